from __future__ import annotations

import numpy as np
import pytest
import torch

from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats.safetensors import load_network, read_extra, save_network
from mixnas.search_space.network import Network

from ..spaces import IMAGE, everything


@pytest.fixture
def saved(tmp_path):
    network = Network(everything("image").sample(np.random.default_rng(1)), IMAGE).eval()
    path = tmp_path / "model.safetensors"
    save_network(path, network, {"accuracy": 0.5})
    return path, network


def test_a_network_comes_back_whole(saved):
    path, network = saved
    loaded = load_network(path)
    x = IMAGE.example(3)
    assert torch.equal(loaded(x), network(x)) and loaded.architecture == network.architecture
    assert not loaded.training and read_extra(path) == {"accuracy": 0.5}


@pytest.mark.parametrize("damage", ["truncate", "flip", "garbage"])
def test_a_damaged_file_is_refused(saved, damage):
    path, _ = saved
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[-100] ^= 64
    else:
        data = bytearray(b"not weights")
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="damaged"):
        load_network(path)


def test_a_missing_and_a_foreign_file_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ConfigError, match="no such file"):
        load_network(tmp_path / "nothing")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(IntegrityError, match="its format is 'nothing'"):
        load_network(tmp_path / "foreign")
