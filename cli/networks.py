"""`nas export` takes trained networks of a run away as files; `nas reproduce` trains one again."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mixnas.cli.printing import colored, print_json
from mixnas.cli.verbs import Verb, trusting
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.formats.format import get, names, require

PLACE = 2


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas export`."""
    parser.add_argument("run", metavar="RUN")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--pick", metavar="ID", help="this network (the start of its id is enough)")
    which.add_argument("--trial", type=int, metavar="N", help="this trial's network, on the front or not")
    which.add_argument("--where", metavar="EXPR", help="every network of the front that satisfies this")
    which.add_argument("--knee", action="store_true", help="the knee of the front")
    which.add_argument(
        "--one-se",
        action="store_true",
        help="the fastest within one standard error of the best by the first objective (the default, where the error "
        "is known; else the best)",
    )
    which.add_argument("--weights", metavar="M=W,...", help="by how much objectives matter: accuracy=2,latency_ms=1")
    which.add_argument("--all", action="store_true", help="the whole front")
    parser.add_argument(
        "--format",
        default="safetensors",
        metavar="NAME[,NAME...]",
        help=f"file formats: {', '.join(names())} (default: safetensors)",
    )
    parser.add_argument(
        "--keep-kernels",
        action="store_true",
        help="keep Triton kernels in torch-export, which then loads with mixnas on a GPU only (torch-export-kernels)",
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not load the task: compare on random inputs, measure nothing"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="how far a file's outputs may be from the network's (default: by its types, and no whole number differs)",
    )
    parser.add_argument("--licence", "--license", default="unknown", metavar="ID", help="SPDX identifier, for the card")
    trusting(parser)
    parser.add_argument("-o", "--output", metavar="DIR", help="where to (default: the run's exports/)")


def _weights(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            found[name.strip()] = float(weight)
        except ValueError:
            raise ConfigError(f"--weights: {part!r}: expected METRIC=NUMBER, as in accuracy=2,latency_ms=1.") from None
    return found


def _formats(args: argparse.Namespace) -> list[str]:
    """The formats that were asked for; kernels are kept by a format of its own."""
    asked = [name.strip() for name in args.format.split(",")]
    try:
        for name in asked:
            get(name)
    except ConfigError as error:
        raise ConfigError(f"--format: {error}") from error
    if not args.keep_kernels:
        return list(asked)
    if "torch-export" not in asked:
        raise ConfigError(f"--keep-kernels: of the formats only torch-export can, and --format is {args.format}.")
    return ["torch-export-kernels" if name == "torch-export" else name for name in asked]


def export(args: argparse.Namespace) -> int:
    """Trained networks of a run as files."""
    from mixnas.search.card import CARD
    from mixnas.search.export import export_run
    from mixnas.search.picking import Choice
    from mixnas.search.run.directory import Run
    from mixnas.search.run.front import SHARE
    from mixnas.search.run.progress import make_progress
    from mixnas.search.run.trust import about_to_import, require_trust
    from mixnas.search.run.typed import typed
    from mixnas.search_space.files import read_json

    run = Run.open(args.run, args.runs)
    if not args.no_verify and (said := about_to_import(run.manifest, args.trust)):
        print(said, file=sys.stderr)
    if not args.no_verify or args.trial is not None:  # what is refused is so before there is any progress to show
        require_trust(run.manifest, run.path, "export", args.trust)
    asked = _formats(args)
    for name in asked:
        require(get(name))
    chosen: dict[str, Any] = {
        "pick": args.pick,
        "where": args.where,
        "knee": args.knee,
        "one_se": args.one_se,
        "weights": None if args.weights is None else _weights(args.weights),
        "everything": args.all,
    }
    if args.trial is None:
        Choice(**chosen).of(run.front(), typed(run.path))
    progress = make_progress("quiet" if args.quiet else "auto", color=colored(args))
    with progress, progress.phase("export", unit="networks") as phase:
        found = export_run(
            run,
            **chosen,
            trial=args.trial,
            format_names=asked,
            output=args.output,
            verify=not args.no_verify,
            tolerance=args.tolerance,
            licence=args.licence,
            trust=args.trust,
            report=phase,
            told=lambda text: print(text, file=sys.stderr),
        )
    for folder in found:
        share = read_json(folder / CARD)["metrics"].get(SHARE, 1.0)
        if share < 1:
            print(f"{folder.name} had {share:.0%} of a whole training", file=sys.stderr)
    written = [str(folder) for folder in found]
    if args.json:
        print_json(written)
    else:
        print("\n".join(written))
    return 0


# -- nas reproduce --------


def reproduce_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas reproduce`."""
    parser.add_argument("export", metavar="EXPORT", help="the folder of an exported network")
    trusting(parser)


def reproduce(args: argparse.Namespace) -> int:
    """Train an exported network again from its card; 1 where the test metric is not within the interval."""
    from mixnas.search import reproducing
    from mixnas.search.run.progress import make_progress
    from mixnas.search.run.stopping import StopSignal

    progress = make_progress("quiet" if args.quiet else "auto", color=colored(args))
    stop = StopSignal()
    with progress, stop, progress.phase("reproduce") as phase:
        found = reproducing.reproduce(
            args.export,
            report=phase,
            should_stop=stop,
            told=lambda text: print(text, file=sys.stderr),
            trust=args.trust,
        )
    if args.json:
        print_json(
            {
                "metric": f"test_{found.metric}",
                "exported": found.exported,
                "again": found.again,
                "allowed": found.allowed,
                "holds": found.holds,
            }
        )
    else:
        within = "no standard error is known" if found.allowed is None else f"allowed {found.allowed:.4f}"
        verdict = "" if found.allowed is None else ": agrees" if found.holds else ": does not agree"
        print(f"test {found.metric}: exported {found.exported:.4f}, again {found.again:.4f} ({within}){verdict}")
    return 0 if found.holds else 1


VERBS = (
    Verb("export", "networks with trained weights as files, verified", export, export_arguments),
    Verb("reproduce", "train an exported network again from its card, and compare", reproduce, reproduce_arguments),
)
