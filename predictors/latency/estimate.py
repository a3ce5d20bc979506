"""An estimate for an NVIDIA GPU that nobody has measured, from its data sheet. Never a measurement, and says so.

Each operation takes its launch, and then its arithmetic or its traffic, whichever binds. Arithmetic runs in waves: a
multiprocessor that waits for the last wave's others does nothing. The blocks of a Triton kernel, and how many of them
fit on a multiprocessor, are known from its launch table and from what the ahead-of-time compiler counted
(`features.work_of`). What a kernel reaches of a GPU's peak is not known without measuring it, so the shares below are
round numbers, and the interval is wide.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mixnas.predictors.latency.fit import SpaceToFit
from mixnas.predictors.latency.gpus import GPUS
from mixnas.predictors.latency.lookup import SpaceTable
from mixnas.predictors.latency.model import Composition, UnitModel
from mixnas.predictors.latency.predictor import LatencyPredictor, Profiled
from mixnas.predictors.latency.trees import Trees
from mixnas.predictors.units import describe, io_fields
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.space import SearchSpace

_SHARES = {"arithmetic_ms": 0.5, "bandwidth_ms": 0.7}
_LAUNCH_MS = {"eager": 6e-3, "graph": 2e-3}
_HALF_WIDTH = math.log(3.0)


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
    from mixnas.predictors.latency.features import work_of

    if device not in GPUS:
        raise ConfigError(
            f"no data sheet of {device!r}.{nearest(device, GPUS)} There are: {', '.join(GPUS)}. "
            "Measure it with `nas latency profile`."
        )
    if runtime not in _LAUNCH_MS:
        raise ConfigError(f"runtime {runtime!r} of a GPU: allowed are {', '.join(_LAUNCH_MS)}.")
    gpu, launch = GPUS[device], _LAUNCH_MS[runtime]
    to_fit = SpaceToFit.of(space, io_fields(io), plain)
    works = [work_of(key, batch_size, gpu=gpu) for key in to_fit.keys]
    names = sorted({name for work in works for name in work})
    settings = [describe(key) for key in to_fit.keys]
    setting_names = sorted({name for s in settings for name in s})
    empty = np.empty(0, dtype=np.int64)
    trees = Trees(0.0, 0.0, 0, empty, empty, np.empty(0), empty, empty, np.empty(0))
    milliseconds = {"launches": launch} | {name: 1 / share for name, share in _SHARES.items()}
    coefficients = np.array([milliseconds.get(name, 0.0) for name in names])
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
        "gpu": gpu.to_plain(),
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
