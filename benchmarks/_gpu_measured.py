"""Step "measured" of `gpu.py`: profiles of the real-size spaces, and what their predictors are worth.

Networks that no fit saw are measured twice, each built anew with other weights and inputs: one measurement predicting
the other is as good as any predictor can be seen to be. Everything measured is kept in `tables.zip`, from which the
next call goes on.
"""

from __future__ import annotations

import copy
import functools
import math
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gpu_context import Context, first_line, require_answers, root
from _gpu_results import LARGEST_BYTES, Results, write_bytes

from mixnas.predictors.latency.estimate import estimate
from mixnas.predictors.latency.fit import accuracy
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring import runtimes
from mixnas.predictors.measuring.measure import MeasureConfig, fixed_threads, measure_networks
from mixnas.predictors.measuring.sentinel import make_sentinel, sentinel_module
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.files import load_yaml
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

_UNSEEN = 60
_PROFILE_SHARE = 0.6  # of a setting's time; the rest is for networks that the fit did not see
_ESTIMATE_S = 25.0  # that counting a space takes; without them, --take does it
_AT_ONCE = 6  # networks that are measured between two looks at the clock


@dataclass(frozen=True)
class Setting:
    """A space at an input size and a batch size.

    Attributes:
        name: As in the results.
        config: Whose `space:`.
        io: The input.
        batch: Inputs per forward.
        weight: Share of the step's time, relative to the others'.
    """

    name: str
    config: str
    io: IOSpec
    batch: int
    weight: float


def _tokens(length: int) -> IOSpec:
    return IOSpec("causal", (length,), 8192, 8192, head="token", tokens=True)


SETTINGS = (
    Setting("imagenet, 224x224, batch 1", "imagenet", IOSpec("image", (224, 224), 3, 1000), 1, 3.0),
    Setting("lm, 1024 tokens, batch 1", "lm", _tokens(1024), 1, 2.0),
    Setting("imagenet, 224x224, batch 32", "imagenet", IOSpec("image", (224, 224), 3, 1000), 32, 3.0),
    Setting("lm, 8192 tokens, batch 1", "lm", _tokens(8192), 1, 1.5),
)
_DRY = (Setting("digits, 8x8, batch 1", "digits", IOSpec("image", (8, 8), 1, 10), 1, 1.0),)


def _space(setting: Setting, dry: bool) -> tuple[SearchSpace, dict[str, Any]]:
    plain = load_yaml(root() / "configs" / f"{setting.config}.yaml")
    if dry:  # of everything one or two
        plain = copy.deepcopy(plain)
        plain["space"]["stages"] = plain["space"]["stages"][:1]
        block = {"mixer": ["identity", "pooling"], "gate": "none", "channel_mixer": ["none", "mlp"]}
        plain["space"]["stages"][0] |= {"width": [4, 8, 16], "depth": [1, 2], "block": block}
    return SearchSpace.from_dict(plain["space"]), {"task": plain["task"], "space": plain["space"]}


def run(context: Context) -> None:
    """Go through the settings, each with its share of the time."""
    results = context.results("measured", unseen_wanted=_UNSEEN)
    place = context.work / "tables"
    place.mkdir(exist_ok=True)
    unpack(context, place)
    settings = list(_DRY if context.dry else SETTINGS)
    try:
        while settings and context.left > 5.0:
            setting = settings.pop(0)
            until = time.monotonic() + context.left * setting.weight / sum(each.weight for each in (setting, *settings))
            try:
                _measure(context, setting, results, place, until)
            except Exception as error:  # the other settings may be well
                item = results.items.get(setting.name, {})
                results.keep(setting.name, item | {"failed": first_line(error)})
                print(f"{setting.name}: {first_line(error)}")
                require_answers(context)
            pack(context, place, results)
        for setting in settings:
            results.leave_out(setting.name, "out of time")
        results.complete()
    finally:
        pack(context, place, results)


