"""What the parts of `tasks.py` have in common: a search as somebody starts it, networks trained beside it, a record."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _checkout import ROOT

from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.training import TrainConfig, TrainResult, evaluate, steps_of, train
from mixnas.predictors.latency.source import LatencySource
from mixnas.predictors.measuring.device import provenance
from mixnas.search.config import load_config, read_config
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.enumeration import cost_corner
from mixnas.search_space.files import write_json
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace

RESULTS = ROOT / "benchmarks" / "results"
NAS = [sys.executable, ROOT / "nas.py"]
CORES = len(os.sched_getaffinity(0))


class Clock:
    """The wall-clock time that a part may take; it runs from when this is made.

    Args:
        seconds: All of it, on two cores that nobody else uses.
        results: The folder that the record goes to.
    """

    def __init__(self, seconds: float, results: Path = RESULTS) -> None:
        self.seconds, self.results = seconds, results
        self._began = time.monotonic()

    @property
    def gone(self) -> float:
        """Seconds."""
        return time.monotonic() - self._began

    @property
    def left(self) -> float:
        """Seconds, below 0 where it took longer."""
        return self.seconds - self.gone

    def write(self, part: str, record: dict[str, Any]) -> None:
        """One result file."""
        self.results.mkdir(parents=True, exist_ok=True)
        path = self.results / f"tasks-{part}.json"
        took = {"budget_seconds": self.seconds, "part_seconds": self.gone}
        command = f"python benchmarks/tasks.py {part}"
        write_json(path, {**record, **took, "command": command, "provenance": provenance("cpu", 1)})
        say(f"wrote {path}; {self.gone:.0f} of {self.seconds:.0f} s")

    def settings(
        self,
        config: str,
        *,
        search: float,
        profile: float = 0,
        supernet: float = 0,
        final: float = 0,
        changes: Sequence[str] = (),
    ) -> list[str]:
        """What `nas search -c configs/CONFIG.yaml` is told so that each phase takes a share of this time.

        The last trainings are counted in steps, and not in seconds: how many there can be is found from what steps of
        the largest network and of the smallest take, between which candidates lie. No more than the configuration has.

        Args:
            config: Its name.
            search, profile, supernet, final: Shares; the last three of a search with a super-network.
            changes: Further settings, which count where they say something else.
        """
        read = load_config(ROOT / "configs" / f"{config}.yaml", settings=changes)
        found = [f"search.time={search * self.seconds:.0f}s"]
        if read.search.evaluator == "supernet":
            found += [
                f"latency.profile={profile * self.seconds:.0f}s",
                f"supernet.seconds={supernet * self.seconds:.0f}",
            ]
            task = by_name(read.task.to_plain())
            space = SearchSpace.from_dict(read.space)
            largest, smallest = (corner_step_s(space, task, read.final.train, largest=end) for end in (True, False))
            step_s = (largest + smallest) / 2
            steps = final * self.seconds * CORES / (step_s * read.final.candidates)
            steps = max(1, min(steps_of(read.final.train, len(task.train)), int(steps)))
            say(f"a step takes {smallest * 1e3:.0f} to {largest * 1e3:.0f} ms: the last trainings have {steps} steps")
            found.append(f"final.train.steps={steps}")
        return [*found, *changes]


def corner_step_s(space: SearchSpace, task: Any, config: TrainConfig, *, largest: bool) -> float:
    """Seconds of a training step of the network with the most multiply-accumulates, or the fewest, on one thread."""
    architecture = cost_corner(space, task.io, "macs", largest=largest).architecture
    network = Network(architecture, task.io, generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(1)
    # The first step allocates, so the second run tells.
    _, result = (
        train(network, task, replace(config, steps=n, stop_at=None), generator=torch.Generator().manual_seed(0))
        for n in (2, 8)
    )
    return result.seconds / result.steps


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


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

    def trained(
        self, asked: Sequence[tuple[Architecture, TrainConfig | None]], clock: Clock
    ) -> list[dict[str, Any] | None]:
        """Test metrics, latencies and costs.

        As many are trained side by side as there are cores, each on one thread; all are measured afterwards, when
        nothing else runs. One that would begin when the clock has run out is left out.

        Args:
            asked: Each with how it is trained; None for as the run's last trainings.
            clock: Of the part.

        Returns:
            One for each that is asked for, in order; None where it was left out.
        """
        spec = StandaloneSpec(
            task=self.config.task.to_plain(),
            space=self.config.space,
            train=self.config.final.train,
            seed=self.config.search.seed,
            device="cpu",
        )
        ends_at = time.time() + clock.left
        with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as pool:
            waiting = [
                pool.submit(_train, replace(spec, train=how) if how else spec, architecture, ends_at)
                for architecture, how in asked
            ]
            found = []
            for done, one in enumerate(waiting, start=1):
                found.append(one.result())
                say(f"trained {done} of {len(waiting)} beside the search, {clock.left:.0f} s left")
        records: list[dict[str, Any] | None] = []
        for (architecture, _), made in zip(asked, found, strict=True):
            if made is None:
                records.append(None)
                continue
            network, result = made
            (latency,) = self.latency.measure([network], passes=self.config.latency.final_passes)
            records.append(
                {
                    "id": architecture.id,
                    f"test_{self.task.metric}": evaluate(network, self.task, "test").score,
                    "latency_ms": latency.ms,
                    "latency_low_ms": latency.low_ms,
                    "latency_high_ms": latency.high_ms,
                    "params": sum(p.numel() for p in network.parameters()),
                    "train_steps": result.steps,
                    "train_seconds": result.seconds,
                    "architecture": architecture.to_dict(),
                }
            )
        return records


def _train(spec: StandaloneSpec, architecture: Architecture, ends_at: float) -> tuple[Network, TrainResult] | None:
    """In another process; None where it would begin after `ends_at`, a time of the system's clock."""
    if time.time() >= ends_at:
        return None
    torch.set_num_threads(1)
    return StandaloneEvaluator(spec).train(architecture)


def mixers_of(architecture: Mapping[str, Any]) -> list[str]:
    """Names of the mixers, block after block, each as often as it runs."""
    found = []
    for stage in architecture["stages"]:
        for block in stage["blocks"]:
            mixer = block.get("mixer", "identity")
            found += [mixer if isinstance(mixer, str) else mixer["name"]] * int(block.get("recursion", 1))
    return found
