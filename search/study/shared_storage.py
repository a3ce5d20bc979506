"""Optuna's storage of a study that several drivers share: its tables on a server, and what this driver knows of them.

Optuna's own writes each parameter of a trial in a transaction of its own, and two drivers that ask at the same time do
not see each other. Here a proposal is one transaction under a lock (`claim`): what others have in flight is read first,
then a trial is proposed, and it is there as a whole or not at all. So is a result. What is read is kept; it is read
again at each claim (`refresh`). Built on what Optuna 5.0 does not make public, its tables and how it fills them.

A trial says who carries it out (`DRIVER`). One whose driver is gone is given back: it ends as interrupted, and the same
architecture waits as a new trial, with what became of it among its `retries`; after `RETRIES` times it has failed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mixnas.search.engines.elsewhere import RETRIES
from mixnas.search.study.connection import NOW, Connection
from mixnas.search.study.driver import Driver
from mixnas.search.study.results import INTERRUPTED
from mixnas.search_space.errors import NasError

_T = TypeVar("_T")

DRIVER = "driver"
GIVEN_BACK = "given_back"
"""Attributes of a trial: who carries it out, and how often it was given back before."""


class GivenAwayError(NasError):
    """A trial of this driver was given to others meanwhile: they held this driver to be gone."""


@dataclass(slots=True)
class _Pending:
    """What a trial has that the server has not."""

    params: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)
    user: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    state: TrialState | None = None
    values: Sequence[float] | None = None


class SharedStorage(BaseStorage):
    """See the module.

    Args:
        connection: To the server.
        driver: Who this is.
        heard: Told of each trial that is other than it was known, once it is so on the server; in the order of their
            numbers.
        given_back: Told of the architecture's id when one is given back, within a claim.
    """

    def __init__(
        self,
        connection: Connection,
        driver: Driver,
        heard: Callable[[FrozenTrial], None],
        given_back: Callable[[str], None],
    ) -> None:
        self._connection, self._rdb = connection, connection.rdb
        self.driver, self._heard, self._given_back = driver, heard, given_back
        self.study = -1  # its id
        self._trials: dict[int, FrozenTrial] = {}  # by id, as the server has them
        self._unfinished: set[int] = set()
        self._last_finished = -1
        self._drafts: dict[int, FrozenTrial] = {}  # of this driver, before they are there
        self._pending: dict[int, _Pending] = {}
        self._session: Any = None  # of a claim
        self.mine: set[int] = set()  # ids of this driver's trials in flight

    # -- together ---------------------------------------------------------------------------------------------------

    def claim(self, work: Callable[[], _T], began: bool = False) -> _T:
        """Do something that proposes trials while no other driver does; all that it writes is there when this returns.

        Args:
            work: Done again from the start where the connection is lost.
            began: Whether this driver has just started, so that nobody carries out what processes of its run that are
                certainly gone had in flight.
        """

        def inside(session: Any) -> _T:
            self._drop_drafts()
            self._connection.lock(session)
            self._read()
            self._session = session
            try:
                self._take_back(session, began)
                found = work()
                for trial_id in list(self._pending):
                    self._write(session, trial_id)
            finally:
                self._session = None
            session.flush()
            return found

        flying = {trial_id: self._pending[trial_id] for trial_id in self.mine if trial_id in self._pending}
        kept = {trial_id: self._drafts[trial_id] for trial_id in flying}
        self._pending, self._drafts = {}, {}
        try:
            found = self._connection.transact(inside)
            for trial_id, trial in sorted(self._drafts.items()):
                if trial.state == TrialState.RUNNING:
                    self.mine.add(trial_id)
                self._adopt(trial)
        finally:
            self._drop_drafts()
            self._pending, self._drafts = flying, kept
        self._connection.keep_alive(sorted(self.mine))
        return found

    def refresh(self) -> None:
        """Read what is new."""
        self._connection.patiently(self._read)

    @property
    def claiming(self) -> bool:
        """Whether this is within a claim."""
        return self._session is not None

    def running(self) -> int:
        """How many trials are in flight, with whomever, as was read last."""
        return len(self.get_all_trials(self.study, False, (TrialState.RUNNING,)))

    def _drop_drafts(self) -> None:
        self._drafts, self._pending = {}, {}

    def _read(self) -> None:
        """Take in what the server has that is new."""
        known = self._unfinished
        found = self._rdb._get_trials(self.study, None, set(known), self._last_finished)
        for trial in sorted(found, key=lambda t: t.number):
            self._adopt(trial)

    def _adopt(self, trial: FrozenTrial) -> None:
        """A trial as it is on the server now."""
        trial_id = trial._trial_id
        before = self._trials.get(trial_id)
        self._trials[trial_id] = trial
        if trial.state.is_finished():
            self._unfinished.discard(trial_id)
            self.mine.discard(trial_id)
            self._last_finished = max(self._last_finished, trial_id)
        else:
            self._unfinished.add(trial_id)
        if before is None or before.state != trial.state or before.user_attrs != trial.user_attrs:
            self._heard(trial)

    # -- drivers that are gone --------------------------------------------------------------------------------------

    def _take_back(self, session: Any, began: bool) -> None:
        from sqlalchemy import text

        query = text(
            "SELECT t.trial_id FROM trials t JOIN trial_heartbeats h ON h.trial_id = t.trial_id "
            "WHERE t.study_id = :study AND t.state = 'RUNNING' "
            f"AND h.heartbeat < {NOW} - make_interval(secs => :grace) "
            "FOR UPDATE OF t"  # whose end is just being written is not gone
        )
        asked = {"study": self.study, "grace": self._connection.server.grace}
        gone = {row[0] for row in session.execute(query, asked)} - self.mine
        if began:
            running = [trial for trial in self._trials.values() if trial.state == TrialState.RUNNING]
            gone |= {t._trial_id for t in running if t.user_attrs.get(DRIVER) in self.driver.gone} - self.mine
        for trial_id in sorted(gone):
            trial = self._trials[trial_id]
            attrs, often = trial.user_attrs, int(trial.user_attrs.get(GIVEN_BACK, 0))
            reason = f"its driver {attrs.get(DRIVER, 'unknown')} was gone, as trial {trial.number}"
            if "id" not in attrs:  # of another program; nothing is known of it
                self.set_trial_user_attr(trial_id, "failure", INTERRUPTED)
            elif often >= RETRIES:
                self.set_trial_user_attr(trial_id, "failure", f"{reason}, and {RETRIES} retries were lost before")
            else:
                self.set_trial_user_attr(trial_id, "failure", INTERRUPTED)
                kept: dict[str, Any] = {key: attrs[key] for key in ("id", "architecture", "queued") if key in attrs}
                waiting = optuna.trial.create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={**kept, "retries": [*attrs.get("retries", []), reason], GIVEN_BACK: often + 1},
                    system_attrs=trial.system_attrs,
                )
                self._given_back(attrs["id"])
                self.create_new_trial(self.study, waiting)
            self.set_trial_state_values(trial_id, TrialState.FAIL)

    # -- trials -----------------------------------------------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """See Optuna. Within a claim."""
        if self._session is None:
            return self.claim(lambda: self.create_new_trial(study_id, template_trial))
        model = self._rdb._get_prepared_new_trial(study_id, template_trial, self._session)
        self._session.flush()
        trial_id = int(model.trial_id)
        if template_trial is None:
            self._session.add(_heartbeat(trial_id))
            trial = optuna.trial.create_trial(state=TrialState.RUNNING)
            trial.datetime_start = model.datetime_start
        else:
            trial = copy.deepcopy(template_trial)
        trial.number, trial._trial_id = int(model.number), trial_id
        self._drafts[trial_id] = trial
        if template_trial is None:
            self.set_trial_user_attr(trial_id, DRIVER, self.driver.process)
        return trial_id

    def _draft(self, trial_id: int) -> tuple[FrozenTrial, _Pending]:
        """A trial that is changed, and what the server does not have of it yet."""
        trial = copy.copy(self.get_trial(trial_id))
        self._drafts[trial_id] = trial
        return trial, self._pending.setdefault(trial_id, _Pending())

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """See Optuna."""
        trial, pending = self._draft(trial_id)
        value = distribution.to_external_repr(param_value_internal)
        trial.params = {**trial.params, param_name: value}
        trial.distributions = {**trial.distributions, param_name: distribution}
        pending.params[param_name] = param_value_internal, distribution

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See Optuna. Written with what ends the trial, or by `flush`."""
        trial, pending = self._draft(trial_id)
        trial.user_attrs = {**trial.user_attrs, key: value}
        pending.user[key] = value

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See Optuna; as `set_trial_user_attr`."""
        trial, pending = self._draft(trial_id)
        trial.system_attrs = {**trial.system_attrs, key: value}
        pending.system[key] = value

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Nothing of ours has steps."""
        raise NotImplementedError

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """See Optuna.

        Raises:
            GivenAwayError: The trial was this driver's, and is no more.
        """
        trial, pending = self._draft(trial_id)
        if state == TrialState.RUNNING:
            if trial.state != TrialState.WAITING:
                return False
            trial.datetime_start = datetime.now()
            self.set_trial_user_attr(trial_id, DRIVER, self.driver.process)
            trial = self._drafts[trial_id]
        else:
            trial.datetime_complete = datetime.now()
        pending.state, pending.values = state, values
        trial.state, trial.values = state, None if values is None else list(values)
        if self._session is None:
            self.flush(trial_id)
        return True

    def flush(self, trial_id: int) -> None:
        """Write what is new of a trial of this driver's, all of it or nothing.

        Raises:
            GivenAwayError: It was given to others.
        """
        if trial_id not in self._pending:
            return
        try:
            self._connection.transact(lambda session: self._write(session, trial_id))
        except optuna.exceptions.UpdateFinishedTrialError:
            there = self._connection.patiently(lambda: self._rdb.get_trial(trial_id))
            self._pending.pop(trial_id, None)
            draft = self._drafts.pop(trial_id)
            self._adopt(there)
            if there.state != draft.state or there.user_attrs != draft.user_attrs:
                raise GivenAwayError(
                    f"trial {there.number}: this driver was not heard from for {self._connection.server.grace:g} s, "
                    "and others carry its trial out now."
                ) from None
            return  # it was written, and the connection was lost before that was said
        self._pending.pop(trial_id, None)
        self._adopt(self._drafts.pop(trial_id))
        self._connection.keep_alive(sorted(self.mine))

    def _write(self, session: Any, trial_id: int) -> None:
        from optuna.storages._rdb import models

        pending = self._pending[trial_id]
        model: Any = models.TrialModel.find_or_raise_by_id(trial_id, session, for_update=True)
        self._rdb.check_trial_is_updatable(trial_id, model.state)
        for name, (value, distribution) in pending.params.items():
            text = distribution_to_json(distribution)
            session.add(
                models.TrialParamModel(trial_id=trial_id, param_name=name, param_value=value, distribution_json=text)
            )
        for kind, attrs in (
            (models.TrialUserAttributeModel, pending.user),
            (models.TrialSystemAttributeModel, pending.system),
        ):
            for key, value in attrs.items():
                self._rdb._set_trial_attr_without_commit(session, kind, trial_id, key, value)
        for objective, value in enumerate(pending.values or ()):
            self._rdb._set_trial_value_without_commit(session, model, objective, value)
        if pending.state is not None:
            if pending.state == TrialState.RUNNING:  # it waited: nobody had it
                session.add(_heartbeat(trial_id))
            draft = self._drafts[trial_id]
            model.datetime_start, model.datetime_complete = draft.datetime_start, draft.datetime_complete
            model.state = pending.state

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See Optuna: as it is known here."""
        found = self._drafts.get(trial_id) or self._trials.get(trial_id)
        if found is None:
            raise KeyError("Record does not exist.")
        return found

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """See Optuna: as they are known here; `refresh` and `claim` read them."""
        if states is not None and not any(
            s in states for s in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        ):
            ids = {*self._unfinished, *self._drafts}
        else:
            ids = {*self._trials, *self._drafts}
        found = [self.get_trial(trial_id) for trial_id in ids]
        found = sorted((t for t in found if states is None or t.state in states), key=lambda t: t.number)
        return copy.deepcopy(found) if deepcopy else found

    # -- the study --------------------------------------------------------------------------------------------------

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """See Optuna. What a connection has found is not made again, should it be gone by now."""
        if self._connection.study_id is not None:
            raise optuna.exceptions.DuplicatedStudyError
        return self._found(self._rdb.create_new_study(directions, study_name))

    def get_study_id_from_name(self, study_name: str) -> int:
        """See Optuna."""
        known = self._connection.study_id
        return self._found(self._rdb.get_study_id_from_name(study_name) if known is None else known)

    def _found(self, study_id: int) -> int:
        if self.study != study_id:
            self.study = self._connection.study_id = study_id
            self.refresh()
        return study_id

    def delete_study(self, study_id: int) -> None:
        """Not from here."""
        raise NotImplementedError

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """See Optuna."""
        self._connection.patiently(lambda: self._rdb.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """See Optuna."""
        self._connection.patiently(lambda: self._rdb.set_study_system_attr(study_id, key, value))

    def get_study_name_from_id(self, study_id: int) -> str:
        """See Optuna."""
        return self._connection.patiently(lambda: self._rdb.get_study_name_from_id(study_id))

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """See Optuna."""
        return self._connection.patiently(lambda: self._rdb.get_study_directions(study_id))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """See Optuna."""
        return self._connection.patiently(lambda: self._rdb.get_study_user_attrs(study_id))

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """See Optuna."""
        return self._connection.patiently(lambda: self._rdb.get_study_system_attrs(study_id))

    def get_all_studies(self) -> list[Any]:
        """See Optuna."""
        return self._connection.patiently(self._rdb.get_all_studies)


def _heartbeat(trial_id: int) -> Any:
    from optuna.storages._rdb import models
    from sqlalchemy import func

    return models.TrialHeartbeatModel(trial_id=trial_id, heartbeat=func.timezone("UTC", func.clock_timestamp()))
