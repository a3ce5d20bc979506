from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import METRICS, cost
from mixnas.search_space.enumeration import contexts, cost_corner, sites_of
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, plan

from .spaces import IMAGE, IOS, everything, small


def listed(space: SearchSpace) -> Iterator[Architecture]:
    """Every architecture, by brute force over all vectors."""
    seen = set()
    for vector in itertools.product(*(range(len(v.values)) for v in space.variables)):
        architecture = space.decode(vector)
        if architecture.id not in seen:
            seen.add(architecture.id)
            yield architecture


def random_space(rng: np.random.Generator) -> dict[str, Any]:
    """A small space with policies, in which the cheapest mixer depends on the policy."""
    mixers: list[Any] = [
        "identity",
        "pooling",
        "attention",
        "linear_attention",
        {"name": "convnext", "kernel_size": 3, "expansion": [1, 2]},
        {"name": "ssm", "state": 8, "kernel_size": 3},
        {"name": "dwconv", "kernel_size": [3, 7]},
        {"name": "gla", "heads": 2},
        {"name": "inception_dwconv", "branch_ratio": 0.25},
    ]
    gates = ["none", "se", "output_sigmoid"]
    channels = ["none", {"name": "mlp", "expansion": [1, 2]}, {"name": "swiglu", "expansion": 2}, "inverted_residual"]
    quants = [["fp32", "bf16"], "bf16", {"mixer": ["bf16", "fp32"], "channel_mixer": ["fp32", "bf16"]}]

    def some(options: list[Any], least: int, most: int) -> list[Any]:
        picked = rng.choice(len(options), size=int(rng.integers(least, most + 1)), replace=False)
        return [options[i] for i in sorted(picked)]

    def block() -> dict[str, Any]:
        return {
            "mixer": some(mixers, 1, 3),
            "gate": some(gates, 1, 2),
            "channel_mixer": some(channels, 1, 2),
            "quant": quants[int(rng.integers(3))],
            "recursion": some([1, 2], 1, 1),
        }

    plain: dict[str, Any] = {"stem": "conv", "norm": some(["layer", "batch"], 1, 2), "stages": []}
    plain["stages"].append({"width": some([4, 8], 1, 2), "block": block(), "downsample": some(["none", "patch"], 1, 2)})
    return plain


@pytest.mark.parametrize("seed", range(12))
def test_corners_are_exact_by_brute_force(seed):
    space = SearchSpace.from_dict(random_space(np.random.default_rng(seed)))
    costs = [cost(architecture, IMAGE) for architecture in listed(space)]
    assert len(costs) == space.size()
    for metric in METRICS:
        values = [getattr(c, metric) for c in costs]
        for largest, extreme in ((False, min(values)), (True, max(values))):
            corner = cost_corner(space, IMAGE, metric, largest=largest)
            assert space.contains(corner.architecture)
            assert corner.value == getattr(cost(corner.architecture, IMAGE), metric) == extreme


def test_the_smallest_weights_are_those_of_the_dearer_mixer_in_bfloat16():
    """Attention has more parameters than a small ConvNeXt, but all of them shrink (9 taps and a norm do not)."""
    block = {"mixer": ["attention", {"name": "convnext", "kernel_size": 3, "expansion": 1}], "channel_mixer": "none",
             "quant": ["fp32", "bf16"]}  # fmt: skip
    space = SearchSpace.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]})
    assert cost_corner(space, IOSpec("image", (8, 8), 1, 10), "weight_bytes", largest=False).value == 1384


def test_corners_of_a_space_too_large_to_list():
    plain = small()
    plain["stages"].append({"width": [4, 8], "downsample": ["none", "patch"], "block": plain["stages"][0]["block"]})
    space = SearchSpace.from_dict(plain)
    sampled = [cost(a, IMAGE) for a in space.decode_many(space.sample_many(300, np.random.default_rng(0)))]
    for metric in METRICS:
        low, high = (cost_corner(space, IMAGE, metric, largest=largest) for largest in (False, True))
        for corner in (low, high):
            assert space.contains(corner.architecture)
            assert getattr(cost(corner.architecture, IMAGE), metric) == corner.value
        values = [getattr(c, metric) for c in sampled]
        assert low.value <= min(values) and max(values) <= high.value


@pytest.mark.parametrize("kind", IOS)
def test_every_operator_of_every_architecture_has_a_site(kind):
    space, io = everything(kind), IOS[kind]
    sites = {(s.unit, s.axis, s.op, s.before, s.after): s.quants for s in sites_of(space, io)}
    inside = contexts(space, io)
    rng = np.random.default_rng(0)
    for _ in range(40):
        for name, unit in plan(space.sample(rng), io):
            for axis, op in unit.ops:
                after = unit.after if axis in registry.BETWEEN else unit.before
                quants = sites[name, axis, op, unit.before, after]
                assert (unit.quant in quants) if axis not in ("norm", *registry.BETWEEN) else not quants
            if name.startswith("stages.") and unit.role in ("token", "channel"):
                assert unit.before in inside[int(name.split(".")[1])]


def test_the_cases_of_the_review_are_searchable():
    cases = Path(__file__).resolve().parents[3] / "shared" / "cases"
    if not cases.exists():
        pytest.skip(f"{cases.name} is not beside this checkout")
    for name in ("four-stages.yaml", "shared-blocks.yaml"):
        space = SearchSpace.load(cases / name)
        assert cost_corner(space, IOSpec("image", (8, 8), 1, 10), "params", largest=True).value > 0
