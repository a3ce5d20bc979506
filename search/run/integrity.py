"""Whether the files of a run are what was written, and nothing else than files.

The manifest, the summary of the journal, tables, predictors, the reasons of failures and each weights file have a
digest in themselves; the digests of `config.yaml`, `trials.csv` and `pareto.json` are in the manifest, those of an
exported folder in its own manifest, which has one of itself. A file of a version that had no digests is read without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mixnas.search_space.errors import ConfigError, IntegrityError, NasError, shown, visible
from mixnas.search_space.files import check_stamp, digest_of, parse_json, read_bytes, stamped, without_stamp, write_json
from mixnas.search_space.formats.checks import changed

_WITH_DIGESTS = 3  # since this format

_DIGESTED = ("config.yaml", "trials.csv", "pareto.json", "data.json")
_FILES = ("manifest.json", "study.journal", "study.summary.json", *_DIGESTED)
_OTHERS = ("study.journal.torn", "unsent.json", "driver.json", "supernet.safetensors", "report.html", "variants.json")
_FOLDERS = ("latency", "networks", "exports")
_AGAIN = {
    "config.yaml": "Restore it from a copy, or give a whole one with -c; what may change is changed with --set.",
    "trials.csv": "A resume writes it again from the journal.",
    "pareto.json": "A resume writes it again.",
    "data.json": "Restore it from a copy: it says which examples were trained on.",
}
ABSENT = ""
"""Stands among the digests of a file where there was none: between the manifest's write and its own it is not there."""


def check_layout(path: Path) -> None:
    """Refuse a run in which something is no file or folder of its own: a link leads out of it, a pipe blocks.

    Raises:
        IntegrityError: It names what.
    """
    _check_entry(path / ".lock", stat.S_ISREG)
    for name in (*_FILES, *_OTHERS):
        _check_entry(path / name, stat.S_ISREG)
    for name in _FOLDERS:
        folder = path / name
        if _check_entry(folder, stat.S_ISDIR):
            with os.scandir(folder) as entries:
                for entry in entries:
                    inside = stat.S_ISDIR if name == "exports" and entry.is_dir(follow_symlinks=False) else stat.S_ISREG
                    _check_entry(folder / entry.name, inside)


def check_own(path: Path) -> None:
    """Refuse to write into a run whose files are another place's too: what is changed here would change there.

    Raises:
        IntegrityError: A file that is written in place has another name (a hard link, as of `cp -l`).
    """
    for file in (path / ".lock", path / "study.journal", *sorted((path / "latency").glob("*.csv"))):
        with contextlib.suppress(FileNotFoundError):
            if os.lstat(file).st_nlink > 1:
                raise IntegrityError(
                    f"{visible(str(file))}: has another name elsewhere (a hard link), and writing would change that "
                    "too. Make it a file of its own: copy it and put the copy in its place."
                )


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


_TYPES: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("name", "created", "finished", "mark", "commit", "device", "latency", "phase"), str),
    **dict.fromkeys(("versions", "digests", "measured"), dict),
    "seed": int,
    "reference_ms": (int, float),
}


def _missing(plain: Mapping[str, Any]) -> str:
    """What a manifest lacks; empty when nothing."""
    phases, fixed, digests = plain.get("phases"), plain.get("fixed"), plain.get("digests", {})
    if not all(isinstance(known, list) for known in digests.values()):
        return "its files' digests are no lists"
    for name, kinds in _TYPES.items():
        value = plain.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            return f"its {name} is {shown(value)}"
    if not isinstance(plain.get("created"), str):
        return "when it was created is missing"
    if not isinstance(fixed, dict) or not isinstance(fixed.get("objectives"), dict):
        return "what its trials depend on is missing"
    task = fixed.get("task", "")
    if not isinstance(task.get("name") if isinstance(task, dict) else task, str):
        return f"its task is {shown(task)}"
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
    first = "Delete it. " if name == "pareto.json" else ""
    return f"damaged: not what was written. {first}{_AGAIN[name]}"


