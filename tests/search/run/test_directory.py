from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.run.directory import FORMAT, Run, commit, list_runs, versions
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError
from tests.contracts.engine import carry_out
from tests.search.run.fronts import front_of

CONFIG = {
    "task": "digits",
    "objectives": {"accuracy": "max", "latency_ms": "min", "params": "min"},
    "constraints": ["params <= 1e4"],
    "search": {"trials": 12, "seed": 0},
    "space": {"stages": [{"width": [16, 24]}]},
}


def test_create_and_open(tmp_path):
    run = Run.create(tmp_path / "runs", CONFIG, prefix="digits", seed=0, device="cpu-x-1t")
    again = Run.open(run.name, tmp_path / "runs")
    assert again.manifest == run.manifest and again.config() == CONFIG
    assert run.name.startswith("digits-20") and run.manifest["format"] == FORMAT
    assert run.manifest["seed"] == 0 and run.manifest["versions"]["optuna"].startswith("5.")
    assert Run.open(run.path).path == run.path
    assert run.exports.is_dir() and run.exports.parent == run.path


def test_names(tmp_path):
    names = {Run.create(tmp_path, CONFIG, prefix="my.pack:Class").name for _ in range(5)}
    assert len(names) == 5 and all(name.startswith("my-pack-Class-") for name in names)
    Run.create(tmp_path, CONFIG, name="first")
    with pytest.raises(ConfigError, match=r"exists already.*nas resume first"):
        Run.create(tmp_path, CONFIG, name="first")
    for wrong in ("", "../x", ".hidden", "a/b", "a b", "x" * 200):
        with pytest.raises(ConfigError, match="no name for a run"):
            Run.create(tmp_path, CONFIG, name=wrong)
    with pytest.raises(ConfigError, match=r"frist: no such run\. Did you mean 'first'"):
        Run.open("frist", tmp_path)
    with pytest.raises(ConfigError, match="There are no runs"):
        Run.open("first", tmp_path / "elsewhere")


def test_other_formats_and_damage(tmp_path):
    run = Run.create(tmp_path, CONFIG, name="r")
    manifest = run.path / "manifest.json"
    manifest.write_text(json.dumps({**run.manifest, "format": FORMAT + 1}))
    with pytest.raises(
        ConfigError, match=f"has format {FORMAT + 1}; this version of mixnas reads formats up to {FORMAT}"
    ):
        Run.open("r", tmp_path)
    for damaged in ("{", "[]", "{}", ""):
        manifest.write_text(damaged)
        with pytest.raises(IntegrityError, match=r"manifest\.json: damaged"):
            Run.open("r", tmp_path)
    assert "damaged" in list_runs(tmp_path)[0].problem
    with pytest.raises(NasError, match="no front has been written"):
        run.front()
    assert not run.has_front
    (run.path / "pareto.json").write_text('{"front": [')
    with pytest.raises(IntegrityError, match=r"pareto\.json: damaged"):
        run.front()


def test_another_latency_is_refused(tmp_path):
    run = Run.create(tmp_path, CONFIG, name="r", device="cpu-x-1t", latency="eager-b8")
    run.check_resumable()
    run.check_latency("cpu-x-1t", "eager-b8")
    for other in (("cpu-y-1t", "eager-b8"), ("cpu-x-1t", "eager")):
        with pytest.raises(ConfigError, match=rf"is that of cpu-x-1t \(eager-b8\), and now {other[0]} \({other[1]}\)"):
            run.check_latency(*other)


def test_a_changed_space_is_refused_with_the_difference(tmp_path):
    Run.create(tmp_path, CONFIG, name="r")
    run = Run.open("r", tmp_path)
    run.check_fixed(CONFIG)
    run.write_config({**CONFIG, "search": {"trials": 50, "seed": 0}})
    assert run.config()["search"]["trials"] == 50
    with pytest.raises(ConfigError, match="space has changed") as error:
        run.write_config({**CONFIG, "space": {"stages": [{"width": [16, 32]}]}})
    assert "-  - width: [16, 24]" in str(error.value) and "+  - width: [16, 32]" in str(error.value)
    with pytest.raises(ConfigError, match="objectives has changed"):
        run.check_fixed({**CONFIG, "objectives": dict(reversed(CONFIG["objectives"].items()))})
    assert run.config()["space"] == CONFIG["space"]


