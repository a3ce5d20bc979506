"""`nas search`, `resume`, `status` and `front`: a run from its start to its answer."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mixnas.cli.dry_run import dry_run
from mixnas.cli.overview import overview
from mixnas.cli.printing import colored, number, print_json, print_table
from mixnas.cli.verbs import (
    Verb,
    budgeted,
    config_name,
    configured,
    engine_settings,
    load_config,
    settings,
    storage_settings,
    trusting,
)
from mixnas.search_space.errors import ConfigError, IntegrityError, StoppedEarly, counted, nearest

if TYPE_CHECKING:
    from mixnas.search.config import Config
    from mixnas.search.run.directory import Run
    from mixnas.search.run.front import Front, Member
    from mixnas.search.study.results import TrialRecord

PLACE = 1

_WATCHED_S = 2.0


# -- nas search --------


def _logged(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--log", action="append", default=[], metavar="SINK", help="tell tensorboard or mlflow, too; may come again"
    )


def search_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas search`."""
    configured(parser)
    budgeted(parser)
    _logged(parser)
    parser.add_argument("--data", metavar="PATH", help="your data: a folder of pictures by class; see docs/data.md")
    parser.add_argument("--name", metavar="RUN", help="name of the run (default: task, date and time)")
    parser.add_argument(
        "--smoke", action="store_true", help="this search in small: through every phase of it in under a minute"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check and build everything, take one step, say what it would take, start nothing",
    )


def search(args: argparse.Namespace) -> int:
    """A whole search."""
    from mixnas.search.job import new_run
    from mixnas.search.run.making import check_name
    from mixnas.search.sinks import check as check_sinks
    from mixnas.search.smoke import lighter, shrunk

    check_sinks(args.log)
    check_name(args.runs, args.name)
    if args.data is None:
        config, source = load_config(args), config_name(args)
    else:
        from mixnas.search.data import config_for

        changed = [*engine_settings(args, args.read), *storage_settings(args, args.read), *settings(args)]
        config = config_for(args.data, base=args.config, settings=changed)
        source = args.config or f"data {args.data}"
    if args.smoke:
        config, omitted = shrunk(config)
        if omitted:
            print(f"--smoke: nothing is trained for long, so left out: {', '.join(omitted)}", file=sys.stderr)
        config, said = lighter(config)
        if said:
            print(f"--smoke: its networks are large, so {said}", file=sys.stderr)
    if args.dry_run:
        dry_run(config, source, json=args.json)
        return 0
    prefix = f"smoke-{config.task.name}" if args.smoke else None
    run = new_run(config, root=args.runs, name=args.name, source=source, prefix=prefix)
    status = _execute(args, run, config)
    if args.smoke:
        _take_away(run)
    return status


def _take_away(run: Run) -> None:
    """What follows a search: an export, verified, and a report."""
    from mixnas.search.export import export_run
    from mixnas.search.report.page import write_report

    begun = time.monotonic()
    export_run(run)
    exported = time.monotonic()
    write_report(run)
    seconds = {phase["name"]: phase["seconds"] for phase in run.manifest["phases"]}
    seconds |= {"export": exported - begun, "report": time.monotonic() - exported}
    took = ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())
    print(f"--smoke: every phase was gone through ({took}); the numbers of {run.path} mean nothing", file=sys.stderr)


def _execute(args: argparse.Namespace, run: Run, config: Config) -> int:
    """Carry out what is left of a run, and print its front."""
    from mixnas.search.job import Job
    from mixnas.search.run.progress import make_progress
    from mixnas.search.run.stopping import StopSignal
    from mixnas.search.run.typed import typed
    from mixnas.search.sinks import Sinks

    args.begun = typed(run.path)  # whatever ends it: there is a run to go on with

    def heard() -> None:
        print(
            "stopping after the trials in progress; other training is left where it is, and that of a network begins "
            "anew on resume. Ctrl-C again aborts at once",
            file=sys.stderr,
        )

    def told(record: TrialRecord) -> None:
        if args.verbose:
            text = f"trial {record.number} {record.status} {record.id} {record.failure}"
            print(text.rstrip(), file=sys.stderr, flush=True)
        sinks.trial(record)

    progress = make_progress("quiet" if args.quiet else "auto", color=colored(args))
    if not args.quiet:
        print(f"run {run.path}", file=sys.stderr)
    try:
        with run, Sinks(args.log, run) as sinks:  # before a closer look: another process may be at it
            job = Job(run, config, progress=progress, stop=StopSignal(heard), on_trial=told)
            found = job.execute()
            sinks.finished(found)
    except StoppedEarly as stopped:
        raise StoppedEarly(f"{stopped} Go on with: nas resume {args.begun}") from stopped
    if args.json:
        print_json(found.to_plain())
        return 0
    _print_front(args, found, found.members, run.manifest.get("policies", {}))
    if not args.quiet:
        print(f"take one away: nas export {args.begun}    see the front again: nas front {args.begun}", file=sys.stderr)
    return 0


