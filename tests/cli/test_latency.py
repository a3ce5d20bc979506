"""`nas latency devices`, `profile` and `query`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mixnas.evaluators.tasks.loading import by_name
from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.search.config import load_config
from mixnas.search.run.directory import Run
from mixnas.search.run.trust import mark
from mixnas.search_space.space import SearchSpace

from .command import CONFIG, nas, ok

BATCH = 4


QUICK = ProfileConfig(
    budget_s=60.0,  # never reached: these networks are measured before
    max_networks=14,
    measure=MeasureConfig(passes=1, window_ms=0.5, sentinel_repeats=4, max_extra_passes=1, batch_size=BATCH),
    fit=FitConfig(num_trees=20),
)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `batches.yaml`, whose latencies are of batches, and this machine's `tables` for it."""
    root = tmp_path_factory.mktemp("profiled")
    (root / "batches.yaml").write_text(CONFIG.replace("latency: {", f"latency: {{batch_size: {BATCH}, "))
    config = load_config(root / "batches.yaml")
    space, io = SearchSpace.from_dict(config.space), by_name("digits").io
    profile(space, io, device="cpu", directory=root / "tables", config=QUICK, plain=config.space)
    return root


def test_profile_goes_on_with_a_table(profiled: Path, tmp_path: Path):
    shutil.copytree(profiled / "tables", tmp_path / "tables")
    (path,) = (tmp_path / "tables").glob("*.csv")
    before = path.read_text()
    words = ("latency", "profile", "-c", profiled / "batches.yaml", "--budget", "3s", "--tables", tmp_path / "tables")
    answer = nas(*words, "--json")
    assert answer.returncode == 0, answer.stderr
    assert "profile: " in answer.stderr and "done in" in answer.stderr
    said = json.loads(answer.stdout)
    assert said["runtime"] == "eager" and said["device"] in path.name and said["accuracy"]["networks"] > 0
    assert path.read_text().startswith(before)  # what was measured stays; a busy machine may have had no time for more
    wrong = nas(*words, "--budget", "soon")
    assert wrong.returncode == 2 and "--budget: 'soon' is not a duration" in wrong.stderr


def test_devices(profiled: Path):
    (found,) = json.loads(ok("latency", "devices", "--json", "--tables", profiled / "tables"))
    assert found["batch"] == BATCH and found["runtime"] == "eager" and found["num_units"] > 0
    assert found["device"] in ok("latency", "devices", "--tables", profiled / "tables")
    assert json.loads(ok("latency", "devices", "--json", "--tables", profiled / "none")) == []


def test_latency_of_a_run_that_was_measured(searched: Path):
    rows = json.loads(ok("latency", "query", "first", "--json", "--runs", searched / "runs"))
    assert rows and all(row["measured_ms"] > 0 for row in rows)


def test_a_run_of_batches_is_answered_by_its_own_predictor(searched: Path, profiled: Path, tmp_path: Path):
    shutil.copytree(searched / "runs" / "first", tmp_path / "batches")
    run = tmp_path / "batches"
    shutil.copytree(profiled / "tables", run / "latency")
    opened = Run.open(run)
    assert opened.manifest["latency"] == "eager"
    config = opened.config()
    opened.update(latency=f"eager-b{BATCH}", fixed={**opened.manifest["fixed"], "latency.batch_size": BATCH})
    opened.write_config({**config, "latency": {**config["latency"], "batch_size": BATCH}})
    asked = ("latency", "query", "batches", "--runs", tmp_path)
    front = json.loads((run / "pareto.json").read_text())["front"]
    rows = json.loads(ok(*asked, "--json"))
    assert [row["id"] for row in rows] == [member["id"] for member in front]
    for row, member in zip(rows, front, strict=True):
        assert 0 < row["low_ms"] < row["latency_ms"] < row["high_ms"]
        assert row["measured_ms"] == member["metrics"]["latency_ms"]
    assert "90% interval" in ok(*asked)
    refused = nas(*asked, "--runtime", "compiled")  # what is asked for by name is not left out without a word
    assert refused.returncode == 2 and f"through 'compiled-b{BATCH}'" in refused.stderr


def test_only_what_was_measured_is_called_measured(searched: Path, profiled: Path, tmp_path: Path):
    shutil.copytree(searched / "runs" / "first", tmp_path / "elsewhere")
    run = tmp_path / "elsewhere"
    opened = Run.open(run)
    opened.write_tables("", replace(opened.front(), latency="predicted"))
    asked = ("latency", "query", "elsewhere", "--runs", tmp_path, "--tables", profiled / "tables", "--json")
    rows = json.loads(ok(*asked, "--runtime", f"eager-b{BATCH}"))
    assert rows and not any("measured_ms" in row for row in rows)
    refused = nas(*asked)  # nobody measured single inputs here, and the run's own numbers are predictions
    assert refused.returncode == 2 and "no measurements of device" in refused.stderr


def test_architectures_of_a_file_and_of_a_sample(profiled: Path, tmp_path: Path):
    tables = ("--tables", profiled / "tables")
    batches = ("-c", profiled / "batches.yaml")
    rows = json.loads(ok("latency", "query", *batches, "--sample", 3, "--seed", 1, "--json", *tables))
    assert len(rows) == 3 and all(row["low_ms"] < row["latency_ms"] < row["high_ms"] for row in rows)
    (tmp_path / "architecture.yaml").write_text(json.dumps(rows[0]["architecture"]))
    asked = ("latency", "query", "--arch", tmp_path / "architecture.yaml", *tables)
    (row,) = json.loads(ok(*asked, *batches, "--json"))
    assert row["latency_ms"] == rows[0]["latency_ms"]
    assert "stem" in ok(*asked, "--runtime", f"eager-b{BATCH}")  # the breakdown of a single network
    single = nas(*asked)
    assert single.returncode == 2 and "through 'eager'" in single.stderr
    settings = ("--set", f"latency.batch_size={BATCH}", "--set", "space.stages.0.width=[8]")
    changed = json.loads(ok("latency", "query", *batches, *settings, "--sample", 3, "--json", *tables))
    assert all(row["architecture"]["stages"][0]["width"] == 8 for row in changed)


