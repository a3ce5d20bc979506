"""Everything of Optuna's that is not public and that we use all the same, for speed. Checked against Optuna 5.0.

Public calls copy every trial, and read them all again for each proposal: at the thousandth trial that takes longer than
the evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.samplers._ga import BaseGASampler
from optuna.storages.journal._storage import JournalOperation as JournalOperation
from optuna.study._constrained_optimization import _CONSTRAINTS_KEY
from optuna.trial import FrozenTrial, TrialState


def fail(study: optuna.Study, trial: FrozenTrial, **user_attrs: Any) -> None:
    """End a trial of a process that is gone; `Study.tell` would want the trial that this process asked for."""
    storage = study._storage
    for name, value in user_attrs.items():
        storage.set_trial_user_attr(trial._trial_id, name, value)
    storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)


def stored(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> FrozenTrial:
    """A trial as the storage has it, not a copy."""
    return study._storage.get_trial(trial._trial_id)


def set_violations(study: optuna.Study, trial: optuna.Trial, violations: Sequence[float]) -> None:
    """Store by how much a trial violates each constraint: zero or less where it does not.

    As Optuna's samplers store it, one list. `Trial.set_constraint` gives each a name instead since Optuna 5, which
    optuna-dashboard (0.21) does not read: it would show every trial as feasible. `FrozenTrial.constraints` has both.
    """
    study._storage.set_trial_system_attr(trial._trial_id, _CONSTRAINTS_KEY, list(violations))


# -- generations of evolutionary samplers


def generation_key(sampler: BaseGASampler) -> str:
    """Name of the system attribute that holds a trial's generation."""
    return sampler._get_generation_key()


def generation_of(sampler: BaseGASampler, trial: FrozenTrial) -> int | None:
    """The generation that was stored with a trial."""
    return trial.system_attrs.get(generation_key(sampler))


def set_generation(sampler: BaseGASampler, study: optuna.Study, trial: FrozenTrial, generation: int) -> None:
    """Store a trial's generation with it."""
    study._storage.set_trial_system_attr(trial._trial_id, generation_key(sampler), generation)


def assign_generation(study: optuna.Study, trial: optuna.Trial) -> None:
    """Give a trial its generation where the sampler has generations: of an enqueued trial it is never asked for one."""
    if isinstance(study.sampler, BaseGASampler):
        study.sampler.get_trial_generation(study, trial._cached_frozen_trial)


# -- random numbers


def reseed(sampler: BaseSampler, seed: int) -> None:
    """Start the generator of a sampler that has one anew."""
    sampler._rng.rng.seed(seed)  # type: ignore[attr-defined]


def reseed_tpe(sampler: TPESampler, rng: np.random.Generator) -> None:
    """Start both generators of a TPE sampler anew."""
    _reseed_all(rng, sampler._rng, sampler._random_sampler._rng)


def reseed_gp(sampler: GPSampler, rng: np.random.Generator) -> None:
    """Start both generators of a GP sampler anew."""
    independent: Any = sampler._independent_sampler
    _reseed_all(rng, sampler._rng, independent._rng)


def _reseed_all(rng: np.random.Generator, *states: Any) -> None:
    for state, number in zip(states, rng.integers(2**32, size=len(states)), strict=True):
        state.rng.seed(int(number))