FULL = {
    **CONFIG,
    "search": {"trials": 12, "seed": 0, "strategy": "nsga2", "evaluator": "supernet"},
    "train": {"epochs": 3, "lr": 1e-3},
    "supernet": {"seconds": 5.0, "processes": 1},
    "latency": {"runtime": "eager", "threads": 1, "batch_size": 1, "profile": 45.0, "passes": 3},
    "final": {"candidates": 3},
}


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("search", "evaluator", "standalone"),
        ("train", "epochs", 4),
        ("supernet", "seconds", 50.0),
        ("latency", "runtime", "compiled"),
        ("latency", "threads", 2),
        ("latency", "batch_size", 32),
    ],
)
def test_what_trials_depend_on_is_fixed_by_the_run(tmp_path, group, name, value):
    run = Run.create(tmp_path, FULL, name="r")
    with pytest.raises(ConfigError, match=rf"{group}.* has changed since the run was started") as error:
        run.write_config({**FULL, group: {**FULL[group], name: value}})
    assert str(value) in str(error.value) and run.config() == FULL


def test_seed_strategy_and_budget_may_change(tmp_path):
    run = Run.create(tmp_path, FULL, name="r")
    changed = {
        **FULL,
        "search": {**FULL["search"], "trials": 99, "seed": 7, "strategy": "tpe", "time": 60.0},
        "supernet": {**FULL["supernet"], "processes": 2},
        "latency": {**FULL["latency"], "profile": 90.0, "passes": 5},
        "final": {"candidates": 9},
    }
    run.write_config(changed)
    assert run.config() == changed
    run.write_config({**changed, "train": {**FULL["train"], "later": 0}})  # a setting of a later version


HOLD = """
import sys
from mixnas.search.run.directory import Run
with Run.open(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_and_a_dead_one_leaves_no_lock(tmp_path):
    run = Run.create(tmp_path, CONFIG, name="r")
    assert not run.is_running()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "held\n"
        assert run.is_running() and run.status().state == "running"
        with pytest.raises(NasError, match=f"process {holder.pid} is running this search"), run:
            pass
        os.kill(holder.pid, signal.SIGKILL)
    assert not run.is_running() and run.status().state == "stopped"
    with run:
        assert run.is_running()
        with pytest.raises(NasError, match="is running this search"), Run.open("r", tmp_path):
            pass
    assert not run.is_running()


def test_a_run_from_search_to_tables(tmp_path, space, objectives, constraints, evaluator):
    run = Run.create(tmp_path, CONFIG, name="r")
    with run, SearchStudy(run.journal, space, objectives, constraints) as study:
        carry_out(LocalEngine(), study, evaluator, Budget(trials=12))
        status = run.status()
        assert (status.state, status.done, status.failed, status.running, status.trials) == ("running", 12, 0, 0, 12)
        run.add_phase("search", 1.23456)
        run.write_tables(study.results.to_csv(), front_of(study.results))
        run.finish(device="cpu-y-1t")
    again = Run.open("r", tmp_path)
    assert again.manifest["phases"][0]["seconds"] == 1.235 and again.manifest["device"] == "cpu-y-1t"
    assert again.status().state == "finished"
    assert again.front() == front_of(study.results) and len(again.front().members) == len(study.results.front())
    assert (run.path / "trials.csv").read_text().count("\n") == 13
    assert [p.name for p in run.path.iterdir() if p.name.startswith(".") and p.name != ".lock"] == []
    Run.create(tmp_path, CONFIG, name="later")
    assert {s.name: s.state for s in list_runs(tmp_path)} == {"r": "finished", "later": "stopped"}
    assert json.loads(json.dumps(list_runs(tmp_path)[0].to_plain()))["problem"] == ""


def test_provenance_names_no_machine():
    text = json.dumps([versions(), commit()])
    assert os.uname().nodename not in text and str(os.getcwd()) not in text
