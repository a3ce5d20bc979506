"""Latency of a cluster's devices: measured on the node that is one, while it does nothing else.

Such a node is started with the resource `latency_device`, of which it has one. Whoever measures there takes that, and
all of the node's cores and GPUs: so there is one measurement at a time, whoever asks, and no worker beside it. Nodes
are different devices, each with its own name and its own profile.

As with the search itself (`driver`), the process that is connected to Ray is a child of the one that asks.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixnas.evaluators.answering import Where, code_version, set_threads, this_process
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.source import LatencySource, LatencySpec
from mixnas.predictors.measuring.energy import ENERGY
from mixnas.predictors.measuring.value import Latency
from mixnas.search.engines.on_ray.cluster import Cluster, Share
from mixnas.search.engines.on_ray.driver import plain_error, refuse_other_code, started
from mixnas.search_space.errors import ConfigError, MachineError, NasError, StoppedEarly
from mixnas.search_space.extensions import name_extensions
from mixnas.search_space.files import atomic_write
from mixnas.search_space.reporting import Report
from mixnas.search_space.space import SearchSpace

if TYPE_CHECKING:
    from mixnas.search_space.network import Network
    from mixnas.search_space.units import IOSpec

_logger = logging.getLogger(__name__)

RESOURCE = "latency_device"
_LOOK_SECONDS = 0.2
_TELL_SECONDS = 30.0
_KEPT = (".csv", ".json", ".npz")  # files of a profile


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Which device is wanted.

    Attributes:
        address: Of the cluster.
        spec: Of the latency; its device is a name.
        extensions: Modules of the user's own, that register operators.
        code: Which code the node must have.
    """

    address: str
    spec: LatencySpec
    extensions: tuple[str, ...]
    code: str


# -- the process that asks ---------------------------------------------------------------------------------------------


