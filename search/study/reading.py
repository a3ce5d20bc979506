"""Reading a study's journal without Optuna: its trials, what they come to, and whether it is what was written.

A record is one line of JSON. Its last entry, `crc`, is the CRC-32 of its own text and, in a chain, of every record
before it, so that a digit that flipped, a record that went or two that changed places show. Optuna does not mind. What
was written before there was a chain is read without.

Beside the journal lies its summary: how many trials are in which state and what is best so far, for a stretch of the
journal whose length and CRC-32 it holds. Whoever looks is spared the records, and a journal that has lost some is
noticed. The journal is always brought to the disk first.
"""

from __future__ import annotations

import enum
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mixnas.evaluators.protocol import standard_error
from mixnas.search.study.objectives import Comparison, Objective
from mixnas.search.study.pareto import Reference
from mixnas.search.study.results import INTERRUPTED, Results, Status, Stretch, TrialRecord
from mixnas.search_space.errors import ConfigError, IntegrityError, shown
from mixnas.search_space.files import check_stamp, parse_json, read_bytes, stamped, write_json

SUMMARY_FORMAT = 1
FIDELITY = "fidelity"
"""A trial's attribute: the share of a whole training that its metrics are of; 1 where there is none."""


class Operation(enum.IntEnum):
    """What a record does; the numbers are Optuna's (`optuna_internals.JournalOperation`)."""

    CREATE_STUDY = 0
    DELETE_STUDY = 1
    SET_STUDY_USER_ATTR = 2
    SET_STUDY_SYSTEM_ATTR = 3
    CREATE_TRIAL = 4
    SET_TRIAL_PARAM = 5
    SET_TRIAL_STATE_VALUES = 6
    SET_TRIAL_INTERMEDIATE_VALUE = 7
    SET_TRIAL_USER_ATTR = 8
    SET_TRIAL_SYSTEM_ATTR = 9


class State(enum.IntEnum):
    """Of a trial; the numbers are Optuna's (`optuna.trial.TrialState`)."""

    RUNNING = 0
    COMPLETE = 1
    PRUNED = 2
    FAIL = 3
    WAITING = 4


# -- the chain ----------------------------------------------------------------------------------------------------

_CRC = b',"crc":"'
_CRC_LENGTH = len(_CRC) + 8 + len(b'"}')


def chained(record: bytes, chain: int) -> tuple[bytes, int]:
    """A record's line, `{...}` with its `crc`, and the chain with it."""
    chain = zlib.crc32(record[:-1], chain)
    return b'%s%s%08x"}\n' % (record[:-1], _CRC, chain), chain


@dataclass(slots=True)
class Scan:
    """A journal that was looked through.

    Attributes:
        end: Bytes up to the end of its last whole record; what is behind is a torn end.
        chain: CRC-32 chain of the records.
        records: How many.
    """

    end: int = 0
    chain: int = 0
    records: int = 0


def scan(data: bytes, path: str | Path) -> Scan:
    """Look a journal through: every record whole, and the one that was written there.

    What a killed process or a power cut leaves behind the last whole record (half a line, a line that is no record,
    zeros) is a torn end, and is not counted.

    Raises:
        IntegrityError: Something that is no record, or not the one that was written, stands before one that is.
    """
    found = Scan()
    linked = False
    size = len(data)
    while found.end < size:
        newline = data.find(b"\n", found.end)
        if newline < 0:
            break
        line = data[found.end : newline]
        has_crc = line[-_CRC_LENGTH:].startswith(_CRC)
        text = line[:-_CRC_LENGTH] if has_crc else line
        chain = zlib.crc32(text, found.chain)
        if has_crc:
            whole = line.startswith(b'{"') and line[-10:-2] == b"%08x" % chain and line.endswith(b'"}')
        else:
            # without a chain, a record is whole if it can be read; one without behind one with is another's
            whole = not linked and _is_record(line)
            chain = zlib.crc32(line[:-1], found.chain)
        if not whole:
            break
        linked |= has_crc
        found.end, found.chain, found.records = newline + 1, chain, found.records + 1
    rest = data[found.end :]
    if any(_is_record(line) for line in rest.split(b"\n")[1:]):
        raise IntegrityError(
            f"{path}:{found.records + 1}: damaged: not the record that was written, with whole records after it. "
            f"Restore the file from a copy, or keep the {found.records} before it: head -c {found.end}."
        )
    return found


