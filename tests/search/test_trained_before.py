"""A search that goes by networks which were trained before: what it says, keeps and puts into the card."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest

from mixnas.evaluators.tasks.task import recorded
from mixnas.search.card import card, readme
from mixnas.search.config import read_config
from mixnas.search.job import Job, new_run, reopen
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search.run.progress import make_progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.formats.safetensors import load_network
from mixnas.search_space.formats.torch_export import TorchExport

BLOCK = {"mixer": {"name": "dwconv", "kernel_size": 3}, "channel_mixer": "mlp"}
PLAIN = {
    "search": {"evaluator": "standalone", "trials": 1, "strategy": "random"},
    "train": {"steps": 3, "batch_size": 8},
    "latency": {"passes": 1, "final_passes": 1},
    "objectives": {"accuracy": "max", "params": "min"},
}


def searched(root, name: str, task: dict, *blocks: dict, said=None) -> Run:
    space = {"stem": {"name": "conv", "stride": 2}, "stages": [{"width": 8, "blocks": list(blocks)}]}
    config = read_config({**PLAIN, "task": {"name": "digits", "at_most": 32, **task}, "space": space}, "test")
    made = new_run(config, root=root, name=name, source="test")
    progress = make_progress("quiet") if said is None else make_progress("lines", said)
    with made:
        Job(made, config, progress=progress, stop=StopSignal()).execute()
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def earlier(root) -> Run:
    return searched(root, "earlier", {}, BLOCK)


def network_of(run: Run):
    (file,) = run.networks.glob("*.safetensors")
    return load_network(file)


def test_the_run_and_the_card_say_what_it_learned_from_and_began_with(earlier, root, caplog):
    teacher = root / "teacher.pt2"
    TorchExport().write(copy.deepcopy(network_of(earlier)), teacher, {})
    said = io.StringIO()
    task = {"teacher": {"file": str(teacher), "weight": 0.25}, "init": str(earlier.path)}
    run = searched(root, "later", task, BLOCK, {**BLOCK, "mixer": "pooling"}, said=said)
    told = " ".join(said.getvalue().split())
    assert "teacher: teacher.pt2" in told and "25% of the loss" in told and "init: earlier" in told
    assert "init: earlier: each network begins with what it has of 4 units taken (head, stages.0.blocks.0.ch" in told
    assert told.count("teacher: ") == 1 and told.index("init: ") < told.index("1/1")  # before anything is trained
    assert not [one for one in caplog.records if one.name.startswith("mixnas") and "teacher" in one.getMessage()]
    data = run.data()
    assert data["teacher"]["weight"] == 0.25 and set(data["init"]["units"]) >= {"stem", "head"}
    front, network = run.front(), network_of(run)
    plain = card(run, front, front.members[0], network, licence="mit", files={})
    assert plain["init"]["taken"] == ["stem", "stages.0.blocks.0.token", "stages.0.blocks.0.channel", "head"]
    assert set(plain["init"]["not_taken"]) == {"stages.0.blocks.1.token", "stages.0.blocks.1.channel"}
    verified = {"inputs": 1, "of": "x", "difference": 0.0, "allowed": 1e-4}
    files = {"m": {"format": "f", "needs": [], "bytes": 1, "weight_bytes": 1, "verified": verified}}
    text = readme({**plain, "files": files}, network)
    assert "It learned from teacher.pt2 too" in text and "It began with the weights of earlier" in text
    assert "stages.0.blocks.1.token not: the earlier network has none." in text
    # Another teacher would make another search of it.
    TorchExport().write(network_of(run), teacher, {})
    again, config = reopen(run.path, settings=["search.trials=2"])
    with pytest.raises(ConfigError, match=r"the data has changed since the run was started \(teacher"):
        Job(again, config, progress=make_progress("quiet"), stop=StopSignal()).execute()


def test_a_search_into_which_nothing_but_the_head_fits_is_refused_before_it_starts(earlier, tmp_path):
    """A network of pictures, for series: its head has as many classes and is as wide."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(60, 12, 2)), y=np.arange(60) % 10)
    task = {"name": "series", "path": str(tmp_path / "d.npz"), "init": str(earlier.path)}
    plain = {
        **PLAIN,
        "space": {"stem": "linear", "stages": [{"width": 8, "blocks": [{**BLOCK, "channel_mixer": "none"}]}]},
    }
    with pytest.raises(ConfigError, match=r"task\.init: nothing of .* fits .*: 1 units taken \(head\); .*stem"):
        new_run(read_config({**plain, "task": task}, "test"), root=tmp_path / "runs", name="a", source="test")
    assert not (tmp_path / "runs").exists()
    plain["space"]["stages"][0]["blocks"][0]["channel_mixer"] = "mlp"  # which is the same of pictures and of series
    problem = Problem(read_config({**plain, "task": task}, "test"))
    (said,) = problem.told(recorded(problem.task))
    assert said.startswith("init: earlier: each network begins with what it has of 2 units taken (head, stages.0.")
