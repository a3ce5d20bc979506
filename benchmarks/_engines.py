"""What `engines.py` evaluates; workers import it, so it is light."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mixnas.evaluators.protocol import Metric, Outcome, Request, attempt
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.reporting import SILENT, Report

BLOCK = {
    "mixer": [{"name": "dwconv", "kernel_size": [3, 5, 7]}, {"name": "attention", "heads": [2, 4]}, "identity"],
    "gate": ["none", "se"],
    "channel_mixer": [{"name": "mlp", "expansion": [1, 2, 4]}, {"name": "swiglu", "expansion": [1, 2, 3]}],
}
SPACE = {
    "stem": {"name": "conv", "stride": 1},
    "norm": ["layer", "rms"],
    "stages": [
        {"width": [16, 24, 32], "depth": [1, 2, 3], "block": BLOCK},
        {"width": [32, 48, 64], "depth": [1, 2, 3], "downsample": "patch", "block": BLOCK},
    ],
}
"""More architectures than any search looks at."""


def made_up(architecture: Architecture) -> dict[str, float]:
    """Metrics in conflict, which need no network: what is wide, deep and gated is good, slow and large."""
    params, quality = 0.0, 0.0
    for stage in architecture.stages:
        for block in stage.blocks:
            gain = {"attention": 1.2, "dwconv": 1.0}.get(block.mixer.name, 0.3) + 0.2 * (block.gate.name == "se")
            expansion = float(block.channel_mixer.get("expansion"))
            params += stage.width**2 * (1 + expansion) * (1.1 if block.gate.name == "se" else 1.0)
            quality += gain * np.sqrt(stage.width * expansion) / 40
    return {"accuracy": float(1 - np.exp(-quality)), "latency_ms": params / 1e4, "params": params}


class Sleeper:
    """An evaluator that takes `seconds`, or what `seconds` says of an architecture.

    `log` gets a line "number-less begin end pid id" for each evaluation, and "pid id" in `begun` when it begins.
    """

    metrics: Mapping[str, Metric] = {}
    finishing = "nothing"
    device = "cpu"

    def __init__(self, folder: Path, seconds: float, trouble: str = "", seed: int = 0, trials: int = 0) -> None:
        self.log, self.begun = folder / "log", folder / "begun"
        self._seconds, self._trouble, self._seed, self._trials = seconds, trouble, seed, trials
        self.log.touch()
        self.begun.touch()

    @property
    def spec(self) -> Sleeper:
        return self

    def open(self) -> Sleeper:
        return self

    def prepare(self, report: Report = SILENT, should_stop: Callable[[], bool] | None = None) -> None:
        pass

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def finish(self, architecture: Architecture, report: Report = SILENT, should_stop: Any = None) -> Any:
        raise NotImplementedError

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        return [attempt(self._evaluate, request) for request in requests]

    def _evaluate(self, request: Request) -> Outcome:
        identity = request.architecture.id
        with open(self.begun, "a") as file:
            file.write(f"{os.getpid()} {identity}\n")
        begin = time.time()
        if self._trouble == "hung" and int(identity, 16) % 10 == self._seed % 10:
            time.sleep(3600)
        if self._trouble == "deadly" and int(identity, 16) % 10 == self._seed % 10:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self._seconds)
        with open(self.log, "a") as file:
            file.write(f"{begin:.6f} {time.time():.6f} {os.getpid()} {identity}\n")
        return Outcome(made_up(request.architecture))

    def evaluations(self) -> list[tuple[float, float, int, str]]:
        """Those that ended: begin, end, process, architecture."""
        lines = (line.split() for line in self.log.read_text().splitlines())
        return [(float(begin), float(end), int(pid), identity) for begin, end, pid, identity in lines]

    def kill_at(self, count: int) -> threading.Thread:
        """Kill the process of the evaluation that is begun as the so-many-th, soon after it is."""

        def watch() -> None:
            while len(lines := self.begun.read_text().splitlines()) < count:
                time.sleep(0.005)
            time.sleep(min(0.3, self._seconds / 3))
            os.kill(int(lines[count - 1].split()[0]), signal.SIGKILL)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        return thread
