"""A run directory: everything about one search, every file whole or not there, one process at a time.

runs/<name>/config.yaml     the configuration as resolved
            manifest.json   format, versions, seed, device, commit, when, phases with their seconds, digests
            study.journal   the Optuna study
            study.summary.json  what the journal comes to, checked against it
            trials.csv      every trial
            pareto.json     the front (`search.run.front`)
            latency/        this machine's profile, where latency is predicted
            supernet.safetensors, networks/, exports/
            driver.json     who drives it, where the study lies on a server (`search.study.driver`)
            rungs/          trainings that were left off (`search.halving`), until the run is finished

Every file tells whether it is what was written: the manifest, the journal's records, tables, predictors and weights in
themselves, the others by their digest in the manifest (`search.run.integrity`). Nothing in a run is followed when it is
a link.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from mixnas.predictors.measuring.table import tagged
from mixnas.search.run.fixed import difference, fixed
from mixnas.search.run.front import Front
from mixnas.search.run.integrity import (
    ABSENT,
    check_layout,
    check_own,
    journal_gone,
    not_as_written,
    read_manifest,
    write_manifest,
)
from mixnas.search.run.making import never_began, new_folder
from mixnas.search.run.origin import commit, utc_now, versions
from mixnas.search.run.trust import mark
from mixnas.search.run.typed import DEFAULT_ROOT, typed
from mixnas.search.study.reading import summary_of
from mixnas.search_space.errors import (
    ConfigError,
    IntegrityError,
    MachineError,
    NasError,
    listed,
    nearest,
    shown,
    visible,
)
from mixnas.search_space.files import (
    atomic_write,
    digest_of,
    dump_yaml,
    json_text,
    parse_json,
    parse_yaml,
    read_bytes,
    remove_unfinished,
)

FORMAT = 3
"""Since 2, latency is that of branches, not of whole blocks: a run of format 1 can be looked at, not gone on with.
Since 3, there are digests: what was written before has none, and is read all the same."""
_READABLE = (1, 2, FORMAT)
_RESUMABLE = (2, FORMAT)

State = Literal["running", "stopped", "finished"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at a glance.

    Attributes:
        name: Name of the directory.
        state: "running" (a process holds its lock), "finished" (its budget is spent), or "stopped".
        created: When, ISO 8601 in UTC.
        done: Trials evaluated.
        failed: Trials that failed; one that was interrupted may be evaluated again, and is no failure.
        running: Trials in progress; 0 unless the run is.
        trials: Trials in its budget, None when the configuration has none.
        problem: Why it cannot be opened; empty when it can.
    """

    name: str
    state: State
    created: str
    done: int
    failed: int
    running: int
    trials: int | None
    problem: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return dataclasses.asdict(self)


def _is_there(path: Path) -> bool:
    """Whether there is anything under a path, a link that leads nowhere too; no path that cannot be one is."""
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL
        return False


