"""The command line, `nas`: thin. Every verb parses its words, calls the package, and prints.

Results go to stdout, everything else to stderr. Heavy packages are imported inside the verbs, so that help is instant.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mixnas.search_space.errors import ConfigError, NasError, StoppedEarly, nearest

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"
EXIT_STATUS = """\
exit status: 0 done; 1 failed; 2 wrong usage or configuration; 3 nothing feasible under the constraints;
4 stopped early and can be resumed; 5 a file failed its integrity check."""


# -- printing --------


def _console(args: argparse.Namespace, stderr: bool = False) -> Any:
    from rich.console import Console

    plain = args.no_color or bool(os.environ.get("NO_COLOR"))
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 200  # a file or a pipe has no width of its own
    return Console(stderr=stderr, no_color=plain, highlight=False, width=width, soft_wrap=False)


def _table(args: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    title = escape(title)
    table = Table(*columns, title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(table.columns):
        cells = [row[i] for row in rows]
        if cells and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells):
            column.justify = "right"
            column.no_wrap = True
    for row in rows:
        table.add_row(*map(escape, row))
    _console(args).print(table)


def _json(obj: Any) -> None:
    print(json.dumps(obj, indent=2, allow_nan=False))


def _number(value: float) -> str:
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


# -- what several verbs need --------


def _settings(args: argparse.Namespace) -> list[str]:
    """`--set` and the options that are short for one."""
    settings = list(args.set or [])
    for option, key in (("trials", "search.trials"), ("time", "search.time"), ("seed", "search.seed")):
        if getattr(args, option, None) is not None:
            settings.append(f"{key}={getattr(args, option)}")
    return settings


def _load_config(args: argparse.Namespace) -> Any:
    from mixnas.search.config import load_config

    return load_config(args.config or DEFAULT_CONFIG, settings=_settings(args))


# -- nas space --------


def _space_and_io(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from mixnas.evaluators.tasks.loading import by_name
    from mixnas.search_space.space import SearchSpace

    config = _load_config(args)
    space = SearchSpace.from_dict(config.space, f"{args.config or DEFAULT_CONFIG.name}: space")
    return config, space, by_name(config.task.to_plain()).io


def _checked_space_and_io(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from mixnas.search_space.enumeration import check_space

    args.config = args.file
    config, space, io = _space_and_io(args)
    check_space(space, io)
    return config, space, io


def space_show(args: argparse.Namespace) -> int:
    """Knobs, size, corners, constraints."""
    from mixnas.search.study.feasibility import check_constraints, corners

    config, space, io = _checked_space_and_io(args)
    found = corners(space, io)
    check_constraints(config.parsed_constraints(), found)
    if args.json:
        variables = [{"name": v.name, "values": list(v.values)} for v in space.variables]
        ends = {
            metric: {end: {"value": c.value, "architecture": c.architecture.to_dict()} for end, c in pair.items()}
            for metric, pair in found.items()
        }
        _json({"size": space.size(), "variables": variables, "corners": ends})
        return 0
    print(f"{space.size():,} architectures, {len(space.variables)} choices\n")
    rows = []
    for variable in space.variables:
        condition = ""
        if variable.parent >= 0:
            parent = space.variables[variable.parent]
            condition = f"{parent.name} in {', '.join(str(parent.values[i]) for i in sorted(variable.parent_options))}"
        rows.append([variable.name, ", ".join(map(str, variable.values)), condition])
    _table(args, ["choice", "values", "only when"], rows)
    rows = []
    for metric, pair in found.items():
        rows += [[f"{end} {metric}", _number(c.value), str(c.architecture)] for end, c in pair.items()]
    _table(args, ["corner", "value", "architecture"], rows)
    if config.constraints:
        print(f"Each of the constraints can be met as far as costs tell: {', '.join(config.constraints)}")
    return 0


def space_size(args: argparse.Namespace) -> int:
    """The exact number of architectures."""
    _, space, _ = _checked_space_and_io(args)
    _json({"size": space.size()}) if args.json else print(space.size())
    return 0


def space_sample(args: argparse.Namespace) -> int:
    """Random architectures with their costs."""
    import numpy as np

    from mixnas.search_space.network import cost

    _, space, io = _checked_space_and_io(args)
    rng = np.random.default_rng(args.seed or 0)
    found = [space.sample(rng) for _ in range(args.n)]
    if args.json:
        _json([{"id": a.id, "params": cost(a, io).params, "macs": cost(a, io).macs, **a.to_dict()} for a in found])
    elif args.n == 1:
        print(found[0].to_yaml(), end="")
    else:
        rows = [[a.id, _number(cost(a, io).params), _number(cost(a, io).macs), str(a)] for a in found]
        _table(args, ["id", "params", "macs", "architecture"], rows)
    return 0


def space_check(args: argparse.Namespace) -> int:
    """Whether the file is a space that can be searched."""
    from mixnas.search.study.feasibility import check_constraints, corners

    config, space, io = _checked_space_and_io(args)
    check_constraints(config.parsed_constraints(), corners(space, io))
    print(f"{args.file or DEFAULT_CONFIG.name}: {space.size():,} architectures, everything fits {io.kind} tasks")
    return 0


# -- nas ops, nas doctor --------


def ops(args: argparse.Namespace) -> int:
    """The registered operators."""
    import fnmatch

    from mixnas.search_space import registry

    registry.load()
    found = [
        registry.get(axis, name)
        for axis in registry.AXES
        for name in registry.names(axis)
        if fnmatch.fnmatch(name, args.pattern) or fnmatch.fnmatch(axis, args.pattern)
    ]
    if not found:
        known = [name for axis in registry.AXES for name in registry.names(axis)]
        raise ConfigError(f"no operator matches {args.pattern!r}.{nearest(args.pattern, known)} See all: nas ops")
    if args.json:
        rows_json = [
            {
                "axis": op.axis,
                "name": op.name,
                "kinds": list(op.kinds),
                "paper": op.paper,
                "knobs": {
                    k: {"default": v.default, "allowed": v.describe(), "doc": v.doc} for k, v in op.knobs.items()
                },
            }
            for op in found
        ]
        _json(rows_json)
        return 0
    rows = []
    for op in found:
        knobs = "; ".join(f"{k}={v.default} ({v.describe()})" for k, v in op.knobs.items())
        rows.append([op.axis.replace("_", " "), op.name, ", ".join(op.kinds), knobs, op.paper])
    _table(args, ["axis", "name", "tasks", "knobs, default (allowed)", "paper"], rows)
    return 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine has, what will work, what to install."""
    from mixnas.cli.doctor import examine

    findings = examine()
    if args.json:
        _json([{"what": f.what, "found": f.found, "ok": f.ok, "advice": f.advice} for f in findings])
    else:
        mark = {True: "ok", False: "missing", None: "-"}
        rows = [[f.what, mark[f.ok], f.found, f.advice] for f in findings]
        _table(args, ["what", "", "found", "advice"], rows)
    return 0 if all(f.ok is not False or not f.required for f in findings) else 1


