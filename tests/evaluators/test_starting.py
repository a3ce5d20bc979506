"""Beginning with the weights of an earlier network."""

import json
from pathlib import Path

import pytest
import torch

from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.starting import Start
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import recorded
from mixnas.evaluators.training import TrainConfig
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats.safetensors import FORMAT, load_tensors, save_network, save_tensors
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search_space.units import IOSpec

IO = IOSpec("image", (8, 8), in_features=1, num_outputs=10)
STEM = {"name": "conv", "kernel_size": 3, "stride": 2}
CONV = {"mixer": {"name": "dwconv", "kernel_size": 3}, "channel_mixer": {"name": "mlp", "expansion": 2}}
POOL = {"mixer": "pooling", "channel_mixer": {"name": "mlp", "expansion": 2}}


def architecture(width: int, *blocks) -> Architecture:
    return Architecture.from_dict({"stem": STEM, "stages": [{"width": width, "blocks": list(blocks)}]})


def network(made: Architecture, io: IOSpec = IO, seed: int = 0) -> Network:
    return Network(made, io, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def earlier() -> Network:
    return network(architecture(8, CONV, CONV), seed=7)


@pytest.fixture(scope="module")
def file(earlier, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("earlier") / "model.safetensors"
    save_network(path, earlier)
    return str(path)


def test_the_same_architecture_begins_as_the_earlier_one_ended(earlier, file):
    own = network(architecture(8, CONV, CONV))
    taken = Start(file, "init").begin(own)
    assert not taken.left
    assert {"stem", "stages.0.blocks.1.channel", "head"} <= set(taken.whole)
    x = IO.example(4)
    torch.testing.assert_close(own.eval()(x), earlier.eval()(x))


def test_units_that_do_not_fit_begin_afresh_and_are_named(earlier, file):
    io = IOSpec("image", (8, 8), in_features=1, num_outputs=5)
    own = network(architecture(8, CONV, POOL, CONV), io)
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    taken = Start(file, "init").begin(own)
    assert set(taken.left) == {
        "stages.0.blocks.1.token",
        "stages.0.blocks.2.token",
        "stages.0.blocks.2.channel",
        "head",
    }
    assert "(5," in taken.left["head"] and "10" in taken.left["head"]
    for name, tensor in own.state_dict().items():
        afresh = name.startswith(tuple(taken.left))
        assert torch.equal(tensor, before[name] if afresh else earlier.state_dict()[name]), name
    assert "head" in str(taken)


def test_a_super_network_takes_it_where_networks_of_that_size_look(earlier, file):
    space = SearchSpace.from_dict(
        {
            "stem": STEM,
            "stages": [{"width": [8, 16], "depth": [2, 3], "block": {**CONV, "mixer": [CONV["mixer"], "pooling"]}}],
        }
    )
    supernet = Supernet(space, IO, torch.Generator().manual_seed(0))
    taken = Start(file, "init").begin(supernet)
    assert "stages.0.blocks.2.token" in taken.left and len(taken.whole) == 6
    x = IO.example(4)
    same = supernet.subnet(architecture(8, CONV, CONV)).eval()
    torch.testing.assert_close(same(x), earlier.eval()(x))


def test_trainings_begin_with_it(file):
    task = {"name": "digits", "at_most": 32, "init": file}
    space = {"stem": STEM, "stages": [{"width": [8], "depth": [2], "block": CONV}]}
    begun, _ = StandaloneEvaluator(
        StandaloneSpec(task=task, space=space, train=TrainConfig(steps=1, lr=1e-12, batch_size=8))
    ).train(architecture(8, CONV, CONV))
    stored = Start(file, "init").record()["units"]["stem"]
    assert stored == {
        name.removeprefix("stem."): list(t.shape) for name, t in begun.state_dict().items() if name.startswith("stem.")
    }
    told = recorded(by_name(task))["init"]
    assert told["file"] == "model.safetensors" and len(told["sha256"]) == 64


def test_of_a_run_it_is_the_most_accurate_network(earlier, tmp_path):
    (tmp_path / "networks").mkdir()
    save_network(tmp_path / "networks" / "bb.safetensors", earlier)
    save_network(tmp_path / "networks" / "aa.safetensors", network(architecture(8, CONV)))
    members = [{"id": "aa", "metrics": {"accuracy": 0.5}}, {"id": "bb", "metrics": {"accuracy": 0.9}}]
    front = {"metric": "accuracy", "objectives": {"accuracy": "max"}, "front": members}
    (tmp_path / "pareto.json").write_text(json.dumps(front))
    assert Start(str(tmp_path), "init").file == "bb.safetensors"
    members[1]["id"] = "../bb"
    (tmp_path / "pareto.json").write_text(json.dumps(front))
    assert Start(str(tmp_path), "init").file == "aa.safetensors"
    (tmp_path / "pareto.json").write_text(json.dumps({**front, "front": [{}]}))
    with pytest.raises(IntegrityError, match=r"pareto\.json"):
        Start(str(tmp_path), "init")


def test_a_folder_of_data_may_have_the_run_s_name(earlier, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers" / "roses").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"flowers is no run that has ended.*here or below runs/"):
        Start("flowers", "init")
    (tmp_path / "runs" / "flowers").mkdir(parents=True)
    save_network(tmp_path / "runs" / "flowers" / "model.safetensors", earlier)
    assert Start("flowers", "init").file == "model.safetensors"


def test_what_is_no_network_is_refused(tmp_path, file):
    with pytest.raises(ConfigError, match=r"init: nowhere is no run"):
        by_name("digits", init="nowhere")
    with pytest.raises(ConfigError, match="is no run"):
        by_name("digits", init=3)
    (tmp_path / "model.safetensors").write_bytes(Path(file).read_bytes()[:-9])
    with pytest.raises(IntegrityError, match="damaged"):
        by_name("digits", init=str(tmp_path))
    with pytest.raises(ConfigError, match=r"init: x{200}: File name too long"):
        by_name("digits", init="x" * 5000)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"folded": "nonsense"}, "its metadata does not say what is folded"),
        ({"architecture": None}, "its metadata names no architecture"),
        ({"stem": float("nan")}, r"of stem is NaN or infinite"),
        ({"head": float("inf")}, r"of head is NaN or infinite"),
    ],
)
def test_a_network_that_is_damaged_in_itself_is_refused_and_named(change, said, file, tmp_path):
    tensors, metadata = load_tensors(file, FORMAT)
    ((key, value),) = change.items()
    if key in ("stem", "head"):
        name = next(name for name, one in tensors.items() if name.startswith(key) and one.is_floating_point())
        tensors[name].view(-1)[-1] = value
    else:
        metadata = {name: text for name, text in {**metadata, key: value}.items() if text is not None}
    save_tensors(tmp_path / "bad.safetensors", tensors, metadata)
    with pytest.raises(IntegrityError, match=rf"bad\.safetensors: .*{said}"):
        by_name("digits", init=str(tmp_path / "bad.safetensors"))
