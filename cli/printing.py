"""Printing: tables, JSON, numbers. Results go to stdout; everything else goes to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixnas.search_space.errors import visible

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 200  # a file or a pipe has no width of its own
_BETWEEN = 3  # characters between two columns
_LEAST_TEXT = 12  # characters of a column that is wrapped


def colored(args: argparse.Namespace) -> bool:
    """Whether colours are wanted."""
    return not (args.no_color or os.environ.get("NO_COLOR"))


def _make_console(args: argparse.Namespace, least: int = 0) -> Console:
    """stdout; `least` characters wide where the terminal is narrower, which then wraps the lines itself."""
    from rich.console import Console

    out = getattr(sys.stdout, "raw", sys.stdout)  # rich draws itself; what it is given is made visible below
    console = Console(file=out, no_color=not colored(args), highlight=False, soft_wrap=False)
    console.width = max(least, console.width if sys.stdout.isatty() else _PIPE_WIDTH)
    return console


def line_width(args: argparse.Namespace) -> int:
    """Characters that fit on a line."""
    return _make_console(args).width


def print_table(
    args: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Print a table; columns of numbers stand to the right.

    Where it is too wide, texts are wrapped; what names a row (the first column) and numbers are never cut.
    """
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=escape(visible(title)) or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    kept = []  # columns whose cells stay whole, and how wide they are with and without their headers on one line
    for i, column in enumerate(table.columns):
        cells = [row[i] for row in rows]
        numbers = bool(cells) and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells)
        column.justify = "right" if numbers else "left"
        column.overflow = "fold"
        if numbers or i == 0:
            cells_width = max(map(len, cells), default=1)
            header = columns[i]
            kept.append((column, max(cells_width, len(header)), max(cells_width, *map(len, header.split() or [""]))))
    rest = _BETWEEN * len(columns) + _LEAST_TEXT * (len(columns) - len(kept))
    fits = rest + sum(width for _, width, _ in kept) <= line_width(args)
    for column, width, least in kept:
        column.width = width if fits else least
    for row in rows:
        table.add_row(*(escape(visible(cell)) for cell in row))
    _make_console(args, 0 if fits else rest + sum(least for _, _, least in kept)).print(table)


def print_json(obj: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(obj, indent=2, allow_nan=False))


def number(value: float) -> str:
    """Four digits; whole numbers in full, with commas."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"