# -- nas search, nas resume --------


def search(args: argparse.Namespace) -> int:
    """A whole search."""
    from mixnas.search.job import new_run
    from mixnas.search.problem import Problem
    from mixnas.search.strategies import STRATEGIES

    config = _load_config(args)
    source = str(args.config or DEFAULT_CONFIG.name)
    if args.dry_run:
        problem = Problem(config, source)
        strategy = STRATEGIES.name_of(config.search.strategy)
        lines = [
            f"task          {config.task.name}: {problem.io.kind}, input {'x'.join(map(str, problem.io.size))}",
            f"space         {problem.space.size():,} architectures, {len(problem.space.variables)} choices",
            f"objectives    {', '.join(map(str, problem.objectives))}",
            f"constraints   {', '.join(map(str, problem.constraints)) or 'none'}",
            f"search        {config.search.trials} trials by {strategy}, {config.search.evaluator}",
            "nothing was started (--dry-run)",
        ]
        print("\n".join(lines))
        return 0
    return _execute(args, new_run(config, root=args.runs, name=args.name, source=source), config)


def resume(args: argparse.Namespace) -> int:
    """Go on with a run."""
    from mixnas.search.job import reopen_run

    run, config = reopen_run(args.run, root=args.runs, config=args.config, settings=_settings(args))
    return _execute(args, run, config)


