"""Files that earlier versions wrote open, or are refused with one clear sentence. Each kind of file has its test.

`tests/data/v1` was written by mixnas 0.1.0 at 8436471 (run format 1), on a machine called cpu-intel-xeon-6-167-1t:
`finished`, a super-network search that came to its end; `half`, one that was stopped after 11 of its 40 trials;
`standalone`, one that trained every candidate; `exported`, a network that `nas export` took from `finished`. The
numbers below were read from these files, or computed with them, by the version that wrote them.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixnas.evaluators.supernet.training import load_supernet
from mixnas.evaluators.tasks.loading import by_name
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search.config import load_config
from mixnas.search.run.directory import Run, list_runs
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.reading import read_results
from mixnas.search.study.results import Results
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.files import load_yaml
from mixnas.search_space.formats.safetensors import load_network, read_extra
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet

V1 = Path(__file__).parent / "data" / "v1"
DEVICE = "cpu-intel-xeon-6-167-1t"
RUNS = ("finished", "half", "standalone")
PROFILED = ("finished", "half")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The runs, copied, so that nothing that reads them can change them."""
    shutil.copytree(V1, tmp_path / "v1")
    return tmp_path / "v1"


def results_of(run: Run) -> Results:
    fixed = run.manifest["fixed"]
    return read_results(run.journal, parse_objectives(fixed["objectives"]), parse_constraints(fixed["constraints"]))


def space_of(folder: Path) -> SearchSpace:
    return SearchSpace.from_dict(load_yaml(folder / "config.yaml")["space"])


def first_outputs(network: nn.Module) -> Tensor:
    """The first three outputs for a ramp from -1 to 1."""
    with torch.inference_mode():
        return network.eval()(torch.linspace(-1, 1, 64).view(1, 8, 8, 1))[0, :3]


# -- run directories --------


