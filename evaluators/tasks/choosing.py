"""Which task reads what lies under a path: told by names and first bytes, without torch and without reading it all."""

from __future__ import annotations

from pathlib import Path

from mixnas.search_space.errors import ConfigError, visible

READS = ("a folder with a folder of pictures for each class (or train/, val/ and test/ of such)",)
"""What may be given as data, in words."""


def task_of(path: str | Path) -> dict[str, str]:
    """The task for somebody's data, as a configuration has it: its name and the path.

    Raises:
        ConfigError: Nothing is there, or nothing that a task reads.
    """
    place = Path(path)
    try:
        there = place.exists()
    except (OSError, ValueError):  # a NUL, a name that is too long
        there = False
    if not there:
        raise ConfigError(f"{visible(str(path))[:200]}: no such file or folder. Give {'; '.join(READS)}.")
    if place.is_dir():
        return {"name": "folder", "path": str(path)}
    raise ConfigError(f"{visible(str(path))}: is no data that can be read. Give {'; '.join(READS)}.")
