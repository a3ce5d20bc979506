"""What the parts of `tasks.py` have in common: a search as somebody starts it, networks trained beside it, a record."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _checkout import ROOT

from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.training import TrainConfig, evaluate
from mixnas.predictors.latency.source import LatencySource
from mixnas.predictors.measuring.device import provenance
from mixnas.search.config import read_config
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.files import write_json

RESULTS = ROOT / "benchmarks" / "results"
NAS = [sys.executable, ROOT / "nas.py"]


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def write(part: str, record: dict[str, Any]) -> None:
    """One result file."""
    path = RESULTS / f"tasks-{part}.json"
    write_json(path, {**record, "command": f"python benchmarks/tasks.py {part}", "provenance": provenance("cpu", 1)})
    say(f"wrote {path.relative_to(ROOT)}")


def timed(command: Sequence[str | Path], cwd: Path) -> tuple[dict[str, float], str]:
    """What a command that has to succeed took, and its stdout.

    Wall and processor seconds, the peak memory of its largest process and of all of its processes together (MiB; looked
    at twice a second, what they share counted once), and what the machine's load was: above the number of cores, the
    wall clock is that of a machine that others use too.
    """
    start = time.monotonic()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        together, over = [0.0], threading.Event()
        watch = threading.Thread(target=_watch, args=(process.pid, together, over), daemon=True)
        watch.start()
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)  # itself and those that it waited for
        process.returncode = os.waitstatus_to_exitcode(status)
        over.set()
        watch.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, said)
    took = {
        "seconds": time.monotonic() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "peak_together_mib": together[0] or used.ru_maxrss / 1024,
        "load_average": os.getloadavg()[1],
    }
    return took, said


def _watch(root: int, together: list[float], over: threading.Event) -> None:
    """Keep the most that a process and its descendants had resident at once, in MiB."""
    while not over.wait(0.5):
        pids, total = [root], 0.0
        for pid in pids:
            try:
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                pids += [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
            except (OSError, ValueError):  # it has ended
                continue
            total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
        together[0] = max(together[0], total)


def _children(task: Path) -> list[str]:
    try:
        return (task / "children").read_text().split()
    except OSError:
        return []


def searched(config: str, home: Path, *changes: str) -> tuple[Run, dict[str, float]]:
    """A run of `nas search -c CONFIG`, and what it took."""
    settings = [word for change in changes for word in ("--set", change)]
    took, table = timed([*NAS, "search", "-c", ROOT / "configs" / f"{config}.yaml", "--name", config, *settings], home)
    say(f"{table}\nsearch: {took}")
    return Run.open(home / "runs" / config), took


def told(run: Run, took: Mapping[str, float]) -> dict[str, Any]:
    """What a record has of a search."""
    front, data = run.front(), run.data()
    return {
        "task": run.config()["task"],
        "data": {key: data[key] for key in ("summary", "labels", "bicubic_psnr", "pixel_shares") if key in data},
        "search": dict(took),
        "cores": len(os.sched_getaffinity(0)),
        "phases": run.manifest["phases"],
        "trials": dict(front.trials),
        "front": [{"id": m.id, **m.values, "architecture": m.architecture} for m in front.members],
    }


class Beside:
    """Networks trained as long as a run's were, from scratch, judged on the same test split and measured on its clock.

    Args:
        run: The run.
    """

    def __init__(self, run: Run) -> None:
        self.config = read_config(run.config(), f"run {run.name}")
        self.problem = Problem(self.config)
        self.latency: LatencySource = self.problem.latency(run.latency, run.manifest.get("reference_ms"))
        self.task = self.problem.task

    def trained(self, architecture: Architecture, train: TrainConfig | None = None) -> dict[str, Any]:
        """Its test metric, its latency and its costs."""
        spec = StandaloneSpec(
            task=self.config.task.to_plain(),
            space=self.config.space,
            train=train or self.config.final.train,
            seed=self.config.search.seed,
            device="cpu",
        )
        network, result = StandaloneEvaluator(spec, task=self.task, space=self.problem.space).train(architecture)
        (latency,) = self.latency.measure([network], passes=self.config.latency.final_passes)
        metric = self.task.metric
        return {
            "id": architecture.id,
            f"test_{metric}": evaluate(network, self.task, "test").score,
            "latency_ms": latency.ms,
            "latency_low_ms": latency.low_ms,
            "latency_high_ms": latency.high_ms,
            "params": sum(p.numel() for p in network.parameters()),
            "train_steps": result.steps,
            "train_seconds": result.seconds,
            "architecture": architecture.to_dict(),
        }


def mixers_of(architecture: Mapping[str, Any]) -> list[str]:
    """Names of the mixers, block after block, each as often as it runs."""
    found = []
    for stage in architecture["stages"]:
        for block in stage["blocks"]:
            mixer = block.get("mixer", "identity")
            found += [mixer if isinstance(mixer, str) else mixer["name"]] * int(block.get("recursion", 1))
    return found
