"""Printing: tables, JSON, numbers. Results go to stdout; everything else goes to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from mixnas.search_space.errors import visible

_PIPE_WIDTH = 200  # a file or a pipe has no width of its own
_BETWEEN = 3  # characters between two columns
_LEAST_TEXT = 12  # characters of a column that is wrapped


def colored(args: argparse.Namespace) -> bool:
    """Whether colours are wanted."""
    return not (args.no_color or os.environ.get("NO_COLOR"))


def terminal_width() -> int | None:
    """Characters that fit on a line of the terminal; None where stdout is a file or a pipe."""
    from rich.console import Console

    return Console().width if sys.stdout.isatty() else None


def print_table(
    args: argparse.Namespace,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    *,
    cut: str = "",
    spare: Sequence[str] = (),
) -> None:
    """Print a table; columns of numbers stand to the right.

    What names a row (the first column) and numbers are never cut, and texts are wrapped where the table is wider than
    the terminal; but with `cut` each row is one line. A file or a pipe gets it whole, however wide: what reads it there
    searches it or cuts it itself (grep, less -S), and could not have back what was left out.

    Args:
        args: `no_color`.
        columns: Their headers.
        rows: A text for each column.
        title: Above it.
        cut: The column whose texts end with an ellipsis where there is no room for all of them.
        spare: Columns that are left out, in this order, as long as the others do not fit.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    class _Console(Console):
        def on_broken_pipe(self) -> None:  # rich's own ends the program with status 1
            raise BrokenPipeError("the reader of stdout has gone")

    width = terminal_width()
    columns, rows = list(columns), [[visible(cell) for cell in row] for row in rows]
    if width is not None:
        columns, rows = _without_spare(columns, rows, width, cut, spare)
    table = Table(*columns, title=escape(visible(title)) or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    kept = []  # columns whose cells stay whole, and how wide they are with and without their headers on one line
    for i, column in enumerate(table.columns):
        cells = [row[i] for row in rows]
        numbers = _is_numbers(cells)
        column.justify = "right" if numbers else "left"
        column.overflow = "fold"
        if columns[i] != cut and (numbers or i == 0 or cut):
            kept.append((column, *_widths(columns[i], cells)))
    rest = _BETWEEN * len(columns) + _LEAST_TEXT * (len(columns) - len(kept))
    whole, least = (sum(widths[which] for _, *widths in kept) for which in (0, 1))
    room = (width or _PIPE_WIDTH) - rest
    used = whole if whole <= room else least
    for column, wide, narrow in kept:
        column.width = wide if whole <= room else narrow
    line = max(width or _PIPE_WIDTH, rest + used)  # where even that does not fit, the terminal wraps the lines itself
    if cut in columns:
        at = list(columns).index(cut)
        longest = max([len(cut), *(len(row[at]) for row in rows)])
        longest = min(longest, _LEAST_TEXT + max(room - used, 0)) if width else longest
        rows = [[*row[:at], _shortened(row[at], longest), *row[at + 1 :]] for row in rows]
        table.columns[at].width = longest
        line = line if width else max(line, rest + used + longest)
    for row in rows:
        table.add_row(*map(escape, row))
    out = getattr(sys.stdout, "raw", sys.stdout)  # rich draws itself; what it is given was made visible above
    console = _Console(file=out, no_color=not colored(args), highlight=False, soft_wrap=False)
    console.width = line
    console.print(table)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _is_numbers(cells: Sequence[str]) -> bool:
    return bool(cells) and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)


def _widths(header: str, cells: Sequence[str]) -> tuple[int, int]:
    """Characters of a column with its header on one line, and with its header's words below each other."""
    widest = max(map(len, cells), default=1)
    return max(widest, len(header)), max(widest, *map(len, header.split() or [""]))


def _without_spare(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, cut: str, spare: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """The columns and rows without as many of the spare columns as it takes to fit."""
    left, cells = list(columns), [list(row) for row in rows]
    for name in spare:
        least = [
            _LEAST_TEXT if column == cut else _widths(column, [row[i] for row in cells])[1]
            for i, column in enumerate(left)
        ]
        if sum(least) + _BETWEEN * len(left) <= width:
            break
        if name in left:
            at = left.index(name)
            left, cells = left[:at] + left[at + 1 :], [row[:at] + row[at + 1 :] for row in cells]
    return left, cells


def print_json(obj: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(obj, indent=2, allow_nan=False))


def number(value: float) -> str:
    """Four digits; whole numbers in full, with commas."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"