def _measure(context: Context, setting: Setting, results: Results, place: Path, until: float) -> None:
    """Profile a setting, then measure unseen networks until the time is over."""
    space, plain = _space(setting, context.dry)
    left = until - time.monotonic()
    quick = MeasureConfig(batch_size=setting.batch, window_ms=10.0)
    if context.dry:
        quick = MeasureConfig(passes=1, window_ms=0.2, sentinel_repeats=2, max_extra_passes=0)
        left = min(left, 600.0)  # it ends when all is measured
    budget = left * (_PROFILE_SHARE if len(results.items.get(setting.name, {}).get("ids", [])) < _UNSEEN else 0.9)
    began = time.monotonic()
    predictor = _profiled(context, setting, space, plain, place, budget, quick)
    item = results.items.get(setting.name, {})
    item |= {
        "config": setting.config,
        "io": setting.io.to_plain(),
        "batch": setting.batch,
        "runtime": predictor.runtime,
        "profile_s": round(item.get("profile_s", 0.0) + time.monotonic() - began, 1),
        "units": predictor.meta["num_units"],
        "networks": predictor.meta["num_networks"],
        "half_width_log": predictor.half_width,
        "calibration": predictor.accuracy,
    }
    item.pop("failed", None)
    pack(context, place, results)  # what was measured comes back, whatever becomes of the rest
    results.keep(setting.name, item)
    _unseen(context, setting, space, predictor, place, quick, results, until)
    judge(results.items[setting.name], predictor, setting.io)
    if context.dry or until - time.monotonic() > _ESTIMATE_S:
        add_estimate(results.items[setting.name], predictor.device, space)
    results.write()
    print(f"{setting.name}: {results.items[setting.name].get('held_out')}")


def _profiled(
    context: Context,
    setting: Setting,
    space: SearchSpace,
    plain: Any,
    place: Path,
    budget_s: float,
    measure: MeasureConfig,
) -> LatencyPredictor:
    """The one call of `profile`."""
    return profile(
        space,
        setting.io,
        device="cpu" if context.dry else "cuda",
        runtime="eager" if context.dry else "graph",
        directory=place,
        config=ProfileConfig(budget_s=budget_s, measure=measure, max_networks=16 if context.dry else 600),
        plain=plain,
    )


def _unseen(
    context: Context,
    setting: Setting,
    space: SearchSpace,
    predictor: LatencyPredictor,
    place: Path,
    config: MeasureConfig,
    results: Results,
    until: float,
) -> None:
    """Measure networks that the table does not hold, some at a time, each twice."""
    table = MeasurementTable.load(place, predictor.device, predictor.tag)
    seen = {str(what.config["architecture"]) for what in table.subjects.values() if what.kind == "network"}
    item = results.items[setting.name]
    done = item.setdefault("ids", [])
    for name in ("measured_ms", "measured_again_ms", "architectures"):
        item.setdefault(name, [])
    wanted = 4 if context.dry else _UNSEEN
    drawn = space.decode_many(space.sample_many(3 * wanted, np.random.default_rng([7, 1])))
    todo = [a for a in dict.fromkeys(drawn) if str(a.to_dict()) not in seen and a.id not in done]
    cost = 0.0
    while todo and len(done) < wanted and time.monotonic() + cost < until:
        began = time.monotonic()
        some, todo = todo[: min(_AT_ONCE, wanted - len(done))], todo[_AT_ONCE:]
        pairs = [_times(context, setting, some, config, table.reference_ms, seed) for seed in (10, 20)]
        for architecture, once, again in zip(some, *pairs, strict=True):
            if once is not None and again is not None:
                done.append(architecture.id)
                item["architectures"].append(architecture.to_dict())
                item["measured_ms"].append(once)
                item["measured_again_ms"].append(again)
        results.keep(setting.name, item)
        cost = time.monotonic() - began


def _network(architecture: Architecture, io: IOSpec, generator: torch.Generator) -> Network:
    return Network(architecture, io, generator=generator).eval().requires_grad_(False).deploy()


