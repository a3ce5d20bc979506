from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.export import export_run
from mixnas.search.job import reopen
from mixnas.search.run.directory import FORMAT, Run, list_runs
from mixnas.search.run.integrity import problems, undigested
from mixnas.search.run.making import new_folder
from mixnas.search.run.origin import commit, versions
from mixnas.search.run.trust import require_trust
from mixnas.search.run.typed import typed
from mixnas.search.study.results import Results
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import ConfigError, IntegrityError, MachineError, NasError, visible
from tests.contracts.engine import carry_out
from tests.search.run.fronts import front_of
from tests.search.run.test_front import final

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
    with pytest.raises(ConfigError, match=rf"exists already.*nas resume {tmp_path}/first"):
        Run.create(tmp_path, CONFIG, name="first")
    for wrong in ("", "../x", ".hidden", "a/b", "a b", "x" * 200):
        with pytest.raises(ConfigError, match="no name for a run"):
            Run.create(tmp_path, CONFIG, name=wrong)
    with pytest.raises(ConfigError, match=r"frist: no such run\. Did you mean 'first'"):
        Run.open("frist", tmp_path)
    with pytest.raises(ConfigError, match="There are no runs"):
        Run.open("first", tmp_path / "elsewhere")


def test_a_search_that_could_not_begin_is_in_nobodys_way(tmp_path, monkeypatch):
    """A full disk left an empty folder: there was no such run, and yet its name was taken."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as during:
        during.setattr("mixnas.search.run.directory.write_manifest", full)
        for name in ("first", None):
            with pytest.raises(OSError, match="No space"):
                Run.create(tmp_path, CONFIG, name=name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.yaml").write_text("task: digits\n")
    (tmp_path / "killed" / ".manifest.json.a1b2c3d4").write_text("{")
    with pytest.raises(ConfigError, match=r"killed: no such run\..* Its folder is there, but no search began in it\."):
        Run.open("killed", tmp_path)
    assert Run.create(tmp_path, CONFIG, name="killed").config() == CONFIG
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"other exists already, and is no run\. Choose another --name"):
        Run.create(tmp_path, CONFIG, name="other")
    with new_folder(tmp_path, "new", "run") as path, pytest.raises(ConfigError, match="new exists already"):
        Run.create(tmp_path, CONFIG, name="new")
    assert path.is_dir()


def test_a_run_is_named_as_it_is_typed_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for root, name in (("runs", "r"), ("tm", "tm/r"), (tmp_path / "runs", "r"), (tmp_path / "a b", "'a b/r'")):
        path = Path(root) / "r"
        if not path.exists():
            Run.create(root, CONFIG, name="r")
        assert typed(path) == name
        assert Run.open(shlex.split(name)[0]).path.resolve() == path.resolve()
    monkeypatch.chdir(tmp_path / "tm")
    assert typed(tmp_path / "runs" / "r") == str(tmp_path / "runs" / "r")
    monkeypatch.chdir(tmp_path)
    shutil.copytree("tm/r", "r")  # what `Run.open` would take for the name
    assert typed("runs/r") == "runs/r" and typed("r") == "r"


def test_a_run_that_ends_while_it_is_looked_at_is_finished(tmp_path):
    """`nas status --watch` said "stopped, 60 of 60", and then "finished"."""
    run = Run.create(tmp_path, CONFIG, name="r")
    with run:
        seen = Run.open("r", tmp_path)
        assert seen.status().state == "running"
        run.finish()
    assert seen.status().state == "finished" and "finished" in repr(seen)


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
        with pytest.raises(NasError, match=f"process {holder.pid} is using this run"), run:
            pass
        os.kill(holder.pid, signal.SIGKILL)
    assert not run.is_running() and run.status().state == "stopped"
    left = run.networks / ".n1.safetensors.a1b2c3_9"
    run.networks.mkdir()
    left.write_text("ha")
    with run:
        assert run.is_running() and not left.exists()
        with pytest.raises(NasError, match="is using this run"), Run.open("r", tmp_path):
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


@pytest.mark.parametrize("kind", ["link", "link to nowhere", "pipe", "the other kind"])
@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "study.journal", "study.summary.json", "trials.csv", "pareto.json", "supernet.safetensors"),
        *(".lock", "latency", "networks", "exports", "networks/a.safetensors", "latency/x.csv", "exports/0123456789ab"),
    ],
)
def test_nothing_in_a_run_is_followed_out_of_it(tmp_path, name, kind):
    """Of a received run, `exports`, `.lock` and the journal led to files of the user's, which were emptied."""
    run = Run.create(tmp_path / "runs", CONFIG, name="r")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("mine")
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    match kind:
        case "link":
            path.symlink_to(victim if name in ("latency", "networks", "exports") else victim / "file")
        case "link to nowhere":
            path.symlink_to(victim / "new")
        case "pipe":
            os.mkfifo(path)
        case _ if name in ("latency", "networks", "exports"):
            path.write_text("")
        case _ if name.startswith("exports/"):
            pytest.skip("an export is a folder")
        case _:
            path.mkdir()
    with pytest.raises(IntegrityError, match=r"is (a link|a pipe|a folder|a file), where a run has") as refused:
        Run.open("r", tmp_path / "runs")
    assert str(path) in str(refused.value)
    assert "where a run has" in list_runs(tmp_path / "runs")[0].problem
    assert [p.name for p in victim.iterdir()] == ["file"] and (victim / "file").read_text() == "mine"


