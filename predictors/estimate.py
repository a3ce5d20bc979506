"""An estimate for an NVIDIA GPU that nobody has measured: floors from its data sheet. Never a measurement, and says so.

A unit takes at least its launches, its arithmetic and its traffic. What a kernel reaches of a GPU's peak is not known
without measuring it, so the shares below are round numbers, and the interval is wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixnas.predictors.fit import SpaceToFit
from mixnas.predictors.latency import LatencyPredictor, Profiled
from mixnas.predictors.lookup import SpaceTable
from mixnas.predictors.model import Composition, UnitModel
from mixnas.predictors.trees import Trees
from mixnas.predictors.units import describe, io_fields
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.space import SearchSpace


@dataclass(frozen=True, slots=True)
class GPU:
    """A GPU's data sheet: peak rates in 10^12 operations a second (a fused multiply-add is two), without sparsity.

    Attributes:
        fp32: Plain single precision.
        half: bf16 and fp16 on the tensor cores.
        int8: On the tensor cores.
        bandwidth: Memory, 10^12 bytes a second.
    """

    fp32: float
    half: float
    int8: float
    bandwidth: float


# NVIDIA's data sheets of the products (SXM where there are several).
GPUS: Mapping[str, GPU] = {
    "nvidia-h200": GPU(67, 989, 1979, 4.8),
    "nvidia-h100": GPU(67, 989, 1979, 3.35),
    "nvidia-a100": GPU(19.5, 312, 624, 2.0),
    "nvidia-l4": GPU(30.3, 121, 242, 0.30),
    "nvidia-l40s": GPU(91.6, 362, 733, 0.864),
    "nvidia-t4": GPU(8.1, 65, 130, 0.32),
    "nvidia-geforce-rtx-4090": GPU(82.6, 165, 330, 1.008),
    "nvidia-geforce-rtx-3090": GPU(35.6, 71, 142, 0.936),
}

_RATE_SHARE = 0.5
_BANDWIDTH_SHARE = 0.7
_LAUNCH_MS = {"eager": 6e-3, "graph": 2e-3}
_HALF_WIDTH = math.log(3.0)


def _coefficient(name: str, gpu: GPU, launch_ms: float) -> float:
    kind, _, what = name.rpartition(".")
    if what == "calls":
        return 0.0 if kind == "view" else launch_ms
    if what == "bytes":
        return 1e3 / (gpu.bandwidth * 1e12 * _BANDWIDTH_SHARE)
    if what == "macs":
        rate = gpu.half if kind.endswith(".16") else gpu.int8 if kind.endswith(".8") else gpu.fp32
        return 2e3 / (rate * 1e12 * _RATE_SHARE)
    return 0.0


def estimate(
    device: str, space: SearchSpace, io: Any, *, runtime: str = "graph", batch_size: int = 1, plain: Any = None
) -> LatencyPredictor:
    """A predictor of a GPU from its data sheet. Its answers have `estimate` set; it cannot be saved.

    Args:
        device: One of `GPUS`.
        space: Whose units are counted.
        io: The task's `IOSpec`.
        runtime: "graph" or "eager".
        batch_size: Inputs per forward.
        plain: As in `profile`.

    Raises:
        ConfigError: A GPU whose data sheet is not here, or a runtime that is not a GPU's.
    """
    from mixnas.predictors.features import work_of

    if device not in GPUS:
        raise ConfigError(
            f"no data sheet of {device!r}.{nearest(device, GPUS)} There are: {', '.join(GPUS)}. "
            "Measure it with `nas latency profile`."
        )
    if runtime not in _LAUNCH_MS:
        raise ConfigError(f"runtime {runtime!r} of a GPU: allowed are {', '.join(_LAUNCH_MS)}.")
    gpu, launch = GPUS[device], _LAUNCH_MS[runtime]
    to_fit = SpaceToFit.of(space, io_fields(io), plain)
    works = [work_of(key, batch_size) for key in to_fit.keys]
    names = sorted({name for work in works for name in work})
    settings = [describe(key) for key in to_fit.keys]
    setting_names = sorted({name for s in settings for name in s})
    empty = np.empty(0, dtype=np.int64)
    trees = Trees(0.0, 0.0, 0, empty, empty, np.empty(0), empty, empty, np.empty(0))
    coefficients = np.array([_coefficient(name, gpu, launch) for name in names])
    columns = np.array([[s.get(name, 0.0) for name in setting_names] for s in settings])
    model = UnitModel(
        tuple(names), coefficients, tuple(setting_names), trees, math.inf, columns.min(axis=0), columns.max(axis=0)
    )
    unit_ms = model.physical(works)
    meta = {
        "device": device,
        "runtime": runtime,
        "threads": 1,
        "batch": batch_size,
        "estimate": True,
        "half_width": _HALF_WIDTH,
        "coverage": 0.0,
        "accuracy": {"networks": 0},
        "provenance": [{"device": device, "source": "NVIDIA's data sheet; nothing was measured"}],
        "rows_digest": "",
        "categories": ["width"],
        "operators": [],
        "num_units": 0,
        "num_networks": 0,
        "spaces": [{"written_as": list(to_fit.written_as)}],
    }
    composition = Composition(1.0, np.zeros(1), 0.0, np.empty(0))
    profiled = Profiled(to_fit.keys, unit_ms, unit_ms, np.zeros(len(unit_ms), dtype=bool))
    return LatencyPredictor(meta, model, composition, profiled, [SpaceTable(space, to_fit.io, to_fit.parts)])