class Meter:
    """A device of a cluster, which this process holds until it ends, or `end` is called.

    Args:
        wanted: Which.

    Raises:
        ConfigError: No node is that device.
        NasError: The cluster cannot be reached, or the node has other code.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._device, self._address = wanted.spec.device, wanted.address
        self._process, self._connection = started("mixnas.search.engines.on_ray.meter", own=False)
        try:
            self._send(wanted)
            self._answer(lambda: False)
        except BaseException:
            self.end()
            raise

    @property
    def ended(self) -> bool:
        """Whether it holds nothing any more."""
        return self._process.poll() is not None

    def end(self) -> None:
        """Give the device back."""
        self._connection.close()
        with contextlib.suppress(Exception):
            self._process.wait(10.0)
        self._process.kill()
        self._process.wait()

    def call(self, name: str, *args: Any, should_stop: Callable[[], bool] | None = None) -> Any:
        """What a method of `_Device` gives.

        Raises:
            NasError: What it raised.
            MachineError: The node, or the connection to it, was lost.
            StoppedEarly: `should_stop` said so; the device is given back.
        """
        self._send((name, args))
        return self._answer(should_stop or (lambda: False))

    def _send(self, value: Any) -> None:
        with contextlib.suppress(OSError):  # it has ended: noticed when it is listened to
            self._connection.send_bytes(pickle.dumps(value))

    def _answer(self, should_stop: Callable[[], bool]) -> Any:
        while True:
            while not self._connection.poll(_LOOK_SECONDS):
                if should_stop():
                    self.end()
                    raise StoppedEarly(f"stopped while {self._device} was measured.")
            try:
                kind, value = pickle.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                raise MachineError(
                    f"device {self._device!r}: the connection to the cluster at {self._address} was lost while it was "
                    "measured. See that the cluster is whole (ray status), then resume the run."
                ) from None
            if kind == "waits":
                _logger.warning("%s", value)
            elif kind == "raised":
                raise value
            else:
                return value


_meters: dict[tuple[str, str], Meter] = {}


@atexit.register
def give_back() -> None:
    """Give back every device that this process holds."""
    while _meters:
        _meters.popitem()[1].end()


class MeteredLatency(LatencySource):
    """Latency on a device of a cluster: measured, and profiled, on its node; predicted here.

    Args:
        spec: Its device is the name of one.
        address: Of the cluster.

    Raises:
        ConfigError: The device has no name.
    """

    shares_machine = False

    def __init__(self, spec: LatencySpec, address: str) -> None:
        if spec.device in ("auto", "cpu", "cuda"):
            raise ConfigError(
                f"device: {spec.device!r} is a device of this machine, and search.engine measures one of the cluster "
                "(measure: true). Give its name, as `nas doctor` says it there; or leave measure out."
            )
        super().__init__(spec)
        self._address = address

    @property
    def _meter(self) -> Meter:
        key = (self._address, self._spec.device)
        meter = _meters.get(key)
        if meter is None or meter.ended:
            spec = replace(self._spec, directory=None)
            wanted = Wanted(address=self._address, spec=spec, extensions=tuple(Share().extensions), code=code_version())
            meter = _meters[key] = Meter(wanted)
        return meter

    @cached_property
    def here(self) -> bool:
        """See `LatencySource`: it can be measured."""
        return True

    @cached_property
    def processor(self) -> str:
        """See `LatencySource`."""
        return "cpu" if self._spec.device.startswith("cpu-") else "cuda"

    def check(self, space: SearchSpace) -> None:
        """See `LatencySource`; the device is held from now on.

        Raises:
            ConfigError: No node of the cluster is that device, or it lacks the runtime.
        """
        self.check_policies(space)
        self._meter.call("require", self._spec.runtime)

    def profile(
        self,
        space: SearchSpace,
        io: IOSpec,
        directory: Path,
        *,
        plain: Any = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> LatencyPredictor:
        """Measure the device anew.

        Args:
            space: Whose networks are to be predicted.
            io: The task's input.
            directory: Of this machine, where its files are kept.
            plain: See `LatencySource.prepare`.
            should_stop: Asked meanwhile.
        """
        spec = replace(self.spec, directory=None)
        files: dict[str, bytes] = self._meter.call("profile", spec, space, io, plain, should_stop=should_stop)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            atomic_write(directory / name, content)
        return LatencyPredictor.load(self.device, self.tag, directory)

    def _profile(
        self,
        space: SearchSpace,
        io: IOSpec,
        directory: Path,
        plain: Any,
        report: Report,
        should_stop: Callable[[], bool] | None,
    ) -> LatencyPredictor:
        budget = self.spec.profile_s
        with report.phase("profile", budget, unit="s", seconds=budget):
            return self.profile(space, io, directory, plain=plain, should_stop=should_stop)

    @property
    def reference_ms(self) -> float:
        """See `LatencySource`."""
        if self._reference_ms is None:
            self._reference_ms = float(self._meter.call("reference", replace(self.spec, directory=None)))
        return self._reference_ms

    def measure_each(self, networks: Sequence[Network], passes: int | None = None) -> list[Latency | str]:
        """See `LatencySource`."""
        _ = self.reference_ms
        found: list[Latency | str] = self._meter.call(
            "measure", replace(self.spec, directory=None), [network.cpu() for network in networks], passes
        )
        return found

    def check_energy(self) -> None:
        """See `LatencySource`: of this machine only."""
        raise ConfigError(
            f"{ENERGY} is measured on the machine that searches only, and search.engine measures a device of the "
            "cluster (measure: true). Leave one of the two out."
        )


# -- its child ---------------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """What the child does: hold the device, and have its node answer."""
    import ray  # noqa: F401 - see `driver.serve`

    connection = Connection(descriptor)

    def say(kind: str, value: Any = None) -> None:
        connection.send_bytes(pickle.dumps((kind, value)))

    try:
        wanted: Wanted = pickle.loads(connection.recv_bytes())
        try:
            with Cluster(wanted.address, Share(cpus=0, resources={}), 1):
                _serve(wanted, connection, say)
        except NasError as error:
            say("raised", plain_error(error))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            say("raised", NasError(f"search.engine: Ray failed: {type(error).__name__}: {error}"))
    except (EOFError, OSError):
        return


def _serve(wanted: Wanted, connection: Connection, say: Callable[..., None]) -> None:
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    device = _held(wanted, say)
    say("holds")
    while True:
        name, args = pickle.loads(connection.recv_bytes())
        try:
            say("gives", ray.get(getattr(device, name).remote(*args)))
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, NasError) else NasError(str(error))
            say("raised", plain_error(cause))
        except RayActorError as error:
            raise MachineError(
                f"device {wanted.spec.device!r}: its node was lost while it was measured: {str(error).splitlines()[0]} "
                "See that the cluster is whole (ray status), then resume the run."
            ) from error


def _held(wanted: Wanted, say: Callable[..., None]) -> Any:
    """The device's actor, on the node that it has for itself; of nodes that turn out to be others nothing is held."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(RESOURCE, 0.0) >= 1]
    if not nodes:
        raise ConfigError(
            f"device {wanted.spec.device!r}: no node of the cluster at {wanted.address} has the resource {RESOURCE}. "
            f"On the machine that is to be measured: ray start --address=... --resources='{{\"{RESOURCE}\": 1}}'."
        )
    asked: dict[Any, Any] = {}
    for node in nodes:
        actor: Any = (
            ray.remote(_Device)
            .options(
                num_cpus=node["Resources"].get("CPU", 0.0),
                num_gpus=node["Resources"].get("GPU", 0.0),
                resources={RESOURCE: 1.0},
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            )
            .remote(wanted.extensions, wanted.spec.threads)
        )
        asked[actor.which.remote(wanted.spec)] = actor
    names: list[str] = []
    told = time.monotonic()
    while asked:
        for ref in ray.wait(list(asked), num_returns=1, timeout=_LOOK_SECONDS)[0]:
            actor = asked.pop(ref)
            where, name, itself = ray.get(ref)
            if itself:
                refuse_other_code(where, wanted.code)
                for other in asked.values():
                    ray.kill(other)
                return actor
            names.append(name)
            ray.kill(actor)
        if asked and time.monotonic() - told > _TELL_SECONDS:
            told = time.monotonic()
            say("waits", f"device {wanted.spec.device!r} is not free: something else runs on {len(asked)} node(s)")
    raise ConfigError(
        f"device {wanted.spec.device!r}: no node of the cluster at {wanted.address} that has {RESOURCE} is it. "
        f"There are: {', '.join(sorted(names))}."
    )


