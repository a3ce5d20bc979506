"""What a search would take, from steps that were really taken: the cheapest and the dearest network of its space."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mixnas.evaluators.training import TrainConfig, evaluate, train
from mixnas.predictors.measuring.energy import WINDOW_S
from mixnas.search.problem import Problem
from mixnas.search.variants import TRAINED, most_variants
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SilentReport
from mixnas.search_space.supernet import Supernet

_STEPS = 2
"""The first pays for what is made once; the second is timed."""

_COPIES = 4
"""Of a super-network in its checkpoint: weights, their average, and AdamW's two moments."""

_TRIAL_BYTES = 4096
"""Of a trial in the journal and in `trials.csv`."""
_COPIES_LEFT_OFF = 4
"""Of a network's weights, in a training that was left off: weights, two moments and a moving average."""

Range = tuple[float, float]
"""From the cheapest architecture of the space to the dearest."""


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What was measured, and what follows.

    Attributes:
        batch_size: Examples of a step.
        step_s: Seconds of a training step.
        judge_s: Seconds of judging a network on the validation split.
        phases: Seconds of each phase; measuring the finalists and loading come on top.
        memory_bytes: The most that this process had while it trained.
        disk_bytes: Of the run, at most.
    """

    batch_size: int
    step_s: Range
    judge_s: Range
    phases: Mapping[str, Range]
    memory_bytes: int
    disk_bytes: int

    @property
    def total_s(self) -> Range:
        """Of all phases."""
        return sum(low for low, _ in self.phases.values()), sum(high for _, high in self.phases.values())

    def to_plain(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "batch_size": self.batch_size,
            "step_s": list(self.step_s),
            "judge_s": list(self.judge_s),
            "phases_s": {name: list(seconds) for name, seconds in self.phases.items()},
            "total_s": list(self.total_s),
            "memory_bytes": self.memory_bytes,
            "disk_bytes": self.disk_bytes,
        }


def rehearse(problem: Problem) -> Rehearsal:
    """Build, train for a step and judge the cheapest and the dearest network of a search by operations.

    Raises:
        NasError: It can't be trained: that is what a search would say later.
    """
    config = problem.config
    alone = config.search.evaluator == "standalone"
    recipe: TrainConfig = config.train if alone else config.final.train
    ends = problem.corners["macs"]
    measured = [_measured(problem, ends[end].architecture, recipe) for end in ("smallest", "largest")]
    steps, judged = zip(*measured, strict=True)
    step_s, judge_s = (min(steps), max(steps)), (min(judged), max(judged))
    largest = int(problem.corners["params"]["largest"].value)
    trials, candidates = config.search.trials, config.final.candidates
    trained = _steps(recipe, len(problem.task.train))
    workers = max(1, int(getattr(config.search.engine, "workers", None) or 1))
    phases: dict[str, Range] = {}
    disk = trials * _TRIAL_BYTES + (trials if alone else candidates) * largest * 4
    if problem.metrics["latency_ms"].cheap:
        phases["profile"] = (config.latency.profile, config.latency.profile)
    if config.search.evaluator == "supernet":
        phases["super-network"] = _supernet_s(problem, step_s, recipe)
        store = Supernet(problem.space, problem.io, torch.Generator().manual_seed(0))
        disk += _COPIES * sum(tensor.numel() * tensor.element_size() for tensor in store.state_dict().values())
    each = tuple(trained * step + judge if alone else judge for step, judge in zip(step_s, judge_s, strict=True))
    if problem.shares is not None:
        effort = config.search.halving.effort(problem.shares)
        each = tuple(effort * trained * step + judge for step, judge in zip(step_s, judge_s, strict=True))
        disk += trials * _COPIES_LEFT_OFF * largest * 4
    energy = config.latency.passes * WINDOW_S if problem.energy else 0.0  # one at a time, whoever trains
    found = [trials * (seconds / workers + energy) for seconds in each]
    limit = config.search.time or float("inf")
    phases["search"] = min(found[0], limit), min(found[1], limit)
    if not alone:
        phases["training to the end"] = candidates * trained * step_s[0], candidates * trained * step_s[1]
    if varied := most_variants(problem):
        phases["other policies"] = 0.0, varied * TRAINED * trained * step_s[1]  # of none or all that are looked for
        disk += varied * largest * 4
    return Rehearsal(recipe.batch_size, step_s, judge_s, phases, _peak_bytes(), disk)


class _Watched(SilentReport):
    """Remembers when it was told of each step."""

    def __init__(self) -> None:
        self.at = [time.perf_counter()]

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        """See `Report`."""
        self.at.append(time.perf_counter())


def _measured(problem: Problem, architecture: Architecture, recipe: TrainConfig) -> Range:
    """Seconds of a step, and of judging."""
    device = problem.latency().torch_device
    network = Network(architecture, problem.io, generator=torch.Generator().manual_seed(problem.seed))
    watched = _Watched()
    short = replace(recipe, steps=_STEPS, stop_at=None, validate_every=0)
    generator = torch.Generator().manual_seed(problem.seed)
    train(network, problem.task, short, generator=generator, device=device, report=watched)
    begun = time.perf_counter()
    evaluate(network, problem.task, "validation", device=device)
    return watched.at[-1] - watched.at[-2], time.perf_counter() - begun


def _steps(recipe: TrainConfig, examples: int) -> int:
    return recipe.steps or recipe.epochs * max(1, examples // recipe.batch_size)


def _supernet_s(problem: Problem, step_s: Range, recipe: TrainConfig) -> Range:
    supernet = problem.config.supernet
    if supernet.seconds is not None:
        return supernet.seconds, supernet.seconds
    corners = {"both": 2, "largest": 1, "none": 0}[supernet.corners]
    factor = supernet.batch_size / recipe.batch_size / supernet.processes
    networks = _steps(supernet, len(problem.task.train)) * (corners + supernet.samples) * factor
    return networks * step_s[0], networks * step_s[1]


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
