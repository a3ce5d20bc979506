"""`nas report`: a run as one page for a browser."""

from __future__ import annotations

import argparse

from mixnas.cli.printing import print_json
from mixnas.cli.verbs import Verb

PLACE = 2


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas report`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("-o", "--output", metavar="FILE", help="where to (default: report.html of the run)")


def report(args: argparse.Namespace) -> int:
    """A run as one page."""
    from mixnas.search.report.page import write_report
    from mixnas.search.run.directory import Run

    path = write_report(Run.open(args.run, args.runs), args.output)
    if args.json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print(path)
    return 0


VERBS = (Verb("report", "a run as one HTML page, to be read anywhere", report, report_arguments),)
