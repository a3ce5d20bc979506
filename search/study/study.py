"""The study: an Optuna study in the run directory that never loses a finished trial and never evaluates one twice."""

from __future__ import annotations

import logging
import math
import warnings
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from mixnas.evaluators.protocol import Request
from mixnas.search.strategies import Batching, Cheap, Question, Remembering, Strategy
from mixnas.search.strategies.drawing import mutated, trial_generator
from mixnas.search.strategies.evolution import NSGA2
from mixnas.search.study.journal import JournalFile
from mixnas.search.study.meeting import Nearest, nearest
from mixnas.search.study.objectives import Comparison, Objective
from mixnas.search.study.optuna_internals import assign_generation, fail, set_violations, stored
from mixnas.search.study.pareto import Reference
from mixnas.search.study.reading import (
    FIDELITY,
    check_journal,
    check_objectives,
    further_key,
    status_of,
    write_summary,
)
from mixnas.search.study.results import INTERRUPTED, Results, Stretch, TrialRecord
from mixnas.search.study.storage import Storage
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import InfeasibleError, IntegrityError, NasError, counted, shown
from mixnas.search_space.space import SearchSpace

_logger = logging.getLogger(__name__)

STUDY_NAME = "search"
MAX_REFUSED_IN_A_ROW = 20
_RANDOM_DRAWS = (50, 450, 1500)  # together, as long as none may be evaluated
_PARENTS = 64  # that were evaluated, from which is looked for what keeps the constraints
_ENUMERABLE = 50_000  # spaces up to this size are searched through to the last architecture


class SpaceExhausted(NasError):  # noqa: N818 - not a failure: everything has been evaluated
    """Every architecture of the space that may be evaluated has been."""


class BudgetTaken(NasError):  # noqa: N818 - not a failure: others carry the rest out
    """Other drivers have in flight what was left of the budget."""


@dataclass(frozen=True)
class Proposal:
    """What is to be evaluated, and the Optuna trial that holds it."""

    trial: optuna.Trial
    request: Request

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @property
    def architecture(self) -> Architecture:
        """Which architecture."""
        return self.request.architecture


@dataclass(frozen=True)
class Continuation(Proposal):
    """A trial that is known, of which more is to be evaluated: more of its training.

    Attributes:
        record: What is known of it.
    """

    record: TrialRecord

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.record.number


def record_of(trial: FrozenTrial, further: Mapping[str, Any] = MappingProxyType({})) -> TrialRecord:
    """A trial as it is told of; it shares what is long with the trial.

    Args:
        trial: As the storage has it.
        further: The study's attributes, where what came of more of its training stands.
    """
    attrs = trial.user_attrs
    record = TrialRecord(
        number=trial.number,
        status=status_of(trial.state, attrs),
        id=attrs.get("id", ""),
        architecture_json=attrs.get("architecture", ""),
        metrics=attrs.get("metrics", {}),
        seconds=attrs.get("seconds", 0.0),
        failure=attrs.get("failure", ""),
        retries=tuple(attrs.get("retries", ())),
        queued=bool(attrs.get("queued", False)),
        share=attrs.get(FIDELITY, 1.0),
    )
    more = further.get(further_key(trial.number), ())
    return record.trained_on(map(Stretch.from_plain, more)) if more else record


def _reference(study: optuna.Study) -> Reference | None:
    stored = study.user_attrs.get("reference")
    return None if stored is None else Reference(tuple(stored["point"]), tuple(stored["span"]))