def test_a_manifest_that_is_no_file_is_refused_at_once(tmp_path):
    Run.create(tmp_path, CONFIG, name="good")
    for name in ("pipe", "folder", "link", "closed"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe" / "manifest.json")
    (tmp_path / "folder" / "manifest.json").mkdir()
    (tmp_path / "link" / "manifest.json").symlink_to(tmp_path / "good" / "manifest.json")
    (tmp_path / "closed" / "manifest.json").write_bytes(b"\xff\xfe")
    found = {status.name: status.problem for status in list_runs(tmp_path)}
    assert found.pop("good") == "" and set(found) == {"pipe", "folder", "link", "closed"}
    assert all("where a run has a file" in found[name] for name in ("pipe", "folder", "link"))
    assert "damaged" in found["closed"]


@pytest.mark.parametrize("name", ["config.yaml", "trials.csv", "pareto.json", "manifest.json"])
def test_a_digit_that_changed_is_noticed(tmp_path, objectives, name):
    run = Run.create(tmp_path, CONFIG, name="r", seed=0)
    run.journal.touch()
    run.write_tables("trial,id\n0,1\n", front_of(Results(objectives)))
    path = run.path / name
    whole = path.read_bytes()
    assert list(problems(run.path, Run.open("r", tmp_path).manifest)) == []
    places = [i for i, byte in enumerate(whole) if chr(byte).isdigit()]
    for place in places[:: max(1, len(places) // 20)]:
        path.write_bytes(whole[:place] + (b"7" if whole[place : place + 1] != b"7" else b"3") + whole[place + 1 :])
        if name == "manifest.json":
            with pytest.raises((IntegrityError, ConfigError), match=r"not what was written|damaged|has format"):
                Run.open("r", tmp_path)
            continue
        opened = Run.open("r", tmp_path)
        assert [wrong for wrong, _ in problems(opened.path, opened.manifest)] == [name]
        if name != "trials.csv":
            with pytest.raises(IntegrityError, match=f"{name}: damaged: not what was written"):
                opened.config() if name == "config.yaml" else opened.front()
    path.write_bytes(whole[: len(whole) // 2])
    if name == "manifest.json":
        with pytest.raises(IntegrityError, match="damaged: not the manifest of a run"):
            Run.open("r", tmp_path)
    else:
        assert [wrong for wrong, _ in problems(run.path, run.manifest)] == [name]


@pytest.mark.parametrize("crash", ["before the manifest", "between the two"])
def test_a_crash_between_two_writes_is_no_damage(tmp_path, monkeypatch, crash):
    run = Run.create(tmp_path, CONFIG, name="r")
    writes = {"before the manifest": "write_manifest", "between the two": "atomic_write"}[crash]
    monkeypatch.setattr(f"mixnas.search.run.directory.{writes}", _fails)
    with pytest.raises(RuntimeError, match="killed here"):
        run.write_config({**CONFIG, "search": {"trials": 50}})
    monkeypatch.undo()
    again = Run.open("r", tmp_path)
    assert again.config() == CONFIG and list(problems(again.path, again.manifest)) == []
    again.write_config({**CONFIG, "search": {"trials": 60}})
    assert Run.open("r", tmp_path).config()["search"]["trials"] == 60


def _fails(*args):
    raise RuntimeError("killed here")


MANIFESTS = {
    "no format": {"format": None},
    "no objectives": {"fixed": {}},
    "no fixed": {"fixed": 3},
    "no created": {"created": 7},
    "phases": {"phases": [3]},
    "a negative time": {"phases": [{"name": "search", "seconds": -1}]},
    "a time in words": {"phases": [{"name": "search", "seconds": "long"}]},
    "a name that is none": {"phases": [{"name": 3, "seconds": 1}]},
    "a device that is a list": {"device": ["cpu"]},
    "versions that are a text": {"versions": "all"},
    "a seed that is a command": {"seed": "0; id > PROOF"},
    "a seed that is a yes": {"seed": True},
    "digests that are texts": {"digests": {"config.yaml": "0"}},
    "a time of the sentinel in words": {"reference_ms": "long"},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_lacks_something_is_one_sentence(tmp_path, name):
    """Of format 2, which had no digests: those with one cannot be changed by hand."""
    run = Run.create(tmp_path, CONFIG, name="r")
    changed = {**run.manifest, "format": 2, **MANIFESTS[name]}
    (run.path / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(IntegrityError, match=r"manifest\.json: damaged: not the manifest of a run \("):
        Run.open("r", tmp_path)


def test_a_manifest_whose_digest_was_taken_out_is_refused(tmp_path):
    run = Run.create(tmp_path, CONFIG, name="r")
    (run.path / "manifest.json").write_text(json.dumps(run.manifest))
    with pytest.raises(IntegrityError, match="its digest is missing"):
        Run.open("r", tmp_path)


def test_a_run_of_the_format_before_goes_on_and_gets_digests(tmp_path):
    run = Run.create(tmp_path, CONFIG, name="r")
    former = {key: value for key, value in run.manifest.items() if key not in ("digests", "mark")} | {"format": 2}
    (run.path / "manifest.json").write_text(json.dumps(former))
    again = Run.open("r", tmp_path)
    again.check_resumable()
    assert again.config() == CONFIG and undigested(again.path, again.manifest) == ["manifest.json", "config.yaml"]
    again.write_config({**CONFIG, "search": {"trials": 50}})
    now = Run.open("r", tmp_path)
    assert now.manifest["format"] == FORMAT and undigested(now.path, now.manifest) == []


def test_a_run_that_was_taken_away_is_written_no_more(tmp_path, objectives):
    run = Run.create(tmp_path, CONFIG, name="r")
    with run:
        shutil.rmtree(run.path)
        for write in (lambda: run.update(seed=1), lambda: run.write_tables("", front_of(Results(objectives)))):
            with pytest.raises(MachineError, match="was removed, moved or replaced"):
                write()
        Run.create(tmp_path, CONFIG, name="r")
        with pytest.raises(MachineError, match="was removed, moved or replaced"):
            run.add_phase("search", 1.0)
    assert Run.open("r", tmp_path).manifest["phases"] == []


def test_names_that_are_no_paths(tmp_path):
    for name in ("x" * 300, "a\0b", "", "\x1b[31m", "../..", "."):
        with pytest.raises(ConfigError, match="no such run") as refused:
            Run.open(name, tmp_path)
        assert len(visible(str(refused.value))) <= 300 + len(str(tmp_path))


# -- what is missing --------


def test_what_a_run_has_written_and_is_gone_is_said(tmp_path, objectives):
    run = Run.create(tmp_path, CONFIG, name="r")
    run.journal.touch()
    results = Results(objectives)
    for _ in range(2):  # of the first write nobody can tell whether it came to the file
        run.write_tables("number\n", front_of(results))
        run.write_tables("number,status\n", front_of(results))
    assert dict(problems(run.path, run.manifest)) == {}
    for name in ("trials.csv", "pareto.json", "config.yaml", "study.journal"):
        kept = (run.path / name).read_bytes()
        (run.path / name).unlink()
        found = dict(problems(run.path, Run.open("r", tmp_path).manifest))
        assert list(found) == [name] and found[name].startswith("missing")
        (run.path / name).write_bytes(kept)
    run.journal.unlink()
    with pytest.raises(IntegrityError, match=r"study\.journal: missing: the run's trials are in it"):
        run.check_resumable()


def test_between_the_manifest_and_the_file_nothing_is_missing(tmp_path, objectives, monkeypatch):
    run = Run.create(tmp_path, CONFIG, name="r")
    run.journal.touch()
    monkeypatch.setattr("mixnas.search.run.directory.atomic_write", _fails)
    with pytest.raises(RuntimeError, match="killed here"):
        run.write_tables("number\n", front_of(Results(objectives)))
    assert dict(problems(run.path, Run.open("r", tmp_path).manifest)) == {}


def test_a_run_that_was_opened_before_it_was_written_on_is_not_called_damaged(tmp_path):
    opened = Run.create(tmp_path, CONFIG, name="r")
    front = final()
    opened.write_tables("number\n", front)
    other = Run.open("r", tmp_path)
    other.write_tables("number\n", dataclasses.replace(front, run="r", knee=None))
    other.write_tables("number\n0\n", dataclasses.replace(front, run="r", device="cpu-other"))
    assert opened.front().device == "cpu-other"
    (opened.path / "pareto.json").write_text("{}")
    with pytest.raises(IntegrityError, match="damaged"):
        opened.front()


def test_a_network_of_the_front_that_is_gone_is_said(tmp_path):
    run = Run.create(tmp_path, CONFIG, name="r")
    front = final()
    run.write_tables("number\n", front)
    run.journal.touch()
    (identity,) = (member.id for member in front.members)
    assert dict(problems(run.path, run.manifest)) == {
        f"networks/{identity}.safetensors": "missing. A resume makes it again."
    }


# -- whose task may be run --------


def _own(tmp_path, monkeypatch, **changes):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')\nTask = None\n")
    return Run.create(tmp_path / "runs", {**CONFIG, "task": "evil:Task"}, name="r")


def test_a_run_that_was_started_here_is_trusted_and_no_other(tmp_path, monkeypatch):
    run = _own(tmp_path, monkeypatch)
    require_trust(Run.open("r", "runs").manifest, run.path, "resume", False)
    assert (tmp_path / "state" / "mixnas" / "key").stat().st_mode & 0o077 == 0
    for changed in (
        {**run.manifest, "fixed": {**run.manifest["fixed"], "task": "evil:Other"}},
        {**run.manifest, "mark": ""},
        {**run.manifest, "created": "2020-01-01T00:00:00Z"},
    ):
        with pytest.raises(ConfigError, match=r"'evil:.*evil\.py.* was not started here .* nas resume r --trust"):
            require_trust(changed, run.path, "resume", False)
        require_trust(changed, run.path, "resume", True)
        require_trust({**changed, "fixed": {**changed["fixed"], "task": "digits"}}, run.path, "resume", False)
    elsewhere = tmp_path / "received"
    elsewhere.mkdir()
    shutil.copy("evil.py", elsewhere)
    monkeypatch.chdir(elsewhere)  # a module of that name, in another folder, beside a run whose mark was copied
    with pytest.raises(ConfigError, match=r"received.evil\.py.* was not started here"):
        require_trust(run.manifest, run.path, "resume", False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    with pytest.raises(ConfigError, match="was not started here"):
        require_trust(run.manifest, run.path, "export", False)


@pytest.mark.parametrize("content", [b"", b"00", b"not hexadecimal", b"\xff" * 64, b"0" * 5000])
def test_a_key_that_is_damaged_trusts_nobody_and_is_made_anew(tmp_path, monkeypatch, content):
    run = _own(tmp_path, monkeypatch)
    key = tmp_path / "state" / "mixnas" / "key"
    key.write_bytes(content)
    with pytest.raises(ConfigError, match="was not started here"):
        require_trust(run.manifest, run.path, "resume", False)
    again = Run.create(tmp_path / "runs", {**CONFIG, "task": "evil:Task"}, name="again")
    if len(content) < 1000:  # what is no key at all is left alone
        require_trust(again.manifest, again.path, "resume", False)
        assert key.stat().st_mode & 0o077 == 0 and os.listdir(key.parent) == ["key"]
    else:
        assert again.manifest["mark"] == "" and key.read_bytes() == content


def test_a_user_without_a_home_is_asked_for_trust(tmp_path, monkeypatch):
    monkeypatch.setattr("mixnas.search.run.trust.Path.home", _fails)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    run = Run.create(tmp_path / "runs", {**CONFIG, "task": "evil:Task"}, name="r")
    with pytest.raises(ConfigError, match="was not started here"):
        require_trust(run.manifest, run.path, "resume", False)


def test_looking_at_a_run_imports_nothing_of_it(tmp_path, monkeypatch):
    run = _own(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert Run.open("r", "runs").status().state == "stopped" and list_runs("runs")[0].problem == ""
    with pytest.raises(ConfigError, match="--trust"):
        reopen("r", "runs")
    with pytest.raises(ConfigError, match="--trust"):
        export_run(run)
    assert "evil" not in sys.modules


def test_provenance_names_no_machine():
    text = json.dumps([versions(), commit()])
    assert os.uname().nodename not in text and str(os.getcwd()) not in text


def test_a_trial_that_was_interrupted_is_no_failure(tmp_path, space, objectives, constraints, evaluator):
    """Of a process that is gone, before the search goes on and after; in the list of runs too."""
    run = Run.create(tmp_path, CONFIG, name="r")
    with run, SearchStudy(run.journal, space, objectives, constraints) as study:
        study.ask(10)
    with run, SearchStudy(run.journal, space, objectives, constraints) as study:
        carry_out(LocalEngine(), study, evaluator, Budget(trials=3))
        assert study.results.counts["interrupted"] == 1
    status = run.status()
    assert (status.done, status.failed, status.running) == (3, study.results.counts["failed"], 0) == (3, 0, 0)
    assert list_runs(tmp_path) == [status]
