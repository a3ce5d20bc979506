"""Search strategies: which architectures are evaluated next. One file each.

A strategy is a frozen dataclass, whose fields are its options, that makes an Optuna sampler:

    @STRATEGIES.register("mine")
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Mine(Strategy):
        patience: int = 3

        def make(self, question, cheap, acceptable): ...

Every strategy draws the numbers of trial n from a generator seeded by (seed, n). A search that was stopped or killed
and resumed with the same seed therefore goes on with new samples, and with the ones it would have drawn anyway (but for
those that decide several together, `predictor` and `linas`: what they had decided is decided anew).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from mixnas.search.naming import Registry
from mixnas.search.study.objectives import Comparison, Objective
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.schema import Schema
from mixnas.search_space.space import SearchSpace

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial

Cheap = Callable[[np.ndarray], Mapping[str, np.ndarray]]
"""Metrics that are known without evaluating, each (rows,), of encoded architectures (rows, variables)."""

Acceptable = Callable[[Architecture], bool]
"""Whether an architecture is worth proposing: not evaluated or in flight, and not known to be infeasible."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a strategy is asked.

    Attributes:
        space: What to propose from.
        objectives: In the order of a trial's values.
        constraints: What a result has to satisfy. They reach a sampler through the trials too (`Trial.constraints`).
        seed: Of all that is drawn.
    """

    space: SearchSpace
    objectives: tuple[Objective, ...]
    constraints: tuple[Comparison, ...] = ()
    seed: int = 0


class Strategy(ABC):
    """See the module."""

    __slots__ = ()

    @abstractmethod
    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """The sampler.

        Args:
            question: What is searched.
            cheap: See `Cheap`; None where nothing is known without evaluating.
            acceptable: See `Acceptable`. A sampler that proposes whole architectures asks it and draws again; what
                any other proposes in vain the study refuses.
        """

    def check(self) -> None:  # noqa: B027 - most need nothing
        """Refuse to be used where something that it needs is missing; asked before any work is started.

        Raises:
            ConfigError: Says what is missing, and how to get it.
        """

    @classmethod
    def from_plain(cls, plain: Any, where: str) -> Strategy:
        """Read `name`, or `{name: ..., option: value}`."""
        return STRATEGIES.read(plain, where)

    def to_plain(self) -> str | dict[str, Any]:
        """The inverse, every option written out."""
        return STRATEGIES.to_plain(self)

    @classmethod
    def schema(cls) -> Schema:
        """What `from_plain` reads, as a JSON Schema."""
        return STRATEGIES.schema()


STRATEGIES: Registry[Strategy] = Registry("strategy", __name__)


@runtime_checkable
class Remembering(Protocol):
    """What a sampler may offer that keeps cheap metrics."""

    def forget_cheap(self) -> None:
        """Called when cheap metrics are others than before, of what was evaluated too: a predictor was corrected."""


@runtime_checkable
class Batching(Protocol):
    """What a sampler may offer that decides several proposals together."""

    def begin_batch(self, study: Study, count: int) -> None:
        """Called before `count` proposals are asked for one after the other."""


@runtime_checkable
class Hearing(Protocol):
    """What a sampler may offer that counts trials as they end (`after_trial`)."""

    def heard(self, trial: FrozenTrial) -> None:
        """Called with a trial that another process of a shared study has ended."""
