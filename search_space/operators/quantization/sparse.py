"""Two of four weights: the sparsity that GPUs' tensor cores know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixnas.kernels.dispatch import keeping
from mixnas.kernels.quantized_linear import parted
from mixnas.search_space.operators.quantization.affine import dequantize, fake_rows, quantize_rows, straight_through
from mixnas.search_space.operators.quantization.projected import Projected, State
from mixnas.search_space.registry import Knob, register


def two_of_four(weight: Tensor) -> Tensor:
    """Which weights stay, (N, K) of bool: of each four in a row the two greatest, the earlier of equals."""
    fours = weight.abs().view(len(weight), -1, 4)
    order = fours.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, order[..., :2], True)
    return kept.view(weight.shape)


def compress(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N, K / 2) that stay, and where they stood: (N, ceil(K / 8)) uint8, two bits each, the first lowest."""
    fours = kept.view(len(weight), -1, 4)
    places = fours.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :2]
    values = weight.view(len(weight), -1, 4).gather(-1, places)
    halves = (places[..., 0] | (places[..., 1] << 2)).to(torch.uint8)
    halves = F.pad(halves, (0, halves.shape[1] % 2))
    return values.flatten(1), halves[:, ::2] | (halves[:, 1::2] << 4)


def expand(values: Tensor, places: Tensor) -> Tensor:
    """Undo `compress`: (N, K), zero where nothing stayed."""
    outputs, fours = len(values), values.shape[1] // 2
    halves = torch.stack(parted(places, 16), dim=-1).flatten(1)[:, :fours]
    index = torch.stack(parted(halves, 4), dim=-1).long()
    weight = torch.zeros(outputs, fours, 4, dtype=values.dtype, device=values.device)
    return weight.scatter_(-1, index, values.view(outputs, fours, 2)).flatten(1)


@dataclass(frozen=True)
class _Ready:
    widen: Callable[[], Tensor]
    bias: Tensor | None
    made: dict[str, Tensor] = field(default_factory=dict)

    def weight(self) -> Tensor:
        """(N, K), made once."""
        if "weight" not in self.made:
            with keeping():
                self.made["weight"] = self.widen()
        return self.made["weight"]


@register(
    "quant",
    "sparse24",
    paper="Mishra et al. 2021, Accelerating Sparse Deep Neural Networks (arXiv 2104.08378), section 3",
    knobs={"bits": Knob(32, choices=(8, 32), doc="of the weights that stay")},
)
@dataclass(frozen=True)
class Sparse24(Projected):
    """Of each four inputs' weights of an output the two of greatest magnitude; the others are zero and not stored.

    A layer of fewer than four inputs stays as it is.
    """

    name: ClassVar[str] = "sparse24"

    flattens: ClassVar[bool] = False
    prunes: ClassVar[bool] = True

    bits: int = 32

    def covers(self, inputs: int) -> bool:
        """Not fewer than four."""
        return inputs >= 4

    def check(self, outputs: int, inputs: int) -> str:
        """Four must divide the inputs."""
        if inputs % 4 == 0:
            return ""
        return f"4 does not divide {inputs} inputs. Choose another width or expansion, or another policy here."

    def store(self, weight: Tensor) -> State:
        """Half of the weights, of 32 or 8 bits, two bits each for where they stood, four bytes a channel for scales."""
        kept = two_of_four(weight)
        if self.bits == 32:
            values, places = compress(weight, kept)
            return {"values": values, "places": places}
        whole, scale = quantize_rows(weight * kept, self.bits)
        values, places = compress(whole, kept)
        return {"values": values, "places": places, "scale": scale.squeeze(1)}

    def ready(self, stored: State, bias: Tensor | None, inputs: int) -> _Ready:
        """See `Projected`."""
        values, places, scale = stored["values"], stored["places"], stored.get("scale")

        def widen() -> Tensor:
            weight = expand(values, places)
            return weight if scale is None else dequantize(weight, scale.unsqueeze(1))

        return _Ready(widen, bias)

    def product(self, entered: Tensor, ready: _Ready) -> Tensor:
        """See `Projected`."""
        bias = None if ready.bias is None else ready.bias.to(entered.dtype)
        return F.linear(entered, ready.weight().to(entered.dtype), bias)

    def fake_weight(self, weight: Tensor) -> Tensor:
        """Gradients pass to all weights, also those that are left out (Zhou et al. 2021, arXiv 2102.04010, without
        the decay of theirs)."""
        kept = weight * two_of_four(weight.detach())
        kept = kept if self.bits == 32 else fake_rows(kept, self.bits)
        return straight_through(weight, kept.detach())

    def instead(self, device: str, runtime: str) -> str:
        """Nothing here multiplies the sparse form."""
        return "float32: the weights are made dense when they are loaded, and multiplied as floats"
