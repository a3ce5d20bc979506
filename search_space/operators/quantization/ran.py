"""Which products ran, seen from outside: a network is called int8 only if an int8 product was run."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PRODUCTS = {
    "aten::_int_mm": "int8",
    "onednn::qlinear_pointwise": "int8",
    "mixnas::scaled_linear": "int8 or fp8",
    "mixnas::int4_linear": "4-bit weights",
    "aten::_weight_int8pack_mm": "8-bit weights",
    "aten::_weight_int4pack_mm_for_cpu": "4-bit weights",
    "aten::mm": "float",
    "aten::addmm": "float",
    "aten::bmm": "float",
    "aten::baddbmm": "float",
    "aten::_convolution": "float",
    "aten::mkldnn_convolution": "float",
    "aten::thnn_conv2d": "float",
}
"""Operations that multiply, and what."""


@dataclass(frozen=True, slots=True)
class Ran:
    """Operations of one kind in a forward.

    Attributes:
        operation: Its name, as the profiler has it.
        multiplies: As in `PRODUCTS`; "" of what is no product.
        calls: How often.
        share: Of the time that all operations took by themselves on the CPU.
    """

    operation: str
    multiplies: str
    calls: int
    share: float

    def to_plain(self) -> dict[str, str | int | float]:
        """Plain data, for a card."""
        return {
            "operation": self.operation,
            "multiplies": self.multiplies,
            "calls": self.calls,
            "share": round(self.share, 3),
        }


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """torch's profiler writes a line when it starts and when it stops, past Python's stream, to nobody's use."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def what_ran(module: nn.Module, inputs: Tensor, forwards: int = 15) -> list[Ran]:
    """The operations of a forward in eager mode, by torch's profiler, those that took longest first.

    Of each the median over the forwards: where another program runs in between, one of them says nothing.

    Args:
        module: In evaluation mode, deployed.
        inputs: What it reads.
        forwards: How many are looked at, each by itself, after one that is not.
    """
    times: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    with torch.inference_mode(), _without_stderr():
        module(inputs)
        for number in range(forwards):
            with torch.autograd.profiler.profile(use_kineto=False) as profile:
                module(inputs)
            for event in profile.key_averages():
                times.setdefault(event.key, [0.0] * forwards)[number] = event.self_cpu_time_total
                calls[event.key] = event.count
    medians = {name: statistics.median(of) for name, of in times.items()}
    total = sum(medians.values()) or 1.0
    found = [Ran(name, PRODUCTS.get(name, ""), calls[name], took / total) for name, took in medians.items() if took > 0]
    return sorted(found, key=lambda ran: -ran.share)


def products_that_ran(module: nn.Module, inputs: Tensor, forwards: int = 15) -> list[Ran]:
    """`what_ran`, of products alone."""
    return [ran for ran in what_ran(module, inputs, forwards) if ran.multiplies]
