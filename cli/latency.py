"""`nas latency ...`: the devices there are, measuring this one, and what networks take on one of them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixnas.cli.printing import colored, print_json, print_table
from mixnas.cli.verbs import DEFAULT_CONFIG, Group, Verb, config_name, configured, load_space, settings
from mixnas.search_space.errors import ConfigError, IntegrityError

if TYPE_CHECKING:
    from mixnas.predictors.latency.predictor import LatencyPredictor
    from mixnas.search.run.directory import Run
    from mixnas.search.run.front import Front
    from mixnas.search_space.units import IOSpec

PLACE = 3


# -- nas latency devices --------


def devices_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas latency devices`."""
    parser.add_argument("--tables", metavar="DIR", help="look in this directory only")


def devices(args: argparse.Namespace) -> int:
    """The devices that can be asked."""
    from mixnas.predictors.latency.predictor import installed, summary

    found, ended = [], 0
    for _, _, path in installed(args.tables):
        try:
            found.append(summary(path))
        except IntegrityError as damaged:  # one hides no other
            print(f"nas: {damaged}", file=sys.stderr)
            ended = damaged.exit_status
    if args.json:
        print_json(found)
        return ended
    rows = []
    for s in found:
        accuracy = s["accuracy"]
        error = f"{accuracy['mape_percent']:.1f}%" if "mape_percent" in accuracy else "-"
        rows.append([s["device"], s["runtime"], str(s["threads"]), str(s["num_units"]), str(s["num_networks"]), error])
    columns = ["device", "runtime", "threads", "units", "networks", "mean error on held-out networks"]
    print_table(args, columns, rows)
    return ended


# -- nas latency profile --------


def profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas latency profile`."""
    configured(parser)
    parser.add_argument("--device", help="auto, cpu or cuda (default: the configuration's, auto)")
    parser.add_argument("--runtime", help="eager, compiled, onnxruntime or graph (default: the configuration's, eager)")
    parser.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster that has the --device (by its name)")
    parser.add_argument("--budget", default="3m", metavar="T", help="time for everything (default: 3m)")
    parser.add_argument("--tables", metavar="DIR", help="where to keep the table (default: the user's cache directory)")


def profile(args: argparse.Namespace) -> int:
    """Measure this machine and fit its predictor."""
    from mixnas.predictors.latency import profile as profiling
    from mixnas.search.run.progress import make_progress
    from mixnas.search_space.settings import parse_duration

    config, space, io = load_space(args)
    budget = parse_duration(args.budget, "--budget")
    measure = config.latency.measure(config.latency.passes)
    progress = make_progress("quiet" if args.quiet else "auto", color=colored(args))
    device, runtime = args.device or config.device, args.runtime or config.latency.runtime
    plain = {"task": config.task.to_plain(), "space": config.space}
    if args.address is not None:
        from mixnas.predictors.latency.predictor import user_directory
        from mixnas.search.engines.on_ray.meter import MeteredLatency, give_back

        latency = dataclasses.replace(config.latency, profile=budget, runtime=runtime)
        source = MeteredLatency(latency.spec(device, config.search.seed, None, None), args.address)
        try:
            with progress, progress.phase("profile", budget, unit="s", seconds=budget):
                predictor = source.profile(space, io, Path(args.tables or user_directory()), plain=plain)
        finally:
            give_back()
    else:
        with progress, progress.phase("profile", budget, unit="s", seconds=budget) as phase:
            predictor = profiling.profile(
                space,
                io,
                device=device,
                runtime=runtime,
                directory=args.tables,
                config=profiling.ProfileConfig(budget_s=budget, measure=measure),
                plain=plain,
                report=phase,
            )
    if args.json:
        print_json({"device": predictor.device, "runtime": predictor.runtime, "accuracy": predictor.accuracy})
    else:
        print(f"{predictor.device} ({predictor.runtime}): {predictor.accuracy}")
    return 0


# -- nas latency query --------


def query_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas latency query`."""
    parser.add_argument(
        "run", metavar="RUN", nargs="?", help="the front of this run; with --arch, that as this run would have it"
    )
    configured(parser)
    parser.add_argument("--device", help="which device (default: the configuration's or run's, this machine)")
    parser.add_argument(
        "--runtime", help="eager, compiled, onnxruntime or graph (default: the configuration's or run's, eager)"
    )
    parser.add_argument("--arch", metavar="FILE", help="an architecture file")
    parser.add_argument("--sample", type=int, metavar="N", help="so many random architectures of the space in -c")
    parser.add_argument("--tables", metavar="DIR", help="look in this directory only")
    parser.add_argument(
        "--estimate", action="store_true", help="of an NVIDIA GPU that nobody measured, from its data sheet"
    )


def query(args: argparse.Namespace) -> int:
    """Predicted latency. No torch where the device was profiled for what is asked: that is what makes it quick."""
    given = (args.arch is not None) + (args.sample is not None)
    if given > 1 or not (given or args.run is not None) or (args.run is not None and args.sample is not None):
        raise ConfigError(
            "nas latency query: give one of --arch FILE, --sample N (with -c SPACE), or a RUN (--arch also beside it)."
        )
    if args.run is not None:
        _refuse_unused(args)
    device, rows = _query_space(args) if args.run is None else _query_run(args)
    if not rows and not args.json:
        print(f"{args.run}: no network is on the front, so there is none to ask about. See: nas status {args.run}",
              file=sys.stderr)  # fmt: skip
        return 3
    _print_latencies(args, rows, device)
    return 0


def _refuse_unused(args: argparse.Namespace) -> None:
    """A run's networks are asked about as the run has them: other answers would be taken for those to these options."""
    estimating = args.estimate and args.config is not None
    given = [("--config", args.config), ("--set", args.set), ("--seed", args.seed)]
    for option, value in given:
        if value is not None and not (estimating and option != "--seed"):
            raise ConfigError(
                f"nas latency query {args.run}: {option} changes nothing: what is asked about is the run's own space, "
                "task and threads. For another give --sample N, or --arch FILE, with -c FILE and no RUN."
            )


