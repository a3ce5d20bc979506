"""One weight changed in a file after it was written, under every policy: verification names the unit, however little
comes of it; and what units answer names it too, where nothing is known of weights."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.blame import first_divergence, other_weight
from mixnas.search_space.formats.format import Format
from mixnas.search_space.formats.safetensors import FORMAT, load_tensors, save_tensors
from mixnas.search_space.network import Network

from ...contracts.format import FEATURES, content, network_of, small

FORMATS = ("safetensors", "torch-export", "onnx")
QUANTS = registry.names("quant")
X = FEATURES.example(6, generator=torch.Generator().manual_seed(1))


@functools.cache
def network() -> Network:
    """A block for each policy; the first runs twice."""
    blocks = [{"mixer": "attention", "channel_mixer": "mlp", "quant": quant} for quant in QUANTS]
    blocks[0]["recursion"] = 2
    stage = {"width": 16, "blocks": blocks}
    return network_of(Architecture.from_dict({"stem": "conv", "norm": "layer", "stages": [stage]}), FEATURES)


@functools.cache
def written(name: str) -> dict[str, bytes]:
    """The files of a format, by name."""
    file_format = formats.get(name)
    with tempfile.TemporaryDirectory() as folder:
        file_format.write(network(), Path(folder) / file_format.file_name, {})
        return {entry.name: entry.read_bytes() for entry in Path(folder).iterdir()}


@pytest.fixture(params=FORMATS)
def file_format(request: pytest.FixtureRequest) -> Format:
    found = formats.get(request.param)
    try:
        formats.require(found)
    except ConfigError as error:
        pytest.skip(str(error))
    return found


@pytest.fixture
def path(file_format: Format, tmp_path: Path) -> Path:
    for entry, whole in written(file_format.name).items():
        (tmp_path / entry).write_bytes(whole)
    return tmp_path / file_format.file_name


def unit_of(quant: str, branch: str = "channel") -> str:
    return f"stages.0.blocks.{QUANTS.index(quant)}.{branch}"


def a_weight(unit: str) -> str:
    """What is multiplied in a unit, as it is stored."""
    ends = ("up.weight", "up.values", "query.weight", "query.values")
    (name,) = (n for n in network().state_dict() if n.startswith(f"{unit}.") and n.endswith(ends))
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
        program = torch.export.load(path)
        with torch.no_grad():
            program.state_dict[weight].copy_(of(program.state_dict[weight]))
        torch.export.save(program, path)
    else:
        onnx = pytest.importorskip("onnx")
        model = onnx.load(str(path))
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == weight)
        content = bytearray(tensor.raw_data)
        change(content)
        tensor.raw_data = bytes(content)
        onnx.save(model, str(path))


def top_bit(name: str) -> Callable[[bytearray], None]:
    """The sign of the greatest value of a tensor, or as much of one that is packed."""
    tensor = network().state_dict()[name]
    greatest = int(tensor.float().abs().flatten().argmax())
    last = (greatest + 1) * tensor.element_size() - 1  # little endian
    return at(last, 0x88 if tensor.dtype == torch.uint8 else 0x80)


@pytest.mark.parametrize("quant", QUANTS)
def test_the_unit_of_a_weight_that_was_changed_is_named(file_format: Format, path: Path, quant: str):
    """The last bit of one value, of which hardly anything comes."""
    unit = unit_of(quant)
    weight = a_weight(unit)
    changed(path, weight, at(0, 1))
    with pytest.raises(IntegrityError) as caught:
        formats.verify(file_format, path, network(), X)
    said = str(caught.value)
    assert f"The first unit that differs is {unit}, by up to " in said and "The file is wrong" in said
    assert f"{weight} is not the network's: 1 of " in said and str(path) in said


@pytest.mark.parametrize("quant", QUANTS)
def test_what_units_answer_says_which_is_wrong_where_weights_do_not(file_format: Format, path: Path, quant: str):
    assert first_divergence(file_format, path, network(), X) == "Each unit by itself answers as the network's does."
    for unit in (unit_of(quant), unit_of(quant, "token")):
        lay = path.read_bytes()
        weight = a_weight(unit)
        changed(path, weight, top_bit(weight))
        said = first_divergence(file_format, path, network(), X)
        assert said.startswith(f"The first unit that differs is {unit}, by up to "), f"{weight}: {said}"
        path.write_bytes(lay)


def test_weights_of_a_whole_file_are_the_networks_and_all_there(file_format: Format, path: Path):
    assert other_weight(file_format, path, network()) is None
    there = file_format.stored(path)  # type: ignore[attr-defined]
    assert {a_weight(unit_of(quant)) for quant in QUANTS} <= there.keys()
    changed(path, "stem.conv.weight", at(0, 1))
    found = other_weight(file_format, path, network())
    assert found is not None and (found.unit, found.name) == ("stem", "stem.conv.weight")


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
