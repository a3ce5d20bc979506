"""The networks that the benchmark of exports draws, and what it says of one that is wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.apart import Apart
from mixnas.search_space.formats.safetensors import Safetensors


@pytest.fixture
def export(scripts: Path):
    spec = importlib.util.spec_from_file_location("benchmark_of_exports", scripts / "export.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_thirty_networks_have_every_operator_and_policy(export):
    covered = set()
    for architecture, io in export.draw(30, np.random.default_rng(0)):
        covered |= export.used(architecture, io)
    every = {(axis, name) for axis in registry.AXES for name in registry.names(axis)}
    assert every - covered <= {("channel_mixer", "none")}  # which leaves the branch out


def test_what_is_counted(export, tmp_path: Path, monkeypatch):
    (architecture, io), *_ = export.draw(1, np.random.default_rng(1))
    network = export.trained_looking(architecture, io, 0)
    inputs = io.example(4)
    monkeypatch.setattr(Safetensors, "why_not", lambda *_: "")
    with Apart([formats.get("safetensors")]) as apart:
        assert export.through("safetensors", network, inputs, tmp_path, apart)["result"] == "agrees"
        write = Safetensors.write

        def wrong(self, network, path, extra):
            write(self, network, path, extra)
            code = path.with_name("model.py")
            code.write_text(code.read_text().replace("self.head(self.stages", "2 * self.head(self.stages"))

        monkeypatch.setattr(Safetensors, "write", wrong)
        found = export.through("safetensors", network, inputs, tmp_path, apart)
    assert found["result"] == "wrong" and "Each unit by itself answers" in found["why"]
    monkeypatch.setattr(Safetensors, "why_not", lambda *_: "stages.0.blocks.0.token has it")
    assert export.through("safetensors", network, inputs, tmp_path, None)["result"] == "refused"


def test_only_the_policies_that_a_format_refuses_are_replaced(export):
    block = {"mixer": "pooling", "channel_mixer": "mlp", "quant": {"mixer": "bf16", "channel_mixer": "w8a8"}}
    plain = {
        "stem": "conv",
        "stages": [{"width": 16, "block": block}, {"width": 16, "block": block | {"quant": "fp32"}}],
    }
    architecture, io = Architecture.from_dict(plain), export.IOS["image"][0]
    spared = export.without_refused(formats.get("onnx"), architecture, io)
    quants = [(b.quant.name, b.channel_quant.name) for stage in spared.stages for b in stage.blocks]
    assert quants == [("fp32", "w8a8"), ("fp32", "fp32")]
    assert export.without_refused(formats.get("torch-export"), architecture, io) == architecture


def test_counts_tell_what_is_the_same_to_the_bit(export):
    agrees = {"result": "agrees", "difference": 0.0, "integers": True}
    near = {"result": "agrees", "difference": 1e-3, "integers": True}
    refused = {"result": "refused", "why": "bf16", "with_float32_instead": {"result": "agrees", "difference": 2e-6}}
    counts = export.counted([{"onnx": agrees}, {"onnx": near}, {"onnx": refused}], ["onnx"])["onnx"]
    assert (counts["agrees"], counts["refused"], counts["with_float32_instead"]["agrees"]) == (2, 1, 1)
    assert (counts["integers"], counts["integers_identical"], counts["largest_difference"]) == (2, 1, 1e-3)
