"""Making the folder of a new run; where that fails, nothing is left in the way of the next search."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from mixnas.search.run.typed import typed
from mixnas.search_space.errors import ConfigError, NasError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FIRST = re.compile(r"config\.yaml|\.(config\.yaml|manifest\.json)\.[a-z0-9_]{8}")
"""What is written before the manifest is there, and what such writes leave when they are killed."""


def check_name(root: str | Path, name: str | None) -> None:
    """Refuse a name that no new run can have; None is made up later.

    Raises:
        ConfigError: It is taken, or no name for a directory.
    """
    if name is None:
        return
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name for a run. Allowed: letters, digits, '.', '_', '-'; not '.' first.")
    path = Path(root) / name
    if os.path.lexists(path) and not never_began(path):
        raise _taken(path)


def _taken(path: Path) -> ConfigError:
    if os.path.lexists(path / "manifest.json"):
        return ConfigError(f"{path} exists already. Choose another --name, or go on with 'nas resume {typed(path)}'.")
    return ConfigError(f"{path} exists already, and is no run. Choose another --name.")


def never_began(path: Path) -> bool:
    """Whether a folder is what a search left that ended before it had a manifest: there is nothing to go on with."""
    try:
        return not path.is_symlink() and all(_FIRST.fullmatch(name) for name in os.listdir(path))
    except OSError:  # no folder, or one that may not be looked into
        return False


@contextlib.contextmanager
def new_folder(root: str | Path, name: str | None, prefix: str) -> Iterator[Path]:
    """A folder for a new run, held until it has its manifest; it is gone again where something fails meanwhile.

    Args:
        root: The directory of all runs.
        name: Of the run; the prefix, date and time, made unique, if not given.
        prefix: Of the name that is made up.

    Raises:
        ConfigError: See `check_name`.
    """
    check_name(root, name)
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    path = _unique(root, prefix) if name is None else root / name
    path.mkdir(exist_ok=True)
    held = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(path) from None
        if not never_began(path):  # another process was first
            raise _taken(path)
        try:
            yield path
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
    finally:
        os.close(held)


def _unique(root: Path, prefix: str) -> Path:
    stem = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', prefix).strip('-') or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"
    for attempt in range(1, 10_000):
        path = root / (stem if attempt == 1 else f"{stem}-{attempt}")
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path
    raise NasError(f"{root}: no free name for a run was found. Give one with --name.")
