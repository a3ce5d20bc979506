"""What an evaluator is: whatever knows the metrics of architectures, cheaply or by work.

An evaluator knows nothing of run directories, locks, signals or studies; what it keeps it keeps in files and folders
that it is given. Making one does no work: `prepare` does. `spec` makes it again in another process.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import numpy as np

from mixnas.evaluators.isolation import undisturbed
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import MachineError, NasError, StoppedEarly, machine_fault, visible
from mixnas.search_space.reporting import SILENT, Report

if TYPE_CHECKING:
    from mixnas.search_space.network import Network  # imports torch, which an evaluator need not have

_logger = logging.getLogger(__name__)


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


def standard_error(metric: str) -> str:
    """What the standard error of a metric is called among the metrics of an outcome."""
    return f"{metric}_se"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a training.

    Attributes:
        begun: Share of it that is done, from 0.
        until: Share that is to be done after this part, at most 1.
        network: Of a training to final weights: as the part before left it; None at the beginning.
        state: Of an evaluation: what the part before left in `Outcome.state`; None at the beginning. Where it is
            missing or of no use, an evaluator begins anew, and comes to the same.
    """

    begun: float
    until: float
    network: Network | None = None
    state: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """An architecture to evaluate.

    Attributes:
        architecture: Which.
        fidelity: Share of the full effort (epochs, steps), above 0 and at most 1.
        parts: How many parts a training batch is worked through in, one after the other: with 2, what a step keeps in
            memory is about half.
        part: Which part of the training; None for all at once. Of an evaluation, the metrics are those after it.
    """

    architecture: Architecture
    fidelity: float = 1.0
    parts: int = 1
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a request: metrics, or the reason of its failure.

    Attributes:
        metrics: Those of `Evaluator.metrics`, and whatever else is worth keeping; empty where it failed.
        failure: Empty where it did not.
        seconds: Wall-clock time.
        network: The network with its final weights, on the CPU, where evaluating made it.
        state: What it takes to go on with a training that was left off (`Request.part`), in any process.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0
    network: Network | None = None
    state: bytes | None = field(default=None, repr=False)


class Evaluator(Protocol):
    """See the module."""

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Every metric that objectives and constraints may name; an outcome has all of them."""

    @property
    def device(self) -> str:
        """Where networks are trained and judged: "cpu", or a CUDA device."""

    @property
    def finishing(self) -> str:
        """What `finish` does, in a few words."""

    def prepare(self, report: Report = SILENT, should_stop: Callable[[], bool] | None = None) -> None:
        """Do what has to be done once (profile, train a super-network), each part as a phase of the report.

        Safe to repeat: what is done already, by this evaluator or an earlier one, is not done again, and is no phase.

        Raises:
            StoppedEarly: `should_stop` said so; what was done until then is kept.
        """

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """The cheap metrics of encoded architectures (rows, variables), each (rows,)."""

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """Evaluate; an outcome for each request, in order. What goes wrong in one fails that one (see `attempt`)."""

    def finish(
        self, architecture: Architecture, report: Report = SILENT, should_stop: Callable[[], bool] | None = None
    ) -> Network:
        """The network with its final weights, in evaluation mode.

        Raises:
            StoppedEarly: `should_stop` said so.
        """

    @property
    def spec(self) -> EvaluatorSpec:
        """Plain, picklable; `spec.open()` makes this evaluator again, in any process."""


@runtime_checkable
class Apart(Protocol):
    """What an `Evaluator` may be besides: its evaluations come in two parts, of which the first may be done anywhere.

    The second, latency, belongs to the machine that searches: it is measured there, or its predictor lies there.
    """

    @property
    def quiet(self) -> bool:
        """Whether nothing else may run on this machine during `complete`, because something is measured."""

    def elsewhere(self) -> EvaluatorSpec:
        """Makes an evaluator of first parts, in any process of any machine: it holds all that this takes."""

    def complete(self, request: Request, outcome: Outcome) -> Outcome:
        """The whole outcome, of a first part's that did not fail; what goes wrong is its failure (see `attempt`)."""


@runtime_checkable
class InParts(Protocol):
    """What an `Evaluator` may be besides: it trains to the final weights in parts, each done anywhere."""

    def finish_part(
        self,
        architecture: Architecture,
        part: Part,
        report: Report = SILENT,
        should_stop: Callable[[], bool] | None = None,
    ) -> Network:
        """The network after a part, in evaluation mode and fit to be judged; `part.network` stays as it is.

        Raises:
            StoppedEarly: `should_stop` said so.
        """


def finished(
    evaluator: Evaluator, request: Request, report: Report = SILENT, should_stop: Callable[[], bool] | None = None
) -> Outcome:
    """An outcome with the network that is asked for: with its final weights, or after a part of the way there.

    Raises:
        StoppedEarly: `should_stop` said so.
    """
    if request.part is None:
        return Outcome(network=evaluator.finish(request.architecture, report, should_stop))
    assert isinstance(evaluator, InParts)
    return Outcome(network=evaluator.finish_part(request.architecture, request.part, report, should_stop))


class EvaluatorSpec(Protocol):
    """What an evaluator is made from."""

    def open(self) -> Evaluator:
        """Make the evaluator; `prepare` then finds what was prepared before."""


def attempt(evaluate: Callable[[Request], Outcome], request: Request) -> Outcome:
    """The outcome of one request; whatever goes wrong in it becomes the reason of its failure.

    What it changed for the whole process is put back (`isolation`). A fault of the machine is no failure of the
    architecture: it ends the search, and the trial stays open.

    Raises:
        StoppedEarly: It was asked to stop.
        MachineError: The disk is full, the host's memory used up, a permission missing.
    """
    started = time.perf_counter()
    try:
        with undisturbed():
            found = evaluate(request)
        return replace(found, seconds=time.perf_counter() - started)
    except StoppedEarly:
        raise
    except (Exception, SystemExit) as error:  # a task that ends the program ends its trial
        if fault := machine_fault(error):
            raise MachineError(f"architecture {request.architecture.id}: {fault}.") from error
        failure = _reason(error)
        _logger.debug("architecture %s failed", request.architecture.id, exc_info=True)
    if failure.startswith("out of memory"):
        _free_memory()
    return Outcome({}, failure, time.perf_counter() - started)


@contextlib.contextmanager
def guarded(what: str) -> Iterator[None]:
    """Around what calls a task or an operator and is no trial: its state is put back, what it raises is one sentence.

    Args:
        what: Is done, as a message begins: "training the super-network".

    Raises:
        MachineError: See `attempt`.
        NasError: It raised something else than that, or ended the program.
    """
    try:
        with undisturbed():
            yield
    except NasError:
        raise
    except (Exception, SystemExit) as error:
        if fault := machine_fault(error):
            raise MachineError(f"{what}: {fault}.") from error
        raise NasError(f"{what} failed: {_reason(error)}. Mend the task or the operator that it came from.") from error


def _reason(error: BaseException) -> str:
    text = visible(" ".join(str(error)[:2000].split()))
    # torch.OutOfMemoryError, of a GPU, by its name, so that an evaluator without torch does not import it
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {text[:300]}".rstrip(": ")
    return f"{type(error).__name__}: {text[:500]}".rstrip(": ")


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
