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
        "stages": [{"width": 16, "block": block}, {"width": 16, "block": block | {"quant": "w8a16"}}],
    }
    architecture = Architecture.from_dict(plain)

    def quants(name: str, *, rounds_otherwise: bool) -> list[tuple[str, str]]:
        spared = export.without_refused(formats.get(name), architecture, rounds_otherwise=rounds_otherwise)
        return [(b.quant.name, b.channel_quant.name) for stage in spared.stages for b in stage.blocks]

    assert quants("onnx", rounds_otherwise=False) == [("bf16", "w8a8"), ("w8a16", "w8a16")]
    assert quants("onnx", rounds_otherwise=True) == [("bf16", "fp32"), ("w8a16", "w8a16")]
    assert quants("torch-export", rounds_otherwise=False) == [("bf16", "w8a8"), ("w8a16", "w8a16")]


def test_counts_tell_what_is_the_same_to_the_bit(export):
    """Four files: the same; the same whole numbers, other last digits; one that rounds otherwise; one that can't be."""
    kept = {"layers": 3, "alike": 3, "numbers": 50, "moved": 0, "own": 0}
    files = [
        {"result": "agrees", "whole": True, "difference": 0.0, "identical": True},
        {"result": "agrees", "whole": True, "difference": 1e-6, "identical": False, "integers": kept},
        {"result": "refused", "whole": True, "difference": 1e-3, "identical": False}
        | {"integers": kept | {"alike": 2, "moved": 1, "own": 2, "ties": True}},
        {"result": "refused", "why": "bf16"}
        | {"with_float32_instead": {"result": "agrees", "difference": 2e-6, "identical": False}},
    ]
    counts = export.counted([{"onnx": file} for file in files], ["onnx"])["onnx"]
    assert (counts["agrees"], counts["refused"], counts["with_float32_instead"]) == (2, 2, {"agrees": 1})
    assert (counts["identical"], counts["largest_difference"]) == (1, 1e-3)
    assert counts["largest_difference_of_those_that_agree"] == 2e-6
    assert counts["of_whole_numbers"] == {
        "networks": 3,
        "outputs_identical": 1,
        "whole_numbers_identical": 2,
        "refused": 1,
        "refused_for_the_order_of_sums_alone": 1,
        "numbers": 100,
        "moved": 1,
        "moved_by_torch_itself": 2,
        "layers": 6,
        "layers_alike": 5,
    }
