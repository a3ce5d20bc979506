"""Processes that train together: a `torch.distributed` group, and helpers on this machine that join one."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from mixnas.search_space.errors import NasError

_ENDS_SECONDS = 120
_JOIN_SECONDS = 10.0


class Group:
    """The processes that train together: just this one, or a `torch.distributed` group."""

    def __init__(self) -> None:
        self.together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if self.together else 1
        self.rank = dist.get_rank() if self.together else 0

    def agree(self, value: Any) -> Any:
        """The first process's value, everywhere."""
        if not self.together:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's tensors, in place."""
        if self.together:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def average(self, tensors: list[Tensor], extras: Tensor) -> Tensor:
        """Average tensors in place over the processes; returns the averages of `extras` (1-D)."""
        if not self.together:
            return extras
        flat = torch.cat([*(t.reshape(-1) for t in tensors), extras.to(tensors[0].device)])
        dist.all_reduce(flat)
        flat /= self.size
        *parts, extras = flat.split([*(t.numel() for t in tensors), len(extras)])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
        return extras


@contextlib.contextmanager
def processes(count: int, target: Callable[..., object], *args: Any) -> Iterator[None]:
    """Within it, `count - 1` processes run `target(*args)`, and this one is the first of the group (gloo).

    Each process computes with an equal share of the threads that this one has. Whatever way the block is left, the
    helpers are gone afterwards.

    Args:
        count: Processes in all.
        target: A function at a module's top level: a helper imports it.
        *args: What pickle can carry.

    Raises:
        NasError: A helper failed or was killed; what this process raised by that is its cause.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    # The helpers are on this machine, whatever its name resolves to.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    with tempfile.TemporaryDirectory(prefix="mixnas-") as folder, _environment("GLOO_SOCKET_IFNAME", loopback):
        meeting = f"file://{folder}/meeting"
        context = multiprocessing.get_context("spawn")
        helpers = [
            context.Process(target=_help, args=(meeting, rank, count, share, target, args), daemon=True)
            for rank in range(1, count)
        ]
        try:
            for helper in helpers:
                helper.start()
            torch.set_num_threads(share)
            _join(meeting, 0, count)
            yield
        except RuntimeError as error:
            # Who hung up is about to end, which takes its time on a busy machine; else none may be.
            hung_up = "onnection" in str(error)
            for helper in helpers:
                helper.join((_ENDS_SECONDS if hung_up else _JOIN_SECONDS) / count)
            failed = [helper.exitcode for helper in helpers if helper.exitcode]
            if not failed:
                raise
            raise NasError(f"a helping process ended with status {failed[0]}; its message is above.") from error
        else:
            for helper in helpers:
                helper.join(_JOIN_SECONDS)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            for helper in helpers:
                if helper.is_alive():
                    helper.kill()
                if helper.pid is not None:
                    helper.join()
            torch.set_num_threads(threads)


def _join(meeting: str, rank: int, count: int) -> None:
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count)


def _help(meeting: str, rank: int, count: int, threads: int, target: Callable[..., object], args: tuple[Any]) -> None:
    torch.set_num_threads(threads)
    _join(meeting, rank, count)
    try:
        target(*args)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """An environment variable, where it is not set already."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
