"""`gpu.py --take DIR`: what came back from a GPU, put where it belongs; and the way back, for the next call.

Nothing is taken from a dry run, and no launch configuration of a family whose results were wrong.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _checkout import ROOT, use_checkout
from _gpu_context import first_line
from _gpu_results import STEPS, TABLES, as_json, read_json, read_step, was_wrong, write_bytes
from _gpu_steps import devices_here

_LARGEST_UNPACKED = 512 * 2**20  # of tables.zip


def kept(step: str, device: str, root: Path = ROOT) -> Path:
    """Where a step's results of a device are in the checkout."""
    return root / "benchmarks" / "results" / f"gpu-{device}.{step}.json"


def bring(out: Path) -> None:
    """Begin with what was taken from this machine's device earlier, where `out` has nothing of a step."""
    here = devices_here()
    for step in STEPS:
        if (out / f"{step}.json").exists():
            continue
        for path in sorted((ROOT / "benchmarks" / "results").glob(f"gpu-*.{step}.json")):
            data, fault = read_step(path)
            if not fault and data["device"] in here and not data["dry"]:
                write_bytes(out / f"{step}.json", path.read_bytes())


@dataclass(frozen=True)
class _Found:
    """What came back, looked at, and what it becomes in the checkout.

    Attributes:
        device: Whose results these are.
        files: The new contents by place; all are written, or none.
        lines: What is said of them.
        launches: Whether there are new launches.
    """

    device: str
    files: dict[Path, bytes]
    lines: list[str]
    launches: bool


def take(out: Path, root: Path = ROOT, reports: bool = True) -> Iterator[str]:
    """Put everything in its place; yields a line for each.

    All that came back is looked at before anything is written: what is damaged, of a dry run, or of another device
    ends it with a sentence. What an earlier call gave and this one lacks stays.

    Args:
        out: What `--out` named.
        root: The checkout that is written to.
        reports: Also write docs/kernels.md and kernels/resources.csv anew, which compiles for minutes.
    """
    found = _looked_at(out, root)
    for path, content in found.files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    yield from found.lines
    if reports and (found.launches or (out / "fast.json").exists()):
        from mixnas.kernels import configs
        from mixnas.kernels.tools import report, resources

        for cached in (configs.load, configs.kernels, configs._pick):
            cached.cache_clear()
        resources.main(["--output", str(root / "kernels" / "resources.csv")])
        report.main(["--output", str(root / "docs" / "kernels.md")])
        yield "kernels/resources.csv and docs/kernels.md: written anew"


