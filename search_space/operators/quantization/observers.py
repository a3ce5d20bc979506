"""Which range of activations is quantized, found by looking at some: what lies outside saturates.

An observer sees a layer's inputs batch by batch and then tells the least and the greatest number worth representing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mixnas.search_space.errors import ConfigError
from mixnas.search_space.operators.quantization.affine import affine_parameters, dequantize, quantize

_KEPT = 1 << 16


class Observer(Protocol):
    """See the module."""

    def see(self, x: Tensor) -> None:
        """Look at a batch."""

    def range(self) -> tuple[Tensor, Tensor]:
        """Least and greatest, scalars, of all that was seen."""


def check_seen(x: Tensor) -> None:
    """Refuse what no range can be found of.

    Raises:
        ConfigError: There is nothing, or some of it is NaN or infinite.
    """
    if not x.numel():
        raise ConfigError("the calibration set is empty. Give the task at least one training example.")
    if not bool(x.isfinite().all()):
        count = int((~x.isfinite()).sum())
        raise ConfigError(
            f"{count} of {x.numel()} activations of the calibration set are NaN or infinite. Look for such values in "
            "the training examples, or in the weights."
        )


class MinMax:
    """The least and the greatest that were seen (arXiv 1806.08342, section 3.1.1)."""

    def __init__(self) -> None:
        self._least: Tensor | None = None
        self._greatest: Tensor | None = None

    def see(self, x: Tensor) -> None:
        """See `Observer`."""
        check_seen(x)
        least, greatest = torch.aminmax(x.detach().float())
        self._least = least if self._least is None else torch.minimum(self._least, least)
        self._greatest = greatest if self._greatest is None else torch.maximum(self._greatest, greatest)

    def range(self) -> tuple[Tensor, Tensor]:
        """See `Observer`."""
        if self._least is None or self._greatest is None:
            check_seen(torch.empty(0))
        assert self._least is not None and self._greatest is not None
        return self._least, self._greatest


class Sample:
    """Keeps values that were seen, evenly thinned where they are many; whoever derives says which range they have."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._extremes = MinMax()

    def see(self, x: Tensor) -> None:
        """See `Observer`."""
        self._extremes.see(x)
        values = x.detach().float().flatten()
        self._kept.append(values[:: -(-len(values) // _KEPT)].clone())

    @property
    def values(self) -> Tensor:
        """(n,) of them."""
        return torch.cat(self._kept) if self._kept else torch.empty(0)


class Percentile(Sample):
    """All but the outermost share (McKinstry et al. 2018, arXiv 1809.04191, section 3.1, who leave out 0.01%)."""

    share = 1e-4

    def range(self) -> tuple[Tensor, Tensor]:
        """See `Observer`: a quantile of so many values, interpolated between neighbours."""
        check_seen(self.values)
        ordered = self.values.sort().values
        at = self.share / 2 * (len(ordered) - 1)

        def quantile(place: float) -> Tensor:
            below = int(place)
            above = min(below + 1, len(ordered) - 1)
            return torch.lerp(ordered[below], ordered[above], place - below)

        return quantile(at), quantile(len(ordered) - 1 - at)


class LeastError(Sample):
    """The part of the whole range whose quantization has the least mean square error (Banner et al. 2019, arXiv
    1810.05723, section 3, found by trying rather than by a model of the distribution)."""

    tried = 32

    def range(self) -> tuple[Tensor, Tensor]:
        """See `Observer`: the best of the range times 1/32, 2/32, ..., 1, for eight bits."""
        values = self.values
        check_seen(values)
        least, greatest = self._extremes.range()
        shares = torch.arange(1, self.tried + 1, device=values.device) / self.tried
        errors = []
        for share in shares:
            scale, zero_point = affine_parameters(least * share, greatest * share, 0, 255)
            errors.append(
                (dequantize(quantize(values, scale, zero_point, 0, 255), scale, zero_point) - values).square()
            )
        best = shares[torch.stack([error.mean() for error in errors]).argmin()]
        return least * best, greatest * best


OBSERVERS: dict[str, Callable[[], Observer]] = {"minmax": MinMax, "percentile": Percentile, "mse": LeastError}
