"""A stand-alone search in rungs from its configuration to its export; and who says how long a network was trained."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import mixnas
from mixnas.cli.main import main
from mixnas.evaluators.protocol import Request
from mixnas.search.config import read_config
from mixnas.search.finalists import furthest
from mixnas.search.job import Job, new_run, reopen
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search.run.front import Front, in_words
from mixnas.search.run.progress import Progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.results import Results, Stretch, TrialRecord
from mixnas.search_space.errors import ConfigError, StoppedEarly
from mixnas.search_space.formats.safetensors import load_network

PLAIN: dict[str, Any] = {
    "task": "digits",
    "objectives": {"accuracy": "max", "params": "min"},
    "search": {"trials": 7, "strategy": "random", "evaluator": "standalone", "halving": {"rungs": 3, "factor": 2}},
    "train": {"steps": 24},
    "latency": {"passes": 1, "final_passes": 1},
    "space": {
        "stem": {"name": "conv", "stride": 2},
        "stages": [
            {
                "width": [4, 6, 8],
                "depth": [1, 2],
                "block": {"mixer": ["identity", "pooling"], "channel_mixer": {"name": "mlp", "expansion": [1, 2]}},
            }
        ],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def run(folder):
    """Stopped in the middle and gone on with."""
    config = read_config(PLAIN, "test")
    opened, stop, told = new_run(config, root=folder, name="r", source="test"), StopSignal(), []

    def on_trial(record):
        told.append(record)
        if len(told) == 6:
            assert not opened.front().final if opened.has_front else True
            stop.request()

    with pytest.raises(StoppedEarly):
        Job(opened, config, progress=Progress(), stop=stop, on_trial=on_trial).execute()
    assert list(opened.rungs.iterdir())
    again, changed = reopen("r", folder)
    Job(again, changed, progress=Progress(), stop=StopSignal()).execute()
    return again


def test_the_front_has_networks_that_were_trained_to_the_end_and_no_others(run):
    front = run.front()
    assert front.final and front.members and front.trials["done"] == 7
    assert all(m.metrics["train_share"] == 1 for m in front.members)
    rows = (run.path / "trials.csv").read_text().splitlines()
    at = rows[0].split(",").index("trained")
    shares = [float(row.split(",")[at]) for row in rows[1:] if row.split(",")[2] == "done"]
    assert sorted(set(shares)) == [0.25, 0.5, 1.0] and shares.count(1.0) >= len(front.members)
    assert not run.rungs.exists()  # no state is kept of a run that is finished
    # and each is the network that a training at once gives
    problem = Problem(read_config(PLAIN, "test"))
    evaluator = problem.evaluator(problem.latency())
    member = front.members[0]
    network = load_network(run.networks / f"{member.id}.safetensors")
    (once,) = evaluator.evaluate([Request(network.architecture)])
    for name, value in once.network.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_a_run_is_extended_to_what_it_would_have_been(run, folder):
    """The states are gone by then: whoever goes on is trained again up to there."""
    before = {m.id: m.metrics["accuracy"] for m in run.front().members}
    mixnas.resume(run, settings=["search.trials=9"], progress="quiet")
    after = Run.open("r", folder).front()
    assert after.trials["done"] == 9
    known = {m.id: m.metrics["accuracy"] for m in (*after.members, *after.others)}
    assert all(known.get(i, accuracy) == accuracy for i, accuracy in before.items())


@pytest.fixture
def partly(run, folder, tmp_path):
    """A final front of which one network was left off at a third, as `final.halving` leaves them."""
    run = Run.open(run.name, folder)  # another test may have gone on with it
    plain = run.front().to_plain()
    plain["front"][0]["metrics"]["train_share"] = 1 / 3
    text = Front.from_plain(plain).to_text()
    before = (run.path / "pareto.json").read_text()
    with run:
        run.write_tables((run.path / "trials.csv").read_text(), Front.parse(text, "text"))
    yield run
    with run:
        run.write_tables((run.path / "trials.csv").read_text(), Front.parse(before, "text"))


def test_table_status_report_and_card_say_who_was_left_off(partly, folder, capsys):
    runs = ["--runs", str(folder)]
    assert main(["front", "r", *runs]) == 0
    out, err = capsys.readouterr()
    first = next(line for line in out.splitlines() if "33%" in line)
    assert " trained " in out and partly.front().members[0].id in first
    said = f"trained to the end but for 1 of {len(partly.front().members)}, which had 33% of a whole training"
    assert said in err
    assert main(["status", "r", *runs]) == 0
    assert f"of the front, {said}:" in capsys.readouterr().out
    assert main(["status", "r", "--json", *runs]) == 0
    assert json.loads(capsys.readouterr().out)["train_shares"][0] == pytest.approx(1 / 3)
    assert main(["report", "r", *runs]) == 0
    page = (partly.path / "report.html").read_text()
    assert said in page and "<td>33%</td>" in page.replace(' class="number"', "").replace(' class="n"', "")
    pick = ["export", "r", "--pick", partly.front().members[0].id, "--no-verify", *runs]
    assert main(pick) == 0
    out, err = capsys.readouterr()
    assert "had 33% of a whole training" in err
    (exported,) = partly.exports.iterdir()
    assert "It had 33% of a whole training" in (exported / "README.md").read_text()


def test_how_long_networks_were_trained_in_words():
    assert in_words([]) == in_words([1.0, 1.0]) == "trained to the end"
    assert (
        in_words([1.0, 1 / 3, 1 / 9]) == "trained to the end but for 2 of 3, which had 11% to 33% of a whole training"
    )


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"search": {**PLAIN["search"], "evaluator": "supernet"}}, "a search trains no network"),
        ({"train": {"steps": 24, "stop_at": 0.9}}, "train.stop_at is 0.9"),
        ({"train": {"steps": 2}}, "a training has 2 steps, and the rungs would end after"),
    ],
)
def test_what_no_rung_can_be_is_refused_before_work_starts(changed, says):
    with pytest.raises(ConfigError, match=says):
        Problem(read_config({**PLAIN, **changed}, "test"))


def test_where_nobody_came_to_the_end_the_best_of_those_that_came_furthest_are_finalists():
    objectives = parse_objectives({"accuracy": "max", "params": "min"})
    bounds = parse_constraints(["params <= 9"])

    def record(number, share, accuracy, params):
        first = TrialRecord(number, "done", f"{number}", "{}", {"accuracy": accuracy, "params": params}, share=0.25)
        more = Stretch(share, {"accuracy": accuracy, "params": params})
        return first if share == 0.25 else first.trained_on([more])

    rows = [(0.25, 0.99, 1), (0.5, 0.8, 3), (0.5, 0.9, 5), (0.5, 0.7, 4), (0.5, 0.95, 50)]
    results = Results(objectives, bounds, [record(i, *row) for i, row in enumerate(rows)])
    assert results.front() == []
    assert [r.number for r in furthest(results, 2)] == [2, 1]  # the most accurate, and the smallest
