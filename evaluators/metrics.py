"""The metrics that evaluators of networks have in common."""

from __future__ import annotations

from mixnas.evaluators.protocol import Metric
from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.cost import METRICS
from mixnas.search_space.memory import PEAK_MEMORY


def metrics_of(task: Task, *, latency: bool, cheap_latency: bool = False, memory: bool = False) -> dict[str, Metric]:
    """A task's metric and loss, the costs, and latency.

    Args:
        task: Gives its metric and direction.
        latency: Whether there is latency at all.
        cheap_latency: Whether it is predicted rather than measured.
        memory: Whether there is peak memory.
    """
    own = Metric(task.metric, "max" if task.direction == "max" else "min")
    found = [own, Metric("loss", "min"), *(Metric(name, "min", True) for name in METRICS)]
    if memory:
        found.append(Metric(PEAK_MEMORY, "min", True))
    if latency:
        found.append(Metric("latency_ms", "min", cheap_latency))
    return {metric.name: metric for metric in found}
