"""The metrics that evaluators of networks have in common, and those of them that need no evaluation."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from mixnas.evaluators.protocol import Metric
from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import METRICS, cost
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec


def metrics_of(task: Task, *, latency: bool, cheap_latency: bool = False) -> dict[str, Metric]:
    """A task's metric and loss, the costs, and latency.

    Args:
        task: Gives its metric and direction.
        latency: Whether there is latency at all.
        cheap_latency: Whether it is predicted rather than measured.
    """
    found = [
        Metric(task.metric, "max" if task.direction == "max" else "min"),
        Metric("loss", "min"),
        *(Metric(name, "min", True) for name in METRICS),
    ]
    if latency:
        found.append(Metric("latency_ms", "min", cheap_latency))
    return {metric.name: metric for metric in found}


def costs(architecture: Architecture, io: IOSpec) -> dict[str, float]:
    """Parameters, multiply-accumulates and weight bytes of an architecture."""
    return {name: float(value) for name, value in asdict(cost(architecture, io)).items()}


def costs_of(matrix: np.ndarray, space: SearchSpace, io: IOSpec) -> dict[str, np.ndarray]:
    """Costs of encoded architectures (rows, variables), each (rows,)."""
    found = [costs(architecture, io) for architecture in space.decode_many(matrix)]
    return {name: np.array([one[name] for one in found]) for name in METRICS}
