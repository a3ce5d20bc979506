"""`nas export` and `nas reproduce`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .command import nas, ok, read_csv


@pytest.fixture(scope="module")
def exported(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default export of the small search."""
    folder = tmp_path_factory.mktemp("exported")
    return Path(ok("export", "first", "-o", folder, "--runs", searched / "runs", "-q").strip())


def test_export_loads_by_its_loader_and_by_this_package(exported: Path):
    card = json.loads((exported / "card.json").read_text())
    assert card["verified"]["test_accuracy"] == pytest.approx(card["metrics"]["test_accuracy"])
    command = [sys.executable, exported / "load.py"]
    assert "output (1, 10)" in subprocess.run(command, capture_output=True, text=True).stdout
    from mixnas.search_space.formats.safetensors import load_network

    assert load_network(exported / "model.safetensors")(torch.zeros(2, 8, 8, 1)).shape == (2, 10)


def test_the_default_is_the_fastest_within_one_standard_error_of_the_best(searched: Path, exported: Path):
    front = json.loads((searched / "runs" / "first" / "pareto.json").read_text())["front"]
    best = max(front, key=lambda m: m["metrics"]["accuracy"])["metrics"]
    least = best["accuracy"] - best["accuracy_se"]
    near = [m for m in front if m["metrics"]["accuracy"] >= least]
    assert exported.name == min(near, key=lambda m: m["metrics"]["latency_ms"])["id"]


def test_a_trial_that_is_not_on_the_front_is_finished_first(searched: Path, tmp_path: Path):
    runs = ("--runs", searched / "runs")
    known = json.loads((searched / "runs" / "first" / "pareto.json").read_text())
    final = {m["trial"] for m in (*known["front"], *known["others"])}
    row = next(r for r in read_csv(searched / "runs" / "first" / "trials.csv") if int(r["trial"]) not in final)
    folder = Path(ok("export", "first", "--trial", row["trial"], "-o", tmp_path, "-q", *runs).strip())
    card = json.loads((folder / "card.json").read_text())
    assert folder.name == row["id"] and card["trial"] == int(row["trial"])
    assert card["metrics"]["accuracy"] == pytest.approx(float(row["accuracy"]), abs=1e-6)
    refused = nas("export", "first", "--trial", "999", "-o", tmp_path, *runs)
    assert refused.returncode == 2 and "trial 999 is none that was evaluated" in refused.stderr


def test_what_was_exported_can_be_trained_again(exported: Path, tmp_path: Path):
    answer = json.loads(ok("reproduce", exported, "--json", "-q"))
    assert answer["metric"] == "test_accuracy" and answer["holds"]
    assert answer["again"] == pytest.approx(answer["exported"], abs=1e-6) and 0 < answer["allowed"] < 0.3
    card = json.loads((exported / "card.json").read_text())
    card["metrics"]["test_accuracy"] += 0.5
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "manifest.json").write_text((exported / "manifest.json").read_text())
    changed = nas("reproduce", tmp_path)
    assert changed.returncode == 5 and "missing" in changed.stderr
    assert nas("reproduce", tmp_path / "nowhere").returncode == 2


def test_a_wrong_choice_starts_nothing(searched: Path, tmp_path: Path):
    runs = ("--runs", searched / "runs", "-o", tmp_path / "out")
    assert "Did you mean" in nas("export", "frist", *runs).stderr
    for wrong in (["--pick", "zzz"], ["--weights", "accuracy"], ["--weights", "acc=1"], ["--knee", "--all"]):
        assert nas("export", "first", *wrong, *runs).returncode == 2
    assert not (tmp_path / "out").exists()
