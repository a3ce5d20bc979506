"""Whether a file rounds as the network does: which whole numbers differ, where the first does, and why.

A runtime that adds floats in another order moves their last digits. That is no matter, until a number that is midway
between two steps is rounded the other way: then a whole number is another one, and what follows differs by a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixnas.kernels import dispatch
from mixnas.search_space.formats.format import Format
from mixnas.search_space.operators.quantization.projected import Stored
from mixnas.search_space.units import is_unit

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Integers:
    """What became of the whole numbers of a network in a file.

    Attributes:
        layers: How many layers multiply whole numbers; one that runs twice counts twice.
        alike: How many of them answer to what reaches them in the file as the network's do, to the last bit.
        numbers: Whole numbers that inputs were rounded to.
        moved: How many of them are not the network's.
        why: The first operator that makes a difference, and how; empty where every whole number is the network's.
    """

    layers: int
    alike: int
    numbers: int
    moved: int
    why: str

    def __str__(self) -> str:
        if not self.why:
            return f"all {self.numbers:,} whole numbers in {self.layers} layers are those of the network"
        return (
            f"{self.moved:,} of {self.numbers:,} whole numbers are not those of the network ({self.alike} of "
            f"{self.layers} layers answer the same inputs identically): {self.why}"
        )


def whole_layers(network: nn.Module) -> dict[str, Stored]:
    """The layers of a deployed network that multiply whole numbers, by name."""
    return {n: m for n, m in network.named_modules() if isinstance(m, Stored) and m.policy.whole}


def operators_of(network: nn.Module) -> dict[str, nn.Module]:
    """The operators of all units, by name: norms, mixers, gates, channel mixers, and units that have no parts."""
    found = {}
    for name, module in network.named_modules():
        parent = name.rpartition(".")[0]
        if is_unit(name) or is_unit(parent):
            found[name] = module
    return found


@torch.no_grad()
def compared(file_format: Format, path: Path, network: nn.Module, inputs: Tensor) -> Integers | None:
    """Compare the whole numbers of a file with a network's.

    Args:
        file_format: Of the file.
        path: The file.
        network: What it was written from, deployed, on the CPU.
        inputs: (n, ...).

    Returns:
        None where the file can't be looked into: the format has no `layer_values(path, batch)`, which gives (name,
        input, output) of each layer that multiplies whole numbers, in the order in which they run, and (name, output)
        of operators.
    """
    look = getattr(file_format, "layer_values", None)
    layers, operators = whole_layers(network), operators_of(network)
    if look is None or not layers:
        return None
    values, answers = look(path, inputs.numpy())
    with dispatch.as_traced():
        reached, answered = _recorded(network, inputs, layers, operators)
        if [name for name, _, _ in values] != [name for name, _ in reached]:
            return None
        alike = numbers = moved = 0
        why = ""
        for (name, x, y), (_, x_here) in zip(values, reached, strict=True):
            layer, x_there, y_there = layers[name], torch.from_numpy(x), torch.from_numpy(y)
            if x_there.shape != x_here.shape:
                return None
            here, there = _whole(layer, x_here), _whole(layer, x_there)
            differing = int((here != there).sum())
            same = torch.equal(layer(x_there), y_there)
            alike, numbers, moved = alike + same, numbers + here.numel(), moved + differing
            if differing and not why:
                cause = _first_other(answers, answered, operators)
                why = (
                    f"{name} ({layer.policy.name}) is the first where they differ: {cause} adds floats in another "
                    "order, and a number midway between two steps is then rounded the other way"
                )
            if not same and not why:
                off = (layer(x_there).double() - y_there.double()).abs().max().item()
                why = f"{name} ({layer.policy.name}) answers the same inputs with numbers that are up to {off:.2g} off"
    return Integers(len(values), alike, numbers, moved, why)


def _whole(layer: Stored, x: Tensor) -> Tensor:
    """What a layer rounds its input to."""
    ready = layer.policy.ready(dict(layer.named_buffers(recurse=False)), layer.bias, layer.inputs)
    entered = layer.policy.enter(layer.rows(x), ready)
    found: Tensor = entered[0] if isinstance(entered, tuple) else entered
    return found.int()


def _recorded(
    network: nn.Module, inputs: Tensor, layers: dict[str, Stored], operators: dict[str, nn.Module]
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Inputs of layers, and answers of operators, as they run."""
    reached: list[tuple[str, Tensor]] = []
    answered: list[tuple[str, Tensor]] = []
    hooks = []
    for name, layer in layers.items():

        def came(_m: Any, given: tuple[Tensor, ...], name: str = name) -> None:
            reached.append((name, given[0].clone()))

        hooks.append(layer.register_forward_pre_hook(came))
    for name, module in operators.items():

        def told(_m: Any, _g: Any, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                answered.append((name, output.clone()))

        hooks.append(module.register_forward_hook(told))
    try:
        network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return reached, answered


def _first_other(
    answers: Iterable[tuple[str, np.ndarray]],
    answered: Iterable[tuple[str, Tensor]],
    operators: dict[str, nn.Module],
) -> str:
    """The first operator that does not answer to the last bit as the network's: its name and what it is."""
    there: dict[str, list[np.ndarray]] = {}
    for name, array in answers:
        there.setdefault(name, []).append(array)
    for name, tensor in answered:
        if not there.get(name):
            continue
        array = there[name].pop(0)
        if array.shape == tuple(tensor.shape) and not torch.equal(torch.from_numpy(array), tensor):
            return f"{name} ({type(operators[name]).__name__})"
    return "an operator before it"
