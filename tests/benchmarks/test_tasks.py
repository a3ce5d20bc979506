"""The data that the benchmark of people's own data draws."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mixnas.evaluators.tasks.folder import Folder


@pytest.fixture
def tasks(scripts: Path) -> ModuleType:
    """The script, by its path: there are other modules of its name."""
    spec = importlib.util.spec_from_file_location("benchmark_of_tasks", scripts / "tasks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_drawn_is_of_its_seed_and_can_be_searched(tasks, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tasks.draw_folder(tmp_path / name, 4, seed)
    one, same, other = (sorted((tmp_path / name).glob("*/*")) for name in "abc")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in same]
    assert [path.read_bytes() for path in one] != [path.read_bytes() for path in other]
    task = Folder(path=str(tmp_path / "a"))
    assert task.labels == tasks.SHAPES and np.sum(list(task.counts.values())) == 20


def test_what_a_command_took_is_measured(tasks, tmp_path):
    took, said = tasks.timed([sys.executable, "-c", "print(sum(i * i for i in range(10**6)))"], tmp_path)
    assert said.strip() == "333332833333500000"
    assert took["cpu_seconds"] > 0 and took["seconds"] > 0 and took["peak_mib"] > 1


def test_a_budget_is_shared_out_and_what_is_set_counts(tasks):
    assert tasks.scaled(1) == []
    assert "search.time=38s" in tasks.scaled(0.5) and "final.train.steps=300" in tasks.scaled(0.5)
    clock = tasks.Clock(600)
    assert clock.settings("mqar-hybrids", search=0.5, changes=["search.trials=2"]) == [
        "search.time=300s",
        "search.trials=2",
    ]
    found = clock.settings("segmentation", profile=0.1, supernet=0.3, search=0.2, final=0.001)
    assert found[:3] == ["search.time=120s", "latency.profile=60s", "supernet.seconds=180"]
    (steps,) = (int(one.partition("=")[2]) for one in found[3:])
    assert 1 <= steps < 1000  # fewer than the configuration has: a thousandth of the time is not enough for those
    assert set(tasks.BUDGETS) == set(tasks.PARTS)