def _is_record(line: bytes) -> bool:
    if not line.startswith(b'{"op_code":'):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# -- trials -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Trial:
    state: int = State.RUNNING
    attrs: dict[str, Any] = field(default_factory=dict)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


_DECODE = json.JSONDecoder(parse_constant=_refuse_constant).decode
_SKIPPED = tuple(
    b'{"op_code":%d,' % op
    for op in (Operation.SET_TRIAL_PARAM, Operation.SET_TRIAL_SYSTEM_ATTR, Operation.SET_TRIAL_INTERMEDIATE_VALUE)
)
_FINISHED = (State.COMPLETE, State.PRUNED, State.FAIL)
_ATTRIBUTES: Mapping[str, type | tuple[type, ...]] = {
    "id": str,
    "architecture": str,
    "metrics": dict,
    "failure": str,
    "seconds": (int, float),
    "retries": list,
    "queued": bool,
    FIDELITY: (int, float),
}


class _Reader:
    """The trials and the study's attributes that records come to."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.trials: list[_Trial] = []
        self.study: dict[str, Any] = {}

    def read(self, data: bytes) -> None:
        """Take records in.

        Raises:
            IntegrityError: One is none of Optuna's, or lacks something; the message names its line.
        """
        for number, line in enumerate(data.split(b"\n")[:-1], start=1):
            if line.startswith(_SKIPPED):
                continue
            try:
                self._take(_DECODE(line.decode("utf-8")))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
                reason = shown(str(error)) if not isinstance(error, KeyError) else f"no entry {error}"
                raise IntegrityError(
                    f"{self.path}:{number}: damaged: not a record of the study ({reason[:100]}). "
                    "Restore the file from a copy."
                ) from error

    def _take(self, log: Mapping[str, Any]) -> None:
        op = Operation(log["op_code"])
        if op is Operation.CREATE_TRIAL:
            self.trials.append(_Trial(State(log.get("state", State.RUNNING)), dict(log.get("user_attrs", {}))))
        elif op is Operation.SET_TRIAL_USER_ATTR:
            trial, attrs = self._trial(log), dict(log["user_attr"])
            if trial.state not in _FINISHED:
                trial.attrs.update(attrs)
        elif op is Operation.SET_TRIAL_STATE_VALUES:
            trial, state = self._trial(log), State(log["state"])
            if trial.state not in _FINISHED:
                trial.state = state
        elif op is Operation.SET_STUDY_USER_ATTR:
            self.study.update(log["user_attr"])

    def _trial(self, log: Mapping[str, Any]) -> _Trial:
        number = log["trial_id"]
        if not isinstance(number, int) or not 0 <= number < len(self.trials):
            raise ValueError(f"there is no trial {number!r}")
        return self.trials[number]

    def records(self) -> Iterator[TrialRecord]:
        """The trials that were started."""
        for number, trial in enumerate(self.trials):
            if trial.state != State.WAITING:
                try:
                    yield _further(_record(number, trial), self.study.get(further_key(number), []))
                except (ValueError, TypeError, AttributeError) as error:
                    raise IntegrityError(
                        f"{self.path}: damaged: trial {number}: {error}. Restore the file from a copy."
                    ) from error


def _record(number: int, trial: _Trial) -> TrialRecord:
    attrs = trial.attrs
    for name, kind in _ATTRIBUTES.items():
        if name in attrs and not isinstance(attrs[name], kind):
            raise TypeError(f"its {name} is {shown(attrs[name])}")
    metrics, seconds = attrs.get("metrics", {}), attrs.get("seconds", 0.0)
    for name, value in (*metrics.items(), ("seconds", seconds), (FIDELITY, attrs.get(FIDELITY, 1.0))):
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise TypeError(f"its {shown(name)} is {shown(value)}")
    if seconds < 0:
        raise ValueError(f"it took {seconds} seconds")
    if trial.state == State.COMPLETE and not ("architecture" in attrs and metrics):
        raise ValueError("it is done, and has no architecture or no metrics")
    failure = attrs.get("failure", "")
    return TrialRecord(
        number=number,
        status=status_of(trial.state, attrs),
        id=attrs.get("id", ""),
        architecture_json=attrs.get("architecture", ""),
        metrics=metrics,
        seconds=seconds,
        failure=failure,
        retries=tuple(map(str, attrs.get("retries", ()))),
        queued=attrs.get("queued", False),
        share=attrs.get(FIDELITY, 1.0),
    )


def _further(record: TrialRecord, more: Any) -> TrialRecord:
    """With what came of more of its training."""
    if not isinstance(more, list) or (more and record.status != "done"):
        raise TypeError(f"what came of more of its training is {shown(more)}")
    return record.trained_on(map(Stretch.from_plain, more)) if more else record


def further_key(number: int) -> str:
    """The study's attribute that says what came of more of a trial's training: a list of `Stretch`."""
    return f"further:{number}"


def status_of(state: int, attrs: Mapping[str, Any]) -> Status:
    """A trial's status, from its state and its attributes."""
    if state == State.COMPLETE:
        return "done"
    if state == State.FAIL:
        return "interrupted" if attrs.get("failure") == INTERRUPTED else "failed"
    if state == State.PRUNED:
        return "duplicate" if "duplicate_of" in attrs else "infeasible"
    return "running"


