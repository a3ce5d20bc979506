"""Search strategies: Optuna samplers by name, fitted to spaces whose choices depend on one another.

Every strategy draws the numbers of trial n from a generator seeded by (seed, n). A search that was stopped or killed
and resumed with the same seed therefore goes on with new samples, and with the ones it would have drawn anyway.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, TPESampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.space import SearchSpace

Acceptable = Callable[[Architecture], bool]

_CROSSOVER_RATE = 0.9
_MAX_DRAWS = 50  # proposals that one trial may throw away because they were seen before or are known to be infeasible


def trial_generator(seed: int, trial_number: int) -> np.random.Generator:
    """The generator of one trial's proposal."""
    return np.random.default_rng(np.random.SeedSequence([seed, trial_number]))


def distributions_of(space: SearchSpace) -> dict[str, BaseDistribution]:
    """All variables of a space, active or not, as Optuna's distributions."""
    return {variable.name: CategoricalDistribution(variable.values) for variable in space.variables}


class _OverSpace:
    """What the strategies that propose a whole architecture have in common."""

    def _set_space(self, space: SearchSpace, seed: int, acceptable: Acceptable) -> None:
        self._space, self._seed, self._acceptable = space, seed, acceptable
        self._distributions = distributions_of(space)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        # Optuna's intersection of the spaces seen so far would drop every choice that depends on another one
        return self._distributions

    def _draw(self, propose: Callable[[], Architecture]) -> dict[str, Any]:
        """Parameters of the first acceptable proposal; of the last one when there is none (the study then says no)."""
        for _ in range(_MAX_DRAWS):
            architecture = propose()
            if self._acceptable(architecture):
                break
        return self._space.params_of(architecture)


class RandomArchitectures(_OverSpace, optuna.samplers.RandomSampler):
    """Uniform among the values of every active choice."""

    def __init__(self, space: SearchSpace, *, seed: int, acceptable: Acceptable) -> None:
        super().__init__(seed=seed)
        self._set_space(space, seed, acceptable)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A random architecture's parameters."""
        rng = trial_generator(self._seed, trial.number)
        return self._draw(lambda: self._space.sample(rng))


class _Evolution(_OverSpace):
    """Parents by binary tournament, then the space's own crossover and mutation, over conditional choices too.

    The survivors of a generation are selected by the Optuna sampler that this is mixed into. That sampler goes through
    all trials several times for each proposal to find the generation and its parents; here both are remembered, so
    that the thousandth proposal takes no longer than the first.
    """

    _counts: Counter[int] | None = None  # finished trials per generation
    _parents: tuple[int, list[FrozenTrial]] | None = None  # generation and its parents

    def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
        """The generation of a trial; a new one begins when the last is full. Stored with the trial."""
        key = self._get_generation_key()  # type: ignore[attr-defined]
        if key in trial.system_attrs:
            return int(trial.system_attrs[key])
        if self._counts is None:
            complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            self._counts = Counter(t.system_attrs[key] for t in complete if key in t.system_attrs)
        last = max(self._counts, default=0)
        generation = last + (self._counts[last] >= self._population_size)  # type: ignore[attr-defined]
        study._storage.set_trial_system_attr(trial._trial_id, key, generation)
        return generation

    def get_parent_population(self, study: Study, generation: int) -> list[FrozenTrial]:
        """The survivors that a generation descends from; none for the first."""
        if self._parents is None or self._parents[0] != generation:
            parents = super().get_parent_population(study, generation)  # type: ignore[misc]
            # in the order of the trials, in which a resumed search finds them too
            self._parents = generation, sorted(parents, key=lambda t: t.number)
        return self._parents[1]

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Count the trial in its generation."""
        generation = trial.system_attrs.get(self._get_generation_key())  # type: ignore[attr-defined]
        if self._counts is not None and state == TrialState.COMPLETE and generation is not None:
            self._counts[generation] += 1
        super().after_trial(study, trial, state, values)  # type: ignore[misc]

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        rng = trial_generator(self._seed, trial.number)
        self._rng.rng.seed(int(rng.integers(2**32)))  # type: ignore[attr-defined]  # NSGA-III's niching draws from it
        generation = self.get_trial_generation(study, trial)  # type: ignore[attr-defined]
        parents = self.get_parent_population(study, generation)  # type: ignore[attr-defined]
        if len(parents) < 2:
            return self._draw(lambda: self._space.sample(rng))
        return self._draw(lambda: self._child(parents, study.directions, rng))

    def _child(
        self, parents: list[FrozenTrial], directions: Sequence[StudyDirection], rng: np.random.Generator
    ) -> Architecture:
        first = self._parent(parents, directions, rng)
        child = first
        if rng.random() < _CROSSOVER_RATE:
            child = self._space.crossover(first, self._parent(parents, directions, rng), rng)
        # the usual rate, one choice in n, changes 1 - (1 - 1/n)^n = 63% of the children; mutate() changes every one
        if child == first or rng.random() < 0.63:
            child = self._space.mutate(child, rng)
        return child

    def _parent(
        self, parents: list[FrozenTrial], directions: Sequence[StudyDirection], rng: np.random.Generator
    ) -> Architecture:
        i, j = rng.choice(len(parents), size=2, replace=False)
        winner = parents[j] if _better(parents[j], parents[i], directions) else parents[i]
        return self._space.from_params(winner.params)


def _better(a: FrozenTrial, b: FrozenTrial, directions: Sequence[StudyDirection]) -> bool:
    """Constrained domination (Deb et al. 2002, section VI): less violation first, then Pareto domination."""
    violation_a, violation_b = (sum(v for v in t.constraints.values() if v > 0) for t in (a, b))
    if violation_a != violation_b:
        return violation_a < violation_b
    signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in directions]
    pairs = [(s * x, s * y) for s, x, y in zip(signs, a.values, b.values, strict=True)]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


class ConditionalNSGAII(_Evolution, NSGAIISampler):
    """NSGA-II (Deb et al. 2002) whose children are made by the search space."""

    def __init__(self, space: SearchSpace, *, seed: int, population_size: int, acceptable: Acceptable) -> None:
        super().__init__(population_size=population_size, seed=seed)
        self._set_space(space, seed, acceptable)


class ConditionalNSGAIII(_Evolution, NSGAIIISampler):
    """NSGA-III (Deb and Jain 2014) whose children are made by the search space."""

    def __init__(self, space: SearchSpace, *, seed: int, population_size: int, acceptable: Acceptable) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(population_size=population_size, seed=seed)
        self._set_space(space, seed, acceptable)


class ConditionalTPE(TPESampler):
    """TPE (Bergstra et al. 2011), multivariate, one density per group of choices that are active together."""

    def __init__(self, *, seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(seed=seed, multivariate=True, group=True, constant_liar=False)
        self._seed = seed

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Start this trial's own random numbers."""
        _reseed(self._seed, trial.number, self._rng, self._random_sampler._rng)
        super().before_trial(study, trial)


