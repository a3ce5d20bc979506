"""Normalisation over channels. A norm takes its context and works on (..., C)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.norm import layer_norm, rms_norm
from mixnas.search_space.registry import Context, Knob, Value, register


@register("norm", "layer", paper="Ba et al. 2016, Layer Normalization (arXiv 1607.06450)", pointwise=True)
class LayerNorm(nn.LayerNorm):
    """Layer normalisation per token, eps 1e-6."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return layer_norm(x, self.weight, self.bias, self.eps)


@register(
    "norm",
    "rms",
    paper="Zhang and Sennrich 2019, Root Mean Square Layer Normalization (arXiv 1910.07467)",
    pointwise=True,
)
class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation per token, eps 1e-6."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return rms_norm(x, self.weight, 1e-6)


# Statistics over the batch and all positions would let a position see later ones: not for causal tasks.
@register(
    "norm",
    "batch",
    kinds=("image", "sequence"),
    paper="Ioffe and Szegedy 2015, Batch Normalization (arXiv 1502.03167)",
)
class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over batch and positions; running statistics in evaluation."""

    def __init__(self, context: Context) -> None:
        super().__init__(context.width, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same shape."""
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


def _groups_divide(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.width % int(knobs["groups"]):
        return f"{knobs['groups']} groups do not divide width {context.width}"
    return None


# Statistics over all positions, as of the batch norm. They are of each input, so that no layer can take them in.
@register(
    "norm",
    "group",
    kinds=("image", "sequence"),
    paper="Wu and He 2018, Group Normalization (arXiv 1803.08494); with one group the norm of MetaFormers "
    "(Yu et al. 2022, arXiv 2111.11418)",
    knobs={"groups": Knob(1, low=1, high=64, doc="groups of channels; divides the width")},
    check=_groups_divide,
)
class GroupNorm(nn.GroupNorm):
    """Normalisation of each example over its positions and the channels of a group, eps 1e-6."""

    def __init__(self, context: Context, *, groups: int) -> None:
        super().__init__(groups, context.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if not torch.is_grad_enabled():
            # A sequence as an image of one row: for images alone torch reads channels last as they are.
            image = x.flatten(1, -2).unsqueeze(1).permute(0, 3, 1, 2)
            y = F.group_norm(image, self.num_groups, self.weight, self.bias, self.eps)
            return y.permute(0, 2, 3, 1).reshape(x.shape)
        # As a layer norm over a group's numbers: with channels last torch 2.13's own ends the process on its way back
        # where its input needs no gradient.
        grouped = x.flatten(1, -2).unflatten(-1, (self.num_groups, -1)).transpose(1, 2)
        normal = F.layer_norm(grouped, list(grouped.shape[2:]), eps=self.eps).transpose(1, 2).flatten(-2)
        return torch.addcmul(self.bias, normal, self.weight).view(x.shape)


# As of the batch norm.
@register(
    "norm",
    "prep_batch",
    kinds=("image", "sequence"),
    paper="Guo et al. 2024, SLAB (arXiv 2405.11582), section 3.2, progressive re-parameterised batch norm",
    knobs={"steps": Knob(1000, low=1, high=1_000_000, doc="steps of training until it is a batch norm alone")},
)
class PRepBatchNorm(nn.Module):
    """l layer(x) + (1 - l) (batch(x) + alpha x) in training, l falling from 1 to 0; batch(x) + alpha x afterwards.

    In evaluation that is one factor and one summand a channel (`merged`). A step is a forward in training with
    gradients; those without, which collect statistics, have the last step's l. Train for longer than `steps`: what is
    evaluated has no layer norm in it.
    """

    taken: Tensor
    scale: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(self, context: Context, *, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.layer, self.batch = LayerNorm(context), BatchNorm(context)
        self.alpha = nn.Parameter(torch.ones(1))
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))
        self.register_parameter("scale", None)
        self.register_parameter("shift", None)

    def merged(self) -> tuple[Tensor, Tensor]:
        """The factor and the summand of each channel, (C,)."""
        if self.scale is not None and self.shift is not None:
            return self.scale, self.shift
        batch = self.batch
        assert batch.running_mean is not None and batch.running_var is not None
        scale = batch.weight * (batch.running_var + batch.eps).rsqrt()
        return scale + self.alpha, batch.bias - batch.running_mean * scale

    def merge(self) -> None:
        """Keep these two alone, in place; see `folding.merge`."""
        if self.scale is None:
            scale, shift = self.merged()
            del self.layer, self.batch, self.alpha, self.taken
            self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        if not self.training:
            scale, shift = self.merged()
            return x * scale + shift
        if torch.is_grad_enabled():
            step = self.taken.clone()
            self.taken += 1
        else:
            step = (self.taken - 1).clamp(min=0)
        share = (1 - step / self.steps).clamp(min=0).to(x.dtype)
        return share * self.layer(x) + (1 - share) * (self.batch(x) + self.alpha * x)


def norms_with_running_statistics(module: nn.Module) -> list[nn.modules.batchnorm._NormBase]:
    """The norms inside that keep statistics, which belong to the weights that they were collected with."""
    found = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    return [m for m in found if m.running_mean is not None]


def has_running_statistics(module: nn.Module) -> bool:
    """Whether any norm inside keeps statistics that depend on the weights used to collect them."""
    return bool(norms_with_running_statistics(module))


@torch.no_grad()
def reset_running_statistics(module: nn.Module) -> None:
    """Forget running statistics, and average the coming batches with equal weight until the next reset."""
    for norm in norms_with_running_statistics(module):
        norm.reset_running_stats()
        norm.momentum = None
