"""An estimate for an NVIDIA GPU that nobody has measured, from its data sheet. Never a measurement, and says so.

Each operation takes its launch, and then its arithmetic or its traffic, whichever binds. Arithmetic runs in waves: a
multiprocessor that waits for the last wave's others does nothing. The blocks of a Triton kernel, and how many of them
fit on a multiprocessor, are known from its launch table and from what the ahead-of-time compiler counted
(`counting`). What a kernel reaches of a GPU's peak is not known without measuring it, so the shares below are
round numbers, and the interval is wide.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mixnas.predictors.latency.gpus import GPUS, sheet_of
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import Composition, UnitModel
from mixnas.predictors.latency.predictor import LatencyPredictor, Profiled, plain_digest
from mixnas.predictors.latency.trees import Trees
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

_SHARES = {"arithmetic_ms": 0.5, "bandwidth_ms": 0.7}
_LAUNCH_MS = {"eager": 6e-3, "graph": 2e-3}
_HALF_WIDTH = math.log(3.0)


def estimate(
    device: str, space: SearchSpace, io: IOSpec, *, runtime: str = "graph", batch_size: int = 1, plain: Any = None
) -> LatencyPredictor:
    """A predictor of a GPU from its data sheet. Its answers have `estimate` set; it cannot be saved.

    Args:
        device: One of `GPUS`, or a longer name of it.
        space: Whose units are counted.
        io: The task's input.
        runtime: "graph" or "eager".
        batch_size: Inputs per forward.
        plain: As in `profile`.

    Raises:
        ConfigError: A GPU whose data sheet is not here, or a runtime that is not a GPU's.
    """
    from mixnas.predictors.latency.features import Works

    gpu = sheet_of(device)
    if gpu is None:
        raise ConfigError(
            f"no data sheet of {device!r}.{nearest(device, GPUS)} There are: {', '.join(GPUS)}. "
            "Measure it with `nas latency profile`."
        )
    if runtime not in _LAUNCH_MS:
        raise ConfigError(f"runtime {runtime!r} of a GPU: allowed are {', '.join(_LAUNCH_MS)}.")
    launch = _LAUNCH_MS[runtime]
    own = SpaceUnits(space, io, () if plain is None else (plain_digest(plain),))
    units, works = own.units, Works(batch_size, gpu=gpu)
    milliseconds = {"launches": launch} | {name: 1 / share for name, share in _SHARES.items()}
    unit_ms = np.empty(len(units))
    extremes = []
    for part, some in units.chunks():
        counted, buildable = works.of_all(some)
        floor = counted.select(list(milliseconds)) @ np.array(list(milliseconds.values()))
        unit_ms[part] = np.where(buildable, np.maximum(floor, 1e-6), np.nan)
        settings = some.described()
        extremes += [settings.values.min(axis=0), settings.values.max(axis=0)]
    model = UnitModel(
        tuple(milliseconds),
        np.array(list(milliseconds.values())),
        np.zeros(3),
        settings.names,
        Trees.none(),
        math.inf,
        np.min(extremes, axis=0),
        np.max(extremes, axis=0),
    )
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
    }
    composition = Composition(1.0, np.zeros(1), 0.0, np.empty((0, 0)))
    profiled = Profiled(units, unit_ms, unit_ms, np.zeros(len(unit_ms), dtype=bool))
    return LatencyPredictor(meta, model, composition, profiled, (own,))
