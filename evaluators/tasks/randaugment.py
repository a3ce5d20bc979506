"""RandAugment on tensors of many pictures at once; what is drawn comes from the generator that is given.

torchvision's own draws from torch's global generator and one operation for a whole batch, so a resumed search would not
draw what it had drawn. The operations are Pillow's, to which the tests compare them.

Source: Cubuk et al. 2020, "RandAugment: Practical automated data augmentation with a reduced search space" (arXiv
1909.13719), section 3; ranges of AutoAugment (Cubuk et al. 2019, arXiv 1805.09501, table 6).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = 30
"""Magnitudes go from 0, which changes little, to this."""

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow
_SMOOTH = ((1.0, 1.0, 1.0), (1.0, 5.0, 1.0), (1.0, 1.0, 1.0))  # over their sum

Operation = Callable[[Tensor, Tensor, float], Tensor]
"""`operation(x_BHWC, strength, fill)`: strength (B,) from -1 to 1, fill for what comes in from outside."""


def _along(x: Tensor, values: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 1))


def _blended(x: Tensor, other: Tensor, strength: Tensor) -> Tensor:
    """`other` at factor 0, `x` at 1, and on beyond it: factors from 0.1 to 1.9."""
    return torch.lerp(other, x, _along(x, 1 + 0.9 * strength)).clamp(0, 255)


def _grey(x: Tensor) -> Tensor:
    weights = torch.tensor(_GREY, device=x.device) if x.shape[-1] == 3 else torch.full((x.shape[-1],), 1 / x.shape[-1])
    return (x * weights.to(x)).sum(-1, keepdim=True)


def identity(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """As it is."""
    return x


def brightness(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Towards black, or away from it."""
    return _blended(x, torch.zeros_like(x), strength)


def colour(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Towards grey, or away from it."""
    return _blended(x, _grey(x).expand_as(x), strength)


def contrast(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Towards the mean grey of each picture, or away from it."""
    return _blended(x, _grey(x).mean((1, 2, 3), keepdim=True).expand_as(x), strength)


def sharpness(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Towards a smoothed picture, or away from it; the outermost pixels stay."""
    if min(x.shape[1:3]) < 3:
        return x
    kernel = torch.tensor(_SMOOTH, device=x.device, dtype=x.dtype)
    kernel = (kernel / kernel.sum()).expand(x.shape[-1], 1, 3, 3)
    smooth = x.clone()
    smooth[:, 1:-1, 1:-1] = F.conv2d(x.permute(0, 3, 1, 2), kernel, groups=x.shape[-1]).permute(0, 2, 3, 1)
    return _blended(x, smooth, strength)


def autocontrast(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Each channel stretched from 0 to 255."""
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    stretched = (x - low) * (255 / (high - low).clamp(min=1))
    return torch.where(high - low >= 1, stretched, x).clamp(0, 255)


def equalize(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Each channel with as flat a histogram as whole numbers allow."""
    values = x.round().clamp(0, 255).long().permute(0, 3, 1, 2).flatten(2)  # (B, C, pixels)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - last) // 255
    before = counts.cumsum(2) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(0, 255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device))
    return table.gather(2, values).view(len(x), x.shape[-1], *x.shape[1:3]).permute(0, 2, 3, 1).to(x)


def posterize(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Fewer bits: 8 to 4."""
    grain = _along(x, 2 ** (4 * strength.abs()).round())
    return torch.floor(x / grain) * grain


def solarize(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """What is bright becomes its negative: from nothing to everything."""
    return torch.where(x >= _along(x, 255 * (1 - strength.abs())), 255 - x, x)


def _moved(x: Tensor, matrix: Tensor, shift: Tensor, fill: float) -> Tensor:
    """Each pixel from where `matrix` (B, 2, 2) and `shift` (B, 2), x before y, in pixels, send it about the middle."""
    height, width = x.shape[1:3]
    v, u = torch.meshgrid(
        torch.arange(height, device=x.device) - (height - 1) / 2,
        torch.arange(width, device=x.device) - (width - 1) / 2,
        indexing="ij",
    )
    at = torch.stack([u, v], dim=-1).to(x)
    source = torch.einsum("bij,hwj->bhwi", matrix, at) + shift[:, None, None]
    grid = source * 2 / torch.tensor([max(width - 1, 1), max(height - 1, 1)], device=x.device)
    found = F.grid_sample((x - fill).permute(0, 3, 1, 2), grid, mode="nearest", align_corners=True)
    return found.permute(0, 2, 3, 1) + fill


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return torch.stack([torch.stack([a, b], -1), torch.stack([c, d], -1)], -2)


def rotate(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """About the middle, by up to 30 degrees."""
    angle = strength * math.radians(30)
    cos, sin = angle.cos(), angle.sin()
    return _moved(x, _matrix(cos, -sin, sin, cos), torch.zeros(len(x), 2).to(x), fill)


def shear_x(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Rows against each other, by up to 0.3 of their distance."""
    one = torch.ones_like(strength)
    return _moved(x, _matrix(one, 0.3 * strength, 0 * one, one), torch.zeros(len(x), 2).to(x), fill)


def shear_y(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Columns against each other, by up to 0.3 of their distance."""
    one = torch.ones_like(strength)
    return _moved(x, _matrix(one, 0 * one, 0.3 * strength, one), torch.zeros(len(x), 2).to(x), fill)


def translate_x(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Sideways, by up to 0.45 of the width, in whole pixels."""
    one, by = torch.ones_like(strength), (strength * 150 / 331 * x.shape[2]).round()
    return _moved(x, _matrix(one, 0 * one, 0 * one, one), torch.stack([by, 0 * by], -1), fill)


def translate_y(x: Tensor, strength: Tensor, fill: float) -> Tensor:
    """Up or down, by up to 0.45 of the height, in whole pixels."""
    one, by = torch.ones_like(strength), (strength * 150 / 331 * x.shape[1]).round()
    return _moved(x, _matrix(one, 0 * one, 0 * one, one), torch.stack([0 * by, by], -1), fill)


OPERATIONS: tuple[Operation, ...] = (
    identity, autocontrast, equalize, rotate, solarize, colour, posterize,
    contrast, brightness, sharpness, shear_x, shear_y, translate_x, translate_y,
)  # fmt: skip
"""The paper's fourteen, each as likely."""


def rand_augmented(x_BHWC: Tensor, count: int, magnitude: float, fill: float, generator: torch.Generator) -> Tensor:
    """Each picture through so many operations, drawn for each by itself, one after the other.

    Args:
        x_BHWC: Pixels from 0 to 255, of 1 or 3 channels.
        count: Operations of each picture; N in the paper.
        magnitude: From 0 to `LARGEST`, in either direction; M in the paper.
        fill: What comes in from outside.
        generator: On the same device.
    """
    for _ in range(count):
        drawn = torch.randint(len(OPERATIONS), (len(x_BHWC),), generator=generator, device=x_BHWC.device)
        sign = torch.randint(2, (len(x_BHWC),), generator=generator, device=x_BHWC.device) * 2.0 - 1
        result = x_BHWC.clone()
        for number, operation in enumerate(OPERATIONS):
            hit = (drawn == number).nonzero()[:, 0]
            if len(hit):
                result[hit] = operation(x_BHWC[hit], (sign[hit] * magnitude / LARGEST).to(x_BHWC), fill)
        x_BHWC = result
    return x_BHWC
