"""The file of one step of `gpu.py`: what it found, item by item, written as it goes and read by the next call.

Needs the standard library only. A file is replaced as a whole, so that a process killed at any moment leaves the last
whole one. A result is kept with a digest of the sources that it depends on, and counts for nothing once they change.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
STEPS = ("right", "tuned", "fast", "measured", "trained")
WHY = "gpu.py: "  # begins the line in which a step says why it ends badly
EXIT_REFUSED = 5  # of the step "machine": there is no GPU, or the folder is another's; it has said why
TABLES = "tables.zip"  # the step "measured" keeps its tables and predictors in it
LARGEST_BYTES = 16 * 2**20  # of a file that comes back from a lent machine
COMPILED, CAPTURED = ", compiled", ", in a CUDA graph"  # ends of names of checks
DRY_DEVICE = "dry run: no device's"


def as_json(data: Any) -> bytes:
    """Plain data as it stands in a file."""
    return (json.dumps(data, indent=1, default=str) + "\n").encode()


def write_json(path: Path, data: Any) -> None:
    """Replace a file by JSON, atomically."""
    write_bytes(path, as_json(data))


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


def step_fault(data: Any) -> str:
    """What keeps the contents of a step's file from being gone on from; "" where nothing does."""
    if not isinstance(data, dict):
        return "is no JSON object: half of a file, perhaps"
    if data.get("format") != FORMAT:
        return f"is in format {data.get('format')!r}, not {FORMAT}"
    items, left_out, seconds = data.get("items"), data.get("left_out"), data.get("seconds")
    if not isinstance(items, dict) or not all(isinstance(item, dict) for item in items.values()):
        return "has no results by name under `items`"
    if not isinstance(left_out, dict) or not all(isinstance(why, str) for why in left_out.values()):
        return "has no reasons by name under `left_out`"
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return f"has {seconds!r} for `seconds`, which is no time"
    if not isinstance(data.get("device"), str) or not isinstance(data.get("dry"), bool):
        return "does not say of which device it is (`device`, `dry`)"
    return ""


def read_step(path: Path) -> tuple[dict[str, Any], str]:
    """A step's file and what is wrong with it; nothing, and nothing wrong, where there is none."""
    if not path.exists():
        return {}, ""
    data = read_json(path)
    fault = step_fault(data or None)
    return ({}, f"{path}: {fault}") if fault else (data, "")


def unfit(out: Path, dry: bool, device: str = "") -> str:
    """Why a run must not go on from a folder, in one sentence; "" where it may: nothing in it would be lost.

    Args:
        out: The folder.
        dry: Whether it would be a dry run.
        device: The device that it would be of, where that is known already.
    """
    remedy = "No result was touched. Give another --out, or move it away."
    noted = out / "gpu.json"
    if noted.exists() and not read_json(noted):
        return f"{noted}: is no JSON object: half of a file, perhaps. {remedy}"
    before = read_json(noted).get("dry")
    files = {"gpu.json": (dry if before is None else before, None)}
    for step in STEPS:
        data, fault = read_step(out / f"{step}.json")
        if fault:
            return f"{fault}. {remedy}"
        if data:
            files[f"{step}.json"] = (data["dry"], data["device"])
    if (out / TABLES).exists():
        try:
            with zipfile.ZipFile(out / TABLES) as archive:
                damaged = archive.testzip()
                files[TABLES] = (archive.comment == b"dry", None)
                names = archive.namelist()
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            return f"{out / TABLES}: {error}. {remedy}"
        if damaged is not None:
            return f"{out / TABLES}: {damaged} in it is damaged. {remedy}"
        others = [name for name in names if device and not dry and not name.startswith(f"{device}.")]
        if others:
            return f"{out / TABLES}: holds {others[0]}, and this device is {device}. {remedy}"
    for name, (was_dry, whose) in files.items():
        if was_dry != dry:
            return f"{out / name}: is of a run {'with' if was_dry else 'without'} --dry. {remedy}"
        if device and whose not in (None, device):
            return f"{out / name}: is of {whose}, and this device is {device}. {remedy}"
    return ""


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
        path: Its file; what it holds already is gone on from.
        step: Name of the step.
        device: Standard name of the device.
        dry: Whether this is a dry run, which is no device's.
        about: What else stands in the file, such as the provenance.

    Exits, saying why, where the file is damaged or of another device: what a machine gave is never written over.
    """

    def __init__(self, path: Path, step: str, device: str, dry: bool, about: Mapping[str, Any]) -> None:
        self.path = path
        self._began = time.monotonic()
        before, fault = read_step(path)
        if before and (before["device"], before["dry"]) != (device, dry):
            fault = f"{path}: is of {before['device']}, and this device is {device}"
        if fault:
            raise SystemExit(f"{fault}. No result was touched. Give another --out, or move it away.")
        self.data: dict[str, Any] = {
            "format": FORMAT,
            "step": step,
            "device": device,
            "dry": dry,
            "complete": False,
            "seconds": 0.0,
            **about,
            "items": before.get("items", {}),
            "left_out": {},
        }
        self._before = float(before.get("seconds", 0.0))
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
