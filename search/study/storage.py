"""Optuna's storage over the journal, with trials that stay small and answers that do not go through all of them.

Optuna keeps each trial as it replays it: a dictionary of parameters, another of distributions, the attributes. At ten
thousand trials that is 130 MB, and each proposal goes through all to see whether one is waiting. Here the waiting ones
are known, distributions are shared, and the parameters of a trial that has ended are two tuples, of which one is shared
too. What is long in its attributes (architecture, metrics) is shared with `Results`. Built on what Optuna 5.0 does not
make public.
"""

from __future__ import annotations

import copy
import sys
import threading
import uuid
from collections.abc import Container, Iterator, Mapping
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    json_to_distribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.storages.journal._storage import JournalStorageReplayResult
from optuna.trial import FrozenTrial, TrialState


class _Params(Mapping[str, Any]):
    """Parameters of a trial that has ended: their names, shared by all trials that have the same, and values."""

    __slots__ = ("_names", "_values")

    def __init__(self, names: tuple[str, ...], values: tuple[Any, ...]) -> None:
        self._names, self._values = names, values

    def __getitem__(self, name: str) -> Any:
        try:
            return self._values[self._names.index(name)]
        except ValueError:
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __deepcopy__(self, memo: Any) -> dict[str, Any]:
        return dict(self)


class _Distributions(Mapping[str, BaseDistribution]):
    """The distributions of such parameters; those of one name are one object."""

    __slots__ = ("_all", "_names")

    def __init__(self, names: tuple[str, ...], every: Mapping[str, BaseDistribution]) -> None:
        self._names, self._all = names, every

    def __getitem__(self, name: str) -> BaseDistribution:
        if name not in self._names:
            raise KeyError(name)
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __deepcopy__(self, memo: Any) -> dict[str, BaseDistribution]:
        return dict(self)


class _Replay(JournalStorageReplayResult):
    """What the records come to."""

    def __init__(self, worker_id_prefix: str) -> None:
        super().__init__(worker_id_prefix)
        self.waiting: dict[int, None] = {}  # trial ids, in their order
        self._by_text: dict[str, BaseDistribution] = {}
        self._first: dict[str, BaseDistribution] = {}  # by name
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}

    def _apply_create_trial(self, log: dict[str, Any]) -> None:
        before = len(self._trials)
        super()._apply_create_trial(log)
        for trial_id in range(before, len(self._trials)):
            if self._trials[trial_id].state == TrialState.WAITING:
                self.waiting[trial_id] = None
            elif self._trials[trial_id].state.is_finished():
                self._shrink(trial_id)

    def _apply_set_trial_param(self, log: dict[str, Any]) -> None:
        trial_id = log["trial_id"]
        if not self._trial_exists_and_updatable(trial_id, log):
            return
        name = sys.intern(log["param_name"])
        text = log["distribution"]
        distribution = self._by_text.get(text)
        if distribution is None:
            distribution = self._by_text[text] = json_to_distribution(text)
        first = self._first.setdefault(name, distribution)
        if first is not distribution:
            try:
                check_distribution_compatibility(first, distribution)
            except ValueError:
                if self._is_issued_by_this_worker(log):
                    raise
                return
        value = distribution.to_external_repr(log["param_value_internal"])
        if self._is_issued_by_this_worker(log):  # whoever has the trial sees it as it was
            trial = self._trials[trial_id] = copy.copy(self._trials[trial_id])
            trial.params = {**trial.params, name: value}
            trial.distributions = {**trial.distributions, name: distribution}
        else:
            trial = self._trials[trial_id]
            trial.params[name], trial.distributions[name] = value, distribution

    def _apply_set_trial_user_attr(self, log: dict[str, Any]) -> None:
        if self._is_issued_by_this_worker(log):
            super()._apply_set_trial_user_attr(log)
        elif self._trial_exists_and_updatable(log["trial_id"], log):
            self._trials[log["trial_id"]].user_attrs.update(log["user_attr"])

    def _apply_set_trial_system_attr(self, log: dict[str, Any]) -> None:
        if self._is_issued_by_this_worker(log):
            super()._apply_set_trial_system_attr(log)
        elif self._trial_exists_and_updatable(log["trial_id"], log):
            self._trials[log["trial_id"]].system_attrs.update(log["system_attr"])

    def _apply_set_trial_state_values(self, log: dict[str, Any]) -> None:
        super()._apply_set_trial_state_values(log)
        trial = self._trials.get(log["trial_id"])
        if trial is not None and trial.state != TrialState.WAITING:
            self.waiting.pop(log["trial_id"], None)
            if trial.state.is_finished():
                self._shrink(log["trial_id"])

    def _shrink(self, trial_id: int) -> None:
        """Keep of a trial that has ended what samplers ask for."""
        trial = self._trials[trial_id]
        if all(self._first.get(name) is distribution for name, distribution in trial.distributions.items()):
            names = tuple(trial.params)
            names = self._names.setdefault(names, names)
            params: Any = _Params(names, tuple(trial.params.values()))
            distributions: Any = _Distributions(names, self._first)
            trial.params, trial.distributions = params, distributions
        trial.intermediate_values = trial.intermediate_values or _NO_STEPS


_NO_STEPS: dict[int, float] = {}  # shared: of a trial that has ended nothing is changed any more


class Storage(JournalStorage):
    """See the module.

    Args:
        backend: The journal.
    """

    _replay_result: _Replay

    def __init__(self, backend: BaseJournalBackend) -> None:
        # as Optuna's own, with another replay
        self._worker_id_prefix = f"{uuid.uuid4()}-"
        self._backend = backend
        self._thread_lock = threading.Lock()
        self._replay_result = _Replay(self._worker_id_prefix)
        with self._thread_lock:
            self._sync_with_backend()

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """See Optuna. Those that wait are found without going through all."""
        if states is None or any(state in states for state in TrialState if state != TrialState.WAITING):
            return super().get_all_trials(study_id, deepcopy, states)
        with self._thread_lock:
            self._sync_with_backend()
            found = [self._replay_result._trials[trial_id] for trial_id in self._replay_result.waiting]
        return copy.deepcopy(found) if deepcopy else found
