"""Changes of training pictures, on tensors of many at once. What is drawn comes from the generator that is given."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_ERASED = (0.02, 0.33)  # share of a picture, and the sides' ratio from 0.3 to 1 / 0.3: the paper's
_RATIO = 0.3


def _uniform(low: float, high: float, shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device).mul_(high - low).add_(low)


def mirrored(x_BHWC: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures left to right."""
    drawn = _uniform(0, 1, (len(x_BHWC), 1, 1, 1), x_BHWC, generator) < 0.5
    return torch.where(drawn, x_BHWC.flip(2), x_BHWC)


def jittered(x_BHWC: Tensor, by: float, generator: torch.Generator) -> Tensor:
    """Brightness and contrast of each picture times a number of its own, from 1 - `by` to 1 + `by`."""
    bright, contrast = _uniform(1 - by, 1 + by, (2, len(x_BHWC), 1, 1, 1), x_BHWC, generator)
    mean = x_BHWC.mean((1, 2, 3), keepdim=True)
    return (x_BHWC - mean) * contrast + mean * bright


def erased(x_BHWC: Tensor, share: float, fill: float, generator: torch.Generator) -> Tensor:
    """A rectangle of `share` of the pictures becomes `fill`.

    Source: Zhong et al. 2020, "Random Erasing Data Augmentation" (arXiv 1708.04896), section 3.
    """
    batch, height, width, _ = x_BHWC.shape
    hit, at_row, at_column = _uniform(0, 1, (3, batch), x_BHWC, generator)
    area = _uniform(*_ERASED, (batch,), x_BHWC, generator) * height * width
    ratio = _uniform(math.log(_RATIO), -math.log(_RATIO), (batch,), x_BHWC, generator).exp()
    rows, columns = (area * ratio).sqrt().clamp(max=height), (area / ratio).sqrt().clamp(max=width)
    inside = _box(at_row * (height - rows), rows, at_column * (width - columns), columns, height, width)
    return torch.where((inside & (hit < share)[:, None, None])[..., None], fill, x_BHWC)


def _box(top: Tensor, rows: Tensor, left: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W): the pixels of a rectangle each."""
    down, across = torch.arange(height, device=top.device), torch.arange(width, device=top.device)
    vertical = (down >= top[:, None].round()) & (down < (top + rows)[:, None].round())
    horizontal = (across >= left[:, None].round()) & (across < (left + columns)[:, None].round())
    return vertical[:, :, None] & horizontal[:, None, :]


def mixed(
    x_BHWC: Tensor, targets: Tensor, classes: int, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Each picture with another: both together, or a rectangle of the other in it; at even odds where both are asked.

    Args:
        x_BHWC: Pictures.
        targets: (B,) classes.
        classes: How many there are.
        mixup, cutmix: Both numbers of the Beta distribution of the first one's share; 0 for none.
        generator: Of all that is drawn.

    Returns:
        Pictures, and the share of each class (B, classes): of a rectangle by its pixels.

    Source: Zhang et al. 2018, "mixup" (arXiv 1710.09412), section 2; Yun et al. 2019, "CutMix" (arXiv 1905.04899),
    section 3.
    """
    batch, height, width, _ = x_BHWC.shape
    other = torch.randperm(batch, generator=generator, device=x_BHWC.device)
    cut = _uniform(0, 1, (batch,), x_BHWC, generator) < (0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = torch.where(cut, cutmix or 1.0, mixup or 1.0).to(x_BHWC)
    first, second = (torch._standard_gamma(alpha, generator=generator) for _ in range(2))
    kept = (first / (first + second)).nan_to_num(0.5)  # Beta, as the share of two gammas
    rows, columns = (1 - kept).sqrt() * height, (1 - kept).sqrt() * width
    row, column = _uniform(0, 1, (2, batch), x_BHWC, generator)
    boxes = _box(row * height - rows / 2, rows, column * width - columns / 2, columns, height, width)
    share = torch.where(cut[:, None, None], 1.0 - boxes.to(x_BHWC), kept[:, None, None])
    x = torch.lerp(x_BHWC[other], x_BHWC, share[..., None])
    own = F.one_hot(targets, classes).to(x_BHWC)
    return x, torch.lerp(own[other], own, share.mean((1, 2))[:, None])
