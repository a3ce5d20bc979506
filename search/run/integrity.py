"""Whether the files of a run are what was written, and nothing else than files.

The manifest, the summary of the journal and each weights file have a digest in themselves; the digests of
`config.yaml`, `trials.csv` and `pareto.json` are in the manifest. A file of a version that had no digests is read
without.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixnas.search_space.errors import ConfigError, IntegrityError, NasError, shown, visible
from mixnas.search_space.files import check_stamp, digest_of, parse_json, read_bytes, stamped, without_stamp, write_json

_WITH_DIGESTS = 3  # since this format

_DIGESTED = ("config.yaml", "trials.csv", "pareto.json", "data.json")
_FILES = ("manifest.json", "study.journal", "study.summary.json", *_DIGESTED)
_FOLDERS = ("latency", "networks", "exports")


def check_layout(path: Path) -> None:
    """Refuse a run in which something is no file or folder of its own: a link leads out of it, a pipe blocks.

    Raises:
        IntegrityError: It names what.
    """
    _check_entry(path / ".lock", stat.S_ISREG)
    for name in (*_FILES, "supernet.safetensors"):
        _check_entry(path / name, stat.S_ISREG)
    for name in _FOLDERS:
        folder = path / name
        if _check_entry(folder, stat.S_ISDIR):
            with os.scandir(folder) as entries:
                for entry in entries:
                    inside = stat.S_ISDIR if name == "exports" and entry.is_dir(follow_symlinks=False) else stat.S_ISREG
                    _check_entry(folder / entry.name, inside)


def _check_entry(path: Path, expected: Any) -> bool:
    """Whether there is one; it is what is expected."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return False
    except OSError as error:
        raise IntegrityError(f"{visible(str(path))}: cannot be looked at: {error.strerror}.") from error
    if not expected(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe"}
        kind = kinds.get(stat.S_IFMT(mode), "a device or a socket")
        wanted = "a folder" if expected is stat.S_ISDIR else "a file"
        raise IntegrityError(
            f"{visible(str(path))}: is {kind}, where a run has {wanted}. It is not followed; remove it."
        )
    return True


def read_manifest(path: Path, readable: Collection[int]) -> dict[str, Any]:
    """Read and check a manifest.

    Raises:
        ConfigError: Another version wrote it, or it cannot be read.
        IntegrityError: It is damaged.
    """
    try:
        plain = parse_json(read_bytes(path), str(path))
    except IntegrityError as error:
        raise IntegrityError(f"{path}: damaged: not the manifest of a run. Restore it from a copy.") from error
    problem = "not a mapping" if not isinstance(plain, dict) else ""
    if not problem:
        has_digest = check_stamp(plain, str(path))
        written = plain.get("format")
        if not isinstance(written, int) or isinstance(written, bool):
            problem = "no format"
        elif written not in readable:
            found = plain.get("versions")
            version = found.get("mixnas", "unknown") if isinstance(found, dict) else "unknown"
            raise ConfigError(
                f"{path.parent}: has format {written}; this version of mixnas reads formats up to {max(readable)}. "
                f"Open it with the version that wrote it ({shown(version)})."
            )
        elif written >= _WITH_DIGESTS and not has_digest:
            problem = "its digest is missing"
        else:
            problem = _missing(plain)
    if problem:
        raise IntegrityError(f"{path}: damaged: not the manifest of a run ({problem}). Restore it from a copy.")
    return without_stamp(plain)


def _missing(plain: Mapping[str, Any]) -> str:
    """What a manifest lacks; empty when nothing."""
    phases, fixed = plain.get("phases"), plain.get("fixed")
    if not isinstance(plain.get("created"), str):
        return "when it was created is missing"
    if not isinstance(fixed, dict) or not isinstance(fixed.get("objectives"), dict):
        return "what its trials depend on is missing"
    if not isinstance(phases, list) or not all(isinstance(phase, dict) for phase in phases):
        return "its phases are missing"
    for phase in phases:
        seconds = phase.get("seconds")
        plain_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not isinstance(phase.get("name"), str) or not plain_number or not 0 <= seconds < 1e12:
            return f"a phase took {shown(seconds)} seconds"
    return ""


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest with its digest, atomically."""
    write_json(path, stamped(manifest) if manifest["format"] >= _WITH_DIGESTS else manifest)


def not_as_written(manifest: Mapping[str, Any], name: str, data: bytes) -> str:
    """Why a file's content is not what was written; empty where it is, or was written before there were digests."""
    digests = manifest.get("digests", {}).get(name)
    if digests is None or digest_of(data) in digests:
        return ""
    what = {
        "config.yaml": "Restore it from a copy, or give a whole one with -c; what may change is changed with --set.",
        "trials.csv": "A resume writes it again from the journal.",
        "pareto.json": "Delete it; a resume writes it again.",
        "data.json": "Restore it from a copy: it says which examples were trained on.",
    }
    return f"damaged: not what was written. {what[name]}"


def problems(path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every file of a run that is not what was written, by its path within the run, with what is wrong.

    The journal is checked by whoever reads it. Needs no torch.
    """
    for name in _DIGESTED:
        if os.path.lexists(path / name):
            problem = not_as_written(manifest, name, read_bytes(path / name))
            if problem:
                yield name, problem
    weights = [path / "supernet.safetensors", *sorted((path / "networks").glob("*.safetensors"))]
    for file in weights:
        if os.path.lexists(file):
            problem = weights_problem(file)
            if problem:
                yield str(file.relative_to(path)), problem


def undigested(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Files that a version without digests wrote: nothing tells whether they are what was written."""
    known = manifest.get("digests", {})
    old = [name for name in _DIGESTED if name not in known and os.path.lexists(path / name)]
    return ([] if manifest["format"] >= _WITH_DIGESTS else ["manifest.json"]) + old


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


def weights_problem(path: Path) -> str:
    """Why a weights file is not what was written, without torch; empty where it is. See `formats.safetensors`."""
    try:
        data = read_bytes(path)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        metadata = dict(header.pop("__metadata__"))
        written = metadata.pop("digest", None)
        former = metadata.pop("sha256", None)
        total = hashlib.sha256()
        if written is not None:
            total.update(json.dumps(metadata, sort_keys=True).encode())
        for name in sorted(header):
            about = header[name]
            begin, end = about["data_offsets"]
            total.update(f"{name} torch.{_DTYPES[about['dtype']]} {tuple(about['shape'])};".encode())
            total.update(data[8 + size + begin : 8 + size + end])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, NasError) as error:
        return f"damaged: no weights file ({type(error).__name__})."
    return "" if total.hexdigest() == (written or former) else "damaged: not what was written."
