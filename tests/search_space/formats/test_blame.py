"""One weight changed in a file after it was written, under every policy: verification names the unit, however little
comes of it; and what units answer names it too, where nothing is known of weights."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import IntegrityError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.blame import first_divergence, other_weight
from mixnas.search_space.formats.format import Format, NotIdentical
from mixnas.search_space.formats.safetensors import FORMAT, load_tensors, save_tensors
from mixnas.search_space.network import Network

from ...contracts.format import FEATURES, available, content, network_of, small
from .archive import change_record

FORMATS = ("safetensors", "torch-export", "onnx")
QUANTS = registry.names("quant")
QUICK = ("sparse24",)
BRANCHES = ("token", "channel")
X = FEATURES.example(6, generator=torch.Generator().manual_seed(1))


PAIRS = tuple(itertools.zip_longest(QUANTS[::2], QUANTS[1::2], fillvalue="fp32"))


@functools.cache
def network(pair: int) -> Network:
    """Two policies, each in a branch of the second block; the first block runs twice where it is the first pair.

    Not all in one: what is looked into many times is read as often, and takes as long as it is large.
    """
    token, channel = PAIRS[pair]
    first = {"mixer": "identity", "channel_mixer": "mlp", "recursion": 2 if pair == 0 else 1}
    second = {"mixer": "attention", "channel_mixer": "mlp", "quant": {"mixer": token, "channel_mixer": channel}}
    stage = {"width": 16, "blocks": [first, second]}
    return network_of(Architecture.from_dict({"stem": "conv", "norm": "layer", "stages": [stage]}), FEATURES)


@functools.cache
def written(name: str, pair: int) -> dict[str, bytes]:
    """The files of a format, by name."""
    file_format = formats.get(name)
    with tempfile.TemporaryDirectory() as folder:
        file_format.write(network(pair), Path(folder) / file_format.file_name, {})
        return {entry.name: entry.read_bytes() for entry in Path(folder).iterdir()}


@pytest.fixture(params=FORMATS)
def file_format(request: pytest.FixtureRequest) -> Format:
    return available(request.param)


def laid(file_format: Format, folder: Path, pair: int) -> Path:
    """A file of a format, with those beside it."""
    for entry, whole in written(file_format.name, pair).items():
        (folder / entry).write_bytes(whole)
    return folder / file_format.file_name


def a_weight(network: Network, unit: str) -> str:
    """What is multiplied in a unit, as it is stored."""
    ends = ("up.weight", "up.values", "query.weight", "query.values")
    (name,) = (n for n in network.state_dict() if n.startswith(f"{unit}.") and n.endswith(ends))
    return name


def at(place: int, flip: int) -> Callable[[bytearray], None]:
    """Flips bits of a byte."""

    def change(content: bytearray) -> None:
        content[place] ^= flip

    return change


def changed(path: Path, weight: str, change: Callable[[bytearray], None]) -> None:
    """Change the bytes of a tensor in a file of any of the formats, which is then as whole as before."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        content = bytearray(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        change(content)
        return torch.frombuffer(content, dtype=tensor.dtype).view(tensor.shape)

    if path.suffix == ".safetensors":
        tensors, metadata = load_tensors(path, FORMAT)
        save_tensors(path, {**tensors, weight: of(tensors[weight])}, metadata)
    elif path.suffix == ".pt2":
        change_record(path, weight, change)
    else:
        onnx = pytest.importorskip("onnx")
        model = onnx.load(str(path))
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
        content = bytearray(tensor.raw_data)
        change(content)
        tensor.raw_data = bytes(content)
        onnx.save(model, str(path))


def all_signs(tensor: torch.Tensor) -> Callable[[bytearray], None]:
    """Flips the sign of every value of a tensor; two in a byte where it is packed."""

    def change(content: bytearray) -> None:
        for last in range(tensor.element_size() - 1, len(content), tensor.element_size()):  # little endian
            content[last] ^= 0x88 if tensor.dtype == torch.uint8 else 0x80

    return change


@pytest.mark.parametrize("quant", [q if q in QUICK else pytest.param(q, marks=pytest.mark.slow) for q in QUANTS])
def test_verification_names_the_unit_of_a_weight_that_was_changed(file_format: Format, tmp_path: Path, quant: str):
    """By the weight, of which the last bit of one value is changed, and hardly anything comes of it. By what units
    answer where no weight says it: here each of its values has the other sign."""
    pair, branch = divmod(QUANTS.index(quant), 2)
    path, plain, unit = laid(file_format, tmp_path, pair), network(pair), f"stages.0.blocks.1.{BRANCHES[branch]}"
    whole, weight = path.read_bytes(), a_weight(plain, unit)
    changed(path, weight, at(0, 1))
    with pytest.raises(IntegrityError, match="The file is wrong") as caught:
        formats.verify(file_format, path, plain, X)
    said = str(caught.value)
    assert f"The first unit that differs is {unit}, by up to " in said and str(path) in said
    assert f"{weight} is not the network's: 1 of " in said and not isinstance(caught.value, NotIdentical)
    path.write_bytes(whole)
    changed(path, weight, all_signs(plain.state_dict()[weight]))
    said = first_divergence(file_format, path, plain, X)
    assert said.startswith(f"The first unit that differs is {unit}, by up to ")


@pytest.mark.parametrize("pair", range(len(PAIRS)))
def test_a_whole_file_has_the_networks_weights_and_each_unit_answers_alike(
    file_format: Format, tmp_path: Path, pair: int
):
    """Also where one runs twice."""
    path, plain = laid(file_format, tmp_path, pair), network(pair)
    assert other_weight(file_format, path, plain) is None
    assert first_divergence(file_format, path, plain, X) == "Each unit by itself answers as the network's does."
    names = [name for name, _ in file_format.unit_outputs(path, X.numpy())]  # type: ignore[attr-defined]
    assert names == [name for name, _ in plain.units()]


def test_weights_of_a_float_network_have_their_names_also_where_the_exporter_transposes_them(tmp_path: Path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = tmp_path / "model.onnx"
    path.write_bytes(content("onnx"))
    plain, file_format = small(FEATURES), formats.get("onnx")
    there = file_format.stored(path)  # type: ignore[attr-defined]
    weights = {name: tensor for name, tensor in plain.state_dict().items() if name.endswith("weight")}
    assert weights.keys() <= there.keys() and other_weight(file_format, path, plain) is None
    turned = [t.name for t in onnx.load(str(path)).graph.initializer if t.name.endswith(".T")]
    assert turned
    changed(path, turned[0], at(0, 1))
    found = other_weight(file_format, path, plain)
    assert found is not None and found.name == turned[0].removesuffix(".T")
