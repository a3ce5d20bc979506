"""The command line, as a user meets it: every verb on one small real search."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import mixnas
from mixnas.cli.main import main

CONFIG = """\
task: digits
search: {trials: 6, seed: 0, evaluator: standalone}
train: {steps: 20}
final: {candidates: 4}
latency: {passes: 1, final_passes: 2}
space:
  stem: conv
  stages:
    - width: [4, 8]
      depth: [1, 2]
      block: {mixer: [identity, {name: dwconv, kernel_size: [3, 5]}], channel_mixer: {name: mlp, expansion: [1, 2]}}
"""


class Answer(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def nas(*words: object) -> Answer:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
    return Answer(status, out.getvalue(), err.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def ok(*words: object) -> str:
    result = nas(*words)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nas")
    (root / "config.yaml").write_text(CONFIG)
    result = nas("search", "-c", root / "config.yaml", "--name", "first", "--runs", root / "runs")
    assert result.returncode == 0, result.stderr
    (root / "printed").write_text(result.stdout)
    assert "search: 6/6 trials" in result.stderr and "measure" in result.stderr
    return root


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
    assert nas("front", "first", "--where", "params < 1", *runs).returncode == 3
    wrong = nas("front", "first", "--where", "parms < 1", *runs)
    assert wrong.returncode == 2 and "Did you mean 'params'?" in wrong.stderr


def test_status(searched: Path):
    runs = ("--runs", searched / "runs")
    assert "first" in ok("status", *runs)
    one = json.loads(ok("status", "first", "--json", *runs))
    assert one["state"] == "finished" and one["done"] == 6 and one["best"]["accuracy"] > 0
    missing = nas("status", "frist", *runs)
    assert missing.returncode == 2 and "Did you mean 'first'?" in missing.stderr


def test_every_trial_is_in_the_table(searched: Path):
    rows = read_csv(searched / "runs" / "first" / "trials.csv")
    assert sum(row["status"] == "done" for row in rows) == 6
    done = [row["id"] for row in rows if row["status"] == "done"]
    assert len(set(done)) == 6


def test_export_loads_with_this_package_alone(searched: Path, tmp_path: Path):
    runs = ("--runs", searched / "runs")
    folder = Path(ok("export", "first", "-o", tmp_path, *runs).strip())
    card = json.loads((folder / "card.json").read_text())
    assert card["verified"]["test_accuracy"] == pytest.approx(card["metrics"]["test_accuracy"])
    assert (
        "output (1, 10)" in subprocess.run([sys.executable, folder / "load.py"], capture_output=True, text=True).stdout
    )
    from mixnas.search_space.formats.safetensors import load_network

    assert load_network(folder / "model.safetensors")(torch.zeros(2, 8, 8, 1)).shape == (2, 10)
    damaged = folder / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    again = subprocess.run([sys.executable, folder / "load.py"], capture_output=True, text=True)
    assert again.returncode != 0 and "damaged" in again.stderr
    assert nas("export", "first", "--pick", "zzz", *runs).returncode == 2


def test_resume_with_more_trials_goes_on_and_repeats_nothing(searched: Path, tmp_path: Path):
    import shutil

    shutil.copytree(searched / "runs" / "first", tmp_path / "more")
    before = {row["id"] for row in read_csv(tmp_path / "more" / "trials.csv")}
    ok("resume", "more", "--trials", "9", "--runs", tmp_path, "-q")
    rows = read_csv(tmp_path / "more" / "trials.csv")
    done = [row["id"] for row in rows if row["status"] == "done"]
    assert len(done) == len(set(done)) == 9 and before <= set(done)
    changed = nas("resume", "more", "--set", "space.stages.0.width=[4, 16]", "--runs", tmp_path)
    assert changed.returncode == 2 and "+  - width: [4, 16]" in changed.stderr.replace("+- width", "+  - width")


def test_latency_of_a_run_that_was_measured(searched: Path):
    rows = json.loads(ok("latency", "query", "first", "--json", "--runs", searched / "runs"))
    assert rows and all(row["measured_ms"] > 0 for row in rows)


def test_space_verbs(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    assert ok("space", "size", path).strip() == str(2 * (6 + 36))
    shown = json.loads(ok("space", "show", path, "--json"))
    low, high = (shown["corners"]["params"][end]["value"] for end in ("smallest", "largest"))
    assert shown["size"] == 84 and low < high
    assert "stages.0.blocks.1.mixer" in ok("space", "show", path)
    sample = tmp_path / "architecture.yaml"
    sample.write_text(ok("space", "sample", path, "--seed", 3))
    assert ok("space", "size", sample).strip() == "1"
    assert "84 architectures" in ok("space", "check", path)


def test_ops_and_doctor():
    names = {op["name"] for op in json.loads(ok("ops", "--json"))}
    assert {"attention", "dwconv", "swiglu", "se", "bf16"} <= names
    assert "arXiv" in ok("ops", "*attention*")
    unknown = nas("ops", "atention")
    assert unknown.returncode == 2 and "Did you mean 'attention'?" in unknown.stderr
    findings = {finding["what"]: finding for finding in json.loads(ok("doctor", "--json"))}
    assert findings["torch"]["ok"] and findings["Python"]["ok"]


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
        ("a: &x 1\nb: *x", 2, "alias"),
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


def test_the_installed_command_answers():
    command = [str(Path(sys.executable).with_name("nas")), "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == mixnas.__version__


def test_wrong_words_end_with_status_2():
    assert nas("serach").returncode == 2
    assert nas("front").returncode == 2
    assert nas("search", "--trials", "many").returncode == 2


def test_help_of_every_verb():
    for words in ([], ["search"], ["resume"], ["status"], ["front"], ["export"], ["ops"], ["doctor"], ["space", "show"],
                  ["latency", "query"], ["latency", "profile"]):  # fmt: skip
        assert "usage: nas" in ok(*words, "--help")


def test_a_gpu_that_nobody_measured_is_estimated_and_said_to_be(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    asked = ["latency", "query", "--device", "nvidia-h100", "--runtime", "graph", "-c", tmp_path / "c.yaml",
             "--sample", 2, "--tables", tmp_path / "none"]  # fmt: skip
    refused = nas(*asked)
    assert refused.returncode == 2 and "`--estimate`" in refused.stderr
    answer = nas(*asked, "--estimate")
    assert answer.returncode == 0 and "an estimate: this device was never measured" in answer.stderr
    for row in json.loads(ok(*asked, "--estimate", "--json")):
        assert row["estimate"] and 0 < row["low_ms"] < row["latency_ms"] < row["high_ms"]
