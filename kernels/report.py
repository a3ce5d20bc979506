"""`python -m mixnas.kernels.report`: where each kernel stands, from its machine code for Hopper; needs no GPU.

The calls of `tools.predict.points`, as the launch tables for any GPU launch them, compiled for sm_90: instructions of
the longest loop and of a warp from start to end, registers, blocks a multiprocessor holds, waves, the predicted time,
the floor and what binds it. "Predicted" is a model of the code, good to about a factor of 1.5; nothing is timed.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mixnas.kernels import configs, dispatch

_ROOT = Path(__file__).resolve().parents[1]
_COLUMNS = (
    "call | launches | blocks | warps | registers | shared | loop x trips | instructions | blocks/SM | waves "
    "| predicted | bound by | floor | floor is | over floor"
)
_WHY = "why more than 8 times"


def _commit() -> str:
    """The commit of the sources, with "+" where files differ from it; empty outside a checkout."""
    run = lambda *command: subprocess.run(  # noqa: E731
        ["git", "-C", str(_ROOT), *command], capture_output=True, text=True, check=False
    ).stdout.strip()
    return run("rev-parse", "--short=12", "HEAD") + ("+" if run("status", "--porcelain", "--", "kernels") else "")


def measure(only: str = "") -> dict[str, Any]:
    """Compile every point (or those whose family or label holds `only`) and return the table as plain data."""
    from mixnas.kernels.tools import predict

    rows = []
    for point in predict.points():
        if only not in f"{point.family} {point.label}":
            continue
        row = predict.predict(point)
        rows.append(asdict(row) | {"floor_us": row.floor_us, "floor_by": row.floor_by})
        print(f"{point.family} {point.label}: {row.us:.1f} us predicted", file=sys.stderr)
    return {
        "provenance": {
            "command": "python -m mixnas.kernels.report",
            "commit": os.environ.get("MIXNAS_COMMIT") or _commit(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "triton": dispatch.triton.__version__,
            "torch": torch.__version__,
            "arch": "sm_90, compiled ahead of time; predicted, not timed",
            "tables": configs.ANY_GPU,
        },
        "rows": rows,
    }


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 99.5 else f"{value:,.0f}"


def _cells(row: Mapping[str, Any]) -> Iterator[str]:
    """A row of the table: of several launches, the one that takes longest."""
    launches = row["launches"]
    longest = max(launches, key=lambda launch: launch["us"])
    stack = f" (stack {longest['stack_bytes']})" if longest["stack_bytes"] else ""
    yield from (row["label"], str(len(launches)), f"{longest['blocks']:,}", str(longest["options"]["num_warps"]))
    yield from (f"{longest['registers']}{stack}", f"{longest['shared_bytes']:,}")
    yield f"{longest['loop']} x {longest['trips']:.4g}" if longest["loop"] else ""
    yield f"{longest['instructions']:,.0f}"
    yield from (str(longest["resident"]), f"{longest['waves']:.2f}", f"{_us(row['us'])} us", row["bound_by"])
    yield from (f"{_us(row['floor_us'])} us", row["floor_by"], f"{row['us'] / row['floor_us']:.1f}")


def lines(table: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Write the table in Markdown, a part for each family; with `before`, its prediction in two more columns."""
    old = {(row["family"], row["label"]): row for row in before["rows"]} if before else {}
    families = list(dict.fromkeys(row["family"] for row in table["rows"]))
    for family in families:
        columns = _COLUMNS.split(" | ") + (["predicted before", "over floor before"] if old else [])
        because = any(row.get("because") for row in table["rows"] if row["family"] == family)
        right = "---:|" * (len(columns) - 1)
        columns += [_WHY] if because else []
        yield from (f"### {family}", "", f"| {' | '.join(columns)} |", f"|---|{right}{'---|' if because else ''}")
        for row in (row for row in table["rows"] if row["family"] == family):
            cells = list(_cells(row))
            if old:
                was = old.get((family, row["label"]))
                cells += ["", ""] if was is None else [f"{_us(was['us'])} us", f"{was['us'] / row['floor_us']:.1f}"]
            cells += [row.get("because", "")] if because else []
            yield f"| {' | '.join(cells)} |"
        yield ""


def main(argv: Iterable[str] | None = None) -> None:
    """Print the table; compiles for some minutes, and finds in its cache what has not changed."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m mixnas.kernels.report", description=main.__doc__
    )
    parser.add_argument("--only", default="", help="points whose family or shape holds this text")
    parser.add_argument("--before", type=Path, help="an earlier table (JSON) to stand beside this one")
    parser.add_argument("--output", "-o", type=Path, help="also write the table as JSON")
    arguments = parser.parse_args(None if argv is None else list(argv))
    if dispatch.INTERPRETING or not dispatch.HAS_TRITON:
        parser.error("compiling needs Triton, in a process without TRITON_INTERPRET")
    before = json.loads(arguments.before.read_text(encoding="utf-8")) if arguments.before else None
    table = measure(arguments.only)
    if arguments.output:
        arguments.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines(table, before)))


if __name__ == "__main__":
    main()
