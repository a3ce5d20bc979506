"""A Ray cluster for a search: one that is started on this machine and ends with it, or one that is there already."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from mixnas.search.engines.on_ray import _head
from mixnas.search_space.errors import ConfigError, MachineError, NasError, StoppedEarly
from mixnas.search_space.extensions import VARIABLE

_START_SECONDS = 120.0
_KNOCK_SECONDS = 10.0
_LAST_WORDS_SECONDS = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# what a driver and what it starts are told before they import Ray
_ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # which says things whatever it is asked
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is the session's
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # nothing that a resume needs stands in Ray's files
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # set to 0, all that Ray opens is on 127.0.0.1


@functools.cache
def _token() -> str:
    """Of this process, which Ray reads once; it goes to the processes that it starts, and into no file."""
    return secrets.token_hex(32)


def environment(*, own: bool) -> dict[str, str]:
    """What the environment says to Ray: of a cluster that is started here, or of another."""
    if not own:
        return _ALWAYS
    return {**_ALWAYS, _LOOPBACK: "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}


@contextlib.contextmanager
def settings(*, own: bool) -> Iterator[None]:
    """Within it a connection of this process is as one of a search: to Ray as it is started here, or elsewhere.

    Raises:
        NasError: Ray is not installed.
    """
    changed = environment(own=own)
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        from ray._private import ray_constants

        everywhere = ray_constants.ENABLE_RAY_CLUSTER
        if own:  # this process may have imported Ray before it was told
            ray_constants.ENABLE_RAY_CLUSTER = False
        _read_again()
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = everywhere
    except ImportError as error:
        raise NasError(f"search.engine: Ray cannot be imported ({error}). Install 'ray[tune]'.") from error
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if "ray" in sys.modules:
            _read_again()


def _read_again() -> None:
    """Have Ray read the environment again, which it did when it was imported."""
    from ray import _raylet

    compiled: Any = _raylet
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


def cores() -> int:
    """Of this machine that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a worker has of a machine.

    Attributes:
        cpus: Cores.
        gpus: GPUs, or a fraction of one.
        resources: Others that the cluster's nodes are given, by name.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Inside an operator."""
        return max(1, math.floor(self.cpus))

    @property
    def extensions(self) -> list[str]:
        """Modules of the user's own that a worker imports too."""
        return [name for name in os.environ.get(VARIABLE, "").split(",") if name]

    def fits(self, there: Mapping[str, float]) -> int:
        """How many workers fit into so many resources."""
        wanted = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return min(
            (math.floor(there.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items() if amount), default=1
        )


class Head:
    """Ray on this machine, bound to the loopback, ended with this process at the latest; a context manager.

    Attributes:
        address: What a driver connects to.
        folder: Of its files; removed at the end.

    Args:
        share: Of each worker.
        workers: For how many it has cores, GPUs and resources; None for all cores and GPUs.
        dashboard: Whether Ray's dashboard runs, on the loopback too.
        store_mb: Memory for what workers share, in MB.
        folder: Under which its folder is made; None for the system's temporary files.
        spill: Under which a folder is made for what it spills; None for its folder.
        disk_mb: How much both may hold, in MiB, until it is ended.
        should_stop: Asked while it starts.

    Raises:
        NasError: It does not start.
        StoppedEarly: `should_stop` said so.
    """

    def __init__(
        self,
        share: Share = Share(),
        workers: int | None = None,
        *,
        dashboard: bool = False,
        store_mb: int = 256,
        folder: str | None = None,
        spill: str | None = None,
        disk_mb: int = 10_000,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.address = self.folder = self._spill = ""
        self._share, self._should_stop = share, should_stop
        self._options: dict[str, Any] = {
            "include_dashboard": dashboard,
            "object_store_memory": store_mb << 20,
            "under": folder,
            "spill_under": spill,
            "disk_mb": disk_mb,
        }
        if workers is not None:
            self._options["num_cpus"] = max(1, math.ceil(workers * share.cpus))
            self._options["resources"] = {name: workers * amount for name, amount in share.resources.items()}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Head:
        threads = str(self._share.threads)
        variables = os.environ | environment(own=True) | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", _head.__file__, "watch", json.dumps(self._options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
            start_new_session=True,
        )
        try:
            self.folder, self._spill = self._said("folder", "spill")
            (self.address,) = self._said("address")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _said(self, *what: str) -> list[str]:
        assert self._process is not None and self._process.stdout is not None
        until = time.monotonic() + _START_SECONDS
        while not select.select([self._process.stdout], [], [], 0.1)[0]:
            if self._should_stop():
                raise StoppedEarly("stopped while Ray was starting.")
            if time.monotonic() > until:
                raise NasError(f"search.engine: Ray did not start within {_START_SECONDS:.0f} s on this machine.")
        line = self._process.stdout.readline()
        said: dict[str, str] = json.loads(line) if line else {"failure": "its process ended"}
        if not said.keys() >= set(what):
            raise NasError(
                f"search.engine: Ray does not start on this machine: {said.get('failure', line)} "
                "'nas doctor' says what works; engine: {name: local, workers: 2} needs no Ray."
            )
        return [said[name] for name in what]

    def _end(self) -> None:
        """End all of it; Ctrl-C waits meanwhile."""
        process, self._process = self._process, None
        if process is None:
            return
        with no_signals():
            self._end_process(process)

    def _end_process(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_head.END_SECONDS)
        _head.end_session(process.pid)  # nobody is left, unless it was killed itself
        process.kill()
        process.wait()
        process.stdout.close()
        for folder in filter(None, (self.folder, self._spill)):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def session(self) -> int:
        """The session of its processes, which is also the number of the one that watches them."""
        assert self._process is not None
        return self._process.pid

    def check(self, patience: float = 0.0) -> None:
        """Say so when it is gone.

        Args:
            patience: Seconds to wait for that, where something else lets expect it.

        Raises:
            MachineError: It is.
        """
        until = time.monotonic() + patience
        while self._process is not None and self._process.poll() is None:
            if time.monotonic() >= until:
                return
            time.sleep(0.05)
        why = self._why()
        raise MachineError(f"Ray on this machine ended: {why}. The trials that were reported are safe. Resume the run.")

    def _why(self) -> str:
        """What it said last."""
        said, until = b"", time.monotonic() + _LAST_WORDS_SECONDS
        if self._process is not None and self._process.stdout is not None:
            pipe = self._process.stdout.fileno()
            while (left := until - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
                part = os.read(pipe, 1 << 16)
                if not part:
                    break
                said += part
        for line in said.splitlines():  # Ray, which is ending too, may have said something there
            with contextlib.suppress(ValueError):
                if isinstance(found := json.loads(line), dict) and "failure" in found:
                    return str(found["failure"])
        return "its process was killed"


class Here:
    """The workers that run on this machine.

    Args:
        session: Of the processes of a Ray that was started here; None of another, whose workers' numbers are in `pids`.
    """

    def __init__(self, session: int | None) -> None:
        self.session = session
        self.pids: set[int] = set()

    def processes(self) -> list[int]:
        """Their numbers."""
        if self.session is None:
            return sorted(self.pids)
        found = []
        for pid in _head.processes_of(self.session):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
                    found.append(pid)
        return found

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Within it they stand still; Ray does not notice."""
        stopped = self.processes()
        try:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


class Cluster:
    """A connection of this process to Ray, which `settings` or its environment says how to make; a context manager.

    Args:
        address: `host:port` or `auto`.
        share: Of each worker.
        workers: How many; None for as many as fit.

    Raises:
        NasError: It cannot be reached, or has no place for one worker.
    """

    def __init__(self, address: str, share: Share = Share(), workers: int | None = None) -> None:
        self.address, self.share, self.workers = address, share, workers or 0

    def __enter__(self) -> Cluster:
        import ray

        if ray.is_initialized():
            raise NasError("search.engine: this process is connected to Ray already. Call ray.shutdown() before it.")
        if self.address != "auto":
            knock(self.address)
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            raise NasError(f"search.engine: no Ray cluster answers at {self.address}: {error}") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)  # Ray takes SIGTERM
        try:
            self._count()
        except BaseException:
            self._end()
            raise
        return self

    def _count(self) -> None:
        import ray

        there = ray.cluster_resources()
        fits = self.share.fits(there)
        if not fits:
            raise NasError(
                f"search.engine: no worker fits into the cluster at {self.address}: it has {there}, and one needs "
                f"{self.share}. Give it fewer cpus, gpus or resources."
            )
        self.workers = self.workers or fits

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        import ray

        with no_signals(), contextlib.suppress(Exception):  # its head may be gone
            ray.shutdown()


def listening(pids: Iterable[int]) -> set[str]:
    """The addresses on which processes of this machine listen, as Linux writes them (`0100007F` is 127.0.0.1)."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            sockets |= {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


LOOPBACK = frozenset({"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"})
"""127.0.0.1 and ::1, as `listening` gives them."""


def tried() -> str:
    """Start Ray here as a search would, have a worker answer, and end it; says how that went.

    Raises:
        NasError: It does not work, with the reason.
    """
    from mixnas.evaluators.answering import Answerer

    begun = time.monotonic()
    with settings(own=True), Head(workers=1, store_mb=80) as head, Cluster(head.address):
        import ray

        started = time.monotonic()
        worker: Any = ray.remote(Answerer).remote()
        ray.get(worker.where.remote(), timeout=_START_SECONDS)
        answered = time.monotonic()
        open_to_others = listening([os.getpid(), *_head.processes_of(head.session)]) - LOOPBACK
    took = f"starts in {started - begun:.1f} s, a worker answers after {answered - started:.1f} s"
    return f"{took}, listens on {'the loopback only' if not open_to_others else 'other addresses than the loopback'}"


def knock(address: str) -> None:
    """Refuse an address at which nobody listens: Ray would look for it for minutes.

    Raises:
        NasError: Nobody does, or it is no address.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"search.engine: address: {address!r} is none. Allowed: HOST:PORT, or auto.")
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
    except OSError as error:
        raise NasError(
            f"search.engine: no Ray cluster answers at {address}: {error}. Start one (ray start --head), or leave "
            "address out to have one started on this machine."
        ) from error


@contextlib.contextmanager
def no_signals() -> Iterator[None]:
    """Within it this process does not hear Ctrl-C and its like."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
