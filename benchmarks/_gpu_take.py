"""`gpu.py --take DIR`: what came back from a GPU, put where it belongs; and the way back, for the next call.

Nothing is taken from a dry run, and no launch configuration of a family whose results were wrong.
"""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _checkout import ROOT, use_checkout
from _gpu_results import FORMAT, read_json, was_wrong, write_json

STEPS = ("right", "tuned", "fast", "measured", "trained")


def _slug(device: str) -> str:
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in device)


def kept(step: str, device: str, root: Path = ROOT) -> Path:
    """Where a step's results of a device are in the checkout."""
    return root / "benchmarks" / "results" / f"gpu-{_slug(device)}.{step}.json"


def bring(out: Path) -> None:
    """Begin with what was taken from this machine's device earlier, where `out` has nothing of a step."""
    for step in STEPS:
        if (out / f"{step}.json").exists():
            continue
        for path in sorted((ROOT / "benchmarks" / "results").glob(f"gpu-*.{step}.json")):
            if read_json(path).get("device") in _devices_here():
                (out / f"{step}.json").write_bytes(path.read_bytes())


def _devices_here() -> list[str]:
    use_checkout()
    from mixnas.predictors.measuring.device import gpu_models

    return gpu_models()


def refuse_unfit(out: Path) -> str:
    """The device whose results these are.

    Exits, saying why, where they are nobody's: of a dry run, of several devices, of another format, or none.
    """
    found = {step: read_json(out / f"{step}.json") for step in STEPS}
    found = {step: data for step, data in found.items() if data}
    if not found:
        sys.exit(f"{out}: no results of gpu.py are here ({', '.join(f'{step}.json' for step in STEPS)}).")
    dry = [step for step, data in found.items() if data.get("dry") is not False]
    if dry or read_json(out / "gpu.json").get("dry"):
        sys.exit(f"{out}: this is a dry run ({', '.join(dry) or 'gpu.json'}): it is no device's and is not taken.")
    devices = {str(data.get("device")) for data in found.values()}
    formats = {data.get("format") for data in found.values()}
    if len(devices) != 1 or formats != {FORMAT}:
        sys.exit(f"{out}: results of one device in format {FORMAT} are wanted; these are of {devices} in {formats}.")
    (device,) = devices
    if not device.startswith("nvidia-"):
        sys.exit(f"{out}: {device!r} is no NVIDIA GPU's standard name.")
    return device


def take(out: Path, root: Path = ROOT, reports: bool = True) -> Iterator[str]:
    """Put everything in its place; yields a line for each.

    Args:
        out: What `--out` named.
        root: The checkout that is written to.
        reports: Also write docs/kernels.md and kernels/resources.csv anew, which compiles for minutes.
    """
    device = refuse_unfit(out)
    use_checkout()
    for step in STEPS:
        data = read_json(out / f"{step}.json")
        if data:
            if step == "measured":
                _estimate(data, out, device)
            write_json(kept(step, device, root), data)
            yield f"{step}: {kept(step, device, root).relative_to(root)}"
    changed = list(_launch_tables(out, root))
    yield from changed
    yield from _tables(out, device, root)
    if reports and (changed or (out / "fast.json").exists()):
        from mixnas.kernels import configs
        from mixnas.kernels.tools import report, resources

        for cached in (configs.load, configs.kernels, configs._pick):
            cached.cache_clear()
        resources.main(["--output", str(root / "kernels" / "resources.csv")])
        report.main(["--output", str(root / "docs" / "kernels.md")])
        yield "kernels/resources.csv and docs/kernels.md: written anew"


def _launch_tables(out: Path, root: Path) -> Iterator[str]:
    tuned, right = read_json(out / "tuned.json"), read_json(out / "right.json")
    if not tuned:
        return
    from mixnas.kernels.tools import retune, rows

    records = {key: retune.Record(**item) for key, item in tuned["items"].items()}
    for family in dict.fromkeys(record.family for record in records.values() if record.state == "tuned"):
        if was_wrong(family, right):
            yield f"kernels/{family}.json: left as it is, its results were wrong on this device (right.json)"
            continue
        current = {k: r for k, r in records.items() if r.family == family and r.sources == rows.sources(family)}
        if not current:
            yield f"kernels/{family}.json: left as it is, its kernels have changed since"
            continue
        provenance = tuned["table_provenance"] | {"commit": tuned["provenance"].get("checkout_commit", "")}
        table = rows.table_with(family, tuned["gpu"], retune.launches(current), provenance)
        (root / "kernels" / f"{family}.json").write_text(rows.format_table(table), encoding="utf-8")
        yield f"kernels/{family}.json: rows for {tuned['gpu']}"


def _tables(out: Path, device: str, root: Path) -> Iterator[str]:
    path = out / "tables.zip"
    if not path.exists():
        return
    from mixnas.predictors.latency.predictor import LatencyPredictor
    from mixnas.predictors.measuring.table import MeasurementTable

    place = root / "predictors" / "tables"
    with zipfile.ZipFile(path) as archive:
        if archive.comment == b"dry" or archive.testzip() is not None:
            sys.exit(f"{path}: damaged, or of a dry run.")
        for name in archive.namelist():
            if Path(name).name != name or not name.startswith(f"{device}."):
                sys.exit(f"{path}: holds {name!r}, which is not a table of {device}.")
        archive.extractall(place)
        names = archive.namelist()
    for name in names:
        if name.endswith(".npz"):
            predictor = LatencyPredictor.open(place / name)
            units, networks = predictor.meta["num_units"], predictor.meta["num_networks"]
            yield f"predictors/tables/{name}: {units} units, {networks} networks"
        elif name.endswith(".csv"):
            table = MeasurementTable.load(place, device, name.removeprefix(f"{device}.").removesuffix(".csv"))
            yield f"predictors/tables/{name}: {len(table.subjects)} subjects"


def _estimate(measured: dict[str, Any], out: Path, device: str) -> None:
    """Add the data-sheet estimate's error where the machine had no time for it."""
    from _gpu_measured import SETTINGS, add_estimate

    from mixnas.search_space.files import load_yaml
    from mixnas.search_space.space import SearchSpace

    for setting in SETTINGS:
        item = measured["items"].get(setting.name)
        if item and item.get("architectures") and "estimate" not in item:
            space = SearchSpace.from_dict(load_yaml(ROOT / "configs" / f"{setting.config}.yaml")["space"])
            add_estimate(item, device, space)
    (out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
