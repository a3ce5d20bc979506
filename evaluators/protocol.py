"""What an evaluator is: whatever knows the metrics of architectures, cheaply or by work.

An evaluator knows nothing of run directories, locks, signals or studies. `spec` makes it again in another process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import Report


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that an evaluator gives.

    Attributes:
        name: As in objectives and constraints.
        direction: Which way it is better.
        cheap: Whether it is known for any architecture without evaluating it (`Evaluator.cheap`).
    """

    name: str
    direction: Literal["max", "min"]
    cheap: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """An architecture to evaluate.

    Attributes:
        architecture: Which.
        fidelity: Share of the full effort (epochs, steps), above 0 and at most 1.
    """

    architecture: Architecture
    fidelity: float = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request: metrics, or the reason of its failure.

    Attributes:
        metrics: All finite; empty where it failed.
        failure: Empty where it did not.
        seconds: Wall-clock time.
        network: The trained network, where the evaluator makes one worth keeping.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0
    network: Network | None = None


class Evaluator(Protocol):
    """See the module."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Every metric that it gives, by name."""

    def prepare(self, report: Report) -> None:
        """Do what has to be done once (profile, train a super-network). Safe to repeat; what is done is not done again.

        Raises:
            StoppedEarly: It was asked to stop.
        """

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """The cheap metrics of encoded architectures (rows, variables), each (rows,)."""

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """Evaluate; an outcome for each request, in order. What goes wrong in one fails that one."""

    def finish(self, architecture: Architecture, report: Report) -> Network:
        """The network with its final weights, in evaluation mode."""

    @property
    def spec(self) -> EvaluatorSpec:
        """Plain, picklable; `spec.open()` makes this evaluator again, in any process."""


class EvaluatorSpec(Protocol):
    """What an evaluator is made from."""

    def open(self) -> Evaluator:
        """Make the evaluator; `prepare` then finds what was prepared before."""
