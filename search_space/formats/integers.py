"""Whether a file rounds as the network does: which whole numbers differ, where the first does, and why.

A runtime that adds floats in another order moves their last digits. That is no matter, until a number that is midway
between two steps is rounded the other way: then a whole number is another one, and what follows differs by a step.
That this is why is not taken for granted: the floats themselves are compared where the first number differs. Torch does
it to itself: `own` counts the numbers that are other ones when the network is given its inputs one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixnas.kernels import dispatch
from mixnas.search_space.formats.format import Format, tolerance
from mixnas.search_space.operators.quantization import products
from mixnas.search_space.operators.quantization.projected import Stored


@dataclass(frozen=True, slots=True)
class Integers:
    """What became of the whole numbers of a network in a file.

    Attributes:
        layers: How many layers multiply whole numbers; one that runs twice counts twice.
        alike: How many of them answer to what reaches them in the file as the network's do, to the last bit.
        numbers: Whole numbers that inputs were rounded to.
        moved: How many of them are not the network's.
        why: The first operator that makes a difference, and how; empty where every whole number is the network's.
        ties: Whether every layer answers alike, and what is before the first number that differs is the network's up
            to the last digits: then nothing but the order of sums makes the difference.
        own: Where some are moved, how many the network itself moves when its inputs come one at a time.
    """

    layers: int
    alike: int
    numbers: int
    moved: int
    why: str
    ties: bool = True
    own: int = 0

    def __str__(self) -> str:
        if not self.why:
            return f"all {self.numbers:,} whole numbers in {self.layers} layers are those of the network"
        return (
            f"{self.moved:,} of {self.numbers:,} whole numbers are not those of the network ({self.alike} of "
            f"{self.layers} layers answer the same inputs identically; given one input at a time, torch itself moves "
            f"{self.own:,}): {self.why}"
        )


def whole_layers(network: nn.Module) -> dict[str, Stored]:
    """The layers of a deployed network that multiply whole numbers, by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, Stored) and m.policy.whole}


@torch.no_grad()
def compared(file_format: Format, path: Path, network: nn.Module, inputs: Tensor) -> Integers | None:
    """Compare the whole numbers of a file with a network's.

    Args:
        file_format: Of the file.
        path: The file.
        network: What it was written from, deployed, on the CPU.
        inputs: (n, ...).

    Returns:
        None where the file can't be looked into: the format has no `layer_values(path, batch)`, which gives, of each
        layer that multiplies whole numbers and each time that it runs, its name, the rows (M, K) that it rounds, its
        answer (M, N), and which operators before it compute otherwise than torch, in words.
    """
    look, layers = getattr(file_format, "layer_values", None), whole_layers(network)
    if look is None or not layers:
        return None
    alike = numbers = moved = count = own = 0
    why = cause = ""
    ties, allowed = True, tolerance(network, floats_alone=True)
    with dispatch.as_traced():
        reached = _reached(network, inputs, layers)
        kept = {name: list(rows) for name, rows in reached.items()}
        for name, rows, answer, before in look(path, inputs.numpy()):
            there, answered = torch.from_numpy(rows), torch.from_numpy(answer)
            if not reached.get(name) or reached[name][0].shape != there.shape:
                return None
            layer, here, count = layers[name], reached[name].pop(0), count + 1
            ready = layer.policy.ready(dict(layer.named_buffers(recurse=False)), layer.bias, layer.inputs)
            entered = layer.policy.enter(there, ready)
            with products.only(int8="int32", int8_static="int32"):  # slow, and never wrong
                expected = layer.policy.product(entered, ready)
            whole = _whole(layer.policy.enter(here, ready))
            differing = int((whole != _whole(entered)).sum())
            same = torch.equal(expected, answered)
            numbers, moved, alike = numbers + whole.numel(), moved + differing, alike + same
            if not cause and not torch.equal(here, there):
                cause = before or "a layer"
            if differing and not why:
                off, reach = (here - there).abs().max().item(), here.abs().max().item()
                ties = off <= allowed * reach
                why = f"{name} ({layer.policy.name}) is the first where they differ: what is before it ({cause}) " + (
                    f"adds floats in another order, {off:.1g} apart where they reach {reach:.2g}, and a number midway "
                    "between two steps is then rounded the other way"
                    if ties
                    else f"answers otherwise, by up to {off:.2g} where it reaches {reach:.2g}: more than an order of "
                    "sums explains"
                )
            if not same and not why:
                off = (expected.double() - answered.double()).abs().max().item()
                why = f"{name} ({layer.policy.name}) answers the same inputs with numbers that are up to {off:.2g} off"
        if any(reached.values()):
            return None
        if moved:
            own = _moved_by_itself(network, inputs, layers, kept)
    return Integers(count, alike, numbers, moved, why, ties and alike == count, own)


def _moved_by_itself(
    network: nn.Module, inputs: Tensor, layers: dict[str, Stored], reached: dict[str, list[Tensor]]
) -> int:
    """How many whole numbers are other ones when a network is given one input at a time."""
    singly = [_reached(network, one, layers) for one in inputs.split(1)]
    moved = 0
    for name, layer in layers.items():
        ready = layer.policy.ready(dict(layer.named_buffers(recurse=False)), layer.bias, layer.inputs)
        for i, together in enumerate(reached[name]):
            alone = torch.cat([one[name][i] for one in singly])
            if alone.shape != together.shape:  # its rows are no input's own
                continue
            whole = (_whole(layer.policy.enter(rows, ready)) for rows in (together, alone))
            moved += int(torch.ne(*whole).sum())
    return moved


def _whole(entered: Any) -> Tensor:
    """The whole numbers of what a policy makes of rows."""
    found: Tensor = entered[0] if isinstance(entered, tuple) else entered
    return found.int()


def _reached(network: nn.Module, inputs: Tensor, layers: dict[str, Stored]) -> dict[str, list[Tensor]]:
    """The rows that layers are given, each time that they run."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = []
    for name, layer in layers.items():

        def came(module: Any, given: tuple[Tensor, ...], name: str = name) -> None:
            found[name].append(module.rows(given[0]).clone())

        hooks.append(layer.register_forward_pre_hook(came))
    try:
        network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
