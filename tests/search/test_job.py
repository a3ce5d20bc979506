"""The main job with a super-network: every phase, stopped and resumed, on real data in small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mixnas.evaluators.training import evaluate
from mixnas.search.config import Config
from mixnas.search.finish import choose_finalists, final_front
from mixnas.search.job import Job, Plan, new_run, search
from mixnas.search.run.directory import Run
from mixnas.search.run.progress import Progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.errors import InfeasibleError, StoppedEarly
from mixnas.search_space.formats.safetensors import load_network
from mixnas.search_space.settings import load

PLAIN: dict[str, Any] = {
    "task": "digits",
    "search": {"trials": 30, "evaluator": "supernet", "population_size": 8},
    "supernet": {"steps": 12, "checkpoint_every": 0},
    "final": {"candidates": 3, "train": {"steps": 10}},
    "latency": {"profile": 12, "passes": 1, "final_passes": 2},
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


class _StopIn(Progress):
    """Asks for a stop when a phase is entered, as Ctrl-C then would."""

    def __init__(self, name: str, stop: StopSignal) -> None:
        super().__init__()
        self.wanted, self.stop = name, stop

    def _begin(self, phase: Any) -> None:
        super()._begin(phase)
        if phase.name == self.wanted:
            self.stop.request()


def _config(**changes: Any) -> Config:
    return load(Config, PLAIN | changes, "test")


def test_a_search_stopped_in_every_phase_ends_as_it_would_have(tmp_path: Path):
    config = _config()
    run = new_run(config, root=tmp_path, name="stopped", source="test")
    for phase in ("profile", "train supernet", "search", "fine-tune"):
        stop = StopSignal()
        with pytest.raises(StoppedEarly, match=r"resumed|stopped"):
            Job(run, config, progress=_StopIn(phase, stop), stop=stop).execute()
        run = Run.open("stopped", tmp_path)
        assert run.status().state == "stopped"
    pareto = Job(run, config, progress=Progress(), stop=StopSignal()).execute()
    assert run.status().state == "finished" and pareto == run.pareto()
    assert pareto["final"] and pareto["latency"] == "measured" and 1 <= len(pareto["front"]) <= 3
    assert pareto["trials"]["done"] == 30
    # what was finished was not done again
    finished = [entry["name"] for entry in run.manifest["phases"]]
    assert finished.count("train supernet") >= 1 and finished[-1] == "measure"

    for member in pareto["front"]:
        network = load_network(run.path / "networks" / f"{member['id']}.safetensors")
        judged = evaluate(network, Plan(config).task, "validation")
        assert judged.score == pytest.approx(member["metrics"]["accuracy"])
        assert member["predicted"]["low_ms"] < member["predicted"]["latency_ms"] < member["predicted"]["high_ms"]
        assert member["searched"]["latency_ms"] == pytest.approx(member["predicted"]["latency_ms"])


def test_constraints_that_no_trial_meets_end_with_a_reason(tmp_path: Path):
    config = _config(constraints=["accuracy >= 1"], search={"trials": 4, "evaluator": "standalone"},
                     train={"steps": 2})  # fmt: skip
    run = new_run(config, root=tmp_path, name="none", source="test")
    with pytest.raises(InfeasibleError, match="none of 4 trials satisfies the constraints accuracy >= 1"):
        Job(run, config, progress=Progress(), stop=StopSignal()).execute()
    assert (run.path / "trials.csv").exists()


def _records(values: list[tuple[float, float]]) -> Results:
    objectives = parse_objectives({"accuracy": "max", "latency_ms": "min"})
    records = [
        TrialRecord(i, "done", f"{i:012d}", "{}", {"accuracy": a, "latency_ms": ms}) for i, (a, ms) in enumerate(values)
    ]
    return Results(objectives, (), records)


def test_finalists_span_the_front():
    front = [(0.1 * i, 0.1 * i * i) for i in range(1, 10)]
    results = _records([*front, (0.3, 5.0)])  # the last is dominated
    chosen = choose_finalists(results, 4)
    values = [(record.metrics["accuracy"], record.metrics["latency_ms"]) for record in chosen]
    assert len(set(values)) == 4 and front[0] in values and front[-1] in values and (0.3, 5.0) not in values
    assert len(choose_finalists(results, 99)) == 9


def test_the_final_front_says_why_the_others_are_not_on_it(tmp_path: Path):
    run = search(PLAIN | {"search": {"trials": 5, "evaluator": "standalone"}, "train": {"steps": 3}},
                 name="r", runs=tmp_path, progress="quiet")  # fmt: skip
    pareto = run.pareto()
    reasons = {other["reason"] for other in pareto["others"]}
    assert reasons <= {"dominated"}
    assert final_front([], parse_objectives({"a": "max"}), parse_constraints([])) == {
        "front": [], "others": [], "knee": None,
    }  # fmt: skip
