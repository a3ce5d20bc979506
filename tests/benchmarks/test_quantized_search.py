"""The two-step habit's integer programme, and what both arms are judged by."""

from __future__ import annotations

import argparse
import itertools
import json
import sys

import numpy as np
import pytest

from mixnas.search.config import load_config
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.operators.quantization.policy import uniform
from mixnas.search_space.units import IOSpec, plan


@pytest.fixture
def script(scripts):
    import _quantized_search

    yield _quantized_search
    for name in ("_quantized_search", "svg"):
        sys.modules.pop(name, None)


def test_the_integer_programme_is_the_best_of_all(script):
    rng = np.random.default_rng(0)
    for _ in range(20):
        rises, spent = rng.random((4, 3)), rng.random((4, 3))
        least = spent.min(axis=1).sum()
        budget = least + 0.3 * (spent.max(axis=1).sum() - least)
        picked = script.programme(rises, spent, budget)
        rows = np.arange(4)
        assert spent[rows, picked].sum() <= budget + 1e-6
        allowed = [p for p in itertools.product(range(3), repeat=4) if spent[rows, list(p)].sum() <= budget]
        best = min(rises[rows, list(p)].sum() for p in allowed)
        assert rises[rows, picked].sum() == pytest.approx(best, abs=1e-4)
    nothing = script.programme(np.zeros((2, 2)), np.array([[2.0, 1.0], [1.0, 2.0]]), 10.0)
    assert nothing == [1, 0]  # of equals the cheaper


def test_policies_go_to_the_branches_that_they_are_named_for(script):
    blocks = [{"mixer": "attention", "channel_mixer": "mlp", "quant": "fp32"}] * 2
    architecture = Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "blocks": blocks}]})
    io = IOSpec("image", (8, 8), 1, 10)
    quant = Op("w8a8")
    changed = script.with_policies(architecture, {"stages.0.blocks.1.token": quant})
    found = {name for name, unit in plan(changed, io) if unit.quant == quant}
    assert found == {"stages.0.blocks.1.token"}
    names = [name for name, unit in plan(architecture, io) if unit.quant is not None]
    assert script.with_policies(architecture, dict.fromkeys(names, quant)) == uniform(architecture, quant)
    assert script.policies_used(changed) == ["fp32", "fp32", "w8a8", "fp32"]


def test_arms_are_judged_in_one_box(script):
    def network(arm, accuracy, ms, stored):
        return {"arm": arm, "accuracy": accuracy, "latency_ms": ms, "weight_bytes": stored}

    networks = [
        network(script.FP32, 0.9, 2.0, 400.0),
        network(script.W8A8, 0.9, 1.0, 100.0),
        network(script.PROGRAMME, 0.8, 1.5, 200.0),
        network(script.JOINT, 0.95, 1.0, 100.0),
    ]
    found = script.judged([{"seed": 0, "networks": networks}])
    volumes = {arm: values[0] for arm, values in found["hypervolume"].items()}
    assert volumes[script.JOINT] > volumes[script.TWO_STEPS] >= volumes["two steps, w8a8"]
    assert volumes["two steps, w8a8"] > volumes["two steps, integer programme"]  # which w8a8 dominates
    assert found["joint is better, of the seeds"] == 1


def test_seeds_of_records_with_the_same_settings_are_put_together(script, scripts, tmp_path):
    config = scripts.parent / "configs" / "joint.yaml"
    settings = {name: 1 for name in script.SETTINGS} | {"space": load_config(config).space}

    def record(seeds, settings):
        network = {"arm": script.JOINT, "accuracy": 0.9, "latency_ms": 1.0, "weight_bytes": 10.0}
        other = network | {"arm": script.FP32, "latency_ms": 2.0}
        both = [{"seed": seed, "networks": [network, other]} for seed in seeds]
        return json.loads(json.dumps({"settings": settings, "seeds": both}))

    kept = []
    args = argparse.Namespace(
        **{name: 1 for name in script.SETTINGS},
        config=config,
        before=[record([1], settings), record([0, 1], settings), record([2], settings | {"steps": 2})],
        only=[0, 1],  # which are there: nothing is searched
        tables=None,
        checkpoint=kept.append,
        output=tmp_path,
    )
    found = script.run(args, lambda text: None)
    assert [seed["seed"] for seed in found["seeds"]] == [0, 1]
    assert len(found["hypervolume"][script.JOINT]) == 2 and kept[-1] is found
    assert (tmp_path / "quantization-joint.svg").read_text(encoding="utf-8").startswith("<svg")
