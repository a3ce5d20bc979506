from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mixnas.kernels.glu import glu
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import NasError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.torch_export import EXTRA_FILE, exported_network
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.policy import stored_bytes

from ...contracts.format import FEATURES, FormatContract, small


class TestTorchExport(FormatContract):
    name = "torch-export"


def test_it_holds_the_bytes_of_the_network_and_what_was_said_of_it(tmp_path):
    network, torch_export = small(FEATURES), formats.get("torch-export")
    torch_export.write(network, tmp_path / "model.pt2", {"note": "kept"})
    assert torch_export.weight_bytes(tmp_path / "model.pt2") == stored_bytes(network)
    extra = {EXTRA_FILE: ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    about = json.loads(extra[EXTRA_FILE])
    assert about["extra"] == {"note": "kept"} and about["architecture"] == network.architecture.to_dict()


@pytest.mark.parametrize("quant", ["w8a8", "w8a16", "w4a8", {"name": "w4a16", "group": 16}, "fp8", "sparse24"])
def test_a_network_that_never_ran_is_traced_without_switches_of_gradients(quant):
    """What layers keep is made at their first call: within a trace it switched gradients on for all that followed."""
    block = {"mixer": "attention", "channel_mixer": "mlp", "quant": quant}
    architecture = Architecture.from_dict({"stem": "conv", "stages": [{"width": 16, "block": block}]})
    network = Network(architecture, FEATURES, generator=torch.Generator().manual_seed(0)).eval().deploy()
    program = exported_network(network)
    assert not [str(node.target) for node in program.graph.nodes if "grad" in str(node.target)]


class Loop(nn.Module):
    def forward(self, x):
        return x * float(x.sum())


class Kernel(nn.Module):
    def forward(self, x):
        return torch.ops.mixnas.glu(x, x, "silu")


@pytest.mark.parametrize(
    ("layer", "says"),
    [(Loop(), "stages.0.blocks.0.token.mixer cannot be exported: "), (Kernel(), "mixnas.glu.default is no operation")],
)
def test_what_cannot_be_exported_is_named_and_nothing_is_left(tmp_path, layer, says):
    assert glu  # registers mixnas::glu
    network = small(FEATURES)
    network.get_submodule("stages.0.blocks.0.token").mixer = layer
    with pytest.raises(NasError, match=says) as caught:
        formats.get("torch-export").write(network, tmp_path / "model.pt2", {})
    assert len(str(caught.value).splitlines()) == 1 and not list(tmp_path.iterdir())