def problems(path: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every file of a run that is not what was written, by its path within the run, with what is wrong.

    The journal is checked by whoever reads it. Needs no torch.
    """
    digests, whole = manifest.get("digests", {}), {}
    for name in _DIGESTED:
        if os.path.lexists(path / name):
            data = read_bytes(path / name)
            if problem := not_as_written(manifest, name, data):
                yield name, problem
            else:
                whole[name] = data
        elif digests.get(name) and ABSENT not in digests[name]:
            yield name, f"missing. {_AGAIN[name]}"
    if problem := journal_gone(path, manifest):
        yield "study.journal", problem
    weights = [path / "supernet.safetensors", *sorted((path / "networks").glob("*.safetensors"))]
    found: list[tuple[Path, str]] = [(file, weights_problem(file)) for file in weights if os.path.lexists(file)]
    found += [(file, _other_network(file)) for file, problem in found if not problem and file.parent.name == "networks"]
    found += [(file, _problem_of(read_failure, file)) for file in sorted((path / "networks").glob("*.json"))]
    found += [(file, _problem_of(read_variants, file)) for file in path.glob("variants.json")]
    if manifest["format"] >= _WITH_DIGESTS:
        found += [(file, "missing. A resume makes it again.") for file in _missing_networks(path, whole)]
        found += _latency_problems(path / "latency")
    for file, problem in found:
        if problem:
            yield str(file.relative_to(path)), problem
    for folder in sorted((path / "exports").glob("[!.]*/")):
        for name, problem in export_problems(folder):
            yield str((folder / name).relative_to(path)), f"{problem} Export the network again."


def journal_gone(path: Path, manifest: Mapping[str, Any]) -> str:
    """Why a run's trials are gone, where they are: it has written tables of them, and there is no journal any more."""
    if "trials.csv" in manifest.get("digests", {}) and not os.path.lexists(path / "study.journal"):
        return "missing: the run's trials are in it. Restore it from a copy."
    return ""


def _missing_networks(path: Path, whole: Mapping[str, bytes]) -> list[Path]:
    """Files of the front's networks that should be there and are not."""
    if "pareto.json" not in whole:
        return []
    try:
        front = parse_json(whole["pareto.json"], "pareto.json")
        ids = [str(member["id"]) for member in front["front"]] if front["final"] is True else []
    except (NasError, KeyError, TypeError):
        return []  # whoever reads it says what is wrong
    files = [path / "networks" / f"{i}.safetensors" for i in ids if i.isalnum()]
    return [file for file in files if not os.path.lexists(file)]


def read_failure(path: Path) -> dict[str, Any]:
    """Why a network could not be finished, and by which recipe; nothing where a version without digests wrote it.

    Raises:
        IntegrityError: It is not what was written.
    """
    try:
        plain = parse_json(read_bytes(path), path.name)
        if check_stamp(plain, path.name):
            return without_stamp(plain)
        whole = plain.keys() == {"failure", "recipe"}
    except (NasError, TypeError, AttributeError):
        whole = False
    if whole:
        return {}
    raise IntegrityError(f"{path}: damaged: not what was written. Delete it; a resume tries the network again.")


def read_variants(path: Path) -> dict[str, Any]:
    """What was tried of other policies of finished networks, and what was chosen (`search.variants`).

    Raises:
        IntegrityError: It is not what was written.
    """
    try:
        plain = parse_json(read_bytes(path), path.name)
        if isinstance(plain, dict) and check_stamp(plain, path.name):
            return without_stamp(plain)
    except NasError:
        pass
    raise IntegrityError(f"{path}: damaged: not what was written. Delete it; a resume tries the policies again.")


def _problem_of(read: Callable[[Path], object], path: Path) -> str:
    """Why a file is not what was written, by its reader; empty where it is."""
    try:
        read(path)
    except IntegrityError as error:
        return str(error).removeprefix(f"{path}: ")
    return ""


def _latency_problems(folder: Path) -> Iterator[tuple[Path, str]]:
    """Tables and predictors that are not what was written."""
    from mixnas.predictors.latency.predictor import summary
    from mixnas.predictors.measuring.table import MeasurementTable

    for path in sorted(folder.glob("[!.]*")):
        device, _, tag = path.stem.rpartition(".")
        try:
            if path.suffix == ".npz":
                summary(path)
            elif path.suffix == ".csv":
                MeasurementTable.load(folder, device, tag)
        except NasError as error:
            yield path, str(error).removeprefix(f"{path}: ")


EXPORT_MANIFEST = "manifest.json"
EXPORT_FORMAT = 3
"""Of `card.json` and `manifest.json` in an exported folder. 1 had no manifest; since 3 the manifest has a digest."""


def export_problems(folder: Path) -> Iterator[tuple[str, str]]:
    """Every file of an exported folder that is not what was written, with what is wrong. Needs no torch.

    What somebody else laid into it, and what a version without a manifest exported, is not looked at.
    """
    path = folder / EXPORT_MANIFEST
    if not os.path.lexists(path):
        if os.path.lexists(folder / "load.py") and b"manifest.json" in read_bytes(folder / "load.py"):
            yield EXPORT_MANIFEST, "missing."
        return
    try:
        plain = parse_json(read_bytes(path), path.name)
        has_digest = check_stamp(plain, path.name)
        files = {name: about["sha256"] for name, about in plain["files"].items()}
        if not has_digest and plain["format"] != EXPORT_FORMAT - 1:
            raise ValueError("its digest is missing")
    except (NasError, ValueError, KeyError, TypeError, AttributeError):
        yield EXPORT_MANIFEST, "damaged: not what was written."
        return
    for name, digest in files.items():
        if Path(name).name != name or not name or name in (".", ".."):
            yield EXPORT_MANIFEST, f"damaged: {shown(name)} is no file of it."
        elif not os.path.lexists(folder / name):
            yield name, "missing."
        elif os.path.islink(folder / name) or not os.path.isfile(folder / name):
            yield name, "no file of its own: it is not followed."
        elif digest_of(read_bytes(folder / name)) != digest:
            inside = weights_problem(folder / name) if name.endswith(".safetensors") else ""
            where = f" {inside.removeprefix(_NOT_AS_WRITTEN)}" if inside.startswith(_NOT_AS_WRITTEN) else ""
            yield name, f"damaged or changed: its SHA-256 is not that in {EXPORT_MANIFEST}.{where}"


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


def _other_network(path: Path) -> str:
    """Why a file of weights that is whole is another network's than its name says; empty where it is its own."""
    from mixnas.search_space.architecture import Architecture

    with open(path, "rb") as file:  # the weights behind the header have been read already
        header_text = file.read(int.from_bytes(file.read(8), "little"))
    try:
        header = json.loads(header_text)
        found = Architecture.from_json(header["__metadata__"]["architecture"], f"{path}: architecture").id
    except (ValueError, KeyError, TypeError, RecursionError, NasError):
        return ""  # of operators that are not imported here, say: whoever loads it is told
    return "" if found == path.stem else f"it holds {found}, another network. Was it exchanged with that one's file?"


_NOT_AS_WRITTEN = "damaged: not what was written: "


def weights_problem(path: Path) -> str:
    """Why a weights file is not what was written, without torch; empty where it is. See `formats.safetensors`."""
    try:
        data = read_bytes(path)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        metadata = dict(header.pop("__metadata__"))
        written = metadata.pop("digest", None)
        former = metadata.pop("sha256", None)
        total, ends, tensors = hashlib.sha256(), [8 + size], {}
        if written is not None:
            total.update(json.dumps(metadata, sort_keys=True).encode())
        for name in sorted(header):
            about = header[name]
            begin, end = about["data_offsets"]
            total.update(f"{name} torch.{_DTYPES[about['dtype']]} {tuple(about['shape'])};".encode())
            tensors[name] = memoryview(data)[8 + size + begin : 8 + size + end]
            total.update(tensors[name])
            ends.append(8 + size + end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, NasError) as error:
        return f"damaged: no weights file ({type(error).__name__})."
    if max(ends) != len(data):
        return "damaged: not what was written."
    if total.hexdigest() == (written or former):
        return ""
    return f"{_NOT_AS_WRITTEN}{changed(tensors, metadata)}."
