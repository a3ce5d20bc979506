"""`nas explain`, `nas diff` and `nas report`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mixnas.search import comparing
from mixnas.search.run.directory import Run
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.reading import read_results
from mixnas.search_space.architecture import Architecture

from .command import nas, ok

FORMER = Path(__file__).parents[1] / "data" / "v1"


def test_explain_shows_units_and_what_differs(searched: Path):
    runs = ("--runs", searched / "runs")
    front = json.loads((searched / "runs" / "first" / "pareto.json").read_text())
    first = front["front"][0]
    (one,) = json.loads(ok("explain", "first", first["id"], "--json", *runs))
    assert one["id"] == first["id"] and one["units"][0]["name"] == "stem" and one["units"][-1]["name"] == "head"
    assert sum(unit["params"] for unit in one["units"]) == first["metrics"]["params"]
    assert sum(unit["weight_bytes"] for unit in one["units"]) == first["metrics"]["weight_bytes"]
    assert sum(unit["macs"] for unit in one["units"]) == first["metrics"]["macs"]
    text = ok("explain", FORMER / "finished", "54820b57dc37", "9c7f")
    assert "where they differ" in text and "layer > attention(heads=2)" in text and "params: 914 and 330" in text
    wrong = nas("explain", "first", "zzz", *runs)
    assert wrong.returncode == 2 and "'zzz' is no network and no trial of first" in wrong.stderr
    assert f"The final networks: {first['id']}" in wrong.stderr
    assert json.loads(ok("explain", "first", "0", "--json", *runs))[0]["units"]


def test_diff_of_two_fronts(tmp_path: Path):
    for name in ("finished", "standalone"):
        shutil.copytree(FORMER / name, tmp_path / name)
    same = json.loads(ok("diff", "finished", "finished", "--json", "--runs", tmp_path))
    assert same["ratio"] == 1 and same["dominated"] == [[], []] and same["remarks"] == []
    found = json.loads(ok("diff", "finished", "standalone", "--json", "--runs", tmp_path))
    back = json.loads(ok("diff", "standalone", "finished", "--json", "--runs", tmp_path))
    assert found["ratio"] == pytest.approx(1 / back["ratio"]) and found["dominated"] == back["dominated"][::-1]
    assert "evaluator differs: supernet and standalone" in found["remarks"]
    better = json.loads((tmp_path / "finished" / "pareto.json").read_text())
    bounded = tmp_path / "bounded"
    shutil.copytree(tmp_path / "finished", bounded)
    (bounded / "pareto.json").write_text(json.dumps({**better, "constraints": []}))
    remarks = json.loads(ok("diff", "bounded", "standalone", "--json", "--runs", tmp_path))["remarks"]
    assert any(remark.startswith("constraints differ: none and ") for remark in remarks)
    for member in better["front"]:
        member["metrics"]["latency_ms"] /= 2
    (tmp_path / "finished" / "pareto.json").write_text(json.dumps(better))
    shutil.copytree(FORMER / "finished", tmp_path / "before")
    found = json.loads(ok("diff", "before", "finished", "--json", "--runs", tmp_path))
    assert found["ratio"] > 1 and len(found["dominated"][0]) == len(better["front"]) and not found["dominated"][1]
    assert "dominates" in ok("diff", "before", "finished", "--runs", tmp_path)


def test_report_is_a_file(searched: Path, tmp_path: Path):
    path = ok("report", "first", "-o", tmp_path / "page.html", "--runs", searched / "runs").strip()
    assert path == str(tmp_path / "page.html") and "<!DOCTYPE html>" in (tmp_path / "page.html").read_text()[:20]
    assert nas("report", "nowhere", "--runs", searched / "runs").returncode == 2


def test_no_floor_is_above_its_time(monkeypatch: pytest.MonkeyPatch):
    """A trial off the front whose units do more multiply-accumulates a millisecond sets the rate of its own floors."""
    run = Run.open(FORMER / "finished")
    front = {Architecture.from_canonical(m.architecture).id for m in run.front().members}
    real = comparing.breakdown

    def timed(architecture, io, predictor):
        rate = 10.0 if architecture.id in front else 70.0
        return [
            replace(unit, latency_ms=(unit.macs + 3 * i) / rate) for i, unit in enumerate(real(architecture, io, None))
        ]

    monkeypatch.setattr(comparing, "breakdown", timed)
    records = read_results(run.journal, parse_objectives(run.manifest["fixed"]["objectives"])).records
    off = next(str(r.number) for r in records if r.status == "done" and r.id not in front)
    for names in ([off], [run.front().members[0].id, off]):
        for one in comparing.explain(run, names):
            rows = one.to_plain()["units"]
            assert all(row["floor_ms"] <= row["latency_ms"] for row in rows)
            assert (max(row["floor_ms"] / row["latency_ms"] for row in rows if row["macs"]) == 1) == (
                one.id not in front
            )
