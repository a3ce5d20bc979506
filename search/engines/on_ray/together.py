"""A super-network trained by this process and workers of a cluster together: the same batches, shared.

What is computed is what `evaluators.supernet.processes` has processes of one machine compute: the weights are the same
to the bit, for so many processes with as many threads each. Not Ray Train, whose group took 8 to 13 seconds to start
where plain actors take two, and whose first process would be a worker too: here it is the search's own, which shows the
progress and keeps the checkpoints as in any other training.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from mixnas.evaluators.answering import Where, code_version, set_threads, this_process
from mixnas.search.engines.on_ray.cluster import Cluster, Share
from mixnas.search.engines.on_ray.driver import pickled, plain_error, refuse_other_code, started
from mixnas.search_space.errors import MachineError, NasError
from mixnas.search_space.extensions import name_extensions

_START_SECONDS = 300.0
_JOIN_SECONDS = 10.0
_LOOPBACK = ("127.", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Help:
    """What the child has workers do.

    Attributes:
        address: Of the cluster.
        share: Of each worker.
        count: Processes in all.
        threads: Of each.
        call: What each helper runs, and with which arguments, pickled.
        code: Which code it must have.
    """

    address: str
    share: Share
    count: int
    threads: int
    call: bytes
    code: str


def processes_on(address: str, share: Share) -> Callable[..., AbstractContextManager[None]]:
    """As `evaluators.supernet.processes.processes`, of which the helpers are workers of a cluster.

    Args:
        address: Of the cluster.
        share: Of each worker.
    """

    @contextlib.contextmanager
    def processes(count: int, target: Callable[..., object], *args: Any) -> Iterator[None]:
        threads = torch.get_num_threads()
        each = max(1, threads // count)
        process, connection = started(__name__, own=False)
        try:
            call = pickled((target, args))
            _say(
                connection,
                _Help(address=address, share=share, count=count, threads=each, call=call, code=code_version()),
            )
            host = _heard(connection, _START_SECONDS)
            meeting = f"tcp://{host}:{_free_port(host)}"
            _say(connection, meeting)
            torch.set_num_threads(each)
            try:
                _join(meeting, 0, count)
                yield
            except RuntimeError as error:  # of the group: a helper may have said why
                _heard(connection, _JOIN_SECONDS)
                raise MachineError("training of the super-network: the connection to a worker was lost.") from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(threads)
            connection.close()
            with contextlib.suppress(Exception):
                process.wait(_JOIN_SECONDS)
            process.kill()
            process.wait()

    return processes


def _say(connection: Connection, value: Any) -> None:
    with contextlib.suppress(OSError):  # it has ended: noticed when it is listened to
        connection.send_bytes(pickle.dumps(value))


def _heard(connection: Connection, seconds: float) -> Any:
    """What the child says, if it says something; what it raised is raised."""
    if not connection.poll(seconds):
        return None
    try:
        kind, value = pickle.loads(connection.recv_bytes())
    except (EOFError, OSError):
        raise MachineError(
            "training of the super-network: the connection to the cluster was lost. See that it is whole (ray status), "
            "then resume the run."
        ) from None
    if kind == "raised":
        raise value
    return value


def _free_port(host: str) -> int:
    with socket.socket() as free:
        free.bind((host, 0))
        return int(free.getsockname()[1])


def _join(meeting: str, rank: int, count: int) -> None:
    if meeting.removeprefix("tcp://").startswith(_LOOPBACK):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    wait = timedelta(seconds=_START_SECONDS)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=wait)


# -- the child ---------------------------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """What the child does: have the helpers join, and say so when one fails."""
    connection = Connection(descriptor)
    try:
        asked: _Help = pickle.loads(connection.recv_bytes())
        try:
            with Cluster(asked.address, asked.share) as cluster:
                _serve(asked, cluster, connection)
        except NasError as error:
            _say(connection, ("raised", plain_error(error)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            _say(connection, ("raised", NasError(f"a process that trains on the cluster ended: {error}")))
    except (EOFError, OSError):
        return


def _serve(asked: _Help, cluster: Cluster, connection: Connection) -> None:
    import ray

    if cluster.workers < asked.count - 1:
        raise NasError(
            f"supernet.processes: {asked.count}, of which the cluster at {asked.address} has room for "
            f"{cluster.workers} beside this process. Allowed: at most {cluster.workers + 1}."
        )
    share = asked.share
    kind = ray.remote(_Helper).options(
        num_cpus=share.cpus, num_gpus=share.gpus, resources=dict(share.resources), max_restarts=0
    )
    helpers: list[Any] = [kind.remote(share.extensions, asked.threads) for _ in range(asked.count - 1)]
    for where in ray.get([helper.where.remote() for helper in helpers], timeout=_START_SECONDS):
        refuse_other_code(where, asked.code)
    connection.send_bytes(pickle.dumps(("host", ray.util.get_node_ip_address())))
    meeting = pickle.loads(connection.recv_bytes())
    call = ray.put(asked.call)
    running = [helper.help.remote(meeting, rank, asked.count, call) for rank, helper in enumerate(helpers, 1)]
    while running and not connection.poll():  # the search's process closes it when it is done
        ended, running = ray.wait(running, timeout=0.2)
        ray.get(ended)


class _Helper:
    """An actor that takes a share of the batches."""

    def __init__(self, extensions: Sequence[str], threads: int) -> None:
        name_extensions(extensions)
        set_threads(threads)

    def where(self) -> Where:
        """Which process this is."""
        return this_process()

    def help(self, meeting: str, rank: int, count: int, call: bytes) -> None:
        """Join, and do what is asked."""
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        _join(meeting, rank, count)
        try:
            target, args = pickle.loads(call)
            target(*args)
        finally:
            dist.destroy_process_group()