class Run:
    """One run directory. Reading needs nothing; whoever searches enters it (`with run:`) and so holds its lock.

    Examples:
        After the example of `mixnas.search`:

        >>> import mixnas
        >>> run = mixnas.Run.open("small")
        >>> run.status().state
        'finished'
        >>> best = run.front().members[0]
        >>> sorted(best.metrics)[:3]
        ['accuracy', 'accuracy_se', 'latency_ms']
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._lock: int | None = None
        self._entered = 0

    def __repr__(self) -> str:
        state = "running" if self.is_running() else "finished" if self.manifest.get("finished") else "stopped"
        return f"Run({str(self.path)!r}, {state})"

    # -- making and opening -----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        root: str | Path,
        config: Mapping[str, Any],
        *,
        name: str | None = None,
        prefix: str = "run",
        **facts: Any,
    ) -> Run:
        """Make a new run directory.

        Args:
            root: The directory of all runs.
            config: The resolved configuration as plain data.
            name: Of the run; by default the prefix, date and time, made unique.
            prefix: Of the default name, for example the task's name.
            facts: More for the manifest (seed; device and latency, see `check_latency`).

        Raises:
            ConfigError: The name is taken, or no name for a directory.
        """
        with new_folder(root, name, prefix) as path:
            created, text = utc_now(), dump_yaml(dict(config))
            manifest = {
                "format": FORMAT,
                "name": path.name,
                "created": created,
                "mark": mark(config.get("task"), created),
                "finished": None,
                "versions": versions(),
                "commit": commit(),
                **facts,
                "phases": [],
                "fixed": fixed(config),
                "digests": {"config.yaml": [digest_of(text.encode())]},
            }
            atomic_write(path / "config.yaml", text)
            write_manifest(path / "manifest.json", manifest)
        return cls(path, manifest)

    @classmethod
    def open(cls, run: str | Path, root: str | Path = DEFAULT_ROOT) -> Run:
        """Open a run by its name or path.

        Raises:
            ConfigError: There is no such run (with the nearest name), or another version of mixnas wrote it.
            IntegrityError: Its manifest is damaged.
        """
        if not isinstance(run, str | Path):
            raise ConfigError(f"Run.open: {shown(run)} is no name of a run, and no path.")
        root = Path(root)
        path = Path(run) if _is_there(Path(run) / "manifest.json") else root / run
        if not _is_there(path / "manifest.json"):
            known = [p.parent.name for p in sorted(root.glob("*/manifest.json"))]
            listing = f"Runs in {root}: {listed(known[-20:])}." if known else f"There are no runs in {root}."
            left = " Its folder is there, but no search began in it." if _is_there(path) and never_began(path) else ""
            raise ConfigError(f"{str(run)[:100]}: no such run.{nearest(str(run), known)}{left} {listing}")
        check_layout(path)
        return cls(path, read_manifest(path / "manifest.json", _READABLE))

    # -- places -----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.path.name

    @property
    def journal(self) -> Path:
        """The Optuna study's file."""
        return self.path / "study.journal"

    @property
    def supernet(self) -> Path:
        """The super-network's weights."""
        return self.path / "supernet.safetensors"

    @property
    def latency(self) -> Path:
        """The measurement table and the predictor that a search with predicted latency profiled."""
        return self.path / "latency"

    @property
    def networks(self) -> Path:
        """Networks with trained weights, one file each."""
        return self.path / "networks"

    @property
    def rungs(self) -> Path:
        """Trainings that were left off, and may be gone on with."""
        return self.path / "rungs"

    @property
    def exports(self) -> Path:
        """Where exported networks go (made when asked for)."""
        path = self.path / "exports"
        path.mkdir(exist_ok=True)
        return path

    def config(self) -> dict[str, Any]:
        """The configuration as it was resolved, as plain data.

        Raises:
            IntegrityError: The file is not what was written.
        """
        path = self.path / "config.yaml"
        try:
            plain = parse_yaml(self._read("config.yaml").decode(), str(path))
        except (ConfigError, UnicodeDecodeError) as error:
            raise IntegrityError(f"{path}: damaged: not a configuration. Restore it from a copy.") from error
        if not isinstance(plain, dict):
            raise IntegrityError(f"{path}: damaged: not a configuration. Restore it from a copy.")
        return plain

    # -- lock -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        """Take the lock. The kernel gives it back when the process ends, however it ends.

        Raises:
            NasError: Another process holds it.
            IntegrityError: See `integrity.check_own`.
        """
        if self._lock is not None:
            self._entered += 1
            return self
        check_own(self.path)
        try:
            file = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except FileNotFoundError:
            raise MachineError(f"{self.path}: the run was removed.") from None
        for attempt in range(5):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt < 4:  # someone may only be looking whether it is taken
                    time.sleep(0.02)
        else:
            holder = os.pread(file, 100, 0).decode(errors="replace").strip()
            os.close(file)
            process = holder if holder.isdecimal() else "unknown"
            raise NasError(f"{self.path}: process {process} is using this run. Wait for it, or stop it.")
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._lock, self._entered = file, 1
        for folder in (self.path, self.latency, self.networks, self.rungs):
            if folder.is_dir() and not folder.is_symlink():
                remove_unfinished(folder)
        with contextlib.suppress(NasError, KeyError):  # a resume may have changed it since it was opened
            self.manifest = read_manifest(self.path / "manifest.json", _READABLE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._lock is not None and not self._entered:
            os.close(self._lock)
            self._lock = None

    def is_running(self) -> bool:
        """Whether a process holds the lock."""
        if self._lock is not None:
            return True
        try:
            file = os.open(self.path / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # there is none, or it may not be looked at
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    # -- writing ----------------------------------------------------------------------------------------------------

    def check_there(self) -> None:
        """Make sure that the run whose lock is held is still the one at its path.

        Raises:
            MachineError: It was removed or replaced meanwhile; nothing is written then.
        """
        if self._lock is None:
            return
        held = os.fstat(self._lock)
        try:
            there = os.stat(self.path / ".lock", follow_symlinks=False)
        except OSError:
            there = None
        if there is None or (there.st_dev, there.st_ino) != (held.st_dev, held.st_ino):
            raise MachineError(
                f"{self.path}: the run was removed, moved or replaced while it was worked on; nothing more is written. "
                "What was finished is where the directory now is."
            )

    def update(self, **facts: Any) -> None:
        """Change entries of the manifest."""
        self.check_there()
        self.manifest.update(facts)
        if self.manifest["format"] in _RESUMABLE:
            self.manifest["format"] = FORMAT
        write_manifest(self.path / "manifest.json", self.manifest)

    def _write(self, name: str, text: str) -> None:
        """Write one of the files whose digest the manifest has.

        The manifest first knows both the digest of what is there and of what comes, so that a crash between the two
        writes is no damage.
        """
        path, new = self.path / name, digest_of(text.encode())
        digests = self.manifest.setdefault("digests", {})
        before = digest_of(read_bytes(path)) if _is_there(path) else ABSENT
        known = (ABSENT, *digests.get(name, [before]))
        digests[name] = [new] if before == new or before not in known else [before, new]
        self.update()
        atomic_write(path, text)

    def _read(self, name: str) -> bytes:
        """Read one of them.

        Raises:
            ConfigError: It cannot be read.
            IntegrityError: It is not what was written.
        """
        data = read_bytes(self.path / name)
        problem = not_as_written(self.manifest, name, data)
        if problem and not self._entered:  # it may have been written by somebody else since this was opened
            self.manifest = read_manifest(self.path / "manifest.json", _READABLE)
            data = read_bytes(self.path / name)
            problem = not_as_written(self.manifest, name, data)
        if problem:
            raise IntegrityError(f"{self.path / name}: {problem}")
        return data

    def begin_phase(self, name: str) -> None:
        """Note the phase that the run is in, for whoever looks meanwhile."""
        self.update(phase=name)

    def add_phase(self, name: str, seconds: float) -> None:
        """Note a phase that has ended and how long it took."""
        self.manifest["phases"].append({"name": name, "seconds": round(seconds, 3), "ended": utc_now()})
        self.update(phase=None)

    def finish(self, **facts: Any) -> None:
        """Note that the run's budget is spent and its results are written."""
        self.update(finished=utc_now(), **facts)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Save a configuration whose budget was changed by a resume; see `check_fixed`."""
        self.check_fixed(config)
        self._write("config.yaml", dump_yaml(dict(config)))

    def write_data(self, record: Mapping[str, Any]) -> None:
        """Write down what the task says of its data, once: `Task.record`.

        Raises:
            ConfigError: See `check_data`.
        """
        if self.data():
            self.check_data(record)
        elif record:
            self._write("data.json", json_text(dict(record)))

    def check_data(self, record: Mapping[str, Any]) -> None:
        """Compare what the task says of its data with what it said when the run was started.

        Raises:
            ConfigError: It is not the same.
        """
        known, now = self.data(), parse_json(json_text(dict(record)), "the task's record")
        later = {"prepared"} - known.keys()  # runs of before did not say it
        changed = [k for k in {**known, **now} if known.get(k) != now.get(k) and k != "summary" and k not in later]
        if known and changed:
            raise ConfigError(
                f"{self.path}: the data has changed since the run was started ({listed(changed)}; see "
                f"{self.path / 'data.json'}). Its networks would be judged on what they were trained on. Put the data "
                "back, or start another run."
            )

    def data(self) -> dict[str, Any]:
        """What the task said of its data when the run was started; empty where it said nothing.

        Raises:
            IntegrityError: The file is not what was written.
        """
        if not _is_there(self.path / "data.json"):
            return {}
        plain = parse_json(self._read("data.json"), str(self.path / "data.json"))
        return plain if isinstance(plain, dict) else {}

    def write_tables(self, csv_text: str, front: Front) -> None:
        """Write `trials.csv` (`Results.to_csv`) and `pareto.json`."""
        self._write("trials.csv", csv_text)
        self._write("pareto.json", front.to_text())

    # -- results ----------------------------------------------------------------------------------------------------

    @property
    def has_front(self) -> bool:
        """Whether a front has been written."""
        return _is_there(self.path / "pareto.json")

    def front(self) -> Front:
        """The front that was written last.

        Raises:
            NasError: None has been written yet.
            IntegrityError: The file is damaged.
        """
        if not self.has_front:
            if ABSENT not in self.manifest.get("digests", {}).get("pareto.json", [ABSENT]):
                raise IntegrityError(
                    f"{self.path / 'pareto.json'}: missing. 'nas resume {typed(self.path)}' writes it again."
                )
            raise NasError(f"{self.path}: no front has been written yet. 'nas resume {typed(self.path)}' goes on.")
        return Front.parse(self._read("pareto.json"), str(self.path / "pareto.json"))

    @property
    def latency_tag(self) -> str:
        """Runtime and batch size of its latency, as predictors are looked up by them."""
        if "latency" in self.manifest:
            return str(self.manifest["latency"])
        return tagged("eager", int(self.config()["latency"]["batch_size"]))  # all that format 1 had

    # -- going on ---------------------------------------------------------------------------------------------------

    def check_resumable(self) -> None:
        """Refuse to go on with a run of an earlier format, or one whose trials are gone.

        Raises:
            ConfigError: Its latencies would not compare with those of this version.
            IntegrityError: Going on would begin anew, and write over what is left of the run.
        """
        if problem := journal_gone(self.path, self.manifest):
            raise IntegrityError(f"{self.journal}: {problem}")
        if self.manifest["format"] not in _RESUMABLE:
            raise ConfigError(
                f"{self.path}: was begun by an earlier version, whose latency tables measured whole blocks; its trials "
                "cannot be gone on with. Its front can be seen and exported; start a new run with its config.yaml."
            )

    def check_latency(self, device: str, tag: str) -> None:
        """Refuse to go on with a run under another latency than it was begun with.

        Args:
            device: The device's standard name.
            tag: Runtime and batch size, as `predictors.measuring.table.tagged` writes them.

        Raises:
            ConfigError: The device, the runtime or the batch size is another.
        """
        before = self.manifest["device"], self.latency_tag
        if before != (device, tag):
            raise ConfigError(
                f"{self.path}: latency in this run is that of {before[0]} ({before[1]}), and now {device} ({tag}) is "
                "asked for: they do not compare. Go on where and as it was begun, or start a new run."
            )

    def check_fixed(self, config: Mapping[str, Any]) -> None:
        """Refuse a configuration under which the trials so far would mean something else.

        Raises:
            ConfigError: With the differences in what `FIXED_KEYS` names.
        """
        key, lines = difference(self.manifest["fixed"], fixed(config), ("as the run was started", "now"))
        if key:
            raise ConfigError(
                f"{self.path}: {key} has changed since the run was started, so its trials cannot be gone on with. "
                f"Start a new run, or change it back:\n{lines}"
            )

    # -- looking ----------------------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """The run at a glance; for one that is running, too."""
        running = self.is_running()
        if not running:  # it may have ended since it was opened
            with contextlib.suppress(NasError, KeyError):
                self.manifest = read_manifest(self.path / "manifest.json", _READABLE)
        counts = summary_of(self.journal).counts
        search = self.config().get("search")
        trials = search.get("trials") if isinstance(search, dict) else None
        return RunStatus(
            name=self.name,
            state="running" if running else "finished" if self.manifest.get("finished") else "stopped",
            created=str(self.manifest.get("created", "")),
            done=counts["done"],
            failed=counts["failed"],
            running=counts["running"] if running else 0,
            trials=trials if isinstance(trials, int) else None,
        )


def list_runs(root: str | Path = DEFAULT_ROOT) -> list[RunStatus]:
    """Every run in a directory, the oldest first; one that cannot be opened is listed with its problem."""
    found = []
    for path in Path(root).glob("*/manifest.json"):
        try:
            found.append(Run.open(path.parent).status())
        except Exception as error:  # whatever is wrong with one hides no other
            problem = str(error) if isinstance(error, NasError) else f"{type(error).__name__}: {error}"
            found.append(RunStatus(path.parent.name, "stopped", "", 0, 0, 0, None, problem=visible(problem)))
    return sorted(found, key=lambda status: (status.created, status.name))
