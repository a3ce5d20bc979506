"""Printing: tables, JSON, numbers. Results go to stdout; everything else goes to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

_PIPE_WIDTH = 200  # a file or a pipe has no width of its own


def colored(args: argparse.Namespace) -> bool:
    """Whether colours are wanted."""
    return not (args.no_color or os.environ.get("NO_COLOR"))


def print_table(
    args: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Print a table; columns of numbers stand to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, title=escape(title) or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(table.columns):
        cells = [row[i] for row in rows]
        if cells and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells):
            column.justify = "right"
            column.no_wrap = True
    for row in rows:
        table.add_row(*map(escape, row))
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(no_color=not colored(args), highlight=False, width=width, soft_wrap=False).print(table)


def print_json(obj: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(obj, indent=2, allow_nan=False))


def number(value: float) -> str:
    """Four digits; whole numbers in full, with commas."""
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"