class SearchStudy:
    """Asks for architectures and takes their results. One process at a time (the run directory's lock).

    Several proposals may be in flight: what was asked for and not yet told is not asked for again.

    Args:
        journal: The study's file; it is made, repaired or continued as needed. Trials that a killed process left
            running are marked as failed with the reason "interrupted", and may be evaluated again.
        space: Where architectures come from.
        objectives: In order.
        constraints: Feasible trials satisfy all.
        strategy: What proposes architectures.
        seed: Of the strategy.
        cheap: Metrics that are known without evaluating (parameters, multiply-accumulates, predicted latency). What
            violates a constraint on those is not evaluated and does not count toward the budget.
        extremes: Architectures that a check of the constraints found: where random ones violate a constraint on cheap
            metrics, what keeps it is looked for from these on.

    Raises:
        ConfigError: The study in the file has other objectives.
        IntegrityError: The file is damaged.
    """

    def __init__(
        self,
        journal: str | Path,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Comparison] = (),
        *,
        strategy: Strategy = NSGA2(),  # noqa: B008 - frozen
        seed: int = 0,
        cheap: Cheap | None = None,
        extremes: Sequence[Architecture] = (),
    ) -> None:
        self.path = Path(journal).absolute()
        self.space = space
        self.seed = seed
        self._cheap, self._extremes = cheap, tuple(extremes)
        known = {} if cheap is None else cheap(space.encode_many([]))
        self._constraints_beforehand = [c for c in constraints if c.metric in known]
        self._seen: dict[str, int] = {}  # architecture id -> trial that evaluates or evaluated it
        self._infeasible: dict[str, str] = {}  # architecture id -> the constraint that rules it out
        self._refused_in_a_row = 0
        self._has_reference = False  # whether it stands in the study
        self._enumeration: Iterator[Architecture] | None = None
        self._queue: deque[Architecture] = deque()
        self._size = space.size()
        question = Question(space, tuple(objectives), tuple(constraints), seed)
        sampler = strategy.make(question, cheap, lambda architecture: self._refusal(architecture) is None)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        name, storage = self._open(objectives)
        try:
            self.optuna_study = optuna.create_study(
                study_name=name,
                storage=storage,
                sampler=sampler,
                directions=["maximize" if o.maximise else "minimize" for o in objectives],
                load_if_exists=True,
            )
        except (KeyError, TypeError, ValueError, AssertionError, IndexError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"{journal}: damaged: Optuna cannot read it ({shown(str(error))}).") from error
        check_objectives(self.optuna_study.user_attrs.get("objectives"), objectives, journal)
        if "objectives" not in self.optuna_study.user_attrs:
            self.optuna_study.set_user_attr("objectives", {o.name: o.direction for o in objectives})
            self.optuna_study.set_user_attr("constraints", [str(c) for c in constraints])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                self.optuna_study.set_metric_names([o.name for o in objectives])
        self._summarised = -1  # bytes of the journal that its summary is of
        self.results = Results(objectives, constraints, reference=_reference(self.optuna_study))
        self._begin()
        self._store_reference()

    def _open(self, objectives: Sequence[Objective]) -> tuple[str, BaseStorage]:
        """The study's name and its storage."""
        check_journal(self.path, objectives)  # more closely than Optuna does
        self._backend = JournalFile(self.path)
        return STUDY_NAME, Storage(self._backend)

    def _begin(self) -> None:
        """Take in the trials there are."""
        self.mark_interrupted()
        further = self.optuna_study.user_attrs
        for trial in self.optuna_study.get_trials(deepcopy=False):
            if trial.state != TrialState.WAITING:
                self.results.add(record_of(trial, further))
        self._seen = {r.id: r.number for r in self.results.records if r.evaluated}

    def __enter__(self) -> SearchStudy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def synced(self) -> bool:
        """Whether all that was told is on the disk, not only with the operating system."""
        return self._backend.synced

    def sync(self) -> None:
        """Bring all that was told to the disk."""
        self._backend.sync()

    def summarise(self) -> None:
        """Bring all that was told to the disk, and what it comes to beside it (`reading.Summary`)."""
        self._backend.sync()
        if self._summarised != self._backend.size:
            write_summary(self._backend.path, self.results, self._backend.size, self._backend.crc)
            self._summarised = self._backend.size

    def close(self) -> None:
        """Write what is waiting, and its summary, and close the file."""
        try:
            self.summarise()
        finally:
            self._backend.close()

    def mark_interrupted(self, but: Collection[int] = ()) -> None:
        """End the trials that nobody carries out any more: all that are running, but for those of these numbers."""
        for trial in self.optuna_study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in but:
                continue
            fail(self.optuna_study, trial, failure=INTERRUPTED)
            _logger.info("trial %d was interrupted; its architecture may be evaluated again", trial.number)

    def _store_reference(self) -> None:
        reference = self.results.reference
        if reference is None or self._has_reference:
            return
        if "reference" not in self.optuna_study.user_attrs:  # Optuna copies them all for each look
            self.optuna_study.set_user_attr("reference", {"point": list(reference.point), "span": list(reference.span)})
        self._has_reference = True

    # -- asking -----------------------------------------------------------------------------------------------------

    def begin_batch(self, count: int) -> None:
        """Say that `count` architectures will be asked for in a row: some strategies decide them together."""
        sampler = self.optuna_study.sampler
        if isinstance(sampler, Batching):
            sampler.begin_batch(self.optuna_study, count)

    def cheap_changed(self) -> None:
        """Say that cheap metrics are others than before: a predictor was corrected.

        What trials have stored stays as it was: that is what they were chosen by.
        """
        self._infeasible.clear()
        if isinstance(self.optuna_study.sampler, Remembering):
            self.optuna_study.sampler.forget_cheap()

    def queue(self, architectures: Iterable[Architecture]) -> int:
        """Have these asked for next, whatever the strategy; returns how many may be evaluated and were not yet.

        Their trials are marked, since they are more than a search was given (`Results.queued`).
        """
        before = len(self._queue)
        self._queue.extend(a for a in dict.fromkeys(architectures) if self._refusal(a) is None)
        return len(self._queue) - before

    @property
    def elsewhere(self) -> int:
        """How many trials other drivers have in flight, as far as is known; see `shared_study`."""
        return 0

    def refresh(self) -> None:
        """See what other drivers did."""

    def ask(self, trials: int | None = None) -> Proposal:
        """The next architecture to evaluate: one that was not evaluated before and is not known to be infeasible.

        Args:
            trials: The budget, where other drivers spend it too: how many may be evaluated or in flight.

        Raises:
            SpaceExhausted: There is none left.
            BudgetTaken: Others have what was left of it.
            InfeasibleError: None was found that satisfies the constraints which are known without evaluating.
        """
        while True:
            if len(self._seen) >= self._size:
                told = counted(self._size, "architecture")
                raise SpaceExhausted(f"all there is in the space has been evaluated: {told}.")
            forced = bool(self._queue) or self._refused_in_a_row >= MAX_REFUSED_IN_A_ROW
            if forced:
                marks = {"queued": True} if self._queue else None
                wanted = self._queue.popleft() if self._queue else self._unseen()
                self.optuna_study.enqueue_trial(self.space.params_of(wanted), user_attrs=marks)
            trial = self.optuna_study.ask()
            architecture = self.space.ask(trial)
            if forced:
                assign_generation(self.optuna_study, trial)
            trial.set_user_attr("id", architecture.id)
            trial.set_user_attr("architecture", architecture.to_json())
            refusal = self._refusal(architecture)
            if refusal is None:
                self._refused_in_a_row = 0
                self._seen[architecture.id] = trial.number
                self._backend.flush()  # so that `nas status`, and a resume after a crash, see that it is running
                return Proposal(trial, Request(architecture))
            self._refuse(trial, architecture, refusal)

    def _refusal(self, architecture: Architecture) -> str | None:
        if architecture.id in self._seen:
            return "duplicate"
        if not self._constraints_beforehand:
            return None
        if architecture.id not in self._infeasible:
            assert self._cheap is not None
            metrics = {n: float(v[0]) for n, v in self._cheap(self.space.encode_many([architecture])).items()}
            violated = [c for c in self._constraints_beforehand if not c.holds(metrics)]
            self._infeasible[architecture.id] = (
                f"{violated[0].metric} is {metrics[violated[0].metric]:g}, constraint {violated[0]}" if violated else ""
            )
        return self._infeasible[architecture.id] or None

    def _refuse(self, trial: optuna.Trial, architecture: Architecture, refusal: str) -> None:
        self._refused_in_a_row += 1
        if refusal == "duplicate":
            trial.set_user_attr("duplicate_of", self._seen[architecture.id])
        trial.set_user_attr("failure", refusal)
        self.optuna_study.tell(trial, state=TrialState.PRUNED)
        self._taken(trial)

    def _unseen(self) -> Architecture:
        """An architecture that may be evaluated: near the front, anywhere, the nearest, or the first of a small space.

        What random ones do not come upon, few architectures or one alone that keeps the constraints, is looked for
        from where it was seen to be (`extremes`, and what was evaluated).
        """
        rng = trial_generator(self.seed, len(self.results.records))
        front = self.space.encode_many([record.architecture for record in self.results.front()])
        for count in _RANDOM_DRAWS:
            rows = self.space.sample_many(count, rng)
            if len(front) and self.space.variables:
                parents = front[rng.integers(len(front), size=count // 2)]
                rows[1::2] = mutated(self.space, parents, rng)
            for row in rows[self._kept_beforehand(rows)]:
                architecture = self.space.decode(row)
                if self._refusal(architecture) is None:
                    return architecture
        nearby = self._nearest()
        if nearby is not None and nearby.kept:
            return self.space.decode(nearby.vector)
        if self._size <= _ENUMERABLE and not (nearby is not None and nearby.every):
            if self._enumeration is None:
                self._enumeration = self._enumerate()
            for architecture in self._enumeration:
                if self._refusal(architecture) is None:
                    return architecture
        if self._seen or nearby is None:
            raise SpaceExhausted(
                f"no architecture is left to evaluate: {self._size} in the space, {len(self._seen)} evaluated, "
                "the others found violate a constraint."
            )
        raise InfeasibleError(nearby.told(self.space, self._constraints_beforehand))

    def _kept_beforehand(self, rows: np.ndarray) -> np.ndarray:
        """Which of encoded architectures (rows, variables) keep the constraints that are known beforehand, (rows,)."""
        kept = np.ones(len(rows), dtype=bool)
        if self._constraints_beforehand:
            assert self._cheap is not None
            metrics = self._cheap(rows)
            for constraint in self._constraints_beforehand:
                kept &= constraint.hold(metrics[constraint.metric])
        return kept

    def _nearest(self) -> Nearest | None:
        """The architecture that comes nearest to keeping the constraints known beforehand; None where there are none.

        It is kept where it may be evaluated.
        """
        if not self._constraints_beforehand:
            return None
        assert self._cheap is not None
        evaluated = [record.architecture for record in self.results.records if record.evaluated][-_PARENTS:]
        first = self.space.encode_many([*self._extremes, *evaluated])
        return nearest(
            self.space,
            self._cheap,
            self._constraints_beforehand,
            first,
            lambda row: self._refusal(self.space.decode(row)) is not None,
        )

    def _enumerate(self) -> Iterator[Architecture]:
        """Every architecture once: neighbours of neighbours."""
        start = self.space.decode(np.zeros(len(self.space.variables), dtype=np.int64))
        known, frontier = {start.id}, [start]
        while frontier:
            architecture = frontier.pop()
            yield architecture
            for neighbour in self.space.neighbours(architecture):
                if neighbour.id not in known:
                    known.add(neighbour.id)
                    frontier.append(neighbour)

    # -- telling ----------------------------------------------------------------------------------------------------

    def tell(
        self, proposal: Proposal, metrics: Mapping[str, float], seconds: float, *, share: float = 1.0
    ) -> TrialRecord:
        """Take an evaluated architecture's metrics: safe from a kill when this returns, from a power cut once `synced`.

        Args:
            proposal: What was asked.
            metrics: All metrics, finite; those that are objectives or stand in a constraint must be among them.
            seconds: Time of the evaluation.
            share: Of a whole training, that they are of.
        """
        trial = proposal.trial
        plain = {name: _plain_number(value) for name, value in metrics.items()}
        trial.set_user_attr("metrics", plain)
        trial.set_user_attr("seconds", round(seconds, 6))
        if share < 1:
            trial.set_user_attr(FIDELITY, share)
        if self.results.constraints:
            set_violations(self.optuna_study, trial, [c.violation(plain) for c in self.results.constraints])
        values = [float(plain[o.name]) for o in self.results.objectives]
        self.optuna_study.tell(trial, values=values)
        return self._add(proposal.trial)

    def tell_further(self, record: TrialRecord, stretch: Stretch) -> TrialRecord:
        """Take what came of more of a trial's training, as safely as `tell` takes metrics.

        Optuna's trial stays as it was told: with the metrics after the first part, which all trials have, so that its
        samplers compare like with like, and know them at once. What came later is an attribute of the study.
        """
        found = record.trained_on([stretch])
        plain = [one.to_plain() for one in found.stretches[1:]]
        self.optuna_study.set_user_attr(further_key(record.number), plain)
        self.results.replace(found)
        return found

    def note_retry(self, proposal: Proposal, reason: str) -> None:
        """Note with a trial that it is tried again, and why."""
        before = stored(self.optuna_study, proposal.trial).user_attrs.get("retries", [])
        proposal.trial.set_user_attr("retries", [*before, reason])
        self._backend.flush()

    def has_ended(self, proposal: Proposal) -> bool:
        """Whether its end is in the study, though `tell` may not have returned."""
        return stored(self.optuna_study, proposal.trial).state.is_finished()

    def tell_failure(self, proposal: Proposal, reason: str, seconds: float) -> TrialRecord:
        """Take a failure, as safely as `tell` takes metrics. With the reason "interrupted" it does not count."""
        proposal.trial.set_user_attr("failure", reason)
        proposal.trial.set_user_attr("seconds", round(seconds, 6))
        self.optuna_study.tell(proposal.trial, state=TrialState.FAIL)
        if reason == INTERRUPTED:
            self._seen.pop(proposal.architecture.id, None)
        return self._add(proposal.trial)

    def _add(self, trial: optuna.Trial) -> TrialRecord:
        record = self._taken(trial)
        self._store_reference()
        return record

    def _taken(self, trial: optuna.Trial) -> TrialRecord:
        """Take a trial that has ended in among the results."""
        record = record_of(stored(self.optuna_study, trial))
        self.results.add(record)
        return record


def _plain_number(value: float) -> float:
    number = value.item() if isinstance(value, np.generic) else value
    assert math.isfinite(number)
    return number
