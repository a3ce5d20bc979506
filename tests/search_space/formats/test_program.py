"""A program that somebody gives: what is a graph of tensors is read, and what would run something is refused."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats.program import load_program


def saved(module: nn.Module, path: Path) -> Path:
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(module.eval(), (torch.zeros(2, 6, 6, 1),), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def good(module, tmp_path_factory) -> Path:
    return saved(module, tmp_path_factory.mktemp("program") / "net.pt2")


def test_a_program_answers_as_the_network_that_it_was_exported_from(module, good):
    x = torch.randn(5, 6, 6, 1, generator=torch.Generator().manual_seed(0))
    program = load_program(good).module()
    assert torch.equal(program(x), module(x))


def changed(good: Path, path: Path, name: str, change) -> Path:
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for info in source.infolist():
            data = source.read(info)
            target.writestr(info.filename, change(data) if info.filename.endswith(name) else data)
    return path


class Writes:
    """What unpickles to a file on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def of_model(change):
    def whole(data: bytes) -> bytes:
        plain = json.loads(data)
        change(plain)
        return json.dumps(plain).encode()

    return whole


def first_node(target: str):
    return of_model(lambda plain: plain["graph_module"]["graph"]["nodes"][0].update(target=target))


@pytest.mark.parametrize(
    "target",
    [
        "torch.serialization.os.system",
        "torch.hub.load",
        "torch.ops.aten.from_file.default",
        "_operator.attrgetter",
        "math.__loader__.load_module",
        "torch.ops.load_library",
        "torch.ops.higher_order.cond",
    ],
)
def test_only_operations_of_aten_are_called(good, tmp_path, target):
    with pytest.raises(IntegrityError, match="calls"):
        load_program(changed(good, tmp_path / "bad.pt2", "model.json", first_node(target)))


def test_texts_that_torch_would_evaluate_are_refused_or_left_out(good, tmp_path):
    there = tmp_path / "ran"

    def shape(data: bytes) -> bytes:
        return data.replace(b'"expr_str": "', b'"expr_str": "open(chr(65)) + ', 1)

    with pytest.raises(IntegrityError, match="expr_str"):
        load_program(changed(good, tmp_path / "shape.pt2", "model.json", shape))
    guard = of_model(lambda plain: plain.update(guards_code=[f"open({str(there)!r}, 'w')"]))
    load_program(changed(good, tmp_path / "guard.pt2", "model.json", guard)).module()(torch.zeros(1, 6, 6, 1))
    name = of_model(lambda plain: plain["graph_module"]["graph"]["nodes"][0].update(name="x = open('/tmp/no')\n"))
    with pytest.raises(IntegrityError, match="name is"):
        load_program(changed(good, tmp_path / "name.pt2", "model.json", name))
    assert not there.exists()


def test_pickles_are_not_opened(good, tmp_path):
    there = tmp_path / "ran"
    evil = pickle.dumps(Writes(there))
    # The inputs that a program keeps for show are a pickle in every file: left out, unread.
    load_program(changed(good, tmp_path / "inputs.pt2", "sample_inputs/model.pt", lambda _: evil))

    def pickled(data: bytes) -> bytes:
        plain = json.loads(data)
        next(iter(plain["config"].values()))["use_pickle"] = True
        return json.dumps(plain).encode()

    with pytest.raises(IntegrityError, match="is a pickle"):
        load_program(changed(good, tmp_path / "weights.pt2", "weights_config.json", pickled))
    for name in (
        "data/weights/model.pt",
        "data/constants/opaque_obj_0",
        "data/aotinductor/model/a.so",
        "models/b.json",
    ):
        content = io.BytesIO(good.read_bytes())
        with zipfile.ZipFile(content, "a") as archive:
            archive.writestr(f"net/{name}", evil)
        (tmp_path / "more.pt2").write_bytes(content.getvalue())
        with pytest.raises(IntegrityError, match=r"more\.pt2"):
            load_program(tmp_path / "more.pt2")
    assert not there.exists()


def test_what_is_no_such_file_is_named(good, tmp_path):
    with pytest.raises(ConfigError, match=r"none\.pt2: no such file"):
        load_program(tmp_path / "none.pt2")
    torch.save({"a": 1}, tmp_path / "pickle.pt2")
    (tmp_path / "cut.pt2").write_bytes(good.read_bytes()[:900])
    for name in ("pickle.pt2", "cut.pt2"):
        with pytest.raises(IntegrityError, match=name):
            load_program(tmp_path / name)


def test_one_tensor_in_and_one_out(tmp_path):
    class Two(nn.Module):
        def forward(self, x):
            return x, x + 1

    with pytest.raises(IntegrityError, match="gives 2 outputs"):
        load_program(saved(Two(), tmp_path / "two.pt2"))
