"""Changing one weight of a `.pt2`, which is a ZIP archive: to read a program and to write it again takes seconds."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path


def change_record(path: Path, weight: str, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of a tensor, by its name in the network; the file is as whole as before."""
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (config,) = (json.loads(records[name]) for name in records if name.endswith("weights_config.json"))
    place = config["config"][weight]["path_name"]
    (name,) = (name for name in records if name.endswith(f"/data/weights/{place}"))
    content = bytearray(records[name])
    change(content)
    with zipfile.ZipFile(path, "w") as archive:
        for entry, was in records.items():
            archive.writestr(entry, bytes(content) if entry == name else was)
