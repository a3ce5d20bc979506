"""Measurement tables: plain CSV, one row a window, beside a JSON file with the table's provenance.

A table is kept per device, runtime and batch size: `<device>.<runtime>.csv` and `<device>.<runtime>.json`, where the
runtime for batches of 32 is written "graph-b32". Rows are only ever appended; a torn last line, left by a crash, is cut
off at opening. `COLUMNS` documents the columns, and is written into the JSON file, so that a table explains itself.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import re
import weakref
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mixnas.predictors.measuring.device import INTERPRETER
from mixnas.predictors.measuring.measure import MeasureConfig, Measurement, Window, summarise
from mixnas.predictors.measuring.runtimes import RUNTIMES
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError, counted, nearest, visible
from mixnas.search_space.files import check_stamp, read_bytes, read_json, stamped, without_stamp, write_json

SCHEMA = 3  # 1 had another sentinel; in 2 a unit was a whole block, and its work was counted whole

BY_SIZE = "drawn.by_size"
"""In the `work` of a network that was drawn by its size, not uniformly like those that are asked about."""

COLUMNS = {
    "subject": "12 hexadecimal digits: the content hash of what was measured, with its batch size",
    "kind": "unit (a stem, downsample, branch of a block, or head) or network (a whole one)",
    "config": "JSON: the unit or the canonical architecture with its input; on a subject's first row only",
    "work": "JSON: operations, multiply-accumulates, bytes by kind of one forward; on a subject's first row only",
    "batch": "inputs per forward",
    "dtype": "of the inputs",
    "provenance": "index into the JSON file's provenance records",
    "pass": "number of the shuffled pass",
    "p20_ms": "20th percentile of the repeats",
    "p50_ms": "median",
    "p80_ms": "80th percentile",
    "sentinel_before_ms": "20th percentile of the sentinel just before",
    "sentinel_after_ms": "20th percentile of the sentinel just after",
    "accepted": "1 when the two differ by at most 10%, else 0",
    "samples_us": "the repeats in order, microseconds, separated by spaces",
    "crc": "CRC-32, in hexadecimal, of all lines so far, this one up to here; tables of before have none",
}
_FORMER_COLUMNS = tuple(name for name in COLUMNS if name != "crc")


@dataclass(frozen=True)
class Subject:
    """Something that was measured.

    Attributes:
        id: Content hash.
        kind: "unit" or "network".
        config: Plain data that it can be built from again.
        work: Counts of `latency.features.work_of`; of a network, how it was drawn: `BY_SIZE`, or nothing
            where every choice was uniform.
        batch: Inputs per forward.
        dtype: Of the inputs.
    """

    id: str
    kind: str
    config: Any
    work: Mapping[str, float]
    batch: int
    dtype: str = "float32"


def subject(kind: str, config: Any, work: Mapping[str, float], batch: int, dtype: str = "float32") -> Subject:
    """A subject with its content hash."""
    text = json.dumps([kind, config, batch, dtype], separators=(",", ":"), sort_keys=True)
    return Subject(hashlib.sha256(text.encode()).hexdigest()[:12], kind, config, work, batch, dtype)


def tagged(runtime: str, batch: int) -> str:
    """A runtime as it is written in the names of files: with its batch size, unless that is 1."""
    return runtime if batch == 1 else f"{runtime}-b{batch}"


def profile_command(device: str, tag: str, *, named: bool = False) -> str:
    """The command that measures a device as it is asked about.

    Args:
        device: Its name, which ends in its threads where it is a CPU.
        tag: See `tagged`.
        named: Whether the command names the device; else it is for this machine.
    """
    runtime, _, batch = tag.partition("-b")
    threads = re.search(r"-(\d+)t$", device)
    words = ["nas latency profile", *([f"--device {device}"] if named else [])]
    words += [f"--runtime {runtime}"] if runtime != "eager" else []
    words += [f"--set latency.threads={threads[1]}"] if threads and threads[1] != "1" else []
    return " ".join([*words, *([f"--set latency.batch_size={batch}"] if batch else [])])


def table_paths(directory: Path, device: str, tag: str) -> tuple[Path, Path]:
    """The CSV and the JSON file of a table."""
    return directory / f"{device}.{tag}.csv", directory / f"{device}.{tag}.json"


class MeasurementTable:
    """A table on disk and in memory. Open it with `create_or_open` or `load`."""

    def __init__(self, csv_path: Path, json_path: Path, header: dict[str, Any]) -> None:
        self.csv_path, self.json_path, self.header = csv_path, json_path, header
        self.subjects: dict[str, Subject] = {}
        self.windows: dict[str, list[Window]] = {}
        self._chain: int | None = None  # CRC-32 of the lines so far; None of a table that has none
        self._lock: _Lock | None = None  # of who may append

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.header["device"])

    @property
    def runtime(self) -> str:
        """One of `runtimes.RUNTIMES`."""
        return str(self.header["runtime"])

    @property
    def batch(self) -> int:
        """Inputs per forward."""
        return int(self.header["batch"])

    @property
    def threads(self) -> int:
        """Threads inside an operator."""
        return int(self.header["threads"])

    @property
    def reference_ms(self) -> float:
        """The sentinel's reference time: what a ratio of 1 stands for."""
        return float(self.header["sentinel_reference_ms"])

    @classmethod
    def create_or_open(
        cls, directory: Path, device: str, runtime: str, threads: int, reference_ms: float, batch: int = 1
    ) -> MeasurementTable:
        """Open the device's table to add to it, or start one. Its reference time is that of the first profile.

        Raises:
            ConfigError: It was measured with other threads.
            NasError: Another process adds to it.
        """
        tag = tagged(runtime, batch)
        csv_path, json_path = table_paths(directory, device, tag)
        if runtime not in RUNTIMES:
            raise ConfigError(f"runtime {runtime!r}.{nearest(runtime, RUNTIMES)} Allowed: {', '.join(RUNTIMES)}.")
        lock = _Lock.of(csv_path)
        if csv_path.exists():
            _cut_torn_line(csv_path)
            table = cls.load(directory, device, tag)
            table._lock = lock
            if table.threads != threads:
                raise ConfigError(
                    f"{json_path}: measured with {counted(table.threads, 'thread')}, asked for {threads}. "
                    "Use another directory, or the same number."
                )
            return table
        header = {
            "schema": SCHEMA,
            "device": device,
            "runtime": runtime,
            "batch": batch,
            "threads": threads,
            "sentinel_reference_ms": reference_ms,
            "columns": COLUMNS,
            "provenance": [],
        }
        write_json(json_path, stamped(header))
        line = ",".join(COLUMNS)
        csv_path.write_text(line + "\n")
        table = cls(csv_path, json_path, header)
        table._chain, table._lock = zlib.crc32(line.encode()), lock
        return table

    @classmethod
    def load(cls, directory: Path, device: str, tag: str) -> MeasurementTable:
        """Read the table of a device and a runtime as `tagged` writes it.

        Raises:
            ConfigError: There is none.
            IntegrityError: It is damaged, or of an earlier version, in which other things were measured.
        """
        csv_path, json_path = table_paths(Path(directory), device, tag)
        if not csv_path.exists() or not json_path.exists():
            raise ConfigError(f"{csv_path}: no such table. Make it with `nas latency profile --device {device}`.")
        try:
            header = read_json(json_path)
            has_digest = check_stamp(header, str(json_path))
            header = without_stamp(header)
            own = tagged(header["runtime"], header["batch"])
            if isinstance(header["schema"], int) and header["schema"] < SCHEMA:
                raise IntegrityError(outdated(csv_path, "a table of measurements", f"schema {header['schema']}"))
            if header["schema"] != SCHEMA or header["device"] != device or own != tag:
                raise IntegrityError(
                    f"{json_path}: is the table of {header['device']} ({own}), schema {header['schema']}; "
                    f"expected {device} ({tag}), schema {SCHEMA}."
                )
            table = cls(csv_path, json_path, header)
            table._read_rows(read_bytes(csv_path).decode("utf-8"), has_digest)
        except IntegrityError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError) as error:
            reason = visible(str(error))[:150]
            raise IntegrityError(f"{csv_path}: damaged or not a measurement table: {reason}.") from error
        return table

    def _read_rows(self, text: str, has_digest: bool) -> None:
        lines = text.split("\n")
        columns = lines[0].split(",")
        if columns == list(COLUMNS) and has_digest:
            self._chain = zlib.crc32(lines[0].encode())
        elif columns != list(_FORMER_COLUMNS):
            raise IntegrityError(f"{self.csv_path}: damaged, or the columns are not those of schema {SCHEMA}.")
        if lines.pop():
            raise IntegrityError(f"{self.csv_path}:{len(lines) + 1}: damaged: the file ends within a row.")
        for number, line in enumerate(lines[1:], start=2):
            if self._chain is not None:
                row, _, crc = line.rpartition(",")
                self._chain = zlib.crc32(row.encode(), self._chain)
                if crc != f"{self._chain:08x}":
                    raise IntegrityError(
                        f"{self.csv_path}:{number}: damaged: not the row that was written. Restore the file, or delete "
                        "it and profile again."
                    )
            (cells,) = csv.reader([line], strict=True)
            self._read_row(dict(zip(columns, cells, strict=True)))

    def _read_row(self, row: Mapping[str, str]) -> None:
        identity = row["subject"]
        if identity not in self.subjects:
            if not row["config"]:
                raise IntegrityError(f"{self.csv_path}: the first row of subject {identity} is missing.")
            found = subject(
                row["kind"], json.loads(row["config"]), json.loads(row["work"]), int(row["batch"]), row["dtype"]
            )
            if found.id != identity:
                raise IntegrityError(f"{self.csv_path}: subject {identity} is not what its hash says.")
            self.subjects[identity] = found
            self.windows[identity] = []
        samples = np.array(row["samples_us"].split(), dtype=float) * 1e3
        before, after = float(row["sentinel_before_ms"]) * 1e6, float(row["sentinel_after_ms"]) * 1e6
        usable = 0 < before < np.inf and 0 < after < np.inf and np.isfinite(samples).all() and (samples > 0).all()
        if not len(samples) or not usable:
            raise IntegrityError(f"{self.csv_path}: subject {identity} has a row without usable times.")
        self.windows[identity].append(Window(0, int(row["pass"]), samples, before, after))

    def add_provenance(self, record: Mapping[str, Any]) -> int:
        """Record how the rows that follow were measured; returns its index."""
        self.header["provenance"].append(dict(record))
        write_json(self.json_path, stamped(self.header))
        return len(self.header["provenance"]) - 1

    def append(self, rows: Iterable[tuple[Subject, Window]], provenance: int) -> None:
        """Append windows, durably."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        for what, window in rows:
            first = what.id not in self.subjects
            if first:
                self.subjects[what.id] = what
                self.windows[what.id] = []
            self.windows[what.id].append(window)
            p20, p50, p80 = np.percentile(window.samples_ns, (20, 50, 80)) * 1e-6
            writer.writerow(
                [
                    what.id,
                    what.kind,
                    json.dumps(what.config, separators=(",", ":")) if first else "",
                    json.dumps(dict(what.work), separators=(",", ":")) if first else "",
                    what.batch,
                    what.dtype,
                    provenance,
                    window.pass_index,
                    *(f"{v:.6g}" for v in (p20, p50, p80, window.before_ns * 1e-6, window.after_ns * 1e-6)),
                    int(window.accepted),
                    " ".join(f"{v:.6g}" for v in window.samples_ns * 1e-3),
                ]
            )
        with open(self.csv_path, "a") as file:
            file.write("".join(map(self._stamped, buffer.getvalue().splitlines())))
            file.flush()
            os.fsync(file.fileno())

    def _stamped(self, line: str) -> str:
        """A row as it is written, with the chain where the table has one."""
        if self._chain is None:
            return line + "\n"
        self._chain = zlib.crc32(line.encode(), self._chain)
        return f"{line},{self._chain:08x}\n"

    def measurements(self, kind: str, config: MeasureConfig | None = None) -> dict[str, Measurement]:
        """Every subject of a kind by its id, each from all its windows."""
        config = config or MeasureConfig(threads=self.threads)
        ids = [identity for identity, what in self.subjects.items() if what.kind == kind]
        windows = [
            Window(index, w.pass_index, w.samples_ns, w.before_ns, w.after_ns)
            for index, identity in enumerate(ids)
            for w in self.windows[identity]
        ]
        return dict(zip(ids, summarise(windows, len(ids), config, self.reference_ms), strict=True))

    def uniform(self, identities: Iterable[str]) -> np.ndarray:
        """(subjects,) whether each network was drawn uniformly, as those are that are asked about."""
        return np.array([BY_SIZE not in self.subjects[identity].work for identity in identities], dtype=bool)

    def judging(self, identities: Iterable[str]) -> np.ndarray:
        """(subjects,) which networks a predictor is judged by: the uniformly drawn; all where there are none."""
        uniform = self.uniform(identities)
        return uniform if uniform.any() else np.ones_like(uniform)

    def accepted(self, identity: str) -> int:
        """Accepted windows of a subject."""
        return sum(window.accepted for window in self.windows.get(identity, ()))

    @property
    def rows_digest(self) -> str:
        """SHA-256 of the rows as they are on disk."""
        return hashlib.sha256(self.csv_path.read_bytes()).hexdigest()

    def require_device(self) -> None:
        """Refuse what no device took: `ConfigError` for timings from Triton's interpreter."""
        if self.device == INTERPRETER:
            raise ConfigError(
                f"{self.csv_path}: these timings are the interpreter's, no device's; nothing is fitted on them. "
                "Profile on the device itself."
            )


class _Lock:
    """Whose process may add to a table; one for all its objects in this process. The kernel gives it back."""

    _held: ClassVar[weakref.WeakValueDictionary[Path, _Lock]] = weakref.WeakValueDictionary()

    def __init__(self, table: Path) -> None:
        table.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(table.with_name(f".{table.stem}.lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise NasError(
                f"{table}: another process is measuring into this table. Wait for it, or stop it."
            ) from error
        weakref.finalize(self, os.close, handle)

    @classmethod
    def of(cls, table: Path) -> _Lock:
        """This process's."""
        found = cls._held.get(table.absolute())
        if found is None:
            found = cls._held[table.absolute()] = cls(table)
        return found


def outdated(path: Path, what: str, version: str) -> str:
    """The sentence that refuses what an earlier version wrote about a device."""
    device, _, tag = path.stem.rpartition(".")
    command = profile_command(device, tag, named=True)
    return (
        f"{path}: {what} of an earlier version ({version}), in which whole blocks were measured instead of their two "
        f"branches; delete {path.stem}.* there and measure again with `{command}`."
    )


def _cut_torn_line(path: Path) -> None:
    """Cut the file back to its last newline."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with open(path, "rb+") as file:
            file.truncate(end)