class _Device:
    """An actor on the node that is measured."""

    def __init__(self, extensions: Sequence[str], threads: int) -> None:
        name_extensions(extensions)
        set_threads(threads)
        self._sources: dict[LatencySpec, LatencySource] = {}

    def _source(self, spec: LatencySpec) -> LatencySource:
        return self._sources.setdefault(spec, spec.open())

    def which(self, spec: LatencySpec) -> tuple[Where, str, bool]:
        """Which process this is, its device's name, and whether that is the one."""
        source = self._source(spec)
        name = spec.device if source.here else replace(spec, device="auto").open().device
        return this_process(), name, source.here

    def require(self, runtime: str) -> None:
        """Raises where this machine lacks a runtime."""
        from mixnas.predictors.measuring import runtimes

        runtimes.require(runtime, next(iter(self._sources.values())).torch_device)

    def reference(self, spec: LatencySpec) -> float:
        """The sentinel's reference time."""
        return self._source(spec).reference_ms

    def measure(self, spec: LatencySpec, networks: Sequence[Network], passes: int | None) -> list[Latency | str]:
        """See `LatencySource.measure_each`."""
        return self._source(spec).measure_each(networks, passes)

    def profile(self, spec: LatencySpec, space: SearchSpace, io: IOSpec, plain: Any) -> dict[str, bytes]:
        """The files of a profile, by name."""
        with tempfile.TemporaryDirectory() as folder:
            replace(spec, directory=Path(folder)).open().prepare(space, io, plain=plain)
            return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix in _KEPT}
