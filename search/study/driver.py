"""Who a driver of a team's study is: what others read on a trial, and what it knows again when its run is resumed.

Host and path are not enough: in containers they are often the same. So a run has a random part, and each process that
drives it another one, both kept in the run (`driver.json`). What an earlier process had in flight may be taken back at
once only where it is certain that it is gone: it drove this very directory (not a copy) on this very kernel, and the
run's lock, which it would hold, is ours. Else its heartbeats are waited for, as anybody's.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixnas.search_space.errors import NasError
from mixnas.search_space.files import check_stamp, parse_json, read_bytes, stamped, write_json

FILE = "driver.json"
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MOST = 50  # earlier processes that are remembered


@dataclass(frozen=True, slots=True)
class Driver:
    """See the module.

    Attributes:
        run: The run, in whichever process.
        process: This process.
        earlier: Processes that drove the run before.
        gone: Those of them that certainly do no more.
    """

    run: str
    process: str
    earlier: frozenset[str] = frozenset()
    gone: frozenset[str] = frozenset()

    @classmethod
    def begin(cls, folder: Path, name: str) -> Driver:
        """Be a new process that drives a run, whose lock it has.

        Args:
            folder: The run's directory.
            name: Of host and run, for people.
        """
        part, known = _read(folder / FILE)
        place = _place(folder)
        run = f"{name}#{part or secrets.token_hex(4)}"
        process = f"{run}.{secrets.token_hex(4)}"
        kept = [*known, {"process": process, "place": place}][-_MOST:]
        write_json(folder / FILE, stamped({"run": run.rpartition("#")[2], "processes": kept}))
        return cls(
            run,
            process,
            frozenset(one["process"] for one in known),
            frozenset(one["process"] for one in known if place and one["place"] == place),
        )


def _read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The run's random part and its earlier processes; nothing where that cannot be read: then they are waited for."""
    if not os.path.lexists(path):
        return "", []
    try:
        plain = parse_json(read_bytes(path), str(path))
        if not check_stamp(plain, str(path)):
            return "", []
        return str(plain["run"]), [{"process": str(o["process"]), "place": o["place"]} for o in plain["processes"]]
    except (NasError, KeyError, TypeError, ValueError):
        return "", []


def _place(folder: Path) -> list[Any]:
    """This directory under this kernel, since it was started; empty where that cannot be told."""
    try:
        found = folder.stat()
        return [_BOOT.read_text().strip(), found.st_dev, found.st_ino]
    except OSError:
        return []
