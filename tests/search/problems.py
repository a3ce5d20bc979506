"""Small search problems with made-up metrics, for tests that need no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mixnas.evaluators.protocol import Metric, Outcome, Request, attempt
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.space import SearchSpace

SPACE = {
    "stem": {"name": "conv", "stride": 1},
    "norm": ["layer", "rms"],
    "stages": [
        {
            "width": [16, 24, 32],
            "depth": [1, 2, 3],
            "block": {
                "mixer": [
                    {"name": "dwconv", "kernel_size": [3, 5, 7]},
                    {"name": "attention", "heads": [2, 4]},
                    "identity",
                ],
                "gate": ["none", "se"],
                "channel_mixer": [{"name": "mlp", "expansion": [2, 4]}, {"name": "swiglu", "expansion": [2, 3]}],
            },
        }
    ],
}
TINY = {
    "stem": {"name": "conv", "stride": 1},
    "stages": [
        {"width": [16, 32], "depth": [1, 2], "block": {"mixer": ["dwconv", "identity"], "channel_mixer": "mlp"}}
    ],
}


def analytic(architecture: Architecture) -> dict[str, float]:
    """Made-up metrics that are quick, deterministic and in conflict with each other."""
    params, quality = 0.0, 0.0
    for stage in architecture.stages:
        for block in stage.blocks:
            expansion = float(block.channel_mixer.get("expansion"))
            gated = block.gate.name == "se"
            params += stage.width**2 * expansion * (1.5 if gated else 1.0)
            quality += {"attention": 0.05, "dwconv": 0.04}.get(block.mixer.name, 0.0) + 0.01 * expansion + 0.01 * gated
    width = architecture.stages[-1].width
    return {
        "accuracy": 0.5 + quality * width / 64,
        "latency_ms": params / 1e4 + len(architecture.id) / 1e3,
        "params": params,
    }


class FromFunction:
    """An evaluator whose metrics a function makes up."""

    metrics: Mapping[str, Metric] = {}
    finishing = "nothing"
    device = "cpu"

    def __init__(self, function: Callable[[Architecture], Mapping[str, float]]) -> None:
        self._function = function

    @property
    def spec(self) -> FromFunction:
        return self

    def open(self) -> FromFunction:
        return self

    def prepare(self, report: Report = SILENT, should_stop: Callable[[], bool] | None = None) -> None:
        pass

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        return [attempt(lambda r: Outcome(self._function(r.architecture)), request) for request in requests]

    def finish(
        self, architecture: Architecture, report: Report = SILENT, should_stop: Callable[[], bool] | None = None
    ):
        raise AssertionError("nothing is trained here")


def cheap_of(
    space: SearchSpace, function: Callable[[Architecture], Mapping[str, float]], *names: str
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """Some of a function's metrics as metrics that are known beforehand."""

    def cheap(matrix: np.ndarray) -> dict[str, np.ndarray]:
        found = [function(architecture) for architecture in space.decode_many(matrix)]
        return {name: np.array([metrics[name] for metrics in found]) for name in names}

    return cheap
