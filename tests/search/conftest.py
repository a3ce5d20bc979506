from __future__ import annotations

import pytest

from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search_space.architecture import Architecture
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


@pytest.fixture(scope="session")
def space():
    return SearchSpace.from_dict(SPACE)


@pytest.fixture(scope="session")
def tiny():
    """16 + ... architectures: small enough to run out."""
    return SearchSpace.from_dict(TINY)


@pytest.fixture(scope="session")
def evaluator():
    return analytic


@pytest.fixture(scope="session")
def objectives():
    return parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})


@pytest.fixture(scope="session")
def constraints():
    return parse_constraints(["params <= 1e4"])
