"""The metrics that evaluators of networks have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mixnas.evaluators.protocol import Metric, standard_error
from mixnas.evaluators.tasks.task import Task
from mixnas.predictors.measuring.energy import ENERGY, Energy
from mixnas.search_space.cost import METRICS
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.memory import PEAK_MEMORY

if TYPE_CHECKING:
    from mixnas.predictors.latency.source import LatencySource
    from mixnas.search_space.network import Network


def metrics_of(
    task: Task, *, latency: bool, cheap_latency: bool = False, memory: bool = False, energy: bool = False
) -> dict[str, Metric]:
    """A task's metric and loss, the costs, and latency.

    Args:
        task: Gives its metric and direction.
        latency: Whether there is latency at all.
        cheap_latency: Whether it is predicted rather than measured.
        memory: Whether there is peak memory.
        energy: Whether there is energy, which is measured.
    """
    own = Metric(task.metric, "max" if task.direction == "max" else "min")
    found = [own, Metric("loss", "min"), *(Metric(name, "min", True) for name in METRICS)]
    if memory:
        found.append(Metric(PEAK_MEMORY, "min", True))
    if latency:
        found.append(Metric("latency_ms", "min", cheap_latency))
    if energy:
        found.append(Metric(ENERGY, "min"))
    return {metric.name: metric for metric in found}


def energy_of(network: Network, latency: LatencySource) -> dict[str, float]:
    """Measured energy of a network, trained or not, with its standard error.

    Raises:
        ConfigError: The runtime does not compute it as eager PyTorch does.
    """
    (found,) = latency.measure_energy([network])
    if isinstance(found, str):
        raise ConfigError(found)
    return named(found)


def named(found: Energy) -> dict[str, float]:
    """Energy as metrics; without a standard error of a single pass."""
    return {ENERGY: found.mj} | ({standard_error(ENERGY): found.se} if math.isfinite(found.se) else {})
