"""How a run is typed in a command, from the folder that one is in."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from mixnas.search_space.errors import visible

DEFAULT_ROOT = "runs"
"""The directory of all runs, where none is given."""


def typed(path: str | Path) -> str:
    """A run as `nas resume`, `front` or `export` take it from here: its name below `runs`, else its path.

    >>> typed("runs/mine"), typed("elsewhere/my run")
    ('mine', "'elsewhere/my run'")
    """
    path = Path(path)
    below = os.path.abspath(path.parent) == os.path.abspath(DEFAULT_ROOT)
    if below and path.name and not os.path.lexists(Path(path.name) / "manifest.json"):
        return visible(shlex.quote(path.name))
    shortest = path if not path.is_absolute() else Path(os.path.relpath(path))
    return visible(shlex.quote(str(path if ".." in shortest.parts else shortest)))
