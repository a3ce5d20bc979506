from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mixnas.search.run.integrity import weights_problem
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.safetensors import (
    load_network,
    load_tensors,
    read_extra,
    save_network,
    save_tensors,
)
from mixnas.search_space.network import Network

from ...contracts.cases import IOS, covering
from ...contracts.format import FEATURES, FormatContract, content, network_of, small
from ..operators.quantization import toy

FORMER = Path(__file__).parents[2] / "data" / "v1"
QUANTS = ("fp32", "bf16", toy.NAME)


class TestSafetensors(FormatContract):
    name = "safetensors"


def test_any_changed_byte_is_noticed(tmp_path):
    whole, path = content("safetensors"), tmp_path / "model.safetensors"
    generator = np.random.default_rng(0)
    for place in [0, 8, len(whole) - 1, *generator.integers(len(whole), size=100)]:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(changed)
        with pytest.raises(NasError):
            load_network(path)


@pytest.fixture
def toy_policy():
    with toy.registered():
        yield


@pytest.mark.usefixtures("toy_policy")
@pytest.mark.parametrize("kind", IOS)
def test_a_deployed_network_is_stored_in_the_bytes_that_its_cost_says(kind, tmp_path):
    """Every operator, every policy, one with tensors of its own among them: bytes, outputs, reading back."""
    for architecture in covering(kind, QUANTS)[: len(QUANTS)]:
        network = network_of(architecture, IOS[kind])
        save_network(tmp_path / "model", network)
        stored = formats.get("safetensors").weight_bytes(tmp_path / "model")
        assert stored == cost(architecture, IOS[kind]).weight_bytes
        loaded = load_network(tmp_path / "model")
        assert loaded.deployed and loaded.architecture == architecture and loaded.io == IOS[kind]
        x = IOS[kind].example(2)
        with torch.no_grad():
            assert torch.equal(loaded(x), network(x))
        assert not any(module.training for module in loaded.modules())


def test_a_network_that_is_not_deployed_comes_back_to_be_trained_on(tmp_path):
    block = {"mixer": "attention", "channel_mixer": "mlp", "quant": "bf16"}
    architecture = Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]})
    network = Network(architecture, FEATURES).eval()
    save_network(tmp_path / "model", network, {"accuracy": 0.5})
    loaded = load_network(tmp_path / "model")
    assert not loaded.deployed and read_extra(tmp_path / "model") == {"accuracy": 0.5}
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), network.parameters(), strict=True))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    save_network(tmp_path / "deployed", loaded.deploy())
    assert (tmp_path / "deployed").stat().st_size < (tmp_path / "model").stat().st_size


@pytest.mark.parametrize("key", ["architecture", "io", "deployed", "extra", "format"])
def test_changed_metadata_is_noticed(key, tmp_path):
    path = tmp_path / "model"
    save_network(path, small(FEATURES), {"accuracy": 0.5})
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    changes = {
        "architecture": ('"heads":4', '"heads":2'),
        "io": ('"kind": "image"', '"kind": "other"'),
        "deployed": ("true", "false"),
        "extra": ("0.5", "0.9"),
        "format": ("-2", "-1"),
    }
    changed = metadata[key].replace(*changes[key])
    assert changed != metadata[key]
    save_file(tensors, path, metadata=metadata | {key: changed})
    with pytest.raises(IntegrityError, match="does not match its digest; the file is damaged"):
        load_network(path)


def test_a_changed_tensor_is_named_with_its_unit_where_that_can_be_known(tmp_path):
    """By who loads the file, and by who looks through a run or an export without torch."""
    path = tmp_path / "model"

    def said() -> str:
        with pytest.raises(IntegrityError, match="does not match its digest") as caught:
            load_network(path)
        here = weights_problem(path).removeprefix("damaged: not what was written: ")
        assert f"the file is damaged: {here} Write it again." in str(caught.value)
        return here

    save_network(path, small(FEATURES))
    assert weights_problem(path) == ""
    with safe_open(str(path), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weight = "stages.0.blocks.0.channel.channel_mixer.mlp.up.weight"
    other = tensors[weight].clone()
    other.view(-1)[-1] += 1e-6
    save_file(tensors | {weight: other}, path, metadata=metadata)
    assert said() == f"{weight} (unit stages.0.blocks.0.channel) is not what was written."
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, metadata=metadata)
    assert f" and {len(tensors) - 3} more are not what was written" in said()
    save_file({name: tensor for name, tensor in tensors.items() if name != weight}, path, metadata=metadata)
    assert said() == f"{weight} (unit stages.0.blocks.0.channel) is missing."
    save_file(tensors, path, metadata=metadata | {"extra": "{ }"})
    assert said() == "its tensors are those that were written, and what is said beside them is not."
    save_file(tensors, path, metadata={key: value for key, value in metadata.items() if key != "checks"})
    assert said() == "which tensor it is cannot be told: the file has no check of each by itself."


def test_weights_of_another_type_than_the_policys_are_refused(tmp_path):
    """Loading would round them silently, and the bytes would not be those of the card."""
    block = {"mixer": "attention", "channel_mixer": "none", "quant": "bf16"}
    network = network_of(Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]}), FEATURES)
    network.float()
    save_network(tmp_path / "model", network)
    with pytest.raises(IntegrityError, match=r"attention.* is stored as torch\.float32, not as torch\.bfloat16"):
        load_network(tmp_path / "model")


def test_a_missing_and_a_foreign_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_network(tmp_path / "nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(IntegrityError, match="its format is 'nothing'; this needs 'mixnas-network-2'"):
        load_network(tmp_path / "foreign")
    save_tensors(tmp_path / "other", {"a": torch.zeros(1)}, {"format": "of another kind"})
    with pytest.raises(IntegrityError, match="its format is 'of another kind'"):
        load_network(tmp_path / "other")


# -- files of the previous version ----------------------------------------------------------------------------------


def former_input(io) -> torch.Tensor:
    """What the outputs that are kept beside the files were computed from."""
    shape = (2, *io.size) if io.tokens else (2, *io.size, io.in_features)
    numbers = torch.arange(torch.Size(shape).numel())
    if io.tokens:
        return (numbers * 7 % io.in_features).view(shape)
    return torch.sin(numbers.double()).float().view(shape)


FORMER_OUTPUTS = json.loads((FORMER / "outputs.json").read_text())


@pytest.mark.parametrize("name", FORMER_OUTPUTS)
def test_networks_of_the_previous_version_open_and_compute_what_they_did(name):
    """`networks/` holds every operator that there was, in each kind of task; bf16 was autocast then."""
    network = load_network(FORMER / name)
    assert not network.deployed
    with torch.no_grad():
        found = network(former_input(network.io))
    expected = torch.tensor(FORMER_OUTPUTS[name]).view(found.shape)
    quants = {block.quant.name for stage in network.architecture.stages for block in stage.blocks}
    limit = 2e-2 if "bf16" in quants else 1e-5
    assert (found - expected).abs().max() <= limit * expected.abs().max()


def test_the_kept_outputs_are_of_every_file_and_every_operator_that_there_was():
    files = {str(path.relative_to(FORMER)) for path in FORMER.rglob("*.safetensors") if path.stem != "supernet"}
    assert files == set(FORMER_OUTPUTS)
    assert {read_extra(FORMER / name)["task"] for name in files if "finished" in name} == {"digits"}


def test_a_super_network_of_the_previous_version_is_read():
    tensors, metadata = load_tensors(FORMER / "finished" / "supernet.safetensors", "mixnas-supernet-1")
    assert metadata["task"] == "digits" and tensors
