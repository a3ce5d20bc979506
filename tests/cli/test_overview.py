from __future__ import annotations

import shutil
from pathlib import Path

from mixnas.cli.overview import overview
from mixnas.search.run.directory import Run

from .command import ok, read_csv


def test_the_numbers_are_those_of_the_trials(searched: Path, tmp_path: Path):
    shutil.copytree(searched / "runs" / "first", tmp_path / "first")
    run = Run.open("first", tmp_path)
    seen = overview(run)
    rows = read_csv(run.path / "trials.csv")
    front = [row for row in rows if row["pareto"] == "True"]
    members = run.front().members
    assert seen.final and seen.best["accuracy"] == max(m.metrics["accuracy"] for m in members)
    assert seen.errors["accuracy"] in [m.metrics["accuracy_se"] for m in members]
    assert seen.best["params"] == min(m.metrics["params"] for m in members)
    said = ok("status", "first", "--runs", tmp_path)
    assert f"of the front, trained to the end:\nbest accuracy: {seen.best['accuracy']:.4g} ±" in said
    assert seen.hypervolume is None  # its box waits for ten trials
    assert seen.seconds_left is None and seen.status.state == "finished"
    assert "time left" not in ok("status", "first", "--runs", tmp_path)

    config = run.config()
    run.write_config({**config, "search": {**config["search"], "trials": 10}})
    with run:  # as if a process searched
        seen = overview(run)
        said = ok("status", "first", "--runs", tmp_path)
    mean = sum(float(row["seconds"]) for row in rows) / 6
    assert not seen.final and seen.best["accuracy"] == max(float(row["accuracy"]) for row in front)
    assert "of the search so far, before training to the end:" in said
    assert seen.status.state == "running" and abs(seen.seconds_left - 4 * mean) < 1e-6
    assert "first: running, 6 of 10 trials done" in said and "time left in the search: about" in said
