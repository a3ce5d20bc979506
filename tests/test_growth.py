"""Growth is proved, not claimed: one main job through eight extensions that the package knows nothing of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mixnas.search.run.directory import Run
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.reading import read_results

CONFIG: dict[str, Any] = {
    "task": "growth:LeftNeighbour",
    "objectives": {"iou": "max", "latency_ms": "min", "weight_bytes": "min"},
    "constraints": ["weight_bytes <= 20000"],
    "search": {
        "strategy": {"name": "growth_small_first", "pool": 4},
        "engine": {"name": "growth_threads", "workers": 2},
        "evaluator": "supernet",
        "trials": 60,
    },
    "latency": {"profile": "4s"},
    "supernet": {"seconds": 3, "batch_size": 32},
    "final": {"candidates": 2, "train": {"epochs": 12, "batch_size": 16}},
    "space": {
        "stem": {"name": "conv", "stride": 2, "kernel_size": 3},
        "norm": ["growth_max", "layer"],
        "stages": [
            {
                "width": [8, 16],
                "depth": [1, 2],
                "block": {
                    "mixer": [{"name": "growth_roll", "by": [1, 2]}, "identity"],
                    "gate": ["none", "se"],
                    "channel_mixer": ["none", {"name": "mlp", "expansion": [1, 2]}],
                    "quant": {"mixer": ["growth_w4", "fp32"], "channel_mixer": ["growth_w4", "bf16"]},
                },
            }
        ],
    },
}

SEARCH = """
import json, sys, growth, mixnas
config, runs = json.loads(sys.argv[1]), sys.argv[2]
mixnas.search(config, name="growth", runs=runs, progress="quiet")
"""
RESUME = """
import sys, growth
from mixnas.search.job import Job, reopen
from mixnas.search.run.progress import make_progress
from mixnas.search.run.stopping import StopSignal
run, config = reopen("growth", sys.argv[1])
Job(run, config, progress=make_progress("quiet"), stop=StopSignal()).execute()
"""
EXPORT = """
import json, sys, growth
from mixnas.search.export import export_run
from mixnas.search.run.directory import Run
run = Run.open("growth", sys.argv[1])
front = run.front()
written = []
for member in (*front.members, *front.others):
    written += export_run(run, format_names=["growth-json", "safetensors", "torch-export"], pick=member.id)
print(json.dumps([str(path) for path in written]))
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=here, env=environment, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return out


def evaluated(runs: Path) -> dict[int, str]:
    journal = runs / "growth" / "study.journal"
    if not journal.exists():
        return {}
    objectives = parse_objectives(CONFIG["objectives"])
    records = read_results(journal, objectives).records
    return {r.number: r.id for r in records if r.status == "done" and not r.queued}  # queued: beside the budget


@pytest.mark.slow
@pytest.mark.chaos
def test_one_job_through_eight_extensions(tmp_path):
    """Profile, super-network, search, killed, resumed, finished, measured, exported and loaded again."""
    search = start(SEARCH, json.dumps(CONFIG), str(tmp_path))
    while len(before := evaluated(tmp_path)) < 5:
        assert search.poll() is None, search.communicate()
        time.sleep(0.2)
    search.send_signal(signal.SIGKILL)
    search.communicate()
    finish(start(RESUME, str(tmp_path)))

    after = evaluated(tmp_path)
    assert before.items() <= after.items() and len(after) == len(set(after.values())) == 60  # none lost, none doubled
    run = Run.open("growth", tmp_path)
    phases = [phase["name"] for phase in run.manifest["phases"]]
    assert phases.count("profile") == phases.count("train supernet") == 1  # what was finished is not done again
    front = run.front()
    assert front.members and front.latency == "measured"
    for member in front.members:
        assert member.metrics["weight_bytes"] <= 20000 and 0 < member.metrics["test_iou"] <= 1
        assert member.latency.kind == "measured" and member.predicted.kind == "predicted"
    # The new parts took part: operators and policy were drawn, and moved targets and a metric of its own taught well.
    chosen = [json.dumps(record.architecture.to_dict()) for record in read_results(
        run.journal, parse_objectives(CONFIG["objectives"])).records if record.status == "done"]  # fmt: skip
    for name in ("growth_roll", "growth_max", "growth_w4"):
        assert any(name in text for text in chosen), name
    assert max(member.metrics["test_iou"] for member in front.members) > 0.6  # saying "bright" everywhere gives 0.5

    for folder in map(Path, json.loads(finish(start(EXPORT, str(tmp_path))))):
        card = json.loads((folder / "card.json").read_text())
        assert (folder / "model.growth.json").exists() and (folder / "model.pt2").exists()
        (member,) = [m for m in (*front.members, *front.others) if m.id == card["id"]]
        assert card["files"]["model.safetensors"]["weight_bytes"] == member.metrics["weight_bytes"]