def _query_space(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The device, and a row for the architecture file or for each sampled architecture."""
    from mixnas.predictors.latency import query as asking
    from mixnas.predictors.latency.predictor import LatencyPredictor
    from mixnas.search_space.files import load_yaml

    config = _plain_config(args)
    device = _asked_device(args, config)
    if args.estimate:
        if args.sample is None and args.config is None:
            raise ConfigError("nas latency query --arch: an estimate needs the task's input. Give -c FILE.")
        predictor = _estimate(args, device)
    else:
        predictor = LatencyPredictor.load(device, runtime_tag(args.runtime, config), args.tables)
    if args.sample is None and args.config is None:  # an architecture alone: of the one input that was profiled
        space, io = None, None
    elif (known := predictor.stored_space({key: config.get(key) for key in ("task", "space")})) is not None:
        space, io = known.space, known.io
    else:  # the input is part of the question, and only the task knows it
        _, space, io = load_space(args)
    if args.sample is not None:
        assert space is not None and io is not None
        return device, asking.ask_sample(predictor, space, args.sample, args.seed or 0, io)
    answer = asking.ask(predictor, load_yaml(args.arch), str(args.arch), io)
    return device, [{"id": str(args.arch), **asking.to_plain(answer)}]


def _query_run(args: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    """The device, and a row for each network of the run's front: predicted, and measured where it was.

    With an architecture file, a row for that, as the run would have it.
    """
    from mixnas.predictors.latency import query as asking
    from mixnas.search.run.directory import Run
    from mixnas.search.run.trust import require_own
    from mixnas.search_space.files import load_yaml

    run = Run.open(args.run, args.runs)
    front = run.front()
    own_device = front.device or str(run.manifest["device"])
    plain = run.config()
    device = _asked_device(args, {**plain, "device": own_device})
    measured = measured_front(front) if device == own_device else {}
    predictor: LatencyPredictor | None
    try:
        if args.estimate:
            if args.config is None:
                require_own(run.manifest, run.path)
                args.config = run.path / "config.yaml"
            predictor = _estimate(args, device)
        else:
            predictor = run_predictor(run, device, args.runtime, args.tables)
    except ConfigError:
        if (
            args.arch is not None
            or not measured
            or args.device is not None
            or args.runtime is not None
            or args.estimate
        ):
            raise
        predictor = None  # a stand-alone search measured its front, and nobody has profiled this machine yet
    if predictor is None:
        print(
            f"nothing is predicted: no profile of {device} as in the run. nas latency profile makes one",
            file=sys.stderr,
        )
        return device, [{"id": identity, "measured_ms": ms} for identity, ms in measured.items()]
    io = _run_input(run, plain, predictor)
    if args.arch is not None:
        answer = asking.ask(predictor, load_yaml(args.arch), str(args.arch), io)
        return device, [{"id": str(args.arch), **asking.to_plain(answer)}]
    rows = []
    for member in front.members:
        row = {"id": member.id, **asking.to_plain(asking.ask(predictor, member.architecture, member.id, io))}
        rows.append(row | ({"measured_ms": measured[member.id]} if member.id in measured else {}))
    return device, rows


def _asked_device(args: argparse.Namespace, config: Mapping[str, Any]) -> str:
    """The device that is asked about: `--device`, else the configuration's; of this machine with its threads."""
    from mixnas.predictors.measuring.device import DEFAULT_THREADS, device_name

    latency = config.get("latency") or {}
    return device_name(args.device or str(config.get("device") or "auto"), int(latency.get("threads", DEFAULT_THREADS)))


def _run_input(run: Run, plain: Mapping[str, Any], predictor: LatencyPredictor) -> IOSpec:
    """The input of a run's networks: as profiled for the run, without torch; else its task knows."""
    from mixnas.evaluators.tasks.loading import by_name
    from mixnas.search.run.trust import require_own

    known = predictor.stored_space({key: plain.get(key) for key in ("task", "space")})
    if known is not None:
        return known.io
    require_own(run.manifest, run.path)
    return by_name(run.manifest["fixed"]["task"]).io


def _plain_config(args: argparse.Namespace) -> dict[str, Any]:
    """The configuration as plain data with `--set` applied: reading it in full would import torch."""
    from mixnas.search_space.files import load_yaml
    from mixnas.search_space.settings import apply_overrides

    plain = (load_yaml(args.config or DEFAULT_CONFIG) if args.read is None else args.read) or {}
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{config_name(args)}: expected a mapping at the top; got {plain!r}.")
    return apply_overrides({"space": plain} if "stages" in plain else plain, settings(args))[0]


def _estimate(args: argparse.Namespace, device: str) -> LatencyPredictor:
    """A GPU's predictor from its data sheet, for the space of -c."""
    from mixnas.predictors.latency.estimate import estimate

    config, space, io = load_space(args)
    batch = config.latency.batch_size
    return estimate(device, space, io, runtime=args.runtime or "eager", batch_size=batch, plain=config.space)


def _print_latencies(args: argparse.Namespace, rows: list[dict[str, Any]], device: str) -> None:
    if args.json:
        print_json(rows)
        return
    columns = {
        "id": "architecture",
        "latency_ms": "predicted ms",
        "low_ms": "90% interval",
        "measured_ms": "measured ms",
    }
    present = [key for key in columns if any(key in row for row in rows)]
    cells = []
    for row in rows:
        texts = {key: f"{row[key]:.3f}" for key in present if isinstance(row.get(key), float)} | {"id": row["id"]}
        if row.get("low_ms") is not None:
            texts["low_ms"] = f"{row['low_ms']:.3f} to {row['high_ms']:.3f}"
        cells.append([texts.get(key, "-") for key in present])
    print_table(args, [columns[key] for key in present], cells, title=device)
    if len(rows) == 1 and rows[0].get("units"):
        units = [[u["name"], u["role"], f"{u['latency_ms']:.4f}"] for u in rows[0]["units"]]
        print_table(args, ["unit", "role", "ms"], units)
    for row in rows:
        outside = row.get("outside") or []
        for text in outside if args.verbose else outside[:1]:
            more = f"; and {len(outside) - 1} more, see -v" if len(outside) > 1 and not args.verbose else ""
            print(f"{row['id']}: outside the measured range: {text}{more}", file=sys.stderr)
        if "low_ms" in row and row["low_ms"] is None:
            print(f"{row['id']}: no interval: too little was measured to tell how far off that is", file=sys.stderr)
        if row.get("estimate"):
            print(f"{row['id']}: an estimate: this device was never measured", file=sys.stderr)


# -- which predictor answers --------


def runtime_tag(runtime: str | None, config: Mapping[str, Any]) -> str:
    """A runtime and batch size as predictors are looked up by them (`table.tagged`).

    Args:
        runtime: As asked for; with its batch size ("graph-b32") it stands. None is that of the configuration.
        config: Plain data of a configuration file or of a run's.
    """
    from mixnas.predictors.measuring.table import tagged

    latency = config.get("latency") or {}
    runtime = runtime or latency.get("runtime", "eager")
    return runtime if "-b" in runtime else tagged(runtime, int(latency.get("batch_size", 1)))


def measured_front(front: Front) -> dict[str, float]:
    """Measured latency in ms of the members of a front; empty when its latencies are predicted."""
    if front.latency != "measured":
        return {}
    return {m.id: m.metrics["latency_ms"] for m in front.members}


def run_predictor(run: Run, device: str, runtime: str | None, tables: str | None) -> LatencyPredictor:
    """The predictor that answers for a run's networks: the run's own, else an installed one.

    Args:
        run: Whose runtime and batch size count where `runtime` is None.
        device: A device's name.
        runtime: Another runtime than the run's.
        tables: A directory to look in instead.

    Raises:
        ConfigError: Nobody measured that.
    """
    from mixnas.predictors.latency.predictor import LatencyPredictor, installed

    tag = run.latency_tag if runtime is None else runtime_tag(runtime, run.config())
    own = any((found, of) == (device, tag) for found, of, _ in installed(run.latency))
    return LatencyPredictor.load(device, tag, run.latency if own and tables is None else tables)


VERBS = (
    Group(
        "latency",
        "measure and predict latency",
        (
            Verb("devices", "the devices whose measured tables are installed", devices, devices_arguments),
            Verb("profile", "measure this machine and fit its predictor", profile, profile_arguments),
            Verb("query", "predicted latency with its interval", query, query_arguments),
        ),
    ),
)
