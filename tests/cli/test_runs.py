"""`nas search`, `resume`, `status` and `front` on one small real search."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mixnas.cli import printing
from mixnas.search.run.directory import Run
from mixnas.search_space import files

from .command import CONFIG, nas, ok, read_csv


def test_the_printed_table_is_pareto_json(searched: Path):
    pareto = json.loads((searched / "runs" / "first" / "pareto.json").read_text())
    printed = (searched / "printed").read_text()
    assert pareto["final"] and pareto["latency"] == "measured"
    assert f"{len(pareto['front'])} networks" in printed
    for member in pareto["front"]:
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(member["id"])]
        metrics = member["metrics"]
        for text in (f"{metrics['accuracy']:.4f}", f"{metrics['test_accuracy']:.4f}", f"{metrics['latency_ms']:.3f}"):
            assert text in line
        assert member["latency"]["low_ms"] <= metrics["latency_ms"] <= member["latency"]["high_ms"]


def test_front_as_json_csv_and_filtered(searched: Path):
    runs = ("--runs", searched / "runs")
    front = json.loads(ok("front", "first", "--json", *runs))["front"]
    rows = list(csv.DictReader(io.StringIO(ok("front", "first", "--csv", *runs))))
    assert [row["id"] for row in rows] == [member["id"] for member in front]
    cheapest = min(member["metrics"]["params"] for member in front)
    few = json.loads(ok("front", "first", "--json", "--where", f"params <= {cheapest}", *runs))["front"]
    assert [member["metrics"]["params"] for member in few] == [cheapest]
    none = nas("front", "first", "--where", "params < 1", *runs)
    assert none.returncode == 3 and none.stdout == "" and "no network of the front satisfies" in none.stderr
    wrong = nas("front", "first", "--where", "parms < 1", *runs)
    assert wrong.returncode == 2 and "Did you mean 'params'?" in wrong.stderr


def test_front_by_some_of_the_objectives(searched: Path):
    runs = ("--runs", searched / "runs")
    front = json.loads(ok("front", "first", "--json", *runs))["front"]
    both = json.loads(ok("front", "first", "--json", "--objectives", "accuracy, params", *runs))["front"]
    points = [(-member["metrics"]["accuracy"], member["metrics"]["params"]) for member in front]
    kept = [
        member["id"]
        for member, (error, params) in zip(front, points, strict=True)
        if not any(e <= error and p <= params and (e, p) != (error, params) for e, p in points)
    ]
    assert [member["id"] for member in both] == kept
    none = nas("front", "first", "--objectives", "accuracy,params", "--where", "params < 1", *runs)
    assert none.returncode == 3 and "front by accuracy,params satisfies" in none.stderr
    assert f"without --where there are {len(kept)}" in none.stderr
    twice = nas("front", "first", "--objectives", "accuracy,accuracy", *runs)
    assert twice.returncode == 2 and "'accuracy' stands twice. Give it once." in twice.stderr
    assert "Did you mean" not in twice.stderr
    wrong = nas("front", "first", "--objectives", "accuracy,parms", *runs)
    assert wrong.returncode == 2 and "Did you mean 'params'?" in wrong.stderr


def test_what_was_measured_in_the_search_is_not_called_predicted(searched: Path):
    printed = (searched / "printed").read_text()
    assert "measured ms" in printed and "predicted" not in printed  # a stand-alone search predicts nothing


def test_an_empty_front_does_not_speak_of_a_filter_that_was_not_given(searched: Path, tmp_path: Path):
    shutil.copytree(searched / "runs" / "first", tmp_path / "missed")
    run = Run.open(tmp_path / "missed")
    front = run.front()
    missed = tuple(replace(member, reason="violates latency_ms <= 0.01") for member in front.members)
    changed = {"members": (), "others": missed, "knee": None, "constraints": ("latency_ms <= 0.01",)}
    run.write_tables((run.path / "trials.csv").read_text(), replace(front, **changed))
    answer = nas("front", "missed", "--runs", tmp_path)
    assert answer.returncode == 3 and "satisfies the constraints latency_ms <= 0.01" in answer.stderr
    assert "--where" not in answer.stderr
    for member in missed:  # what missed stands in the table, with the reason
        (line,) = [line for line in answer.stdout.splitlines() if member.id in line]
        assert "violates latency_ms <= 0.01" in line and f"{member.metrics['latency_ms']:.3f}" in line


def test_watching_ends_with_the_search(searched: Path, monkeypatch: pytest.MonkeyPatch):
    run, slept = Run.open("first", searched / "runs").__enter__(), []
    run.begin_phase("train super-network")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:  # as if it had been killed in this phase
            run.__exit__(None, None, None)

    monkeypatch.setattr(time, "sleep", sleep)
    shown = ok("status", "first", "--watch", "--runs", searched / "runs")
    assert shown.count("first: running") == 2 and shown.count("first: finished") == 1
    assert shown.count("phase train super-network: now") == 2


def test_status(searched: Path):
    runs = ("--runs", searched / "runs")
    assert "first" in ok("status", *runs)
    one = json.loads(ok("status", "first", "--json", *runs))
    assert one["state"] == "finished" and one["done"] == 6 and one["best"]["accuracy"] > 0
    assert ok("status", "first", "--watch", *runs) == ok("status", "first", *runs)  # it is over
    assert "Give its name" in nas("status", "--watch", *runs).stderr
    missing = nas("status", "frist", *runs)
    assert missing.returncode == 2 and "Did you mean 'first'?" in missing.stderr


def test_every_trial_is_in_the_table(searched: Path):
    rows = read_csv(searched / "runs" / "first" / "trials.csv")
    assert sum(row["status"] == "done" for row in rows) == 6
    done = [row["id"] for row in rows if row["status"] == "done"]
    assert len(set(done)) == 6
    assert all(0 <= float(row["accuracy_se"]) < 0.1 for row in rows if row["status"] == "done")


def test_resume_with_more_trials_goes_on_and_repeats_nothing(searched: Path, tmp_path: Path):
    shutil.copytree(searched / "runs" / "first", tmp_path / "more")
    before = {row["id"] for row in read_csv(tmp_path / "more" / "trials.csv")}
    ok("resume", "more", "--trials", "9", "--runs", tmp_path, "-q")
    rows = read_csv(tmp_path / "more" / "trials.csv")
    done = [row["id"] for row in rows if row["status"] == "done"]
    assert len(done) == len(set(done)) == 9 and before <= set(done)
    changed = nas("resume", "more", "--set", "space.stages.0.width=[4, 16]", "--runs", tmp_path)
    assert changed.returncode == 2 and "+  - width: [4, 16]" in changed.stderr.replace("+- width", "+  - width")


@pytest.mark.parametrize(
    ("text", "status", "says"),
    [
        ("task: digit", 2, "Did you mean 'digits'?"),
        ("serach: {trials: 3}", 2, "Did you mean 'search'?"),
        ("search: {trials: 0}", 2, "search.trials"),
        ("search: {strategy: nsga}", 2, "Did you mean 'nsga"),
        ("constraints: ['params <= 10']", 3, "params goes from"),
        ("constraints: ['parms <= 10']", 2, "Did you mean 'params'?"),
        ("objectives: {acuracy: max}", 2, "Did you mean 'accuracy'?"),
        ("device: nvidia-h100", 2, "nvidia-h100"),
        ("a: &x [*x]", 2, "alias of itself"),
    ],
)
def test_what_is_wrong_is_refused_before_work_starts(tmp_path: Path, text: str, status: int, says: str):
    key = text.split(":")[0]
    kept = [line for line in CONFIG.splitlines() if not line.startswith(f"{key}:")]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join([*kept, text]))
    result = nas("search", "-c", path, "--runs", tmp_path / "runs", "--name", "never")
    assert result.returncode == status and says in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "runs").glob("*/study.journal"))


class Interrupting(io.StringIO):
    """A stream that presses Ctrl-C, so many times, as soon as the search says that its second trial is done."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def write(self, text: str) -> int:
        written = super().write(text)
        if text.startswith("trial 1 done"):
            while self.left:
                self.left -= 1
                signal.raise_signal(signal.SIGINT)
        return written