class ConditionalGP(GPSampler):
    """Gaussian processes on all choices; one that is inactive in a trial stands at its first value for the model.

    Among few choices a model often proposes what it has already seen. A proposal takes seconds, so one that is not
    acceptable is mutated until it is, instead of asking again.
    """

    def __init__(self, space: SearchSpace, *, seed: int, acceptable: Acceptable) -> None:
        super().__init__(seed=seed, warn_independent_sampling=False)
        self._space, self._seed, self._acceptable = space, seed, acceptable
        self._distributions = distributions_of(space)
        self._first_values = {variable.name: variable.values[0] for variable in space.variables}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Start this trial's own random numbers."""
        independent: Any = self._independent_sampler
        _reseed(self._seed, trial.number, self._rng, independent._rng)
        super().before_trial(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The whole space: GP has no conditional choices, and the intersection would drop them."""
        return self._distributions

    def _sample_relative_impl(
        self,
        study: Study,
        completed_trials: list[FrozenTrial],
        running_trials: list[FrozenTrial],
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        completed = [self._filled(trial) for trial in completed_trials]
        return super()._sample_relative_impl(study, completed, running_trials, search_space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The model's proposal, or one near it; nothing (independent sampling) until there is a model."""
        params = super().sample_relative(study, trial, search_space)
        if not params:
            return params
        proposal = architecture = self._space.from_params(params)
        rng = trial_generator(self._seed, trial.number)
        for _ in range(_MAX_DRAWS):
            if self._acceptable(architecture):
                break
            architecture = self._space.mutate(proposal, rng)
        return self._space.params_of(architecture)

    def _filled(self, trial: FrozenTrial) -> FrozenTrial:
        filled = copy.copy(trial)
        filled.distributions = self._distributions
        filled.params = {**self._first_values, **trial.params}
        return filled


def _reseed(seed: int, trial_number: int, *states: Any) -> None:
    for state, number in zip(
        states, trial_generator(seed, trial_number).integers(2**32, size=len(states)), strict=True
    ):
        state.rng.seed(int(number))


def _nsga2(space: SearchSpace, seed: int, population_size: int, acceptable: Acceptable) -> BaseSampler:
    return ConditionalNSGAII(space, seed=seed, population_size=population_size, acceptable=acceptable)


def _nsga3(space: SearchSpace, seed: int, population_size: int, acceptable: Acceptable) -> BaseSampler:
    return ConditionalNSGAIII(space, seed=seed, population_size=population_size, acceptable=acceptable)


def _tpe(space: SearchSpace, seed: int, population_size: int, acceptable: Acceptable) -> BaseSampler:
    return ConditionalTPE(seed=seed)


def _gp(space: SearchSpace, seed: int, population_size: int, acceptable: Acceptable) -> BaseSampler:
    return ConditionalGP(space, seed=seed, acceptable=acceptable)


def _random(space: SearchSpace, seed: int, population_size: int, acceptable: Acceptable) -> BaseSampler:
    return RandomArchitectures(space, seed=seed, acceptable=acceptable)


STRATEGIES: Mapping[str, Callable[[SearchSpace, int, int, Acceptable], BaseSampler]] = {
    "nsga2": _nsga2,
    "nsga3": _nsga3,
    "tpe": _tpe,
    "gp": _gp,
    "random": _random,
}


def make_sampler(
    name: str,
    space: SearchSpace,
    *,
    seed: int = 0,
    population_size: int = 20,
    acceptable: Acceptable = lambda architecture: True,
) -> BaseSampler:
    """The Optuna sampler of a strategy.

    Constraints reach every strategy through the trials themselves (`Trial.set_constraint`; a sampler's
    `constraints_func` is deprecated in Optuna 5).

    Args:
        name: A key of `STRATEGIES`.
        space: What to propose from.
        seed: Of the search.
        population_size: Of the evolutionary strategies.
        acceptable: Whether an architecture is worth proposing: not evaluated before and not known to be infeasible.
            The strategies that propose whole architectures ask it and draw again.

    Raises:
        ConfigError: No such strategy, or a population of fewer than two.
    """
    if name not in STRATEGIES:
        raise ConfigError(
            f"search.strategy: no strategy is called {name!r}.{nearest(name, STRATEGIES)} "
            f"Allowed: {', '.join(STRATEGIES)}."
        )
    if population_size < 2:
        raise ConfigError(f"search.population_size: {population_size} is not allowed. Allowed: whole numbers from 2.")
    return STRATEGIES[name](space, seed, population_size, acceptable)
