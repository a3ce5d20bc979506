"""Gaussian processes over all choices of a space (Optuna's `GPSampler`)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.drawing import MAX_DRAWS, distributions_of, trial_generator
from mixnas.search.study.optuna_internals import reseed_gp


@STRATEGIES.register("gp")
@dataclass(frozen=True, kw_only=True, slots=True)
class GP(Strategy):
    """One choice that is inactive in a trial stands at its first value for the model."""

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`."""
        return ConditionalGP(question, acceptable)


class ConditionalGP(GPSampler):
    """Gaussian processes on all choices; one that is inactive in a trial stands at its first value for the model.

    Among few choices a model often proposes what it has already seen. A proposal takes seconds, so one that is not
    acceptable is mutated until it is, instead of asking again.
    """

    def __init__(self, question: Question, acceptable: Acceptable) -> None:
        super().__init__(seed=question.seed, warn_independent_sampling=False)
        self._space, self._seed, self._acceptable = question.space, question.seed, acceptable
        self._distributions = distributions_of(question.space)
        self._first_values = {variable.name: variable.values[0] for variable in question.space.variables}

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Start this trial's own random numbers."""
        reseed_gp(self, trial_generator(self._seed, trial.number))
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
        # Optuna leaves those out that have not all choices; the one that is asked for has none yet
        running = [self._filled(t) for t in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if t.params]
        return super()._sample_relative_impl(study, completed, running, search_space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The model's proposal, or one near it; nothing (independent sampling) until there is a model."""
        params = super().sample_relative(study, trial, search_space)
        if not params:
            return params
        proposal = architecture = self._space.from_params(params)
        rng = trial_generator(self._seed, trial.number)
        for _ in range(MAX_DRAWS):
            if self._acceptable(architecture):
                break
            architecture = self._space.mutate(proposal, rng)
        return self._space.params_of(architecture)

    def _filled(self, trial: FrozenTrial) -> FrozenTrial:
        filled = copy.copy(trial)
        filled.distributions = self._distributions
        filled.params = {**self._first_values, **trial.params}
        return filled
