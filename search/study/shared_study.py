"""The study of a team: several drivers propose, evaluate and tell, on one server.

The server has the truth. Each driver keeps a copy of it in its run's directory, a journal as that of any run, so that
`nas status`, `front`, `report` and `diff` read it as ever, and need no server. The copy is made anew when a driver
starts.

The budget counts the trials of all: one is proposed while no other driver proposes (`SharedStorage.claim`), by whoever
sees what all have done and have in flight.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mixnas.evaluators.protocol import Request
from mixnas.search.strategies import Hearing
from mixnas.search.study.connection import Connection
from mixnas.search.study.driver import Driver
from mixnas.search.study.journal import JournalFile
from mixnas.search.study.objectives import Objective
from mixnas.search.study.pareto import Reference
from mixnas.search.study.reading import read_records, summary_path
from mixnas.search.study.results import TrialRecord
from mixnas.search.study.shared_storage import DRIVER, GivenAwayError, SharedStorage
from mixnas.search.study.storage import Storage
from mixnas.search.study.study import STUDY_NAME, BudgetTaken, Proposal, SearchStudy, record_of
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import IntegrityError, MachineError
from mixnas.search_space.files import check_stamp, parse_json, read_bytes, stamped, write_json

_logger = logging.getLogger(__name__)


class JournalCopy:
    """A study in a journal file, as it is told of trial by trial.

    Args:
        path: The file; what is there is replaced, once the copy is whole.
        directions: Of the study.
        attributes: Of the study.
        trials: In the order of their numbers.
    """

    def __init__(
        self,
        path: Path,
        directions: Sequence[StudyDirection],
        attributes: Mapping[str, Any],
        trials: Sequence[FrozenTrial],
    ) -> None:
        new = path.with_name(f"{path.name}.new")
        new.unlink(missing_ok=True)
        backend = JournalFile(new)
        self._storage, self._early = Storage(backend), dict[int, FrozenTrial]()
        study = self._storage.create_new_study(directions, STUDY_NAME)
        for key, value in attributes.items():
            self._storage.set_study_user_attr(study, key, value)
        for trial in trials:
            self.take(trial)
        backend.close()
        summary_path(path).unlink(missing_ok=True)  # of what was there before
        os.replace(new, path)
        self.backend = JournalFile(path)
        self._storage = Storage(self.backend)
        self._study = self._storage.get_study_id_from_name(STUDY_NAME)

    def set(self, key: str, value: Any) -> None:
        """An attribute of the study."""
        self._storage.set_study_user_attr(self._study, key, value)

    def take(self, trial: FrozenTrial) -> None:
        """A trial that is new, or other than it was."""
        storage, study = self._storage, 0
        there = storage._replay_result._trials.get(trial.number)
        if there is None:
            self._early[trial.number] = trial
            while (following := len(storage._replay_result._trials)) in self._early:
                storage.create_new_trial(study, self._early.pop(following))
            return
        if there.state.is_finished():
            return
        for name, value in trial.params.items():
            if name not in there.params:
                distribution = trial.distributions[name]
                storage.set_trial_param(trial.number, name, distribution.to_internal_repr(value), distribution)
        for key, value in trial.user_attrs.items():
            if there.user_attrs.get(key) != value:
                storage.set_trial_user_attr(trial.number, key, value)
        for key, value in trial.system_attrs.items():
            if there.system_attrs.get(key) != value:
                storage.set_trial_system_attr(trial.number, key, value)
        if there.state != trial.state:
            storage.set_trial_state_values(trial.number, trial.state, trial.values)


class SharedStudy(SearchStudy):
    """See the module, and `SearchStudy` for what else it is made with.

    Args:
        journal: Of the copy.
        connection: To the server; whoever gives it closes it.
        driver: Who this is.

    Raises:
        IntegrityError: The server has lost trials that the copy of an earlier session has.
    """

    def __init__(self, journal: str | Path, *args: Any, connection: Connection, driver: Driver, **options: Any) -> None:
        self._connection, self._driver = connection, driver
        self._unsent = Path(journal).with_name("unsent.json")
        self._copy: JournalCopy | None = None
        self._agreed = False  # on the hypervolume's box
        super().__init__(journal, *args, **options)

    # -- beginning --------------------------------------------------------------------------------------------------

    def _open(self, objectives: Sequence[Objective]) -> tuple[str, BaseStorage]:
        self._shared = SharedStorage(self._connection, self._driver, self._hear, self._give_back)
        return self._connection.server.study, self._shared

    def _begin(self) -> None:
        attributes = self.optuna_study.user_attrs
        known: dict[str, Any] = {key: attributes[key] for key in ("objectives", "reference") if key in attributes}
        trials = self._shared.get_all_trials(self._shared.study, deepcopy=False)
        self._check_copy(trials)
        self._copy = JournalCopy(self.path, self.optuna_study.directions, known, trials)
        self._backend = self._copy.backend
        for trial in trials:
            self._take_in(trial)
        self._send_unsent()
        self._shared.claim(lambda: None, began=True)

    def _check_copy(self, trials: Sequence[FrozenTrial]) -> None:
        """Refuse to go on where the server has lost trials that an earlier copy has: that would be lost with it."""
        if not os.path.lexists(self.path):
            return
        try:
            records, _ = read_records(self.path, self.results.objectives)
        except IntegrityError as error:
            _logger.warning("%s It is made anew from the server.", error)
            return
        there = {(t.number, t.user_attrs.get("id")) for t in trials if t.state.is_finished()}
        gone = sum(record.evaluated and (record.number, record.id) not in there for record in records)
        if gone:
            raise IntegrityError(
                f"{self._connection.server}: has lost trials: {gone} that were evaluated are only in the copy "
                f"{self.path}. Restore the database from its backup, or start a new run; this one can be looked at."
            )

    def mark_interrupted(self, but: Collection[int] = ()) -> None:
        """Nothing to do: what a claim proposed and was not given out is not there, and others' trials are theirs."""

    def close(self) -> None:
        """Write the copy and its summary, and close it."""
        if self._copy is not None:
            super().close()

    # -- what is heard ----------------------------------------------------------------------------------------------

    def _hear(self, trial: FrozenTrial) -> None:
        """A trial is other than it was known, on the server."""
        if self._copy is not None:  # else all of them are taken in at the beginning
            self._copy.take(trial)
            self._take_in(trial)

    def _take_in(self, trial: FrozenTrial) -> None:
        identity = trial.user_attrs.get("id", "")
        if trial.state == TrialState.RUNNING and identity:
            self._seen[identity] = trial.number
        if not trial.state.is_finished():
            return
        record = record_of(trial)
        if record.evaluated:
            self._seen[identity] = trial.number
        elif self._seen.get(identity) == trial.number:
            del self._seen[identity]
        self.results.add(record)
        sampler = self.optuna_study.sampler
        if isinstance(sampler, Hearing) and trial.user_attrs.get(DRIVER) != self._driver.process:
            sampler.heard(trial)

    def _give_back(self, identity: str) -> None:
        self._seen.pop(identity, None)

    def _taken(self, trial: Any) -> TrialRecord:
        return record_of(self._shared.get_trial(trial._trial_id))  # it was heard, or will be when the claim ends

    def _store_reference(self) -> None:
        if self._agreed or self.results.reference is None or self._copy is None or self._shared.claiming:
            return
        mine = {"point": list(self.results.reference.point), "span": list(self.results.reference.span)}
        found = self._connection.agree("reference", mine)
        self.results.agree(Reference(tuple(found["point"]), tuple(found["span"])))
        self._copy.set("reference", found)
        self._agreed = True

    @property
    def synced(self) -> bool:
        """What was told is on the server's disk: it says so of each transaction, whatever the copy is."""
        return True

    @property
    def elsewhere(self) -> int:
        """How many trials are in flight with other drivers, as was seen last."""
        return self._shared.running() - len(self._shared.mine)

    def refresh(self) -> None:
        """See what other drivers did, and give back what those had that are gone."""
        self._shared.claim(lambda: None)
        self._store_reference()
        self._backend.flush()

    # -- asking and telling -----------------------------------------------------------------------------------------

    def ask(self, trials: int | None = None) -> Proposal:
        """See `SearchStudy`."""
        before = None

        def proposed() -> Proposal:
            nonlocal before
            if before is None:
                before = dict(self._seen), deque(self._queue), self._refused_in_a_row
            else:  # the connection was lost
                self._restore(*before)
            if trials is not None and self.results.evaluated + self._shared.running() >= trials:
                raise BudgetTaken(f"what is left of {trials} trials is in flight elsewhere.")
            return super(SharedStudy, self).ask()

        try:
            proposal = self._shared.claim(proposed)
        except BaseException:
            if before is not None:
                self._restore(*before)
            raise
        self._store_reference()
        self._backend.flush()
        return proposal

    def _restore(self, seen: dict[str, int], queue: deque[Any], refused: int) -> None:
        self._seen, self._queue, self._refused_in_a_row = dict(seen), deque(queue), refused

    def tell(
        self, proposal: Proposal, metrics: Mapping[str, float], seconds: float, *, share: float = 1.0
    ) -> TrialRecord:
        """See `SearchStudy`. Where the trial was given to others meanwhile, its record says that it was interrupted."""
        try:
            return self._told(proposal, lambda: super(SharedStudy, self).tell(proposal, metrics, seconds, share=share))
        except MachineError:
            self._keep_unsent(proposal, metrics, seconds)
            raise

    def tell_failure(self, proposal: Proposal, reason: str, seconds: float) -> TrialRecord:
        """See `tell`."""
        return self._told(proposal, lambda: super(SharedStudy, self).tell_failure(proposal, reason, seconds))

    def note_retry(self, proposal: Proposal, reason: str) -> None:
        """See `SearchStudy`."""

        def noted() -> None:
            super(SharedStudy, self).note_retry(proposal, reason)
            self._shared.flush(proposal.trial._trial_id)

        self._told(proposal, noted)

    def _told(self, proposal: Proposal, tell: Callable[[], Any]) -> Any:
        trial_id = proposal.trial._trial_id
        try:
            if self._shared.get_trial(trial_id).state.is_finished():
                raise GivenAwayError(f"trial {proposal.number} was given to others.")
            found = tell()
        except GivenAwayError as error:
            _logger.warning("%s What came of it here is not taken.", error)
            found = record_of(self._shared.get_trial(trial_id))
        self._backend.flush()
        return found

    # -- what could not be sent -------------------------------------------------------------------------------------

    def _keep_unsent(self, proposal: Proposal, metrics: Mapping[str, float], seconds: float) -> None:
        """The server does not answer: what was evaluated is kept here, and sent when this run is resumed."""
        kept = {"id": proposal.architecture.id, "metrics": dict(metrics), "seconds": seconds}
        write_json(self._unsent, stamped({"trials": [*self._read_unsent(), kept]}))

    def _read_unsent(self) -> list[dict[str, Any]]:
        if not os.path.lexists(self._unsent):
            return []
        plain = parse_json(read_bytes(self._unsent), str(self._unsent))
        try:
            if not check_stamp(plain, str(self._unsent)):
                raise ValueError("its digest is missing")
            return [{name: one[name] for name in ("id", "metrics", "seconds")} for one in plain["trials"]]
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"{self._unsent}: damaged ({error}). Delete it: its trials are done again.") from error

    def _send_unsent(self) -> None:
        """Tell what an earlier session could not, unless others carry it out by now."""
        for one in self._read_unsent():
            if not self._shared.claim(partial(self._sent, one)):
                _logger.warning("the result of %s, which could not be sent, is no longer wanted", one["id"])
        self._unsent.unlink(missing_ok=True)

    def _sent(self, one: Mapping[str, Any]) -> bool:
        open_ = self._shared.get_all_trials(self._shared.study, False, (TrialState.RUNNING, TrialState.WAITING))
        for trial in open_:
            waits, attrs = trial.state == TrialState.WAITING, trial.user_attrs
            if attrs.get("id") == one["id"] and (waits or attrs.get(DRIVER) in self._driver.earlier):
                if waits:
                    self._shared.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                architecture = Architecture.from_canonical(json.loads(attrs["architecture"]))
                proposal = Proposal(optuna.Trial(self.optuna_study, trial._trial_id), Request(architecture))
                super().tell(proposal, one["metrics"], float(one["seconds"]))
                return True
        return False