def _execute(args: argparse.Namespace, run: Any, config: Any) -> int:
    from mixnas.search.job import Job
    from mixnas.search.run.progress import make_progress
    from mixnas.search.run.stopping import StopSignal

    def heard() -> None:
        print("stopping after what is in progress; Ctrl-C again aborts at once", file=sys.stderr)

    def told(record: Any) -> None:
        text = f"trial {record.number} {record.status} {record.id} {record.failure}"
        print(text.rstrip(), file=sys.stderr, flush=True)

    plain = args.no_color or bool(os.environ.get("NO_COLOR"))
    progress = make_progress("quiet" if args.quiet else "auto", color=not plain)
    if not args.quiet:
        print(f"run {run.path}", file=sys.stderr)
    job = Job(run, config, progress=progress, stop=StopSignal(heard), on_trial=told if args.verbose else None)
    try:
        found = job.execute()
    except StoppedEarly as stopped:
        raise StoppedEarly(f"{stopped} Go on with: nas resume {run.name}") from stopped
    _print_front(args, found, found.members)
    if not args.quiet and not args.json:
        print(f"take one away: nas export {run.name}    see the front again: nas front {run.name}", file=sys.stderr)
    return 0


# -- nas status, nas front --------


def status(args: argparse.Namespace) -> int:
    """All runs, or one."""
    from mixnas.search.run.directory import Run, list_runs
    from mixnas.search.run.progress import format_seconds
    from mixnas.search.study.objectives import parse_constraints, parse_objectives
    from mixnas.search.study.study import read_results

    if args.run is None:
        found = list_runs(args.runs)
        if args.json:
            _json([run.to_plain() for run in found])
            return 0
        if not found:
            print(f"no runs in {args.runs}. Start one: nas search", file=sys.stderr)
            return 0
        rows = [
            [r.name, r.state, f"{r.done}/{r.trials}" if r.trials else str(r.done), str(r.failed), r.created, r.problem]
            for r in found
        ]
        _table(args, ["run", "state", "trials", "failed", "created", "problem"], rows)
        return 0
    run = Run.open(args.run, args.runs)
    one, fixed = run.status(), run.manifest["fixed"]
    objectives = parse_objectives(fixed["objectives"])
    results = read_results(run.journal, objectives, parse_constraints(fixed.get("constraints", [])))
    found_front, hypervolume = results.front(), results.hypervolume()
    best = {
        o.name: (max if o.maximise else min)(record.metrics[o.name] for record in found_front)
        for o in objectives
        if found_front
    }
    if args.json:
        phases = run.manifest["phases"]
        _json({**one.to_plain(), "hypervolume": hypervolume, "best": best, "phases": phases})
        return 0
    print(
        f"{one.name}: {one.state}, {one.done} of {one.trials} trials done, {one.failed} failed, {one.running} running"
    )
    for name, value in best.items():
        print(f"best {name}: {_number(value)}")
    if hypervolume is not None:
        print(f"hypervolume: {hypervolume:.4f}")
    seconds = [r.seconds for r in results.records if r.status == "done"]
    if one.state == "running" and seconds and one.trials and one.done < one.trials:
        left = (one.trials - one.done) * sum(seconds) / len(seconds)
        print(f"time left in the search: about {format_seconds(left)}")
    for phase in run.manifest["phases"]:
        print(f"phase {phase['name']}: {format_seconds(phase['seconds'])}")
    return 0


def front(args: argparse.Namespace) -> int:
    """The Pareto front of a run."""
    from mixnas.search.run.directory import Run
    from mixnas.search.study.objectives import parse_filter

    found = Run.open(args.run, args.runs).front()
    members = found.members
    if args.where:
        known = sorted({name for member in members for name in member.values})
        wanted = parse_filter(args.where, known=known)
        members = tuple(member for member in members if wanted.holds(member.values))
    _print_front(args, found, members)
    if not members:
        print("no member of the front satisfies that", file=sys.stderr)
        return 3
    return 0


