"""Random search: every choice uniform among its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.drawing import OverSpace, trial_generator


@STRATEGIES.register("random")
@dataclass(frozen=True, kw_only=True, slots=True)
class Random(Strategy):
    """Uniform among the values of every active choice."""

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`."""
        return RandomArchitectures(question, acceptable)


class RandomArchitectures(OverSpace, RandomSampler):
    """Uniform among the values of every active choice."""

    def __init__(self, question: Question, acceptable: Acceptable) -> None:
        super().__init__(seed=question.seed)
        self._set_question(question, acceptable)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A random architecture's parameters."""
        rng = trial_generator(self._seed, trial.number)
        return self._draw(lambda: self._space.sample(rng))