def read_results(
    journal: str | Path, objectives: Sequence[Objective], constraints: Sequence[Comparison] = ()
) -> Results:
    """The trials in a journal, without changing it: also while another process is searching.

    Raises:
        IntegrityError: The journal is damaged.
        ConfigError: It belongs to other objectives.
    """
    records, reference = read_records(journal, objectives)
    try:
        return Results(objectives, constraints, records, reference)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{journal}: damaged: no trials of this study ({shown(str(error))}).") from error


def read_records(journal: str | Path, objectives: Sequence[Objective]) -> tuple[list[TrialRecord], Reference | None]:
    """The trials in a journal, and the box of the hypervolume once it is fixed; see `read_results`."""
    data = read_bytes(journal) if os.path.lexists(journal) else b""
    check_summary(journal, data)
    reader = _Reader(journal)
    reader.read(data[: scan(data, journal).end])
    check_objectives(reader.study.get("objectives"), objectives, journal)
    try:
        return list(reader.records()), _reference(reader.study)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{journal}: damaged: no trials of this study ({shown(str(error))}).") from error


def check_journal(journal: str | Path, objectives: Sequence[Objective]) -> None:
    """Check a journal record by record, unless its summary says that all of it is what was written.

    Raises:
        IntegrityError: It is damaged.
        ConfigError: It belongs to other objectives.
    """
    data = read_bytes(journal) if os.path.lexists(journal) else b""
    known = check_summary(journal, data)
    if known is None or known[1] != len(data):
        read_records(journal, objectives)


def _reference(study: Mapping[str, Any]) -> Reference | None:
    stored = study.get("reference")
    return None if stored is None else Reference(tuple(stored["point"]), tuple(stored["span"]))


def check_objectives(stored: Any, objectives: Sequence[Objective], journal: str | Path) -> None:
    """Refuse a study that was begun with other objectives, or in another order.

    Args:
        stored: The study's attribute "objectives"; None where it has none yet.
        objectives: Those that are asked for.
        journal: For the message.

    Raises:
        ConfigError: They differ.
    """
    given = {o.name: o.direction for o in objectives}
    if stored is not None and (stored != given or list(stored) != list(given)):
        raise ConfigError(f"{journal}: this study has the objectives {stored}, not {given}. Start a new run for those.")


# -- summary ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a stretch of a journal comes to.

    Attributes:
        counts: Trials of each status; of those done and failed, the ones that the search was given (none `queued`).
        best: The best value of each objective on the front; empty while the front is.
        errors: The standard errors of those values that have one.
        hypervolume: Of the front; None until its box is fixed.
        seconds: Of all these trials that are done, together.
    """

    counts: Mapping[str, int]
    best: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    hypervolume: float | None = None
    seconds: float = 0.0


def summary_path(journal: str | Path) -> Path:
    """Where a journal's summary lies."""
    return Path(journal).with_suffix(".summary.json")