# -- nas resume --------


def resume_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas resume`."""
    parser.add_argument("run", metavar="RUN")
    configured(parser)
    budgeted(parser)
    _logged(parser)
    trusting(parser)


def resume(args: argparse.Namespace) -> int:
    """Go on with a run."""
    from mixnas.search.job import reopen
    from mixnas.search.run.directory import Run
    from mixnas.search.run.trust import about_to_import
    from mixnas.search.run.typed import typed
    from mixnas.search.sinks import check as check_sinks
    from mixnas.search_space.files import dump_yaml, load_yaml

    check_sinks(args.log)
    opened = Run.open(args.run, args.runs)
    args.begun = typed(opened.path)
    plain = opened.config() if args.config is None else args.read or load_yaml(args.config)
    if said := about_to_import(opened.manifest, args.trust):
        print(said, file=sys.stderr)
    changed = [*engine_settings(args, plain), *storage_settings(args, plain), *settings(args)]
    run, config = reopen(args.run, args.runs, config=args.config, settings=changed, trust=args.trust, plain=args.read)
    same = dump_yaml(config.to_plain()) == dump_yaml(opened.config())
    if run.manifest.get("finished") and same and not args.quiet:
        more = f"nas resume {args.begun} --trials {2 * config.search.trials}"
        print(f"{run.name} is finished: there is nothing left to search. For more: {more}", file=sys.stderr)
    return _execute(args, run, config)


# -- nas status --------


def status_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas status`."""
    parser.add_argument("run", metavar="RUN", nargs="?")
    parser.add_argument("--watch", action="store_true", help="again and again, until the run is over")


def status(args: argparse.Namespace) -> int:
    """All runs, or one."""
    if args.watch:
        return _watch(args)
    return _all_runs(args) if args.run is None else _one_run(args)


def _watch(args: argparse.Namespace) -> int:
    """One run while it is searched; Ctrl-C ends the watching, not the search."""
    from mixnas.search.run.directory import Run

    if args.run is None:
        raise ConfigError("nas status --watch: which run? Give its name.")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            running = Run.open(args.run, args.runs).is_running()  # asked first: what it left last is shown
            if sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            _one_run(args)
            sys.stdout.flush()
            if not running:
                break
            time.sleep(_WATCHED_S)
    return 0


def _all_runs(args: argparse.Namespace) -> int:
    from mixnas.search.run.directory import list_runs

    found = list_runs(args.runs)
    if args.json:
        print_json([run.to_plain() for run in found])
        return 0
    if not found:
        print(f"no runs in {args.runs}. Start one: nas search", file=sys.stderr)
        return 0
    rows = [
        [r.name, r.state, f"{r.done}/{r.trials}" if r.trials else str(r.done), str(r.failed), r.created, r.problem]
        for r in found
    ]
    columns = ["run", "state", "trials", "failed", "created", "problem"]
    if not any(r.problem for r in found):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    print_table(args, columns, rows, spare=["created", "failed"])
    return 0


def _one_run(args: argparse.Namespace) -> int:
    from mixnas.search.run.directory import Run
    from mixnas.search.run.front import in_words
    from mixnas.search.run.integrity import problems, undigested
    from mixnas.search.run.progress import format_seconds

    run = Run.open(args.run, args.runs)
    wrong = dict(problems(run.path, run.manifest))
    for name, problem in wrong.items():
        print(f"nas: {run.path / name}: {problem}", file=sys.stderr)
    old = undigested(run.path, run.manifest)
    if old and not args.quiet:
        print(f"written before files had digests, so read unchecked: {', '.join(old)}", file=sys.stderr)
    if "config.yaml" in wrong:
        return IntegrityError.exit_status
    now, phases = overview(run), run.manifest["phases"]
    one, ended = now.status, IntegrityError.exit_status if wrong else 0
    if args.json:
        plain = {
            **one.to_plain(),
            "hypervolume": now.hypervolume,
            "best": now.best,
            "best_se": now.errors,
            "final": now.final,
            **({"train_shares": list(now.shares)} if now.shares else {}),
        }
        print_json({**plain, "phase": now.phase, "phases": phases, "wrong": wrong, "unchecked": old})
        return ended
    print(
        f"{one.name}: {one.state}, {one.done} of {one.trials} trials done, {one.failed} failed, {one.running} running"
    )
    if now.beside:
        said = f"{counted(now.beside, 'more trial')} of one quantization policy throughout, beside the budget"
        print(f"{said}: the front counts them, too")
    if now.best and not now.final:
        print("of the search so far, before training to the end:")
    elif now.best:
        print(f"of the front, {in_words(now.shares)}:")
    for name in now.best:
        error = now.errors.get(name)
        print(f"best {name}: {number(now.best[name])}" + ("" if error is None else f" ±{error:.4f}"))
    if now.hypervolume is not None:
        print(f"hypervolume: {now.hypervolume:.4f}")
    if now.seconds_left is not None:
        print(f"time left in the search: about {format_seconds(now.seconds_left)}")
    for phase in phases:
        print(f"phase {phase['name']}: {format_seconds(phase['seconds'])}")
    if now.phase is not None:
        print(f"phase {now.phase}: now")
    return ended


# -- nas front --------


def front_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas front`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument(
        "--where", metavar="EXPR", help='only members that satisfy this, e.g. "latency_ms<2 and params<1e4"'
    )
    parser.add_argument(
        "--objectives",
        metavar="A,B",
        help="the front by some of the run's objectives alone: of a search for several devices one device's",
    )
    parser.add_argument("--csv", action="store_true", help="as CSV")
    parser.add_argument("--full", action="store_true", help="every architecture in full, below the table")


def front(args: argparse.Namespace) -> int:
    """The Pareto front of a run."""
    from mixnas.search.run.directory import Run
    from mixnas.search.study.objectives import parse_filter

    run = Run.open(args.run, args.runs)
    found = run.front()
    members = found.members
    if args.objectives is not None:
        members = _front_by(found, [name.strip() for name in args.objectives.split(",")])
    unfiltered = len(members)
    if args.where:
        known = sorted({name for member in members for name in member.values})
        wanted = parse_filter(args.where, known=known)
        members = tuple(member for member in members if wanted.holds(member.values))
    if args.json:
        print_json(replace(found, members=members).to_plain())
    elif args.csv:
        _print_csv(members)
    elif members or not found.members:  # what a filter leaves nothing of is no table
        _print_front(args, found, members, run.manifest.get("policies", {}), whole=args.full)
    if members:
        return 0
    if found.members:
        of = f" by {args.objectives}" if args.objectives is not None else ""
        print(f"no network of the front{of} satisfies {args.where!r}; without --where there are {unfiltered}",
              file=sys.stderr)  # fmt: skip
    elif found.constraints:
        print(f"no network so far satisfies the constraints {', '.join(found.constraints)}", file=sys.stderr)
    else:
        print(f"the front is empty so far: {found.trials['done']} trials are done", file=sys.stderr)
    return 3


def _front_by(found: Front, names: Sequence[str]) -> tuple[Member, ...]:
    """The members that no other dominates in some of the objectives."""
    import numpy as np

    from mixnas.search.study.objectives import parse_objectives
    from mixnas.search.study.pareto import non_dominated

    for i, name in enumerate(names):
        if name not in found.objectives or name in names[:i]:
            twice = name in names[:i]
            why = "stands twice" if twice else "is no objective of this run"
            hint = " Give it once." if twice else nearest(name, found.objectives)
            raise ConfigError(f"--objectives: {name!r} {why}.{hint} Allowed: {', '.join(found.objectives)}.")
    objectives = parse_objectives({name: found.objectives[name] for name in names})
    values = np.array([[m.values[o.name] for o in objectives] for m in found.members]).reshape(-1, len(objectives))
    kept = non_dominated(values, objectives)
    return tuple(member for member, stays in zip(found.members, kept, strict=True) if stays)


def _print_csv(members: Sequence[Member]) -> None:
    metrics = list(dict.fromkeys(name for member in members for name in member.values))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["id", *metrics, "predicted_latency_ms", "architecture"])
    for m in members:
        predicted = "" if m.predicted is None else m.predicted.ms
        architecture = json.dumps(m.architecture, separators=(",", ":"))
        writer.writerow([m.id, *(m.values.get(n, "") for n in metrics), predicted, architecture])


def _print_front(
    args: argparse.Namespace,
    found: Front,
    members: Sequence[Member],
    policies: Mapping[str, str],
    *,
    whole: bool = False,
) -> None:
    from mixnas.search.policies import remarks
    from mixnas.search.run.front import SHARE, in_words
    from mixnas.search_space.architecture import Architecture

    metric, final = found.metric, found.final
    names = {m.id: str(Architecture.from_canonical(m.architecture)) for m in (*members, *found.others)}
    predicted = any(m.predicted is not None for m in members)
    latency = f"{found.latency} ms".strip()
    parts = any(SHARE in m.metrics for m in members)
    trained = ["trained"] if parts else []
    columns = ["id", metric, *trained, *([f"test {metric}", "in search"] if final else []), latency, "90% interval"]
    asked = _other_metrics(found)
    columns += [*(["predicted ms"] if predicted else []), *asked, "params", "macs", "architecture"]
    rows = []
    for m in members:
        values = m.values
        row = [m.id + (" *" if m.id == found.knee else ""), with_error(values, metric)]
        row += [f"{values.get(SHARE, 1.0):.0%}"] if parts else []
        if final:
            row += [with_error(values, f"test_{metric}"), with_error(m.searched, metric)]
        low, high = values.get("latency_low_ms"), values.get("latency_high_ms")
        row.append(_milliseconds(values.get("latency_ms")))
        row.append("-" if low is None or high is None else f"{low:.3f} to {high:.3f}")
        if predicted:
            row.append("-" if m.predicted is None else f"{m.predicted.ms:.3f}")
        row += [_number_of(values, name) for name in (*asked, "params", "macs")]
        rows.append([*row, names[m.id]])
    device = f" on {found.device}" if found.device else ""
    title = f"{found.run}: Pareto front{device}, {counted(len(rows), 'network')} (* the knee; ± one standard error)"
    spare = ["macs", "predicted ms", "in search", "90% interval", f"test {metric}", "params"]
    print_table(args, columns, rows, title=title, cut="architecture", spare=spare)
    missed = [m for m in found.others if m.reason != "dominated"] if len(members) == len(found.members) else []
    if missed:
        columns = ["id", metric, latency, "why it is not on the front"]
        rows = [
            [m.id, with_error(m.metrics, metric), _milliseconds(m.metrics.get("latency_ms")), m.reason] for m in missed
        ]
        print_table(args, columns, rows)
    if whole:
        for m in (*members, *missed):
            print(f"{m.id}  {names[m.id]}")
    for line in remarks(policies, found):
        print(line, file=sys.stderr)
    shares = [m.metrics[SHARE] for m in members if SHARE in m.metrics]
    if any(share < 1 for share in shares):
        print(f"these networks are {in_words(shares)}; see the column trained", file=sys.stderr)
    guessed = [m.id for m in members if m.latency is not None and m.latency.outside]
    if guessed:
        print(f"predicted outside the range that was measured: {', '.join(guessed)}", file=sys.stderr)


def _other_metrics(found: Front) -> list[str]:
    """What was asked for and has no column of its own: `weight_bytes`, `latency_ms@DEVICE`."""
    own = {found.metric, f"test_{found.metric}", "latency_ms", "params", "macs"}
    return [name for name in found.asked if name not in own]


def _number_of(values: Mapping[str, float], name: str) -> str:
    if name not in values:
        return "-"
    return _milliseconds(values[name]) if name.startswith("latency_ms") else number(values[name])


def with_error(values: Mapping[str, float], metric: str) -> str:
    """A metric with its standard error, where that is known: `0.9861 ±0.0062`."""
    from mixnas.evaluators.protocol import standard_error

    if metric not in values:
        return "-"
    error = values.get(standard_error(metric))
    return f"{values[metric]:.4f}" + ("" if error is None else f" ±{error:.4f}")


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


VERBS = (
    Verb("search", "a whole search; with no arguments, the embedded default", search, search_arguments, aborted=4),
    Verb("resume", "go on where a stopped or killed search was", resume, resume_arguments, aborted=4),
    Verb("status", "all runs, or one run: trials, best so far, hypervolume, time left", status, status_arguments),
    Verb("front", "the Pareto front of a run", front, front_arguments),
)
