"""Numbers as whole numbers times a step: the quantizers that all policies of few bits are made of.

Krishnamoorthi 2018, Quantizing deep convolutional networks for efficient inference (arXiv 1806.08342), sections 2.1 to
2.3: `q = clamp(round(x / scale) + zero_point, low, high)` and `x' = (q - zero_point) * scale`. Rounding is half to
even, zero is represented exactly, and what lies outside saturates. As torch's `fake_quantize_per_tensor_affine` and
`fake_quantize_per_channel_affine` do, it multiplies by the scale's reciprocal in float32: results equal theirs bit by
bit, and those two serve training (section 2.4: the gradient passes within the range and is zero outside).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixnas.search_space.errors import ConfigError

EPSILON = 2.0**-40
"""The least scale that is found: a row of zeros has this one."""


def integer_range(bits: int, *, signed: bool = True, narrow: bool = False) -> tuple[int, int]:
    """The least and the greatest whole number of so many bits; `narrow` leaves out the least, so that it is symmetric.

    >>> integer_range(8), integer_range(8, narrow=True), integer_range(8, signed=False)
    ((-128, 127), (-127, 127), (0, 255))
    """
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    return low + narrow, high


def symmetric_scale(x: Tensor, bits: int) -> Tensor:
    """Scale of each row: (M, K) to (M, 1), the greatest magnitude over the greatest number (section 2.2)."""
    _, high = integer_range(bits)
    return x.abs().amax(-1, keepdim=True).mul_(1.0 / high).clamp_min_(EPSILON)  # a norm takes ten times as long


def affine_parameters(least: Tensor, greatest: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a range, which is widened to contain zero (section 2.1).

    Args:
        least: Of the range; any shape.
        greatest: The same shape.
        low: The least whole number.
        high: The greatest.

    Returns:
        The scale, float32, and the zero point, int32, between `low` and `high`.
    """
    least, greatest = least.float().clamp(max=0), greatest.float().clamp(min=0)
    scale = ((greatest - least) / (high - low)).clamp_min(EPSILON)
    return scale, (low - torch.round(least / scale)).clamp(low, high).to(torch.int32)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, low: int, high: int) -> Tensor:
    """Whole numbers, int8 or uint8, of what has any floating-point type.

    Args:
        x: Any shape.
        scale: Float32, such that it broadcasts to `x`.
        zero_point: Whole, likewise.
        low: The least whole number; below zero for int8.
        high: The greatest.
    """
    whole = (x.float() * scale.reciprocal()).round_().add_(zero_point)
    return whole.clamp_(low, high).to(torch.int8 if low < 0 else torch.uint8)


def dequantize(whole: Tensor, scale: Tensor, zero_point: Tensor | int = 0) -> Tensor:
    """The float32 numbers that whole ones stand for."""
    return (whole.float() - zero_point) * scale


def quantize_rows(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Rows as int8 of so many bits, symmetric, each with a scale of its own: what a token or an output channel is.

    Args:
        x: (M, K), any floating-point type.
        bits: 8, or fewer.

    Returns:
        (M, K) int8 between -(2^(bits-1) - 1) and 2^(bits-1) - 1, and (M, 1) float32. No row can exceed that range,
        so nothing is clamped.
    """
    x = x.float()
    scale = symmetric_scale(x, bits)
    return (x * scale.reciprocal()).round_().to(torch.int8), scale


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, stands_for: Tensor) -> Tensor:
        return stands_for.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grads[0], None


def straight_through(x: Tensor, stands_for: Tensor) -> Tensor:
    """`stands_for`, with gradients that go to `x` as if it were that (section 2.4): for values that do not saturate."""
    passed: Tensor = _StraightThrough.apply(x, stands_for)
    return passed


def fake_rows(x: Tensor, bits: int) -> Tensor:
    """What `quantize_rows` stands for, for training: gradients pass the rounding. (M, K) to the same."""
    return straight_through(x, dequantize(*quantize_rows(x.detach(), bits)))


def learned_step(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """What symmetric whole numbers of a learned step stand for, for training: gradients reach weights and steps.

    Esser et al. 2019, Learned Step Size Quantization (arXiv 1902.08153), sections 2.1 and 2.2: a weight's gradient
    passes where it does not saturate; a step's is, of each weight, `round(w / s) - w / s`, and the greatest or least
    whole number where it saturates; all of it times `1 / sqrt(weights of the step x greatest number)`.

    Args:
        weight: (N, K).
        step: (N, 1), positive.
        bits: Of the whole numbers.
    """
    low, high = integer_range(bits, narrow=True)
    share = (weight.shape[1] * high) ** -0.5
    step = step * share + (step * (1 - share)).detach()
    within = (weight / step).clamp(low, high)
    return (within + (within.round() - within).detach()) * step


def check_scales(scale: Tensor, what: str) -> None:
    """Refuse scales that are zero, negative, infinite or NaN.

    Raises:
        ConfigError: One is; the message says whose.
    """
    if scale.is_meta:
        return
    wrong = scale[~(scale.isfinite() & (scale > 0))]
    if len(wrong):
        raise ConfigError(
            f"{what}: {len(wrong)} of {scale.numel()} scales are no positive number, the first is {wrong[0].item():g}. "
            "Calibrate it on finite examples (evaluators.training.calibrate) before it is deployed."
        )
