"""The main job: every phase, stopped and resumed, on real data in small; old runs; what a run refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import mixnas
from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.training import evaluate
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.search.config import Config, read_config
from mixnas.search.job import Job, new_run, reopen
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search.run.progress import Progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, InfeasibleError, NasError, StoppedEarly
from mixnas.search_space.formats.safetensors import load_network
from tests.search.stopping import StopIn

V1 = Path(__file__).parents[1] / "data" / "v1"
PLAIN: dict[str, Any] = {
    "task": "digits",
    "search": {"trials": 30, "strategy": {"name": "nsga2", "population_size": 8}},
    "supernet": {"steps": 12, "checkpoint_every": 0},
    "final": {"candidates": 3, "train": {"steps": 10}},
    "latency": {"profile": 12, "passes": 1, "final_passes": 2, "batch_size": 2},
    "space": {
        "stem": "conv",
        "stages": [
            {
                "width": [4, 8],
                "depth": [1, 2],
                "block": {
                    "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}],
                    "channel_mixer": {"name": "mlp", "expansion": [1, 2]},
                },
            }
        ],
    },
}


STANDALONE = {**PLAIN, "search": {"trials": 5, "evaluator": "standalone"}, "train": {"steps": 3}}


def _config(plain: dict[str, Any] = PLAIN, **changes: Any) -> Config:
    return read_config(plain | changes, "test")


def _job(run: Run, config: Config, progress: Progress | None = None, stop: StopSignal | None = None) -> Job:
    return Job(run, config, progress=progress or Progress(), stop=stop or StopSignal())


def _phases(run: Run) -> list[str]:
    return [entry["name"] for entry in run.manifest["phases"]]


def test_a_search_stopped_in_every_phase_ends_as_it_would_have(tmp_path: Path):
    """With batches of two inputs: their predictor was looked up as that of one, so that no such search was resumed."""
    config = _config()
    new_run(config, root=tmp_path, name="stopped", source="test")
    for phase in ("profile", "train supernet", "search", "fine-tune"):
        run, config = reopen("stopped", tmp_path)
        stop = StopSignal()
        with pytest.raises(StoppedEarly, match=r"resumed|stopped"):
            _job(run, config, StopIn(phase, stop), stop).execute()
        assert Run.open("stopped", tmp_path).status().state == "stopped"
    run, config = reopen("stopped", tmp_path)
    front = _job(run, config).execute()
    assert run.status().state == "finished" and front == run.front()
    assert front.final and front.latency == "measured" and 1 <= len(front.members) <= 3
    assert front.trials["done"] == 30
    # what was finished was not done again
    assert _phases(run) == ["profile", "train supernet", "search", "fine-tune", "measure"]

    for member in front.members:
        network = load_network(run.networks / f"{member.id}.safetensors")
        judged = evaluate(network, Problem(config).task, "validation")
        assert judged.score == pytest.approx(member.metrics["accuracy"])
        assert member.latency is not None and member.metrics["latency_ms"] == member.latency.ms
        predicted = member.predicted
        assert predicted is not None and predicted.low_ms < predicted.ms < predicted.high_ms
        if member.trial < 15:  # from half of the trials on, the predictor was corrected
            assert member.searched["latency_ms"] == pytest.approx(predicted.ms)
    looked_at = run.manifest["measured"]
    assert looked_at["after"] == 22 and 0 < len(looked_at["networks"]) <= 16
    assert run.latency_tag == "eager-b2"
    assert LatencyPredictor.load(run.manifest["device"], run.latency_tag, run.latency).tag == "eager-b2"

    # a finished run has nothing left to do
    run, config = reopen("stopped", tmp_path)
    assert _job(run, config).execute() == front
    assert len(_phases(run)) == 5
    # and with more trials, only what these ask for
    run, config = reopen("stopped", tmp_path, settings=["search.trials=34"])
    more = _job(run, config).execute()
    assert more.trials["done"] == 34 and _phases(run)[5:6] == ["search"]
    assert set(_phases(run)[6:]) <= {"fine-tune", "measure"}


def test_a_stand_alone_search_keeps_the_weights_of_its_front(tmp_path: Path):
    config = _config(STANDALONE)
    run = new_run(config, root=tmp_path, name="r", source="test")
    stop = StopSignal()
    with pytest.raises(StoppedEarly):
        _job(run, config, StopIn("judge on the test split", stop), stop).execute()
    assert not run.front().final and run.front().latency == "measured"
    kept = {path.stem for path in run.networks.iterdir()}
    assert kept == {member.id for member in run.front().members}
    run, config = reopen("r", tmp_path)
    front = _job(run, config).execute()
    assert _phases(run) == ["search", "judge on the test split", "measure"]
    for member in front.members:
        # the weights that the trial ended with: its metrics, to the last digit
        assert member.searched["accuracy"] == member.metrics["accuracy"] and member.predicted is None


def test_a_finished_run_keeps_its_answer_while_it_is_extended(tmp_path: Path):
    config = _config(STANDALONE, objectives={"accuracy": "max", "params": "min"})  # what is on the front is no chance
    new_run(config, root=tmp_path, name="r", source="test")
    run, config = reopen("r", tmp_path, settings=["search.strategy=nsga2"])
    front = _job(run, config).execute()
    run, config = reopen("r", tmp_path, settings=["search.trials=9", "search.seed=5", "search.strategy=random"])
    stop = StopSignal()
    with pytest.raises(StoppedEarly):
        _job(run, config, StopIn("judge on the test split", stop), stop).execute()
    run = Run.open("r", tmp_path)
    assert run.status().state == "stopped" and run.status().done == 9
    assert run.front() == front
    assert all((run.networks / f"{member.id}.safetensors").exists() for member in (*front.members, *front.others))
    (folder,) = mixnas.export(run, pick=front.members[0].id)
    assert (folder / "model.safetensors").exists()
    assert mixnas.resume(run, progress="quiet").front().trials["done"] == 9


def test_constraints_that_no_trial_meets_end_with_a_reason(tmp_path: Path):
    config = _config(STANDALONE, constraints=["accuracy >= 1"], search={"trials": 4, "evaluator": "standalone"})
    run = new_run(config, root=tmp_path, name="none", source="test")
    with pytest.raises(
        InfeasibleError,
        match=r"none of 4 trials satisfies the constraints accuracy >= 1; nearest is \w{12} with accuracy 0",
    ):
        _job(run, config).execute()
    assert (run.path / "trials.csv").exists() and run.front().members == ()


class _Broken(Digits):
    def loss(self, outputs, targets):
        if outputs.shape[0] > 2:  # not those of the check
            raise RuntimeError(f"no loss of {len(outputs)}")
        return super().loss(outputs, targets)


def test_a_search_of_which_every_trial_failed_says_why(tmp_path: Path):
    task = {"name": f"{__name__}:_Broken"}
    config = _config(STANDALONE, task=task, search={"trials": 3, "evaluator": "standalone"})
    run = new_run(config, root=tmp_path, name="broken", source="test")
    with pytest.raises(NasError, match=r"all 3 trials failed: RuntimeError: no loss of \d+ \(3 times\)\. Mend that"):
        _job(run, config).execute()


def test_a_search_that_ended_before_its_first_trial_says_so(tmp_path: Path):
    config = _config(STANDALONE, search={"trials": 5, "evaluator": "standalone", "time": 1e-320})
    with pytest.raises(
        NasError, match=r"ended before its first trial \(search.time: .* s\). .* nas resume .*/brief --set"
    ):
        mixnas.search(config.to_plain(), name="brief", runs=tmp_path, progress="quiet")


def test_searching_twice_in_one_process(tmp_path: Path):
    """The package `mixnas.search`, once it was imported, stood in the way of the function."""
    runs = [mixnas.search(STANDALONE, name=name, runs=tmp_path, progress="quiet") for name in ("first", "second")]
    assert [run.name for run in runs] == ["first", "second"]
    assert [[m.id for m in run.front().members] != [] for run in runs] == [True, True]


def test_another_latency_is_refused_before_work_starts(tmp_path: Path):
    new_run(_config(), root=tmp_path, name="r", source="test")
    with pytest.raises(ConfigError, match=r"latency\.batch_size has changed since the run was started"):
        reopen("r", tmp_path, settings=["latency.batch_size=4"])


# -- runs of the first format --------


@pytest.fixture
def old_runs(tmp_path: Path) -> Path:
    shutil.copytree(V1, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["finished", "half", "standalone"])
def test_an_old_run_is_not_gone_on_with(old_runs: Path, name: str):
    with pytest.raises(ConfigError, match=r"measured whole blocks; its trials cannot be gone on with"):
        reopen(name, old_runs)
    with pytest.raises(ConfigError, match="measured whole blocks"):
        _job(Run.open(name, old_runs), _config())


def test_an_old_run_is_looked_at(old_runs: Path):
    status = Run.open("half", old_runs).status()
    assert (status.state, status.done, status.trials) == ("stopped", 11, 40)
    for name in ("finished", "standalone"):
        run = Run.open(name, old_runs)
        assert run.status().state == "finished" and run.front().final
        for member in run.front().members:
            assert (run.networks / f"{member.id}.safetensors").exists()
            assert Architecture.from_dict(member.architecture).id == member.id
