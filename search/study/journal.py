"""The study's journal file: Optuna's format, one writer, few fsyncs, safe against a torn end.

Optuna's own `JournalFileBackend` locks, writes and fsyncs for each of the thirty or so records of a trial, and a file
that ends in half a record becomes unreadable for good with the next append. Here the run directory's lock says that
there is one writer, records wait in memory until they matter, each carries a checksum (`reading`), and a torn end is
cut off at opening. The file stays one that Optuna and its dashboard read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from mixnas.search.study.optuna_internals import JournalOperation
from mixnas.search.study.reading import Scan, chained, check_summary, scan
from mixnas.search_space.errors import IntegrityError, MachineError
from mixnas.search_space.files import atomic_write, read_bytes

_logger = logging.getLogger(__name__)

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


def torn_path(path: str | Path) -> Path:
    """Where what is cut off a journal is kept."""
    return Path(f"{path}.torn")


def repair(path: str | Path) -> tuple[bytes, Scan]:
    """A journal's records, back to the last whole one; a torn end behind it goes into a file beside the journal.

    Raises:
        IntegrityError: See `reading.scan` and `reading.check_summary`; nothing is cut then.
    """
    path = Path(path)
    data = read_bytes(path) if os.path.lexists(path) else b""
    found = scan(data, path)
    check_summary(path, data[: found.end])
    if len(data) > found.end:
        torn = data[found.end :]
        before = read_bytes(torn_path(path)) if os.path.lexists(torn_path(path)) else b""
        atomic_write(torn_path(path), before + torn)
        with open(path, "rb+") as file:
            file.truncate(found.end)
            os.fsync(file.fileno())
        _logger.warning(
            "%s: cut %d bytes of a half-written record off its end; they are in %s",
            path,
            len(torn),
            torn_path(path).name,
        )
    return data[: found.end], found


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

    Raises:
        IntegrityError: The file is damaged elsewhere than at its end, or has lost trials.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._pending: list[bytes] = []  # not yet in the file
        self._unread: list[bytes] = []  # appended here, not yet asked back by the storage
        self._encode = json.JSONEncoder(separators=(",", ":")).encode
        self.synced = True
        self._last_sync = -math.inf
        self._found: bytes | None
        self._found, found = repair(self.path)  # until the storage has asked for it
        self._chain, self.size, self.crc = found.chain, found.end, zlib.crc32(self._found)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.open(self.path, flags, 0o666)
        _sync_directory(self.path.parent)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the records from a number on: from the file the first time, then what was appended since."""
        if self._found is not None:
            found, self._found = self._found, None
            for number, line in enumerate(found.split(b"\n")[:-1], start=1):
                if number > log_number_from:
                    try:
                        yield json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise IntegrityError(f"{self.path}:{number}: damaged: not a record of the study.") from error
        unread, self._unread = self._unread, []
        for line in unread:
            yield json.loads(line)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Take records; those that finish a trial, or change the study, are written before this returns."""
        urgent = False
        for log in logs:
            line, self._chain = chained(self._encode(log).encode(), self._chain)
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
            MachineError: The disk is full or gone, or the file was removed. It ends at a whole record all the same, and
                what waits is kept.
        """
        if self._pending:
            self._check_there()
            data = b"".join(self._pending)
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._file, data[written:])
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self.size)
                raise MachineError(
                    f"{self.path}: cannot be written: {error.strerror}. Make room, then resume."
                ) from error
            self.size += len(data)
            self.crc = zlib.crc32(data, self.crc)
            self._pending.clear()
            self.synced = False

    def _check_there(self) -> None:
        held = os.fstat(self._file)
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            raise MachineError(f"{self.path}: was removed or replaced while it was written; the search cannot go on.")

    def __reduce__(self) -> Any:
        """A copy in another process would be a second writer."""
        raise TypeError(f"{self.path}: a journal has one writer and cannot be pickled. Open it for reading instead.")

    def close(self) -> None:
        """Flush and close; a second time does nothing."""
        if self._file >= 0:
            try:
                self.sync()
            finally:
                os.close(self._file)
                self._file = -1
