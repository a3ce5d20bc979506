"""The file of a latency predictor: arrays and plain data, with a digest. NumPy only, and no pickle."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixnas.predictors.measuring.table import outdated
from mixnas.search_space.errors import IntegrityError
from mixnas.search_space.files import atomic_create, read_bytes

FORMAT = 4  # 1 had another sentinel; in 2 a unit was a whole block; in 3, which is read, no pair of operators counted

LARGEST_FILE = 1 << 28
"""Bytes of a predictor file, and of all its arrays unpacked."""


def write_stored(path: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Write a predictor's arrays and plain data, atomically."""
    plain = json.dumps({**meta, "format": FORMAT}, allow_nan=False).encode()
    whole = {**arrays, "meta": np.frombuffer(plain, dtype=np.uint8)}
    whole["digest"] = np.frombuffer(_digest(whole), dtype=np.uint8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **whole)  # type: ignore[arg-type]

    atomic_create(path, write)


def _digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    total = hashlib.sha256()
    for name in sorted(arrays):
        if name != "digest":
            array = np.ascontiguousarray(arrays[name])
            total.update(f"{name} {array.dtype.str} {array.shape}".encode())
            total.update(array.tobytes())
    return total.digest()


def damaged(path: Path, reason: object) -> IntegrityError:
    """What is raised for a file that is no predictor's."""
    return IntegrityError(
        f"{path}: damaged, truncated or not a latency predictor ({reason}). Delete it and profile again with "
        "`nas latency profile`."
    )


def _check_size(path: Path, data: bytes) -> None:
    """Refuse an archive whose headers announce more than a predictor holds, before anything is unpacked."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > LARGEST_FILE:
        raise damaged(path, f"it would unpack to {unpacked:,} bytes; allowed are {LARGEST_FILE:,}")


def read_stored(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_stored` wrote.

    Raises:
        IntegrityError: It is damaged, truncated, something else, or of a version that is not read any more.
    """
    try:
        data = read_bytes(path, at_most=LARGEST_FILE)
        _check_size(path, data)
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except IntegrityError:
        raise
    except Exception as error:  # zlib, zipfile and NumPy each have errors of their own for a damaged file
        raise damaged(path, error) from error
    if "digest" not in arrays or "meta" not in arrays or arrays["digest"].tobytes() != _digest(arrays):
        raise damaged(path, "its digest does not fit")
    meta = json.loads(arrays["meta"].tobytes())
    if isinstance(meta.get("format"), int) and meta["format"] < FORMAT - 1:
        raise IntegrityError(outdated(path, "a latency predictor", f"format {meta['format']}"))
    if meta.get("format") not in (FORMAT - 1, FORMAT):
        raise damaged(path, f"format {meta.get('format')}, this version reads {FORMAT - 1} and {FORMAT}")
    return arrays, meta
