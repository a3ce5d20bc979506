"""`nas explain` and `nas diff`: networks unit by unit, and two fronts beside each other."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from mixnas.cli.printing import number, print_json, print_table
from mixnas.cli.verbs import Verb

if TYPE_CHECKING:
    from mixnas.search.comparing import Explained

PLACE = 2


# -- nas explain --------


def explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas explain`."""
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("network", metavar="A", help="id of a network (its start is enough), or number of a trial")
    parser.add_argument("other", metavar="B", nargs="?", help="another one, to be compared with the first")


def explain(args: argparse.Namespace) -> int:
    """A network unit by unit; what makes another one slower or better."""
    from mixnas.search.comparing import changes
    from mixnas.search.comparing import explain as explained
    from mixnas.search.run.directory import Run

    found = explained(Run.open(args.run, args.runs), [name for name in (args.network, args.other) if name])
    if args.json:
        print_json([one.to_plain() for one in found])
        return 0
    for one in found:
        _print_units(args, one)
    if len(found) == 2:
        before, after = found
        rows = [
            [name, old.operators if old else "-", new.operators if new else "-", "-" if ms is None else f"{ms:+.4f}"]
            for name, old, new, ms in changes(before, after)
        ]
        print_table(args, ["unit", before.id, after.id, "ms more"], rows, title="where they differ")
        for name in before.metrics:
            if name in after.metrics and before.metrics[name] != after.metrics[name]:
                print(f"{name}: {number(before.metrics[name])} and {number(after.metrics[name])}")
    return 0


def _print_units(args: argparse.Namespace, one: Explained) -> None:
    rows = [
        [
            unit.name,
            "-" if unit.latency_ms is None else f"{unit.latency_ms:.4f}",
            "-" if floor is None else f"{floor:.4f}",
            f"{unit.params:,}",
            f"{unit.weight_bytes:,}",
            unit.answers,
            unit.operators,
        ]
        for unit, floor in zip(one.units, one.floors_ms, strict=True)
    ]
    total = [u.latency_ms for u in one.units if u.latency_ms is not None]
    title = f"{one.id}" + (f": predicted {sum(total):.3f} ms" if total else ": nobody predicts its latency here")
    columns = ["unit", "ms", "floor ms", "params", "bytes", "answers", "operators"]
    print_table(args, columns, rows, title=title, cut="operators", spare=["bytes", "floor ms", "answers", "params"])
    if total:
        print(
            "floor: at the greatest rate of multiply-accumulates that any unit here or of the front reaches",
            file=sys.stderr,
        )


# -- nas diff --------


def diff_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas diff`."""
    parser.add_argument("first", metavar="RUN1")
    parser.add_argument("second", metavar="RUN2")


def diff(args: argparse.Namespace) -> int:
    """Two fronts under one reference point."""
    from mixnas.search.comparing import compare_fronts
    from mixnas.search.run.directory import Run

    fronts = [Run.open(name, args.runs).front() for name in (args.first, args.second)]
    found = compare_fronts(*fronts)
    if args.json:
        print_json(
            {
                "objectives": {o.name: o.direction for o in found.objectives},
                "reference": list(found.reference),
                "hypervolumes": list(found.hypervolumes),
                "ratio": found.ratio,
                "dominated": [list(ids) for ids in found.dominated],
                "remarks": list(found.remarks),
            }
        )
        return 0
    rows = [
        [front.run, str(len(front.members)), f"{volume:.4f}", str(len(dominated))]
        for front, volume, dominated in zip(fronts, found.hypervolumes, found.dominated, strict=True)
    ]
    print_table(args, ["run", "networks", "hypervolume", "dominated by the other"], rows)
    point = ", ".join(f"{o.name} {number(v)}" for o, v in zip(found.objectives, found.reference, strict=True))
    print(f"reference point of both: {point}")
    if found.ratio is not None:
        print(f"hypervolume of {fronts[1].run} over {fronts[0].run}: {found.ratio:.4f}")
    for front, other, ids in zip(fronts, reversed(fronts), found.dominated, strict=True):
        if ids:
            print(f"{other.run} dominates {', '.join(ids)} of {front.run}")
    for remark in found.remarks:
        print(remark, file=sys.stderr)
    return 0


VERBS = (
    Verb("explain", "a network unit by unit, and what makes another slower or better", explain, explain_arguments),
    Verb("diff", "two fronts under one reference point", diff, diff_arguments),
)