def _print_front(args: argparse.Namespace, found: Any, members: Sequence[Any]) -> None:
    if args.json:
        _json({**found.to_plain(), "front": [member.to_plain() for member in members]})
        return
    if getattr(args, "csv", False):
        import csv

        metrics = list(dict.fromkeys(name for member in members for name in member.values))
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["id", *metrics, "predicted_latency_ms", "architecture"])
        for m in members:
            predicted = "" if m.predicted is None else m.predicted.ms
            architecture = json.dumps(m.architecture, separators=(",", ":"))
            writer.writerow([m.id, *(m.values.get(n, "") for n in metrics), predicted, architecture])
        return
    from mixnas.search_space.architecture import Architecture

    metric, final = found.metric, found.final
    columns = ["id", metric, *([f"test {metric}", "in search"] if final else [])]
    columns += [f"{found.latency} ms".strip(), "90% interval", *(["predicted ms"] if final else [])]
    columns += ["params", "macs", "architecture"]
    rows = []
    for m in members:
        values = m.values
        row = [m.id + (" *" if m.id == found.knee else ""), f"{values[metric]:.4f}"]
        if final:
            row += [f"{values[f'test_{metric}']:.4f}", f"{m.searched[metric]:.4f}"]
        low, high = values.get("latency_low_ms"), values.get("latency_high_ms")
        row.append(f"{values['latency_ms']:.3f}" if "latency_ms" in values else "-")
        row.append("-" if low is None or high is None else f"{low:.3f} to {high:.3f}")
        if final:
            predicted = m.searched.get("latency_ms") if m.predicted is None else m.predicted.ms
            row.append("-" if predicted is None else f"{predicted:.3f}")
        row += [_number(values["params"]), _number(values["macs"])]
        rows.append([*row, str(Architecture.from_dict(m.architecture))])
    device = f" on {found.device}" if found.device else ""
    _table(args, columns, rows, title=f"{found.run}: Pareto front{device}, {len(rows)} networks (* the knee)")


# -- nas export --------


def export(args: argparse.Namespace) -> int:
    """Trained networks of a run as files."""
    from mixnas.search.export import export_run
    from mixnas.search.run.directory import Run

    run = Run.open(args.run, args.runs)
    written = export_run(run, pick=args.pick, where=args.where, output=args.output)
    if args.json:
        _json([str(folder) for folder in written])
    else:
        print("\n".join(map(str, written)))
    return 0


# -- nas latency --------


def latency_devices(args: argparse.Namespace) -> int:
    """The devices that can be asked."""
    from mixnas.predictors.latency.predictor import installed, summary

    found = [summary(path) for _, _, path in installed(args.tables)]
    if args.json:
        _json(found)
        return 0
    rows = []
    for s in found:
        accuracy = s["accuracy"]
        error = f"{accuracy['mape_percent']:.1f}%" if "mape_percent" in accuracy else "-"
        rows.append([s["device"], s["runtime"], str(s["threads"]), str(s["num_units"]), str(s["num_networks"]), error])
    _table(args, ["device", "runtime", "threads", "units", "networks", "mean error on held-out networks"], rows)
    return 0


def latency_profile(args: argparse.Namespace) -> int:
    """Measure this machine and fit its predictor."""
    from mixnas.predictors.latency.profile import ProfileConfig, profile
    from mixnas.search.run.progress import make_progress
    from mixnas.search_space.settings import parse_duration

    config, space, io = _space_and_io(args)
    budget = parse_duration(args.budget, "--budget")
    settings = ProfileConfig(budget_s=budget, measure=config.latency.measure(config.latency.passes))
    progress = make_progress("quiet" if args.quiet else "auto", color=not args.no_color)
    with progress, progress.phase("profile", budget, unit="s", seconds=budget) as phase:
        predictor = profile(
            space,
            io,
            device=args.device,
            runtime=args.runtime,
            directory=args.tables,
            config=settings,
            plain=config.space,
            progress=lambda share, text: phase(round(share * budget), measured=text.removesuffix(" measured")),
        )
    if args.json:
        _json({"device": predictor.device, "runtime": predictor.runtime, "accuracy": predictor.accuracy})
    else:
        print(f"{predictor.device} ({predictor.runtime}): {predictor.accuracy}")
    return 0


