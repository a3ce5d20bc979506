"""A run directory: everything about one search, every file whole or not there, one process at a time.

runs/<name>/config.yaml     the configuration as resolved
            manifest.json   format, versions, seed, device, commit, when, phases with their seconds
            study.journal   the Optuna study
            trials.csv      every trial
            pareto.json     the front (`search.run.front`)
            latency/        this machine's profile, where latency is predicted
            supernet.safetensors, networks/, exports/
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fcntl
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from mixnas.predictors.measuring.table import tagged
from mixnas.search.run.front import Front
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError, nearest
from mixnas.search_space.files import atomic_write, dump_yaml, load_yaml, write_json

FORMAT = 2
"""Since 2, latency is that of branches, not of whole blocks. A run of format 1 can be looked at, not gone on with."""
_READABLE = (1, FORMAT)

FIXED_KEYS = (
    *("task", "objectives", "constraints", "space", "search.evaluator", "train", "supernet"),
    *("latency.runtime", "latency.threads", "latency.batch_size"),
)
"""What the trials of a run depend on: a resumed run may change its seed, strategy and budget, not these."""
_FREE = ("checkpoint_every", "processes")  # of the super-network: its weights are the same

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PACKAGES = ("mixnas", "torch", "triton", "optuna", "numpy", "scikit-learn", "ray")

State = Literal["running", "stopped", "finished"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run at a glance.

    Attributes:
        name: Name of the directory.
        state: "running" (a process holds its lock), "finished" (its budget is spent), or "stopped".
        created: When, ISO 8601 in UTC.
        done: Trials evaluated.
        failed: Trials that failed or were interrupted.
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


def utc_now() -> str:
    """Now, as `2026-11-21T10:23:07Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """The checkout's git commit, with `+` when files were changed since; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


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
        root = Path(root)
        if name is not None and not _NAME.fullmatch(name):
            raise ConfigError(f"{name!r} is no name for a run. Allowed: letters, digits, '.', '_', '-'; not '.' first.")
        path = cls._make(root, name, prefix)
        manifest = {
            "format": FORMAT,
            "name": path.name,
            "created": utc_now(),
            "finished": None,
            "versions": versions(),
            "commit": commit(),
            **facts,
            "phases": [],
            "fixed": _fixed(config),
        }
        atomic_write(path / "config.yaml", dump_yaml(dict(config)))
        write_json(path / "manifest.json", manifest)
        return cls(path, manifest)

    @staticmethod
    def _make(root: Path, name: str | None, prefix: str) -> Path:
        root.mkdir(parents=True, exist_ok=True)
        if name is not None:
            try:
                (root / name).mkdir()
            except FileExistsError:
                raise ConfigError(
                    f"{root / name} exists already. Choose another --name, or go on with 'nas resume {name}'."
                ) from None
            return root / name
        stem = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', prefix).strip('-') or 'run'}-{datetime.now():%Y%m%d-%H%M%S}"
        for attempt in range(1, 10_000):
            path = root / (stem if attempt == 1 else f"{stem}-{attempt}")
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
        raise NasError(f"{root}: no free name for a run was found. Give one with --name.")

    @classmethod
    def open(cls, run: str | Path, root: str | Path = "runs") -> Run:
        """Open a run by its name or path.

        Raises:
            ConfigError: There is no such run (with the nearest name), or another version of mixnas wrote it.
            IntegrityError: Its manifest is damaged.
        """
        root = Path(root)
        path = Path(run) if (Path(run) / "manifest.json").exists() else root / run
        manifest_path = path / "manifest.json"
        if not manifest_path.exists():
            known = [p.parent.name for p in sorted(root.glob("*/manifest.json"))]
            listing = f"Runs in {root}: {', '.join(known[-20:])}." if known else f"There are no runs in {root}."
            raise ConfigError(f"{run}: no such run.{nearest(str(run), known)} {listing}")
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            written = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{manifest_path}: damaged: not the manifest of a run.") from error
        if written not in _READABLE:
            raise ConfigError(
                f"{path}: has format {written}; this version of mixnas reads formats up to {FORMAT}. "
                f"Open it with the version that wrote it ({manifest.get('versions', {}).get('mixnas', 'unknown')})."
            )
        return cls(path, manifest)

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
    def exports(self) -> Path:
        """Where exported networks go (made when asked for)."""
        path = self.path / "exports"
        path.mkdir(exist_ok=True)
        return path

    def config(self) -> dict[str, Any]:
        """The configuration as it was resolved, as plain data."""
        plain = load_yaml(self.path / "config.yaml")
        if not isinstance(plain, dict):
            raise IntegrityError(f"{self.path / 'config.yaml'}: damaged: not a configuration.")
        return plain

    # -- lock -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Run:
        """Take the lock. The kernel gives it back when the process ends, however it ends.

        Raises:
            NasError: Another process holds it.
        """
        file = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
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
            raise NasError(
                f"{self.path}: process {holder or 'unknown'} is running this search. Wait for it, or stop it."
            )
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        self._lock = file
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def is_running(self) -> bool:
        """Whether a process holds the lock."""
        if self._lock is not None:
            return True
        try:
            file = os.open(self.path / ".lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(file)
        return False

    # -- writing ----------------------------------------------------------------------------------------------------

    def update(self, **facts: Any) -> None:
        """Change entries of the manifest."""
        self.manifest.update(facts)
        write_json(self.path / "manifest.json", self.manifest)

    def add_phase(self, name: str, seconds: float) -> None:
        """Note a phase that has ended and how long it took."""
        self.manifest["phases"].append({"name": name, "seconds": round(seconds, 3), "ended": utc_now()})
        self.update()

    def finish(self, **facts: Any) -> None:
        """Note that the run's budget is spent and its results are written."""
        self.update(finished=utc_now(), **facts)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Save a configuration whose budget was changed by a resume; see `check_fixed`."""
        self.check_fixed(config)
        atomic_write(self.path / "config.yaml", dump_yaml(dict(config)))

    def write_tables(self, csv_text: str, front: Front) -> None:
        """Write `trials.csv` (`Results.to_csv`) and `pareto.json`."""
        atomic_write(self.path / "trials.csv", csv_text)
        front.write(self.path / "pareto.json")

    # -- results ----------------------------------------------------------------------------------------------------

    @property
    def has_front(self) -> bool:
        """Whether a front has been written."""
        return (self.path / "pareto.json").exists()

    def front(self) -> Front:
        """The front that was written last.

        Raises:
            NasError: None has been written yet.
            IntegrityError: The file is damaged.
        """
        try:
            return Front.read(self.path / "pareto.json")
        except FileNotFoundError:
            raise NasError(f"{self.path}: no front has been written yet. 'nas resume {self.name}' goes on.") from None

    @property
    def latency_tag(self) -> str:
        """Runtime and batch size of its latency, as predictors are looked up by them."""
        if "latency" in self.manifest:
            return str(self.manifest["latency"])
        return tagged("eager", int(self.config()["latency"]["batch_size"]))  # all that format 1 had

    # -- going on ---------------------------------------------------------------------------------------------------

    def check_resumable(self) -> None:
        """Refuse to go on with a run of an earlier format.

        Raises:
            ConfigError: Its latencies would not compare with those of this version.
        """
        if self.manifest["format"] != FORMAT:
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
        now = _fixed(config)
        for key, before in self.manifest["fixed"].items():
            after = now.get(key)
            if key in ("train", "supernet") and isinstance(after, Mapping):  # a later version may have more settings
                after = {name: after[name] for name in before if name in after}
            # the order of objectives is the order of the values that are stored, and the file's text shows it
            old, new = (dump_yaml({key: plain}).splitlines() for plain in (before, after))
            if old != new:
                diff = "\n".join(difflib.unified_diff(old, new, "as the run was started", "now", lineterm="", n=1))
                raise ConfigError(
                    f"{self.path}: {key} has changed since the run was started, so its trials cannot be gone on with. "
                    f"Start a new run, or change it back:\n{diff}"
                )

    # -- looking ----------------------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """The run at a glance; for one that is running, too."""
        from mixnas.search.study.journal import count_states  # imports optuna

        running = self.is_running()
        counts = {state.name: count for state, count in count_states(self.journal).items()}
        search = self.config().get("search")
        trials = search.get("trials") if isinstance(search, dict) else None
        return RunStatus(
            name=self.name,
            state="running" if running else "finished" if self.manifest.get("finished") else "stopped",
            created=str(self.manifest.get("created", "")),
            done=counts["COMPLETE"],
            failed=counts["FAIL"],
            running=counts["RUNNING"] if running else 0,
            trials=trials if isinstance(trials, int) else None,
        )


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `FIXED_KEYS` names of a resolved configuration, as far as it is there."""
    found: dict[str, Any] = {}
    for key in FIXED_KEYS:
        group, _, name = key.rpartition(".")
        place = config.get(group) if group else config
        if isinstance(place, Mapping) and name in place:
            found[key] = place[name]
    if "supernet" in found:
        found["supernet"] = {name: value for name, value in found["supernet"].items() if name not in _FREE}
    return found


def list_runs(root: str | Path = "runs") -> list[RunStatus]:
    """Every run in a directory, the oldest first; one that cannot be opened is listed with its problem."""
    found = []
    for path in Path(root).glob("*/manifest.json"):
        try:
            found.append(Run.open(path.parent).status())
        except NasError as error:
            found.append(RunStatus(path.parent.name, "stopped", "", 0, 0, 0, None, problem=str(error)))
    return sorted(found, key=lambda status: (status.created, status.name))
