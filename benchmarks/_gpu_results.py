"""The file of one step of `gpu.py`: what it found, item by item, written as it goes and read by the next call.

Needs the standard library only. A file is replaced as a whole, so that a process killed at any moment leaves the last
whole one. A result is kept with a digest of the sources that it depends on, and counts for nothing once they change.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
LARGEST_BYTES = 16 * 2**20  # of a file that comes back from a lent machine
COMPILED, CAPTURED = ", compiled", ", in a CUDA graph"  # ends of names of checks
DRY_DEVICE = "dry run: no device's"


def write_json(path: Path, data: Any) -> None:
    """Replace a file by JSON, atomically."""
    write_bytes(path, (json.dumps(data, indent=1, default=str) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file, atomically. The new file is made beside the folder, which so never holds one more."""
    for folder in (path.parent.parent, path.parent):
        try:
            descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
        except OSError:
            continue
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:  # another file system
            os.unlink(temporary)
            continue
        return
    raise OSError(f"{path}: nowhere to write it")


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or it is no JSON object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def was_wrong(family: str, right: Mapping[str, Any]) -> bool:
    """Whether any check of a family of launch tables was wrong; what a compiler or a capture refuses is not.

    Args:
        family: Such as "depthwise".
        right: What the step "right" wrote; it names groups by public functions, such as "depthwise_conv2d".
    """
    refused = (COMPILED, CAPTURED)
    wrong = {
        str(item.get("group", ""))
        for key, item in right.get("items", {}).items()
        if item.get("right") is False and not (item.get("raised") and key.endswith(refused))
    }
    return any(group == family or group.startswith(f"{family}_") for group in wrong)


class Results:
    """One step's results.

    Args:
        path: Its file; what it holds of this device already is gone on from.
        step: Name of the step.
        device: Standard name of the device.
        dry: Whether this is a dry run, which is no device's.
        about: What else stands in the file, such as the provenance.
    """

    def __init__(self, path: Path, step: str, device: str, dry: bool, about: Mapping[str, Any]) -> None:
        self.path = path
        self._began = time.monotonic()
        before = read_json(path)
        same = before.get("format") == FORMAT and before.get("device") == device and before.get("dry") == dry
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "device": device,
            "dry": dry,
            "complete": False,
            "seconds": 0.0,
            **about,
            "items": before.get("items", {}) if same else {},
            "left_out": {},
        }
        self._before = float(before.get("seconds", 0.0)) if same else 0.0
        self.write()

    @property
    def items(self) -> dict[str, dict[str, Any]]:
        """The results, by name."""
        items: dict[str, dict[str, Any]] = self.data["items"]
        return items

    def known(self, key: str, sources: str) -> dict[str, Any] | None:
        """A result of these sources, if there is one."""
        item = self.items.get(key)
        return item if item is not None and item.get("sources") == sources else None

    def keep(self, key: str, item: Mapping[str, Any]) -> None:
        """Keep a result, on disk."""
        self.items[key] = dict(item)
        self.data["left_out"].pop(key, None)
        self.write()

    def leave_out(self, key: str, why: str) -> None:
        """Say what is not there, and why."""
        self.data["left_out"][key] = why

    def complete(self) -> None:
        """Say that the step went through to its end; it is complete where nothing was left out for want of time."""
        self.data["complete"] = not any(why.startswith("out of time") for why in self.data["left_out"].values())
        self.write()

    def write(self) -> None:
        """Write the file as it stands now."""
        self.data["seconds"] = round(self._before + time.monotonic() - self._began, 1)
        write_json(self.path, self.data)