@pytest.mark.parametrize(
    ("name", "state", "done", "trials"),
    [("finished", "finished", 40, 40), ("half", "stopped", 11, 40), ("standalone", "finished", 8, 8)],
)
def test_manifest_and_state(runs: Path, name: str, state: str, done: int, trials: int):
    run = Run.open(name, runs)
    status = run.status()
    assert (status.state, status.done, status.failed, status.trials) == (state, done, 0, trials)
    assert run.manifest["device"] == DEVICE and run.manifest["fixed"]["constraints"] == ["params <= 2e4"]
    assert [one.problem for one in list_runs(runs)] == [""] * len(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_config(runs: Path, name: str):
    """Smoothing has become the task's option: what was started with it cannot be gone on with unasked."""
    run = Run.open(name, runs)
    with pytest.raises(ConfigError, match=r"has moved|is an option of the task now"):
        load_config(run.path / "config.yaml")
    plain = run.config()
    assert plain["search"]["evaluator"] == ("standalone" if name == "standalone" else "supernet")
    assert plain["search"]["population_size"] == 8 and plain["latency"]["profile"] == 14.0
    assert space_of(run.path).size() == 4224


@pytest.mark.parametrize(
    ("name", "front", "hypervolume"),
    [
        (
            "finished",
            "54820b57dc37 c46561cd24b6 9c7f5de37f75 bd8d6caa9897 6d5431dcf973 e3383aee7144 eef5d8afebf5",
            0.8494124226978207,
        ),
        ("half", "c46561cd24b6 bd8d6caa9897 e3383aee7144 eef5d8afebf5", 0.7094667287826312),
        ("standalone", "6dd9d032a086 e3383aee7144 bd8d6caa9897", None),
    ],
)
def test_journal(runs: Path, name: str, front: str, hypervolume: float | None):
    results = results_of(Run.open(name, runs))
    assert [record.id for record in results.front()] == front.split()
    assert results.hypervolume() == (None if hypervolume is None else pytest.approx(hypervolume))
    assert results.counts == {"done": {"finished": 40, "half": 11, "standalone": 8}[name]}
    assert [record.number for record in results.records] == list(range(len(results.records)))
    for record in results.records:
        assert record.architecture.id == record.id
    fourth = results.records[3]
    assert fourth.id == "c46561cd24b6" and fourth.metrics["params"] == 694 and fourth.metrics["macs"] == 9488
    accuracy = {"finished": 0.12222222222222222, "half": 0.125, "standalone": 0.11944444444444445}[name]
    assert fourth.metrics["accuracy"] == accuracy


@pytest.mark.parametrize(
    ("name", "front", "knee", "first"),
    [
        (
            "finished",
            "54820b57dc37 9c7f5de37f75 eef5d8afebf5",
            "9c7f5de37f75",
            {"accuracy": 0.2, "test_accuracy": 0.14763231197771587, "latency_ms": 0.3924799598910722, "params": 914},
        ),
        (
            "standalone",
            "6dd9d032a086 e3383aee7144 bd8d6caa9897",
            None,
            {"accuracy": 0.18888888888888888, "test_accuracy": 0.14206128133704735, "params": 956},
        ),
    ],
)
def test_pareto(runs: Path, name: str, front: str, knee: str | None, first: dict[str, float]):
    found = Run.open(name, runs).front()
    assert found.final and found.latency == "measured" and found.device == DEVICE
    assert [member.id for member in found.members] == front.split()
    assert knee is None or found.knee == knee
    values = found.members[0].values
    assert {key: values[key] for key in first} == first
    assert values["latency_low_ms"] < values["latency_ms"] < values["latency_high_ms"]
    for member in found.members:
        assert Architecture.from_dict(member.architecture).id == member.id


@pytest.mark.parametrize("name", ["finished", "standalone"])
def test_trials(runs: Path, name: str):
    with open(runs / name / "trials.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    records = results_of(Run.open(name, runs)).records
    assert [(int(row["trial"]), row["id"], row["status"]) for row in rows] == [
        (record.number, record.id, record.status) for record in records
    ]
    assert [float(row["accuracy"]) for row in rows] == [record.metrics["accuracy"] for record in records]


# -- what was measured, and what predicts from it --------


@pytest.mark.parametrize("name", PROFILED)
@pytest.mark.parametrize(
    ("read", "what"),
    [
        (lambda folder: MeasurementTable.load(folder, DEVICE, "eager"), "a table of measurements"),
        (lambda folder: LatencyPredictor.load(DEVICE, "eager", folder), "a latency predictor"),
    ],
)
def test_what_measured_whole_blocks_is_refused(runs: Path, name: str, read, what: str):
    with pytest.raises(IntegrityError) as refused:
        read(runs / name / "latency")
    said = str(refused.value)
    assert what in said and "of an earlier version" in said and "nas latency profile --device" in said
    assert "\n" not in said and len(said) < 500


# -- weights --------


@pytest.mark.parametrize("name", PROFILED)
def test_supernet(runs: Path, name: str):
    supernet = Supernet(space_of(runs / name), by_name("digits").io, torch.Generator().manual_seed(0))
    with pytest.raises(IntegrityError, match=r"its format is 'mixnas-supernet-1'; this needs 'mixnas-supernet-2'"):
        load_supernet(supernet, runs / name / "supernet.safetensors")


@pytest.mark.parametrize(
    ("name", "identity", "params", "test_accuracy", "outputs"),
    [
        ("finished", "54820b57dc37", 914, 0.14763231197771587, [0.304358, -0.483902, -0.156792]),
        ("finished", "9c7f5de37f75", 330, 0.14484679665738162, [-0.100595, -0.212047, -0.183829]),
        ("finished", "eef5d8afebf5", 162, 0.10863509749303621, [-0.190379, 0.052814, -0.226047]),
        ("standalone", "6dd9d032a086", 956, 0.14206128133704735, [0.245849, -0.203849, -0.217038]),
        ("standalone", "bd8d6caa9897", 314, 0.10306406685236769, [0.295127, -0.597448, -0.215139]),
        ("standalone", "e3383aee7144", 183, 0.21727019498607242, [-0.747664, -0.752153, 0.047617]),
    ],
)
def test_network(name: str, identity: str, params: int, test_accuracy: float, outputs: list[float]):
    path = V1 / name / "networks" / f"{identity}.safetensors"
    network = load_network(path)
    assert network.architecture.id == identity and network.io == by_name("digits").io
    assert sum(parameter.numel() for parameter in network.parameters()) == params
    assert read_extra(path)["test"]["accuracy"] == test_accuracy
    assert first_outputs(network).tolist() == pytest.approx(outputs, abs=1e-4)


def test_exported_network():
    folder = V1 / "exported" / "9c7f5de37f75"
    card = json.loads((folder / "card.json").read_text())
    assert card["id"] == folder.name and card["verified"] == {"test_accuracy": 0.14484679665738162}
    assert Architecture.load(folder / "architecture.yaml").id == folder.name
    network = load_network(folder / "model.safetensors")
    assert network.architecture.id == folder.name and read_extra(folder / "model.safetensors")["run"] == "finished"
    assert first_outputs(network).tolist() == pytest.approx([-0.100595, -0.212047, -0.183829], abs=1e-4)