def latency_query(args: argparse.Namespace) -> int:
    """Predicted latency. No torch where the device was profiled for what is asked: that is what makes it quick."""
    from mixnas.predictors.latency import query
    from mixnas.predictors.latency.predictor import LatencyPredictor
    from mixnas.search_space.files import load_yaml

    if (args.arch is not None) + (args.run is not None) + (args.sample is not None) != 1:
        raise ConfigError("nas latency query: give one of --arch FILE, --sample N (with -c SPACE), or a RUN.")
    asked: dict[str, Any] | None
    predictor: LatencyPredictor | None
    if args.run is not None:
        from mixnas.search.run.directory import Run

        run = Run.open(args.run, args.runs)
        members = run.front().members
        device = args.device or run.manifest["device"]
        asked = {member.id: member.architecture for member in members}
        measured = {m.id: m.metrics.get("latency_ms") for m in members}
    else:
        run, device, measured = None, query.device_or_here(args.device), dict[str, Any]()
        asked = None if args.arch is None else {str(args.arch): load_yaml(args.arch)}
    try:
        if args.estimate:
            predictor = _estimate(args, device)
        elif run is not None and args.device is None and args.tables is None:
            predictor = run.predictor()
        else:
            predictor = LatencyPredictor.load(device, args.runtime, args.tables)
    except ConfigError:
        if not any(measured.values()) or args.device is not None:
            raise
        predictor = None  # a stand-alone search measured its front, and nobody has profiled this machine yet
    if predictor is None:
        rows_json: list[dict[str, Any]] = [{"id": i, "measured_ms": ms} for i, ms in measured.items()]
    elif asked is not None:
        answers = {name: query.ask(predictor, plain, name) for name, plain in asked.items()}
        rows_json = [
            {"id": name, **query.to_plain(answer), **({"measured_ms": measured[name]} if name in measured else {})}
            for name, answer in answers.items()
        ]
    else:
        plain = load_yaml(args.config or DEFAULT_CONFIG)
        rows_json = query.ask_sample(predictor, plain, args.sample, args.seed or 0, str(args.config or "default"))
    _print_latencies(args, rows_json, device)
    return 0


def _estimate(args: argparse.Namespace, device: str) -> Any:
    """A GPU's predictor from its data sheet, for the space of -c."""
    from mixnas.predictors.latency.estimate import estimate

    config, space, io = _space_and_io(args)
    batch = config.latency.batch_size
    return estimate(device, space, io, runtime=args.runtime, batch_size=batch, plain=config.space)


def _print_latencies(args: argparse.Namespace, rows: list[dict[str, Any]], device: str) -> None:
    if args.json:
        _json(rows)
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
        if "low_ms" in row:
            texts["low_ms"] = f"{row['low_ms']:.3f} to {row['high_ms']:.3f}"
        cells.append([texts.get(key, "-") for key in present])
    _table(args, [columns[key] for key in present], cells, title=device)
    if len(rows) == 1 and rows[0].get("units"):
        units = [[u["name"], u["role"], f"{u['latency_ms']:.4f}"] for u in rows[0]["units"]]
        _table(args, ["unit", "role", "ms"], units)
    for row in rows:
        for text in row.get("outside", []):
            print(f"{row['id']}: outside the measured range: {text}", file=sys.stderr)
        if row.get("estimate"):
            print(f"{row['id']}: an estimate: this device was never measured", file=sys.stderr)


# -- the parser --------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}. See: {self.prog} --help\n")


def _common() -> argparse.ArgumentParser:
    """Flags that every verb has."""
    common = _Parser(add_help=False)
    common.add_argument("-q", "--quiet", action="store_true", help="no progress")
    common.add_argument("-v", "--verbose", action="store_true", help="more on stderr: every trial, tracebacks")
    common.add_argument("--no-color", action="store_true", help="no colours (NO_COLOR does the same)")
    common.add_argument("--json", action="store_true", help="answer as JSON")
    common.add_argument("--runs", default="runs", metavar="DIR", help="the directory of all runs (default: runs)")
    return common


def _configured(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", metavar="FILE", help="configuration (default: the embedded one, digits)")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="change a setting, e.g. search.trials=50")
    parser.add_argument("--seed", type=int, help="seed of the search")


def _budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, help="architectures to evaluate, in all")
    parser.add_argument("--time", metavar="T", help="time limit of the search phase, e.g. 5m")


