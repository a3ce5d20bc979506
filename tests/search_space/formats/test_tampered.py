"""One weight changed in a file after it was written, of each kind and in every unit: verification says where."""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.safetensors import FORMAT, load_tensors, save_tensors

from ...contracts.format import FEATURES, small
from .archive import change_record

FEWEST = 5
"""Elements of a weight; what has fewer is a constant of the exporter's (an exponent, a scale)."""

NO_MATTER = "key.bias"
"""Moves all scores of a query alike: attention does not change."""

Change = Callable[[], None]


def in_safetensors(path: Path) -> Iterator[tuple[str, Change]]:
    """With the digest of what it then holds: nothing but the comparison can tell."""
    tensors, metadata = load_tensors(path, FORMAT)
    for name in tensors:

        def change(name: str = name) -> None:
            other = {key: tensor.clone() for key, tensor in tensors.items()}
            other[name].view(-1)[0] += 1
            save_tensors(path, other, metadata)

        yield name, change


def in_torch_export(path: Path) -> Iterator[tuple[str, Change]]:
    def one_more(content: bytearray) -> None:
        (was,) = struct.unpack_from("<f", content)
        struct.pack_into("<f", content, 0, was + 1)

    for name in torch.export.load(path).state_dict:
        yield name, functools.partial(change_record, path, name, one_more)


def in_onnx(path: Path) -> Iterator[tuple[str, Change]]:
    onnx = pytest.importorskip("onnx")
    for i, tensor in enumerate(onnx.load(str(path)).graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) < FEWEST:
            continue

        def change(i: int = i) -> None:
            model = onnx.load(str(path))
            was = onnx.numpy_helper.to_array(model.graph.initializer[i]).copy()
            was.reshape(-1)[0] += 1
            model.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(was, model.graph.initializer[i].name))
            onnx.save(model, str(path))

        yield tensor.name, change


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"), [("safetensors", in_safetensors), ("torch-export", in_torch_export), ("onnx", in_onnx)]
)
def test_the_unit_is_named(tmp_path: Path, name: str, changes: Callable[[Path], Iterator[tuple[str, Change]]]):
    file_format = formats.get(name)
    try:
        formats.require(file_format)
    except ConfigError as error:
        pytest.skip(str(error))
    network, path, inputs = small(FEATURES), tmp_path / file_format.file_name, FEATURES.example(4)
    file_format.write(network, path, {})
    formats.verify(file_format, path, network, inputs)
    whole, units, named = path.read_bytes(), [unit for unit, _ in network.units()], set()
    for weight, change in list(changes(path)):
        if weight.endswith(NO_MATTER):
            continue
        change()
        with pytest.raises(IntegrityError) as caught:
            formats.verify(file_format, path, network, inputs)
        said = re.search(r"The first unit that differs is ([\w.]+), by up to [\d.e-]+", str(caught.value))
        assert said is not None, f"{weight}: {caught.value}"
        assert said[1] in units and (weight.startswith(said[1]) or not weight.startswith(tuple(units))), weight
        named.add(said[1])
        path.write_bytes(whole)
    assert named == set(units)
    formats.verify(file_format, path, network, inputs)
