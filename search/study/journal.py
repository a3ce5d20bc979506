"""The study's journal file: Optuna's format, one writer, few fsyncs, safe against a torn end.

Optuna's own `JournalFileBackend` locks, writes and fsyncs for each of the thirty or so records of a trial, and a file
that ends in half a record becomes unreadable for good with the next append. Here the run directory's lock says that
there is one writer, records wait in memory until they matter, and a torn end is cut off at opening. The file stays one
that Optuna and its dashboard read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend
from optuna.trial import TrialState

from mixnas.search.study.optuna_internals import JournalOperation
from mixnas.search_space.errors import IntegrityError, NasError

_logger = logging.getLogger(__name__)

_STATE_PREFIX = f'{{"op_code":{int(JournalOperation.SET_TRIAL_STATE_VALUES)},'.encode()
_CREATE_PREFIX = f'{{"op_code":{int(JournalOperation.CREATE_TRIAL)},'.encode()
_SYNC_SECONDS = 0.25
_BUFFERED = frozenset(
    {
        JournalOperation.CREATE_TRIAL,
        JournalOperation.SET_TRIAL_PARAM,
        JournalOperation.SET_TRIAL_USER_ATTR,
        JournalOperation.SET_TRIAL_SYSTEM_ATTR,
        JournalOperation.SET_STUDY_SYSTEM_ATTR,
    }
)


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def sound_size(path: str | Path) -> int:
    """Number of bytes of a journal up to the end of its last whole record.

    What a killed process or a power cut leaves behind the last whole record (half a line, a line that is no record,
    zeros) does not count.

    Raises:
        IntegrityError: A line that is no record stands before one that is: not a torn end, but damage.
    """
    # zeros, which JSON cannot hold, are blocks that a power cut lost
    data = Path(path).read_bytes().partition(b"\0")[0]
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if _is_record(data[start:end]):
            break
        end = start
    for number, line in enumerate(data[:end].splitlines(), start=1):
        # a record is checked in full when it is read; here only that none is missing its beginning or its end
        if not (line.startswith(b"{") and line.endswith(b"}")):
            raise IntegrityError(
                f"{path}:{number}: damaged: not a record of the study, with whole records after it. "
                "Restore the file from a copy, or delete that line to lose that record only."
            )
    return end


def repair(path: str | Path) -> int:
    """Cut a torn end off, back to the last whole record; return how many bytes went."""
    path = Path(path)
    if not path.exists():
        return 0
    size, sound = path.stat().st_size, sound_size(path)
    if size > sound:
        with open(path, "rb+") as file:
            file.truncate(sound)
            os.fsync(file.fileno())
        _logger.warning("%s: cut %d bytes of a half-written record off its end", path, size - sound)
    return size - sound


def count_states(path: str | Path) -> dict[TrialState, int]:
    """How many trials of a journal are in each state, without replaying it (any process may ask, at any time).

    Trials that wait to be started count as running.
    """
    counts = dict.fromkeys(TrialState, 0)
    path = Path(path)
    if not path.exists():
        return counts
    created = 0
    with open(path, "rb") as file:
        for line in file:
            created += line.startswith(_CREATE_PREFIX)
            if line.startswith(_STATE_PREFIX) and line.endswith(b"\n") and _is_record(line):
                state = TrialState(json.loads(line)["state"])
                counts[state] += state.is_finished()
    counts[TrialState.RUNNING] = created - sum(counts.values())
    return counts


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class JournalFile(BaseJournalBackend):
    """The backend of an `optuna.storages.JournalStorage`, for one writing process.

    Records of a trial that is being proposed or evaluated wait in memory until `flush`. The record that finishes a
    trial is handed to the operating system, with all before it, when `append_logs` returns (a kill -9 cannot lose it
    any more), and to the disk (fsync) at once or, where trials follow each other faster than that, every quarter of a
    second: `synced` says whether a power cut could lose anything, `sync` makes sure that it cannot.

    Args:
        path: The file; it is made if it does not exist.
        read_only: Read what is there without repairing it (another process may be writing); appending raises.

    Raises:
        IntegrityError: The file is damaged elsewhere than at its end.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._pending: list[bytes] = []  # not yet in the file
        self._unread: list[bytes] = []  # appended here, not yet asked back by the storage
        self._file_was_read = False
        self._encode = json.JSONEncoder(separators=(",", ":")).encode
        self.synced = True
        self._last_sync = -math.inf
        if not read_only:
            repair(self.path)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            _sync_directory(self.path.parent)
        self._found_size = sound_size(self.path) if self.path.exists() else 0
        self._size = self._found_size

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the records from a number on: from the file the first time, then what was appended since."""
        if not self._file_was_read:
            yield from self._read_file(log_number_from)
            self._file_was_read = True
        unread, self._unread = self._unread, []
        for line in unread:
            yield json.loads(line)

    def _read_file(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        count = 0
        if self.path.exists():
            with open(self.path, "rb") as file:
                while file.tell() < self._found_size:
                    line = file.readline()
                    count += 1
                    if count <= log_number_from:
                        continue
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise IntegrityError(f"{self.path}:{count}: damaged: not a record of the study.") from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Take records; those that finish a trial, or change the study, are written before this returns."""
        if self.read_only:
            raise NasError(f"{self.path} was opened for reading only.")
        urgent = False
        for log in logs:
            line = self._encode(log).encode() + b"\n"
            self._pending.append(line)
            self._unread.append(line)
            urgent |= log["op_code"] not in _BUFFERED
        if urgent:
            self.flush()
            if time.monotonic() - self._last_sync >= _SYNC_SECONDS:
                self.sync()

    def sync(self) -> None:
        """Bring everything to the disk."""
        self.flush()
        if not self.synced:
            os.fsync(self._file)
            self.synced = True
            self._last_sync = time.monotonic()

    def flush(self) -> None:
        """Hand waiting records to the operating system.

        Raises:
            NasError: The disk is full or gone. The file ends at a whole record all the same.
        """
        if self._pending:
            data = b"".join(self._pending)
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._file, data[written:])
            except OSError as error:
                os.ftruncate(self._file, self._size)
                raise NasError(f"{self.path}: cannot be written: {error.strerror}. Make room, then resume.") from error
            self._size += len(data)
            self._pending.clear()
            self.synced = False

    def __reduce__(self) -> Any:
        """A copy in another process would be a second writer."""
        raise TypeError(f"{self.path}: a journal has one writer and cannot be pickled. Open it for reading instead.")

    def close(self) -> None:
        """Flush and close; a second time does nothing."""
        if not self.read_only and self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1