def test_one_question_at_a_time(tmp_path: Path):
    for words in ((), ("--sample", 2, "--arch", "a.yaml"), ("run", "--sample", 2)):
        refused = nas("latency", "query", *words)
        assert refused.returncode == 2 and "give one of --arch FILE" in refused.stderr
    (tmp_path / "list.yaml").write_text("[1, 2]")
    refused = nas("latency", "query", "-c", tmp_path / "list.yaml", "--sample", 1)
    assert refused.returncode == 2 and "expected a mapping" in refused.stderr


def test_what_would_change_nothing_of_a_run_is_refused(searched: Path, tmp_path: Path):
    """`--set latency.threads=2` was answered with what one thread takes."""
    asked = ("latency", "query", "first", "--runs", searched / "runs")
    for words in (("--set", "latency.threads=2"), ("-c", searched / "config.yaml"), ("--seed", 3)):
        refused = nas(*asked, *words)
        assert refused.returncode == 2 and f"{words[0].replace('-c', '--config')} changes nothing" in refused.stderr


def test_a_profile_is_of_the_configuration_s_runtime_and_device(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    asked = ("latency", "profile", "-c", tmp_path / "c.yaml", "--budget", "2s", "--tables", tmp_path / "tables")
    refused = nas(*asked, "--set", "latency.runtime=graph", "--set", "device=cpu")
    assert refused.returncode == 2 and "'graph' is not available here" in refused.stderr
    refused = nas(*asked, "--set", "device=nvidia-h100")
    assert refused.returncode == 2 and "nvidia-h100" in refused.stderr


WIDE = """
import torch
from mixnas import IOSpec, Split, Task

class Wide(Task):
    name = "wide"
    def __init__(self):
        g = torch.Generator().manual_seed(0)
        x, y = torch.randn(30, 48, 48, 1, generator=g), torch.randint(10, (30,), generator=g)
        self.train, self.validation, self.test = (Split(x[i : i + 10], y[i : i + 10]) for i in (0, 10, 20))
        self.io = IOSpec("image", (48, 48), 1, 10)
"""


def test_the_file_s_task_is_part_of_the_question(profiled: Path, searched: Path, tmp_path: Path, monkeypatch):
    """A network of larger inputs got the answer for those that were profiled."""
    (tmp_path / "wide_input.py").write_text(WIDE)
    monkeypatch.chdir(tmp_path)
    tables, batches = ("--tables", profiled / "tables"), ("-c", profiled / "batches.yaml")
    small = json.loads(ok("latency", "query", *batches, "--sample", 2, "--json", *tables))
    asked = ("latency", "query", *batches, "--set", "task=wide_input:Wide", "--json", *tables)
    large = json.loads(ok(*asked, "--sample", 2))
    (tmp_path / "architecture.yaml").write_text(json.dumps(large[0]["architecture"]))
    (single,) = json.loads(ok(*asked, "--arch", "architecture.yaml"))
    assert single["latency_ms"] == large[0]["latency_ms"]
    for before, after in zip(small, large, strict=True):
        assert before["id"] == after["id"] and after["latency_ms"] != before["latency_ms"]
        assert before["outside"] == [] and any("image 48x48" in text for text in after["outside"])
    # of a run the task is the run's, whatever the predictor was profiled for
    shutil.copytree(searched / "runs" / "first", tmp_path / "wide")
    opened, task = Run.open(tmp_path / "wide"), "wide_input:Wide"
    started_here = mark(task, opened.manifest["created"])
    opened.update(fixed={**opened.manifest["fixed"], "task": task}, mark=started_here)
    opened.write_config({**opened.config(), "task": task})
    rows = json.loads(
        ok("latency", "query", "wide", "--runs", tmp_path, "--runtime", f"eager-b{BATCH}", "--json", *tables)
    )
    assert rows and all(any("image 48x48" in text for text in row["outside"]) for row in rows)


def test_the_file_s_device_and_threads_are_part_of_the_question(profiled: Path, tmp_path: Path):
    asked = ("latency", "query", "-c", profiled / "batches.yaml", "--sample", 1, "--tables", profiled / "tables")
    refused = nas(*asked, "--set", "latency.threads=2")
    assert refused.returncode == 2 and "-2t' through" in refused.stderr
    refused = nas(*asked, "--set", "device=nvidia-h100")
    assert refused.returncode == 2 and "no measurements of device 'nvidia-h100'" in refused.stderr
    refused = nas("latency", "query", "--arch", "a.yaml", "--device", "nvidia-h100", "--estimate")
    assert refused.returncode == 2 and "needs the task's input. Give -c FILE" in refused.stderr


def test_a_gpu_that_nobody_measured_is_estimated_and_said_to_be(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    asked = ["latency", "query", "--device", "nvidia-h100", "--runtime", "graph", "-c", tmp_path / "c.yaml",
             "--sample", 2, "--tables", tmp_path / "none"]  # fmt: skip
    refused = nas(*asked)
    assert refused.returncode == 2 and "`--estimate`" in refused.stderr
    answer = nas(*asked, "--estimate")
    assert answer.returncode == 0 and "an estimate: this device was never measured" in answer.stderr
    for row in json.loads(ok(*asked, "--estimate", "--json")):
        assert row["estimate"] and 0 < row["low_ms"] < row["latency_ms"] < row["high_ms"]
