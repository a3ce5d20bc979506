"""Which unit of a wrong file is to blame: by its weights, which are the network's or not; by what each unit answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mixnas.kernels import dispatch
from mixnas.search_space.formats.format import Format, tolerance
from mixnas.search_space.network import Network, checked_plan

NONE_ALONE = "Each unit by itself answers as the network's does."
"""What `first_divergence` says where none does."""


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor, as files hold them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True, slots=True)
class OtherWeight:
    """A tensor of a file that is not the network's.

    Attributes:
        unit: Whose it is.
        name: Its name in the network.
        how: In which way it is another, in words.
    """

    unit: str
    name: str
    how: str

    def __str__(self) -> str:
        return f"{self.name} is not the network's: {self.how}."


def other_weight(file_format: Format, path: Path, network: Network) -> OtherWeight | None:
    """The first tensor of a file, in the order in which units run, that is not the network's to the last bit.

    None where each is, or where the format can't say (it has no `stored`), or the file can't be read.
    """
    look = getattr(file_format, "stored", None)
    if look is None:
        return None
    try:
        found: Mapping[str, bytes] = look(path)
    except Exception:  # it may be wrong in any way, which its outputs show
        return None
    state = network.state_dict()
    for unit, _ in network.units():
        for name, tensor in state.items():
            if name.startswith(f"{unit}.") and name in found and (how := _otherwise(found[name], tensor)):
                return OtherWeight(unit, name, how)
    return None


def _otherwise(content: bytes, tensor: Tensor) -> str:
    """How the bytes of a tensor are not those of another, in words; empty where they are."""
    expected = raw(tensor)
    if content == expected:
        return ""
    if len(content) != len(expected):
        return f"it has {len(content):,} bytes, not {len(expected):,}"
    here, there = (torch.frombuffer(bytearray(given), dtype=tensor.dtype) for given in (expected, content))
    apart = (there.double() - here.double()).abs()
    return f"{int((apart != 0).sum()):,} of {apart.numel():,} values differ, by up to {apart.max().item():.3g}"


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a unit of a file answers, beside what the network's answers to the same."""

    unit: str
    module: nn.Module
    expected: Tensor
    found: Tensor

    def apart(self) -> tuple[float, float]:
        """The largest difference, and the largest answer."""
        difference = (self.found.double() - self.expected.double()).abs().max().item()
        return difference, self.expected.abs().max().item()


@torch.no_grad()
def _answers(file_format: Format, path: Path, network: Network, inputs: Tensor) -> Iterator[_Answer]:
    """Unit by unit; nothing where the file can't be looked into.

    Each unit of the network is given what the file's is given: what one before it does wrong does not count.
    """
    try:
        found = file_format.unit_outputs(path, inputs.numpy())  # type: ignore[attr-defined]
    except Exception:  # the file is wrong already: it may be in any way
        return
    x, seen = inputs, {name: [y for n, y in found if n == name] for name, _ in found}
    for name, module in network.units():
        x = expected = module(x)
        if seen.get(name):
            x = torch.from_numpy(seen[name].pop(0))
            yield _Answer(name, module, expected, x)
            if x.shape != expected.shape:
                return


def first_divergence(
    file_format: Format, path: Path, network: Network, inputs: Tensor, other: OtherWeight | None = None
) -> str:
    """The first unit of a file that does not answer as the network's does, and by how much, in words.

    Each is given what the file's unit is given, and how far it may be off follows from its own types.

    Args:
        file_format: Of the file.
        path: The file.
        network: What it was written from, in evaluation mode, on the CPU.
        inputs: (n, ...).
        other: A weight that is not the network's, where there is one: its unit is to blame.

    Returns:
        Empty where the file can't be looked into.
    """
    said, looked = "" if other is None else f" {other}", False
    for one in _answers(file_format, path, network, inputs):
        looked, shapes = True, (tuple(one.found.shape), tuple(one.expected.shape))
        if shapes[0] != shapes[1]:
            return f"The first unit that differs is {one.unit}: it answers {shapes[0]}, not {shapes[1]}.{said}"
        difference, scale = one.apart()
        differs = not difference <= tolerance(one.module) * (scale or 1.0)
        if one.unit == other.unit if other is not None else differs:
            by = f"by up to {difference:.3g} (its outputs reach {scale:.3g})"
            return f"The first unit that differs is {one.unit}, {by}.{said}"
    if other is not None:
        return f"The first unit that differs is {other.unit}:{said}"
    return NONE_ALONE if looked else ""


def first_inexact(file_format: Format, path: Path, network: Network, inputs: Tensor) -> str:
    """The first unit of a file that does not answer to the last bit as the network's does, its operators, and by how
    much, in words; empty where each does, or where that can't be seen."""
    with dispatch.as_traced():
        for one in _answers(file_format, path, network, inputs):
            if one.found.shape == one.expected.shape and torch.equal(one.found, one.expected):
                continue
            difference, scale = one.apart()
            planned = dict(checked_plan(network.architecture, network.io))[one.unit]
            operators = ", ".join(str(op) for _, op in planned.choices)
            return (
                f"{one.unit} ({operators}) is the first that does not answer the same inputs to the last bit: it is up "
                f"to {difference:.2g} off where it reaches {scale:.2g}"
            )
    return ""
