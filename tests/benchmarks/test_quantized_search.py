"""What both arms are judged by, and how seeds are put together."""

from __future__ import annotations

import argparse
import json
import sys

import pytest

from mixnas.search.config import load_config


@pytest.fixture
def script(scripts):
    import _quantized_search

    yield _quantized_search
    for name in ("_quantized_search", "svg"):
        sys.modules.pop(name, None)


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