MANY = 60  # trials: a report may lag behind by some, since a trial is reported once it is safe on the disk


def test_a_stopped_search_ends_with_status_4_and_says_how_to_go_on(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    runs = ("--runs", tmp_path / "runs")
    asked = ("search", "-c", tmp_path / "config.yaml", "--name", "stopped", "--trials", MANY, "-v", *runs)
    stopped = nas(*asked, stderr=Interrupting(times=1))
    assert stopped.returncode == 4 and f"Go on with: nas resume {tmp_path}/runs/stopped" in stopped.stderr
    assert "stopping after the trials in progress" in stopped.stderr
    assert json.loads(ok("status", "stopped", "--json", *runs))["state"] == "stopped"
    so_far = json.loads(ok("front", "stopped", "--json", *runs))
    done = so_far["trials"]["done"]
    assert 2 <= done < MANY and not so_far["final"]
    assert nas("export", "stopped", *runs).returncode == 1  # it has not come to its final networks
    ok("resume", "stopped", "-q", "--trials", done + 2, *runs)
    assert json.loads(ok("status", "stopped", "--json", *runs))["done"] == done + 2


def test_a_full_disk_says_where_and_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It said "nas resume RUN", of a run that was not there, and left a folder in the way of the next search."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "file"))

    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    asked = ("search", "-c", "config.yaml", "--name", "f2", "--runs", "tm", "-q")
    with monkeypatch.context() as during:
        during.setattr("mixnas.search.run.directory.write_manifest", full)
        first = nas(*asked)
        assert (first.returncode, first.stderr) == (1, f"nas: {tmp_path}/file: No space left on device. Make room.\n")
        assert not (tmp_path / "tm" / "f2").exists()
    monkeypatch.setattr("mixnas.search.job.Job.execute", full)
    second = nas(*asked)
    assert second.returncode == 4 and second.stderr.endswith("Make room. Then go on: nas resume tm/f2.\n")
    assert nas("resume", "tm/f2", "-q").stderr == second.stderr
    for more in ([], ["--dry-run"]):
        taken = nas(*asked, *more)
        assert taken.returncode == 2 and "tm/f2 exists already" in taken.stderr and "nas resume tm/f2" in taken.stderr


def test_a_finished_run_says_that_nothing_is_left(searched: Path, tmp_path: Path):
    shutil.copytree(searched / "runs" / "first", tmp_path / "runs" / "first")
    again = nas("resume", "first", "--runs", tmp_path / "runs")
    assert again.returncode == 0 and "first is finished: there is nothing left to search. For more: nas" in again.stderr
    assert f"nas export {tmp_path}/runs/first " in again.stderr


def test_trials_beside_the_budget_are_told(searched: Path, tmp_path: Path):
    """`nas status` counted 60 trials where the front and the card said 64."""
    shutil.copytree(searched / "runs" / "first", tmp_path / "runs" / "first")
    run = Run.open("first", tmp_path / "runs")
    front = run.front()
    run.write_tables("", replace(front, trials={**front.trials, "one_policy": 4}))
    said = ok("status", "first", "--runs", tmp_path / "runs")
    assert "4 more trials of one quantization policy throughout, beside the budget: the front counts them, too" in said
    ok("front", "first", "--json", "--runs", tmp_path / "runs")


def test_an_aborted_search_ends_with_status_4_and_can_be_resumed(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    runs = ("--runs", tmp_path / "runs")
    asked = ("search", "-c", tmp_path / "config.yaml", "--name", "aborted", "--trials", MANY, "-v", *runs)
    aborted = nas(*asked, stderr=Interrupting(times=2))
    assert aborted.returncode == 4 and "nas: aborted" in aborted.stderr
    done = json.loads(ok("status", "aborted", "--json", *runs))["done"]
    assert 2 <= done < MANY
    ok("resume", "aborted", "-q", "--trials", done + 2, *runs)
    assert json.loads(ok("status", "aborted", "--json", *runs))["done"] == done + 2


def test_dry_run_says_the_seed_and_what_may_take_how_long(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    asked = ("search", "--dry-run", "-c", tmp_path / "config.yaml", "--seed", 7)
    said = ok(*asked)
    assert "standalone, no limit of time, seed 7" in said and "batch size 1; no profile" in said
    settings = ["search.evaluator=supernet", "search.time=90s", "latency.profile=30s", "supernet.seconds=20"]
    said = ok(*asked, *(word for setting in settings for word in ("--set", setting)))
    assert "supernet, at most 90 s, seed 7" in said and "super-network 20 s of training" in said
    assert "a profile of 30 s" in said


def test_what_was_asked_for_has_a_column(searched: Path, tmp_path: Path):
    """`weight_bytes`, and the latency of another device, as objective or in a constraint."""
    run = Run.open("first", searched / "runs")
    found, elsewhere = run.front(), "latency_ms@gpu-of-others"
    members = tuple(replace(m, metrics={**m.metrics, elsewhere: 0.12345}) for m in found.members)
    asked = {"accuracy": "max", "latency_ms": "min", "weight_bytes": "min"}
    other = replace(found, members=members, objectives=asked, constraints=(f"{elsewhere} <= 2",))
    assert other.asked == ("accuracy", "latency_ms", "weight_bytes", elsewhere)
    copied = tmp_path / "first"
    shutil.copytree(run.path, copied)
    with Run.open("first", tmp_path) as again:
        again.write_tables((copied / "trials.csv").read_text(), other)
    printed = ok("front", "first", "--runs", tmp_path)
    first = next(line for line in printed.splitlines() if line.strip().startswith(members[0].id))
    assert "weight_bytes" in printed and f"{members[0].metrics['weight_bytes']:,.0f}" in first and " 0.123 " in first
    page = tmp_path / "page.html"
    ok("report", "first", "--runs", tmp_path, "-o", page)
    assert f'<th class="number">{elsewhere}</th>' in page.read_text()
    assert "weight_bytes" not in ok("front", "first", "--runs", searched / "runs")


def test_a_damaged_run_ends_with_status_5(searched: Path, tmp_path: Path):
    shutil.copytree(searched / "runs" / "first", tmp_path / "damaged")
    pareto = tmp_path / "damaged" / "pareto.json"
    pareto.write_text(pareto.read_text()[:-20])
    answer = nas("front", "damaged", "--runs", tmp_path)
    assert answer.returncode == 5 and "pareto.json: damaged" in answer.stderr
    (tmp_path / "damaged" / "manifest.json").write_text("{}")
    assert nas("status", "damaged", "--runs", tmp_path).returncode == 5
    assert "damaged" in ok("status", "--runs", tmp_path)  # the list of all runs says what is wrong with one


def test_dry_run_says_what_would_be_done_and_starts_nothing(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    said = ok("search", "--dry-run", "-c", tmp_path / "config.yaml", "--trials", 9, "--runs", tmp_path / "runs")
    assert "84 architectures" in said and "9 trials by predictor, standalone" in said and "nothing was started" in said
    assert not (tmp_path / "runs").exists()
    assert "ms of the cheapest to the dearest network, 64 examples" in said or "ms to " in said
    assert re.search(r"^time +\S.*: search ", said, flags=re.M) and re.search(r"^memory +[\d,]+ MiB", said, flags=re.M)
    assert re.search(r"^disk +at most \d", said, flags=re.M)
    plain = json.loads(ok("search", "--dry-run", "--json", "-c", tmp_path / "config.yaml", "--trials", 9))
    took = plain["rehearsal"]
    (low, high), judge = took["step_s"], took["judge_s"]
    assert plain["architectures"] == 84 and 0 < low <= high and took["total_s"] == took["phases_s"]["search"]
    wanted = [9 * (20 * step + judged) for step, judged in zip((low, high), judge, strict=True)]
    assert took["phases_s"]["search"] == pytest.approx(wanted)
    assert took["memory_bytes"] > 2**26 and 0 < took["disk_bytes"] < 2**20


def test_a_smoke_run_goes_through_every_phase_to_the_export_and_the_report(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(CONFIG + 'constraints: ["accuracy >= 0.99"]\n')
    result = nas("search", "-c", tmp_path / "config.yaml", "--smoke", "--runs", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    assert "--smoke: nothing is trained for long, so left out: accuracy >= 0.99" in result.stderr
    assert re.search(
        r"every phase was gone through \(search [\d.]+ s, .*measure .*export .*report [\d.]+ s\)", result.stderr
    )
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("smoke-digits-") and (run / "report.html").exists()
    assert list(run.glob("exports/*/model.safetensors"))


def test_a_configuration_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.yaml").write_text(CONFIG)
    read = []
    read_text = files.read_text
    monkeypatch.setattr(files, "read_text", lambda path, **of: read.append(Path(path).name) or read_text(path, **of))
    for words in (["search", "--dry-run", "-c"], ["space", "size"], ["latency", "query", "--sample", 1, "-c"]):
        read.clear()
        nas(*words, tmp_path / "config.yaml", "--runs", tmp_path / "runs")
        assert read.count("config.yaml") == 1, words


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal_with_the_names_that_runs_get(searched: Path, tmp_path: Path, monkeypatch, width: int):
    """`nas status` was 84 characters wide where a run had the name that it gets by itself."""
    monkeypatch.setattr(printing, "terminal_width", lambda: width)
    shutil.copytree(searched / "runs" / "first", tmp_path / "digits-20261128-095320")
    asked = ("--runs", tmp_path)
    name = "digits-20261128-095320"
    for words in (
        ["status"],
        ["front", name],
        ["explain", name, "0"],
        ["explain", name, "0", "1"],
        ["diff", name, name],
    ):
        printed = ok(*words, *asked)
        assert printed and max(map(len, printed.splitlines())) <= width, words
