"""What the strategies that propose whole architectures have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import RandomSampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from mixnas.search.strategies import Acceptable, Question
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.space import SearchSpace

MAX_DRAWS = 50
"""Proposals that one trial may throw away because they are not acceptable."""


def trial_generator(seed: int, trial_number: int) -> np.random.Generator:
    """The generator of one trial's proposal."""
    return np.random.default_rng(np.random.SeedSequence([seed, trial_number]))


def distributions_of(space: SearchSpace) -> dict[str, BaseDistribution]:
    """All variables of a space, active or not, as Optuna's distributions."""
    return {variable.name: CategoricalDistribution(variable.values) for variable in space.variables}


def distinct(rows: np.ndarray) -> np.ndarray:
    """Each of encoded architectures (rows, variables) once."""
    found = {row.tobytes(): i for i, row in enumerate(np.ascontiguousarray(rows))}
    return rows[list(found.values())]


def mutated(space: SearchSpace, rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of each encoded architecture (rows, variables) one with a choice or two changed, as `SearchSpace.mutate` does."""
    sizes = np.array([len(v.values) for v in space.variables])
    active = rows >= 0
    chosen = active & (rng.random(rows.shape) < 1 / np.maximum(active.sum(axis=1, keepdims=True), 1))
    none = ~chosen.any(axis=1)
    drawn = np.where(active, rng.random(rows.shape), -1.0).argmax(axis=1)
    chosen[np.flatnonzero(none), drawn[none]] = True
    moved = (rows + rng.integers(1, np.maximum(sizes, 2), size=rows.shape)) % sizes
    return space.complete(np.where(chosen & active, moved, rows), rng)


def crossed(space: SearchSpace, first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Uniform crossover of encoded architectures (rows, variables), as `SearchSpace.crossover` does."""
    child = np.where(rng.random(first.shape) < 0.5, first, second)
    return space.complete(np.where(child >= 0, child, np.maximum(first, second)), rng)


class OverSpace:
    """Mixed into a sampler: it proposes architectures rather than one parameter after the other."""

    def _set_question(self, question: Question, acceptable: Acceptable) -> None:
        self._space, self._seed, self._acceptable = question.space, question.seed, acceptable
        self._distributions = distributions_of(question.space)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        # Optuna's intersection of the spaces seen so far would drop every choice that depends on another one
        return self._distributions

    def _draw(self, propose: Callable[[], Architecture]) -> dict[str, Any]:
        """Parameters of the first acceptable proposal; of the last one when there is none (the study then says no)."""
        for _ in range(MAX_DRAWS):
            architecture = propose()
            if self._acceptable(architecture):
                break
        return self._space.params_of(architecture)


class BatchSampler(OverSpace, RandomSampler):
    """Base of samplers that decide a batch at a time: they say how in `propose`."""

    def __init__(self, question: Question, acceptable: Acceptable) -> None:
        super().__init__(seed=question.seed)
        self._set_question(question, acceptable)
        self._decided: deque[Architecture] = deque()

    @abstractmethod
    def propose(self, study: Study, count: int, rng: np.random.Generator) -> list[Architecture]:
        """Architectures to evaluate next, at least one, beside those in `_decided` which are still to be asked for.

        Args:
            study: With all trials so far, those in flight included.
            count: How many are wanted; what is proposed beyond it comes first the next time.
            rng: Source of whatever is drawn.
        """

    def begin_batch(self, study: Study, count: int) -> None:
        """See `strategies.Batching`."""
        if len(self._decided) < count:
            rng = trial_generator(self._seed, len(study.get_trials(deepcopy=False)))
            self._decided.extend(self.propose(study, count - len(self._decided), rng))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next of the batch; of one of its own, where the study refused some."""
        if not self._decided:
            self._decided = deque(self.propose(study, 1, trial_generator(self._seed, trial.number)))
        return self._space.params_of(self._decided.popleft())
