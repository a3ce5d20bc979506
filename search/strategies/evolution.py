"""NSGA-II (Deb et al. 2002) and NSGA-III (Deb and Jain 2014), whose children are made by the search space."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.drawing import OverSpace, trial_generator
from mixnas.search.study.objectives import Objective
from mixnas.search.study.optuna_internals import generation_of, reseed, set_generation, stored
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.settings import Between

_CROSSOVER_RATE = 0.9


@STRATEGIES.register("nsga2")
@dataclass(frozen=True, kw_only=True, slots=True)
class NSGA2(Strategy):
    """Elitist evolution, survivors by non-domination and crowding.

    Attributes:
        population_size: Trials of a generation, and survivors of each.
        first: Random trials, that the first generation of children descends from; None for as many as a generation has.
    """

    population_size: Annotated[int, Between(2, 10_000)] = 20
    first: Annotated[int, Between(2, 100_000)] | None = None

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`."""
        return ConditionalNSGAII(question, self.population_size, acceptable, cheap, self.first)


@STRATEGIES.register("nsga3")
@dataclass(frozen=True, kw_only=True, slots=True)
class NSGA3(Strategy):
    """Elitist evolution, survivors by non-domination and niches round reference points: for four objectives or more.

    Attributes:
        population_size: Trials of a generation, and survivors of each.
        first: Random trials, that the first generation of children descends from; None for as many as a generation has.
    """

    population_size: Annotated[int, Between(2, 10_000)] = 20
    first: Annotated[int, Between(2, 100_000)] | None = None

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`."""
        return ConditionalNSGAIII(question, self.population_size, acceptable, cheap, self.first)


class _Evolution(OverSpace):
    """Parents by binary tournament, then the space's own crossover and mutation, over conditional choices too.

    The survivors of a generation are selected by the Optuna sampler that this is mixed into. That sampler goes through
    all trials several times for each proposal to find the generation and its parents; here they are remembered, so
    that the fifty-thousandth proposal takes no longer than the first.
    """

    _finished: dict[int, list[FrozenTrial]] | None = None  # by generation; of each its identity is up to date
    _parents: tuple[int, list[FrozenTrial]] | None = None  # generation and its parents
    _decoded: tuple[int, list[Architecture]] | None = None  # generation and its parents' architectures
    _first: int
    _objectives: tuple[Objective, ...] = ()
    _cheap: Cheap | None = None
    _now: dict[int, FrozenTrial] | None = None  # by number, with cheap metrics as they are now, where those changed

    def forget_cheap(self) -> None:
        """See `strategies.Remembering`: survivors are selected by what is predicted of them now."""
        self._now, self._parents, self._decoded = {}, None, None

    def _as_now(self: Any, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Trials with their cheap objectives as these are now."""
        if self._now is None or self._cheap is None:
            return trials
        new = [t for t in trials if t.number not in self._now and t.state == TrialState.COMPLETE]
        if new:
            metrics = self._cheap(self._space.encode_many([self._space.from_params(t.params) for t in new]))
            for i, trial in enumerate(new):
                names = enumerate(objective.name for objective in self._objectives)
                changed = copy.copy(trial)
                changed.values = [float(metrics[n][i]) if n in metrics else trial.values[v] for v, n in names]
                self._now[trial.number] = changed
        return [self._now.get(trial.number, trial) for trial in trials]

    def get_trial_generation(self: Any, study: Study, trial: FrozenTrial) -> int:
        """The generation of a trial; a new one begins when the last is full. Stored with the trial."""
        given = generation_of(self, trial)
        if given is not None:
            return given
        finished = self._finished_in(study)
        last = max(finished, default=0)
        full = self.population_size if last else self._first
        generation: int = last + (len(finished.get(last, ())) >= full)
        set_generation(self, study, trial, generation)
        return generation

    def _finished_in(self: Any, study: Study) -> dict[int, list[FrozenTrial]]:
        if self._finished is None:
            self._finished = {}
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                generation = generation_of(self, trial)
                if generation is not None:
                    self._finished.setdefault(generation, []).append(trial)
        return self._finished  # type: ignore[no-any-return]

    def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The finished trials of a generation, in the order of their numbers."""
        finished = self._finished_in(study).get(generation, ())
        return self._as_now(sorted((stored(study, trial) for trial in finished), key=lambda t: t.number))

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The survivors that a generation descends from; none for the first."""
        if self._parents is None or self._parents[0] != generation:
            parents = super().get_parent_population(study, generation)  # type: ignore[misc]
            # in the order of the trials, in which a resumed search finds them too
            self._parents = generation, sorted(self._as_now(parents), key=lambda t: t.number)
        return self._parents[1]

    def after_trial(
        self: Any, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Count the trial in its generation."""
        self._count(trial, state)
        super().after_trial(study, trial, state, values)  # type: ignore[misc]

    def heard(self, trial: FrozenTrial) -> None:
        """See `strategies.Hearing`."""
        self._count(trial, trial.state)

    def _count(self: Any, trial: FrozenTrial, state: TrialState) -> None:
        generation = generation_of(self, trial)
        if self._finished is not None and state == TrialState.COMPLETE and generation is not None:
            self._finished.setdefault(generation, []).append(trial)
            self._finished.pop(generation - 3, None)  # nobody asks for these again

    def sample_relative(
        self: Any, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        rng = trial_generator(self._seed, trial.number)
        reseed(self, int(rng.integers(2**32)))  # NSGA-III's niching draws from it
        generation = self.get_trial_generation(study, trial)
        parents = self.get_parent_population(study, generation)
        if len(parents) < 2:
            drawn: dict[str, Any] = self._draw(lambda: self._space.sample(rng))
            return drawn
        if self._decoded is None or self._decoded[0] != generation:
            self._decoded = generation, [self._space.from_params(parent.params) for parent in parents]
        decoded = self._decoded[1]
        child: dict[str, Any] = self._draw(lambda: self._child(parents, decoded, study.directions, rng))
        return child

    def _child(
        self,
        parents: list[FrozenTrial],
        decoded: list[Architecture],
        directions: Sequence[StudyDirection],
        rng: np.random.Generator,
    ) -> Architecture:
        first = decoded[_winner(parents, directions, rng)]
        child = first
        if rng.random() < _CROSSOVER_RATE:
            child = self._space.crossover(first, decoded[_winner(parents, directions, rng)], rng)
        # the usual rate, one choice in n, changes 1 - (1 - 1/n)^n = 63% of the children; mutate() changes every one
        if child == first or rng.random() < 0.63:
            child = self._space.mutate(child, rng)
        return child


def _winner(parents: list[FrozenTrial], directions: Sequence[StudyDirection], rng: np.random.Generator) -> int:
    """Which of the parents wins a binary tournament."""
    i, j = rng.choice(len(parents), size=2, replace=False)
    return int(j if _better(parents[j], parents[i], directions) else i)


def _better(a: FrozenTrial, b: FrozenTrial, directions: Sequence[StudyDirection]) -> bool:
    """Constrained domination (Deb et al. 2002, section VI): less violation first, then Pareto domination."""
    violation_a, violation_b = (sum(v for v in t.constraints.values() if v > 0) for t in (a, b))
    if violation_a != violation_b:
        return violation_a < violation_b
    signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions]
    pairs = [(s * x, s * y) for s, x, y in zip(signs, a.values, b.values, strict=True)]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


class ConditionalNSGAII(_Evolution, NSGAIISampler):
    """NSGA-II whose children are made by the search space."""

    def __init__(
        self,
        question: Question,
        population_size: int,
        acceptable: Acceptable,
        cheap: Cheap | None = None,
        first: int | None = None,
    ) -> None:
        super().__init__(population_size=population_size, seed=question.seed)
        self._set_question(question, acceptable)
        self._objectives, self._cheap = question.objectives, cheap
        self._first = max(first or population_size, population_size)


class ConditionalNSGAIII(_Evolution, NSGAIIISampler):
    """NSGA-III whose children are made by the search space."""

    def __init__(
        self,
        question: Question,
        population_size: int,
        acceptable: Acceptable,
        cheap: Cheap | None = None,
        first: int | None = None,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(population_size=population_size, seed=question.seed)
        self._set_question(question, acceptable)
        self._objectives, self._cheap = question.objectives, cheap
        self._first = max(first or population_size, population_size)
