"""Going on with a run that has its answer: nothing that was finished is lost, and no budget is spent twice."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import mixnas
from mixnas.search.config import read_config
from mixnas.search.extending import given
from mixnas.search.finish import choose_finalists
from mixnas.search.job import reopen
from mixnas.search.run.directory import Run
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.errors import ConfigError

PLAIN: dict[str, Any] = {
    "task": "digits",
    "objectives": {"accuracy": "max", "params": "max", "macs": "min"},  # each width is on the front
    "search": {"trials": 6, "strategy": "random", "evaluator": "standalone"},
    "train": {"steps": 2},
    "final": {"candidates": 4},
    "latency": {"passes": 1, "final_passes": 1},
    "space": {
        "stem": "conv",
        "stages": [{"width": [4, 8, 12, 16], "block": {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}}],
    },
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixnas.search(PLAIN, name="r", runs=tmp_path_factory.mktemp("runs"), progress="quiet").path


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Run:
    shutil.copytree(finished, tmp_path / "r")
    return Run.open("r", tmp_path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["search.trials=3"], r"is 3, in all, and 6 trials are done already.* Ask for more, .*/r --trials 12$"),
        (["search.trials=3", "final.candidates=5"], r"Leave --trials out, or ask for more"),
    ],
)
def test_a_budget_that_asks_for_nothing_is_refused_before_anything_is_written(copied: Run, settings, says: str):
    before = (copied.path / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=says):
        reopen(copied.path, settings=settings)
    assert (copied.path / "config.yaml").read_bytes() == before
    reopen(copied.path)
    reopen(copied.path, settings=["search.trials=7"])
    reopen(copied.path, settings=["final.candidates=5"])


def test_a_search_that_was_stopped_may_be_ended_where_it_is(copied: Run):
    with copied:
        copied.update(finished=None)
        copied.write_config(read_config(PLAIN | {"search": {**PLAIN["search"], "trials": 90}}, "test").to_plain())
    with pytest.raises(ConfigError, match=r"is 5, in all, and 6 trials are done .* --trials 6 ends its search"):
        reopen(copied.path, settings=["search.trials=5"])
    assert mixnas.resume(copied, settings=["search.trials=6"], progress="quiet").front().trials["done"] == 6


def test_no_finished_network_leaves_the_answer(copied: Run):
    """Whoever was no candidate any more stood neither on the front nor among the others."""
    before = copied.front()
    assert len(before.ids) > 1
    assert mixnas.resume(copied, progress="quiet").front() == before
    fewer = mixnas.resume(copied, settings=["final.candidates=1"], progress="quiet").front()
    assert fewer.ids == before.ids and {m.id for m in fewer.members} == {m.id for m in before.members}
    more = mixnas.resume(copied, settings=["search.trials=8", "search.seed=3"], progress="quiet").front()
    assert before.ids <= more.ids and more.trials["done"] == 8
    assert all(member.reason for member in more.others)
    assert {path.stem for path in copied.networks.glob("*.safetensors")} >= more.ids


def test_who_is_judged_under_each_policy_does_not_depend_on_how_far_that_came():
    """A resume of a run that was stopped behind it evaluated one more: 72 of 72 where 71 of 71 had been done."""
    objectives = parse_objectives({"accuracy": "max", "params": "min"})

    def trial(number: int, accuracy: float, params: float, *, queued: bool = False) -> TrialRecord:
        metrics = {"accuracy": accuracy, "params": params}
        return TrialRecord(number, "done", f"{number}", metrics=metrics, queued=queued)

    asked = [trial(0, 0.5, 10), trial(1, 0.9, 50), trial(2, 0.7, 30)]
    results = Results(objectives, (), asked)
    likely = choose_finalists(given(results), 3)
    for beside in (trial(3, 0.6, 10, queued=True), trial(4, 0.95, 20, queued=True)):
        results.add(beside)
        assert choose_finalists(given(results), 3) == likely
    assert choose_finalists(results, 3) != likely and results.queued == 2