def _times(
    context: Context,
    setting: Setting,
    architectures: list[Architecture],
    config: MeasureConfig,
    reference_ms: float,
    seed: int,
) -> list[float | None]:
    """Measure networks, built here with weights and inputs of their own; None for what the memory does not hold."""
    device, runtime = context.torch_device, "eager" if context.dry else "graph"
    generator = torch.Generator().manual_seed(seed)
    calls: list[Any] = []
    with fixed_threads(config.threads):
        for architecture in architectures:
            build = functools.partial(_network, architecture, setting.io, generator)
            try:
                network = runtimes.built_on(device, build)
                inputs = setting.io.example(setting.batch, generator=generator).to(device)
                calls.append(runtimes.prepare(network, inputs, runtime, config.threads))
            except (ConfigError, RuntimeError) as error:
                if not isinstance(error, ConfigError) and not runtimes.is_out_of_memory(error):
                    raise
                calls.append(None)
                network = inputs = None
                if device == "cuda":
                    torch.cuda.empty_cache()
                print(f"{setting.name}: {architecture.id} is left out: {first_line(error)}")
        if runtime == "graph":
            sentinel = runtimes.prepare(*sentinel_module(device), "graph", config.threads)
        else:
            sentinel = make_sentinel(device)
        found = measure_networks(
            [call for call in calls if call is not None],
            rng=np.random.default_rng(seed),
            config=config,
            sentinel=sentinel,
            reference_ms=reference_ms,
            clock=runtimes.clock_of(runtime, device),
        )
    values = iter(found)
    return [None if call is None else round(next(values).latency.ms, 6) for call in calls]


def judge(item: dict[str, Any], predictor: LatencyPredictor, io: IOSpec) -> None:
    """Write down the predictor's error on the unseen networks, how often its interval holds, and the noise ceiling."""
    architectures = [Architecture.from_canonical(plain) for plain in item["architectures"]]
    if not architectures:
        return
    once, again = np.array(item["measured_ms"]), np.array(item["measured_again_ms"])
    latencies = [predictor.predict(a, io).latency for a in architectures]
    predicted = np.array([latency.ms for latency in latencies])
    inside = [latency.low_ms <= ms <= latency.high_ms for latency, ms in zip(latencies, once, strict=True)]
    item["predicted_ms"] = predicted.round(6).tolist()
    item["held_out"] = accuracy(predicted, once) | {"coverage_percent": round(100 * float(np.mean(inside)), 1)}
    item["noise_ceiling"] = accuracy(again, once)


def add_estimate(item: dict[str, Any], device: str, space: SearchSpace) -> None:
    """Write down the error that the estimate from the device's data sheet has on the unseen networks; needs no GPU."""
    architectures = [Architecture.from_canonical(plain) for plain in item["architectures"]]
    if not architectures:
        return
    io, once = IOSpec.from_plain(item["io"]), np.array(item["measured_ms"])
    try:
        sheet = estimate(device, space, io, runtime=item["runtime"], batch_size=item["batch"])
    except ConfigError as error:  # a CPU has no data sheet
        item["estimate"] = {"why": first_line(error)}
        return
    item["estimated_ms"] = [round(sheet.predict(a, io).latency.ms, 6) for a in architectures]
    ratio = np.log(np.array(item["estimated_ms"]) / once)
    median = round(math.exp(float(np.median(ratio))), 3)
    item["estimate"] = accuracy(np.array(item["estimated_ms"]), once) | {"median_ratio": median}


def pack(context: Context, place: Path, results: Results) -> None:
    """Put tables and predictors into one file that comes back, within what may."""
    files = sorted(path for path in place.iterdir() if path.suffix in (".csv", ".json", ".npz"))
    for left_out in ([], [".npz"]):
        temporary = context.work / "tables.zip"
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            archive.comment = b"dry" if context.dry else b""
            for path in files:
                if path.suffix not in left_out:
                    archive.write(path, path.name)
        if temporary.stat().st_size <= LARGEST_BYTES:
            break
        results.leave_out("predictors", "tables.zip would be too large: they are fitted anew from the tables")
    write_bytes(context.out / "tables.zip", temporary.read_bytes())


def unpack(context: Context, place: Path) -> None:
    """Go on from the tables of an earlier call, or from those that ship for this device."""
    shipped = root() / "predictors" / "tables"
    if not context.dry:
        for path in shipped.glob(f"{context.device}.graph*"):
            (place / path.name).write_bytes(path.read_bytes())
    try:
        with zipfile.ZipFile(context.out / "tables.zip") as archive:
            if (archive.comment == b"dry") == context.dry and archive.testzip() is None:
                for name in archive.namelist():
                    (place / Path(name).name).write_bytes(archive.read(name))
    except (OSError, zipfile.BadZipFile):
        pass
