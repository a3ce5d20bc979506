"""The networks that the benchmark of exports draws, and what it says of one that is wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mixnas.search_space import registry
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