def _looked_at(out: Path, root: Path) -> _Found:
    """Look at everything; exits, saying why, where something is not to be taken."""
    steps: dict[str, dict[str, Any]] = {}
    for step in STEPS:
        data, fault = read_step(out / f"{step}.json")
        if fault:
            sys.exit(f"{fault}. Nothing was taken.")
        if data:
            steps[step] = data
    if not steps:
        sys.exit(f"{out}: no results of gpu.py are here ({', '.join(f'{step}.json' for step in STEPS)}).")
    dry = [f"{step}.json" for step, data in steps.items() if data["dry"]]
    if dry or read_json(out / "gpu.json").get("dry"):
        sys.exit(f"{out}: this is a dry run ({', '.join(dry) or 'gpu.json'}): it is no device's and is not taken.")
    devices = sorted({data["device"] for data in steps.values()})
    if len(devices) != 1:
        sys.exit(f"{out}: results of one device are wanted; these are of {' and '.join(devices)}. Nothing was taken.")
    (device,) = devices
    if not re.fullmatch(r"nvidia-[a-z0-9]+(-[a-z0-9]+)*", device):
        sys.exit(f"{out}: {device!r} is no NVIDIA GPU's standard name. Nothing was taken.")
    use_checkout()
    files: dict[Path, bytes] = {}
    lines: list[str] = []
    for step, data in steps.items():
        place = kept(step, device, root)
        with _readable(out / f"{step}.json"):
            if step == "measured":
                _estimate(data, device)
            earlier, fault = read_step(place)
            if fault:
                sys.exit(f"{fault}. Nothing was taken; repair that file first.")
            files[place] = as_json(data | {"items": earlier.get("items", {}) | data["items"]})
        lines.append(f"{step}: {place.relative_to(root)}")
    before = len(files)
    with _readable(out / "tuned.json"):
        for path, content, line in _launch_tables(steps, device, root):
            files |= {path: content} if content else {}
            lines.append(line)
    launches = len(files) > before
    if (out / TABLES).exists():
        with _readable(out / TABLES):
            for path, content, line in _tables(out / TABLES, device, root):
                files[path] = content
                lines += [line] if line else []
    return _Found(device, files, lines, launches)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever goes wrong within it, where nothing is written, does for what a file holds: one sentence says so."""
    try:
        yield
    except Exception as error:
        sys.exit(f"{path}: is not as gpu.py leaves it ({first_line(error)}). Nothing was taken.")


def _launch_tables(steps: Mapping[str, Any], device: str, root: Path) -> Iterator[tuple[Path, bytes, str]]:
    """The launch tables that change, and a line for each family that was tuned; a table that stays has no contents."""
    if "tuned" not in steps:
        return
    from mixnas.kernels.tools import retune, rows

    tuned, right = steps["tuned"], steps.get("right", {})
    gpu = re.sub(r"[^a-z0-9]+", "-", tuned["gpu"]).strip("-")  # the tables keep more of a driver's name
    if not gpu or not device.endswith(gpu):
        raise ValueError(f"its rows are for {tuned['gpu']!r}")
    records = {key: retune.Record(**item) for key, item in tuned["items"].items()}
    for family in dict.fromkeys(record.family for record in records.values() if record.state == "tuned"):
        path = root / "kernels" / f"{family}.json"
        if was_wrong(family, right):
            yield path, b"", f"kernels/{family}.json: left as it is, its results were wrong on this device (right.json)"
            continue
        current = {k: r for k, r in records.items() if r.family == family and r.sources == rows.sources(family)}
        if not current:
            yield path, b"", f"kernels/{family}.json: left as it is, its kernels have changed since"
            continue
        launches = retune.launches(current)
        for job in rows.jobs([family]):
            launch = launches.get(job.key, job.launch)
            if set(launch) != set(job.launch) or not all(type(value) is int and value > 0 for value in launch.values()):
                raise ValueError(f"{job.key!r} has no launch of {', '.join(job.launch)}")
        provenance = tuned["table_provenance"] | {"commit": tuned["provenance"].get("checkout_commit", "")}
        table = rows.table_with(family, tuned["gpu"], launches, provenance)
        yield path, rows.format_table(table).encode(), f"kernels/{family}.json: rows for {tuned['gpu']}"


def _tables(path: Path, device: str, root: Path) -> Iterator[tuple[Path, bytes, str]]:
    """The tables and predictors of a device, opened as they will be; refuses what is none of these."""
    from mixnas.predictors.latency.predictor import LatencyPredictor
    from mixnas.predictors.measuring.runtimes import RUNTIMES
    from mixnas.predictors.measuring.table import MeasurementTable

    name = re.compile(rf"{re.escape(device)}\.((?:{'|'.join(RUNTIMES)})(?:-b[1-9][0-9]*)?)\.(csv|json|npz)")
    place = root / "predictors" / "tables"
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        if archive.comment == b"dry":
            sys.exit(f"{path}: is of a dry run. Nothing was taken.")
        entries = archive.infolist()
        kinds: dict[str, set[str]] = {}
        for entry in entries:
            match = name.fullmatch(entry.filename)
            if match is None:
                sys.exit(f"{path}: holds {entry.filename!r}, which is not a table of {device}. Nothing was taken.")
            if match[2] in kinds.setdefault(match[1], set()):
                sys.exit(f"{path}: holds {entry.filename!r} twice. Nothing was taken.")
            kinds[match[1]].add(match[2])
        if sum(entry.file_size for entry in entries) > _LARGEST_UNPACKED:
            sys.exit(f"{path}: would unpack to more than {_LARGEST_UNPACKED // 2**20} MiB. Nothing was taken.")
        for tag, found in kinds.items():
            lacking = {"csv", "json"} - found
            if lacking:
                sys.exit(f"{path}: {device}.{tag}.{min(lacking)} is not in it. Nothing was taken.")
        contents = {entry.filename: archive.read(entry) for entry in entries}  # each against its checksum
        for filename, content in contents.items():
            (Path(folder) / filename).write_bytes(content)
        for filename, content in contents.items():
            there, line = Path(folder) / filename, ""
            if filename.endswith(".npz"):
                predictor = LatencyPredictor.open(there)
                if filename != f"{predictor.device}.{predictor.tag}.npz":
                    raise ValueError(f"{filename} is the predictor of {predictor.device}.{predictor.tag}")
                units, networks = predictor.meta["num_units"], predictor.meta["num_networks"]
                line = f"predictors/tables/{filename}: {units} units, {networks} networks"
            elif filename.endswith(".csv"):
                table = MeasurementTable.load(Path(folder), device, filename[len(device) + 1 : -4])
                line = f"predictors/tables/{filename}: {len(table.subjects)} subjects"
                _refuse_loss(place / filename, content)
            yield place / filename, content, line


def _refuse_loss(place: Path, content: bytes) -> None:
    """Exit where the table that is there has rows which the new one lacks: they would be lost."""
    if place.exists():
        lacking = set(place.read_bytes().splitlines()) - set(content.splitlines())
        if lacking:
            sys.exit(
                f"{place}: has {len(lacking)} rows that the table which came back lacks. Nothing was taken; move that "
                "table away first if they are to go."
            )


def _estimate(measured: dict[str, Any], device: str) -> None:
    """Add the data-sheet estimate's error where the machine had no time for it."""
    from _gpu_measured import SETTINGS, add_estimate

    from mixnas.search_space.files import load_yaml
    from mixnas.search_space.space import SearchSpace

    for setting in SETTINGS:
        item = measured["items"].get(setting.name)
        if item and item.get("architectures") and "estimate" not in item:
            space = SearchSpace.from_dict(load_yaml(ROOT / "configs" / f"{setting.config}.yaml")["space"])
            add_estimate(item, device, space)