def summarise(results: Results) -> Summary:
    """What trials come to."""
    members = results.front()
    counts, seconds = _tally(results.records)
    best, errors = best_of([member.metrics for member in members], results.objectives)
    return Summary(
        counts=counts,
        best=best,
        errors=errors,
        hypervolume=results.hypervolume(),
        seconds=seconds,
    )


def best_of(
    members: Sequence[Mapping[str, float]], objectives: Sequence[Objective]
) -> tuple[dict[str, float], dict[str, float]]:
    """The best value of each objective among the metrics of some networks, and its standard error where it has one."""
    best, errors = {}, {}
    for objective in objectives if members else ():
        name = objective.name
        one = (max if objective.maximise else min)(members, key=lambda metrics: metrics[name])
        best[name] = one[name]
        if standard_error(name) in one:
            errors[name] = one[standard_error(name)]
    return best, errors


def _tally(records: Iterable[TrialRecord]) -> tuple[dict[str, int], float]:
    """How many trials have each status, and the seconds of those done; see `Summary`."""
    counts, seconds = dict.fromkeys(get_args(Status), 0), 0.0
    for record in records:
        if not (record.queued and record.evaluated):
            counts[record.status] += 1
            seconds += record.seconds if record.status == "done" else 0.0
    return counts, seconds


def write_summary(journal: str | Path, results: Results, size: int, crc: int) -> None:
    """Write what a journal comes to.

    Args:
        journal: Its file, brought to the disk up to `size`.
        results: Its trials.
        size: Bytes.
        crc: CRC-32 of them.
    """
    found = summarise(results)
    plain = {
        "format": SUMMARY_FORMAT,
        "bytes": size,
        "crc": f"{crc:08x}",
        "counts": dict(found.counts),
        "best": dict(found.best),
        "errors": dict(found.errors),
        "hypervolume": found.hypervolume,
        "seconds": found.seconds,
    }
    write_json(summary_path(journal), stamped(plain))


def check_summary(journal: str | Path, data: bytes) -> tuple[Summary, int] | None:
    """The summary beside a journal and for how many of its bytes it holds; None where there is none.

    Raises:
        IntegrityError: The journal has lost what the summary was made of, or the summary is damaged.
    """
    path = summary_path(journal)
    if not os.path.lexists(path):
        return None
    plain = parse_json(read_bytes(path), str(path))
    try:
        if not check_stamp(plain, str(path)) or plain["format"] != SUMMARY_FORMAT:
            raise ValueError("its digest is missing, or it is of another version")
        size, crc = int(plain["bytes"]), str(plain["crc"])
        found = Summary(**{key: plain[key] for key in ("counts", "best", "errors", "hypervolume", "seconds")})
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: damaged ({shown(str(error))}). Delete it; a resume writes it again.") from error
    if len(data) < size or f"{zlib.crc32(memoryview(data)[:size]):08x}" != crc:
        lost = "is shorter than it was" if len(data) < size else "is not what was written"
        raise IntegrityError(
            f"{journal}: damaged: it {lost}: trials are missing or changed. Restore it from a copy, or delete "
            f"{path.name} to go on with what is left."
        )
    return found, size


def summary_of(
    journal: str | Path, objectives: Sequence[Objective] = (), constraints: Sequence[Comparison] = ()
) -> Summary:
    """What a journal comes to now: its summary where that is of all of it, else worked out.

    Args:
        journal: Its file.
        objectives: In order; without, only `counts` and `seconds` are right.
        constraints: As of the search.

    Raises:
        IntegrityError: The journal is damaged.
        ConfigError: It belongs to other objectives.
    """
    data = read_bytes(journal) if os.path.lexists(journal) else b""
    known = check_summary(journal, data)
    if known is not None and known[1] == len(data):
        return known[0]
    if objectives:
        return summarise(read_results(journal, objectives, constraints))
    reader = _Reader(journal)
    reader.read(data[: scan(data, journal).end])
    counts, seconds = _tally(reader.records())
    return Summary(counts=counts, seconds=seconds)