def _parser() -> argparse.ArgumentParser:
    common = _common()
    parser = _Parser(
        prog="nas",
        description="Finds networks that are accurate and fast on your device: measured, trained, ready to take away.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    verbs = parser.add_subparsers(metavar="VERB", dest="verb")

    def verb(
        name: str, run: Callable[[argparse.Namespace], int], text: str, parent: Any = verbs
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = parent.add_parser(name, parents=[common], help=text, description=text)
        made.set_defaults(call=run, config=None, set=None, seed=None)
        return made

    def group(name: str, text: str) -> Any:
        made = verbs.add_parser(name, help=text, description=text)
        return made.add_subparsers(metavar="VERB", required=True, dest=f"{name}_verb")

    p = verb("search", search, "a whole search; with no arguments, the embedded default")
    _configured(p)
    _budget(p)
    p.add_argument("--name", metavar="RUN", help="name of the run (default: task, date and time)")
    p.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, start nothing")

    p = verb("resume", resume, "go on where a stopped or killed search was")
    p.add_argument("run", metavar="RUN")
    _configured(p)
    _budget(p)

    p = verb("status", status, "all runs, or one run: trials, best so far, hypervolume, time left")
    p.add_argument("run", metavar="RUN", nargs="?")

    p = verb("front", front, "the Pareto front of a run")
    p.add_argument("run", metavar="RUN")
    p.add_argument("--where", metavar="EXPR", help='only members that satisfy this, e.g. "latency_ms<2 and params<1e4"')
    p.add_argument("--csv", action="store_true", help="as CSV")

    p = verb("export", export, "the best subnetwork with trained weights, verified")
    p.add_argument("run", metavar="RUN")
    which = p.add_mutually_exclusive_group()
    which.add_argument("--pick", metavar="ID", help="this network (the start of its id is enough)")
    which.add_argument("--where", metavar="EXPR", help="every network of the front that satisfies this")
    which.add_argument("--knee", action="store_true", help="the knee of the front (the default)")
    p.add_argument(
        "--format", choices=["safetensors"], default="safetensors", help="file format (default: safetensors)"
    )
    p.add_argument("-o", "--output", metavar="DIR", help="where to (default: the run's exports/)")

    latency = group("latency", "measure and predict latency")
    p = verb("devices", latency_devices, "the devices whose measured tables are installed", latency)
    p.add_argument("--tables", metavar="DIR", help="look in this directory only")
    p = verb("profile", latency_profile, "measure this machine and fit its predictor", latency)
    _configured(p)
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    p.add_argument("--runtime", default="eager", help="eager, compiled, onnxruntime or graph (default: eager)")
    p.add_argument("--budget", default="3m", metavar="T", help="time for everything (default: 3m)")
    p.add_argument("--tables", metavar="DIR", help="where to keep the table (default: the user's cache directory)")
    p = verb("query", latency_query, "predicted latency with its interval", latency)
    p.add_argument("run", metavar="RUN", nargs="?", help="the front of this run")
    _configured(p)
    p.add_argument("--device", help="which device (default: this machine, or the run's)")
    p.add_argument("--runtime", default="eager", help="eager, compiled, onnxruntime or graph (default: eager)")
    p.add_argument("--arch", metavar="FILE", help="an architecture file")
    p.add_argument("--sample", type=int, metavar="N", help="so many random architectures of the space in -c")
    p.add_argument("--tables", metavar="DIR", help="look in this directory only")
    p.add_argument("--estimate", action="store_true", help="of an NVIDIA GPU that nobody measured, from its data sheet")

    space = group("space", "explain a search space")
    for name, run, text in (
        ("show", space_show, "choices, number of architectures, cheapest and dearest corner, constraints"),
        ("size", space_size, "the exact number of architectures"),
        ("sample", space_sample, "random architectures"),
        ("check", space_check, "whether the file can be searched"),
    ):
        p = verb(name, run, text, space)
        p.add_argument("file", metavar="FILE", nargs="?", help="configuration (default: the embedded one, digits)")
        p.add_argument("--set", action="append", metavar="KEY=VALUE", help="change a setting")
        if name == "sample":
            p.add_argument("-n", type=int, default=1, help="how many (default: 1)")
            p.add_argument("--seed", type=int, help="seed")

    p = verb("ops", ops, "the registered operators: knobs, task kinds, paper")
    p.add_argument("pattern", nargs="?", default="*", help="shell-style pattern of a name or an axis")
    verb("doctor", doctor, "what this machine has, what will work, what to install")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.version:
        import mixnas

        print(mixnas.__version__)
        return 0
    if args.verb is None:
        parser.print_help()
        return 0
    level = logging.DEBUG if args.verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for noisy in ("torch", "jax", "matplotlib", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    call: Callable[[argparse.Namespace], int] = args.call
    try:
        return call(args)
    except NasError as error:
        if args.verbose:
            logging.getLogger(__name__).debug("traceback", exc_info=True)
        print(f"nas: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("nas: aborted", file=sys.stderr)
        return 4 if args.verb in ("search", "resume") else 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
