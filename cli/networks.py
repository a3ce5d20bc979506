"""`nas export`: trained networks of a run as files."""

from __future__ import annotations

import argparse

from mixnas.cli.printing import print_json
from mixnas.cli.verbs import Verb, trusting
from mixnas.search_space.formats.format import names

PLACE = 2


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas export`."""
    parser.add_argument("run", metavar="RUN")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--pick", metavar="ID", help="this network (the start of its id is enough)")
    which.add_argument("--where", metavar="EXPR", help="every network of the front that satisfies this")
    which.add_argument("--knee", action="store_true", help="the knee of the front (the default)")
    parser.add_argument(
        "--format",
        default="safetensors",
        metavar="NAME[,NAME...]",
        help=f"file formats: {', '.join(names())} (default: safetensors)",
    )
    trusting(parser)
    parser.add_argument("-o", "--output", metavar="DIR", help="where to (default: the run's exports/)")


def export(args: argparse.Namespace) -> int:
    """Trained networks of a run as files."""
    from mixnas.search.export import export_run
    from mixnas.search.run.directory import Run

    run = Run.open(args.run, args.runs)
    wanted = args.format.split(",")
    found = export_run(run, format_names=wanted, pick=args.pick, where=args.where, output=args.output, trust=args.trust)
    written = [str(folder) for folder in found]
    if args.json:
        print_json(written)
    else:
        print("\n".join(written))
    return 0


VERBS = (Verb("export", "the best subnetwork with trained weights, verified", export, export_arguments),)
