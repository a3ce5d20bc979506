"""`nas bench ...` judges strategies where the answer is known."""

from __future__ import annotations

import argparse
import csv
import sys
from typing import Any

from mixnas.cli.printing import print_json, print_table
from mixnas.cli.verbs import Group, Verb
from mixnas.search_space.errors import ConfigError

PLACE = 6

_STRATEGIES = "predictor,linas,nsga2,tpe,random"


def table_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas bench table`."""
    parser.add_argument("table", metavar="FILE", help="NAME.csv, with NAME.yaml beside it")
    parser.add_argument(
        "--objectives",
        metavar="A,B",
        help="metrics of the table, each in its own direction (default: the first maximised and the first minimised); "
        'one with a comma in its name stands in "quotes"',
    )
    parser.add_argument("--cheap", metavar="B", help="metrics that are known without evaluating")
    parser.add_argument(
        "--strategies", metavar="S,T", default=_STRATEGIES, help=f"names, or {{name: ..., options}} ({_STRATEGIES})"
    )
    parser.add_argument("--trials", type=int, default=400, help="evaluations of each search (default: 400)")
    parser.add_argument("--seeds", type=int, default=5, help="searches of each strategy (default: 5)")


def table(args: argparse.Namespace) -> int:
    """Strategies side by side on a published table."""
    for option in ("trials", "seeds"):
        if getattr(args, option) < 1:
            raise ConfigError(f"--{option}: {getattr(args, option)} is not allowed. Allowed: from 1.")
    from mixnas.evaluators.tabular import Table
    from mixnas.search.benchmarking import compare, objectives_of

    strategies = _strategies(args.strategies)
    read = Table.load(args.table)
    objectives = objectives_of(read, _names(args.objectives))

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    found = compare(
        read,
        objectives,
        strategies,
        trials=min(args.trials, read.space.size()),
        seeds=args.seeds,
        cheap=_names(args.cheap) or (),
        say=say,
    )
    if args.json:
        print_json(found)
        return 0
    reference = ", ".join(f"{name} {value:.4g}" for name, value in found["reference"].items())
    of = "" if found["lines"] == found["rows"] else f", the means of {found['lines']:,} lines"
    print(f"{found['table']}: {found['rows']:,} architectures{of}, {found['front']} on the exact front")
    if found["empty"]:
        print(f"{found['empty']:,} of them lack a metric: they are evaluated in vain, as what fails")
    print(f"reference point: {reference}\n")
    counts = list(next(iter(found["strategies"].values()))["share"])
    rows = []
    for name, one in found["strategies"].items():
        shares = [f"{one['share'][count]['mean']:.4f} ±{one['share'][count]['sd']:.4f}" for count in counts]
        rows.append([name, *shares, f"{1000 * one['proposal_s']:.1f}"])
    columns = ["strategy", *(f"at {count}" for count in counts), "ms a proposal"]
    print_table(args, columns, rows, f"share of the exact hypervolume, mean and deviation of {args.seeds} seeds")
    return 0


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    return [name.strip() for row in csv.reader([text], skipinitialspace=True) for name in row if name.strip()]


def _strategies(text: str) -> dict[str, Any]:
    from mixnas.search.strategies import Strategy
    from mixnas.search_space.files import parse_yaml

    plain = parse_yaml(f"[{text}]", "--strategies")
    if not plain:
        raise ConfigError("--strategies: none is given. Write for example: --strategies predictor,nsga2.")
    found: dict[str, Any] = {}
    for one in plain:
        strategy = Strategy.from_plain(one, "--strategies")
        options = [f"{key}={value}" for key, value in one.items() if key != "name"] if isinstance(one, dict) else []
        found[" ".join([one["name"] if isinstance(one, dict) else one, *options])] = strategy
    return found


VERBS = (
    Group(
        "bench",
        "judge strategies where the answer is known",
        (Verb("table", "strategies side by side on a published table", table, table_arguments),),
    ),
)
