"""Whole numbers in files: each layer by itself, all of a network, and what is said where one is another."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.format import NotIdentical
from mixnas.search_space.formats.integers import _moved_by_itself, _reached, compared, whole_layers
from mixnas.search_space.network import Network

from ...contracts.format import FEATURES, network_of

X = FEATURES.example(8, generator=torch.Generator().manual_seed(1))


def network_with(quant: str, **more: object) -> Network:
    block = {"mixer": "attention", "channel_mixer": "mlp", "quant": quant, **more}
    plain = {"stem": {"name": "conv", "stride": 2}, "norm": "layer", "stages": [{"width": 32, "blocks": [block]}]}
    return network_of(Architecture.from_dict(plain), FEATURES)


@functools.cache
def written(quant: str) -> bytes:
    """An ONNX file, which takes a second or more."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        formats.get("onnx").write(network_with(quant), path, {})
        return path.read_bytes()


@pytest.fixture
def onnx():
    try:
        formats.require(formats.get("onnx"))
    except ConfigError as error:
        pytest.skip(str(error))
    import onnx

    return onnx


@pytest.mark.parametrize("quant", ["w8a8", "w4a8", "w8a8_static"])
def test_layers_of_an_onnx_file_answer_the_same_inputs_to_the_last_bit(onnx, quant, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(written(quant))
    network = network_with(quant)
    found = compared(formats.get("onnx"), path, network, X)
    assert found is not None and found.layers == found.alike == 6 == len(whole_layers(network))
    assert found.numbers == 8 * (2 * 4) * 32 * (5 + 4)  # inputs, tokens, channels; one layer reads 4 x 32


NORM = "stages.0.blocks.0.channel.norm.layer"


def moved(onnx, path: Path, by: float) -> None:
    """Have a norm answer a little more, as another order of its sums might; its weights are the network's still."""
    model = onnx.load(str(path))
    (place, norm) = next((i, n) for i, n in enumerate(model.graph.node) if f"{NORM}.bias" in n.input)
    answer, norm.output[0] = norm.output[0], f"{norm.output[0]}.before"
    name = f"moved.{len(model.graph.initializer)}"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(by, np.float32), name))
    model.graph.node.insert(place + 1, onnx.helper.make_node("Add", [norm.output[0], name], [answer]))
    onnx.save(model, str(path))


def test_a_number_that_is_rounded_otherwise_is_refused_with_the_operator_and_the_reason(onnx, tmp_path):
    path, network, file_format = tmp_path / "model.onnx", network_with("w8a8"), formats.get("onnx")
    path.write_bytes(written("w8a8"))
    moved(onnx, path, 2e-4)
    with pytest.raises(NotIdentical) as caught:
        formats.verify(file_format, path, network, X)
    said = str(caught.value)
    assert re.search(r"whole numbers are not those of the network \(6 of 6 layers answer the same inputs ident", said)
    assert "stages.0.blocks.0.channel.channel_mixer" in said and "(w8a8) is the first where they differ" in said
    assert "LayerNormalization (stages.0.blocks.0.token.norm" in said and ") adds floats in another order" in said
    stated = formats.verify(file_format, path, network, X, stated=0.5)
    assert 0 < stated.difference <= 0.5 == stated.allowed and not stated.identical
    assert stated.integers is not None and 0 < stated.integers.moved < stated.integers.numbers
    assert stated.integers.ties and f"torch itself moves {stated.integers.own:,})" in said
    with pytest.raises(IntegrityError, match=r"by up to .*, where 1e-06 is allowed"):
        formats.verify(file_format, path, network, X, stated=1e-6)


def test_moved_numbers_are_why_also_where_outputs_differ_by_more_than_is_allowed(onnx, tmp_path, monkeypatch):
    path, network, file_format = tmp_path / "model.onnx", network_with("w8a8"), formats.get("onnx")
    path.write_bytes(written("w8a8"))
    moved(onnx, path, 2e-4)
    compare = formats.compare

    def strict(answer, network, inputs, what, stated=None):
        return compare(answer, network, inputs, what, 1e-9 if stated is None else stated)

    monkeypatch.setattr(formats, "compare", strict)
    with pytest.raises(NotIdentical, match=r"by up to .* is allowed .*; .*whole numbers are not those") as caught:
        formats.verify(file_format, path, network, X)
    assert "The file is wrong" not in str(caught.value)
    moved(onnx, path, 2e-2)
    with pytest.raises(IntegrityError, match="The file is wrong") as caught:
        formats.verify(file_format, path, network, X)
    assert not isinstance(caught.value, NotIdentical)


def test_what_no_order_of_sums_explains_is_wrong_and_not_only_rounded_otherwise(onnx, tmp_path):
    path, network, file_format = tmp_path / "model.onnx", network_with("w8a8"), formats.get("onnx")
    path.write_bytes(written("w8a8"))
    moved(onnx, path, 2e-3)
    with pytest.raises(IntegrityError, match="more than an order of sums explains") as caught:
        formats.verify(file_format, path, network, X)
    assert not isinstance(caught.value, NotIdentical) and "The file is wrong" in str(caught.value)
    assert "channel_mixer.mlp.up (w8a8) is the first where they differ" in str(caught.value)


def test_a_network_that_adds_in_another_order_is_seen_to_move_its_own_numbers(monkeypatch):
    """One input at a time: here by a stem that is told to compute otherwise then."""
    network = network_with("w8a8")
    stem = network.get_submodule("stem")
    whole, other = stem.forward, 1e-2 * torch.arange(32).sin()
    monkeypatch.setattr(stem, "forward", lambda x: whole(x) + (other if len(x) == 1 else 0.0))
    layers = whole_layers(network)
    with torch.no_grad():
        together = _reached(network, X, layers)
        assert _moved_by_itself(network, X, layers, together) > 0


@pytest.mark.parametrize("name", ["torch-export", "safetensors"])
@pytest.mark.parametrize("quant", ["w8a8", "w8a8_static", "w4a8", "w4a16"])
def test_what_torch_loads_is_the_network_to_the_last_bit(name, quant, tmp_path):
    """Also where eager mode takes another path, chosen by the batch's size: the scan in pieces, fused products."""
    network = network_with(quant, channel_mixer={"name": "mlp", "expansion": 4}, mixer="ssm")
    file_format = formats.get(name)
    path = tmp_path / file_format.file_name
    file_format.write(network, path, {})
    inputs = FEATURES.example(48, generator=torch.Generator().manual_seed(2))
    found = formats.verify(file_format, path, network, inputs)
    assert found.identical and found.difference == 0


def test_eager_mode_computes_as_a_trace_where_it_is_told_to():
    network = network_with("w8a8_static", mixer="ssm")
    with torch.no_grad():
        fast = network(X)
        assert not dispatch.tracing()
        with dispatch.as_traced():
            assert dispatch.tracing()
            plain = network(X)
    assert not dispatch.tracing()
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3)


def test_widened_weights_are_held_to_what_float32_is():
    few, whole = (formats.tolerance(network_with(quant)) for quant in ("w4a16", "w8a8"))
    assert few == formats.tolerance(torch.nn.Linear(2, 2)) == 1e-4 and whole == 2e-2
    assert formats.tolerance(network_with("fp8")) == 2e-2 == formats.tolerance(network_with("bf16"))
