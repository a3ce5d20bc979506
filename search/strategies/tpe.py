"""Tree-structured Parzen estimator (Bergstra et al. 2011)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import optuna
from optuna.samplers import BaseSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.drawing import trial_generator
from mixnas.search.study.optuna_internals import reseed_tpe


@STRATEGIES.register("tpe")
@dataclass(frozen=True, kw_only=True, slots=True)
class TPE(Strategy):
    """Multivariate, one density per group of choices that are active together; what is in flight counts as not good."""

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`."""
        return ConditionalTPE(seed=question.seed)


class ConditionalTPE(TPESampler):
    """TPE (Bergstra et al. 2011), multivariate, one density per group of choices that are active together."""

    def __init__(self, *, seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(seed=seed, multivariate=True, group=True, constant_liar=True)
        self._seed = seed

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Start this trial's own random numbers."""
        reseed_tpe(self, trial_generator(self._seed, trial.number))
        super().before_trial(study, trial)
