"""The depthwise convolution of 16-bit maps on the tensor cores: of each channel, products with banded matrices.

For one channel and one row of taps i, a row of the output gets the row i - top below it in the input times a matrix
that holds the taps along its diagonals: T_i[x', x] = weight[i, x' - x + left]. All rows of all images are the rows of
one product, and their sum over i is the convolution. The matrices are two thirds empty for 31 taps across 56 columns,
and nine tenths for 7; but an instruction of the tensor cores multiplies 64 times as many pairs as one of the plain
units. The gradient of a tap is the sum of a diagonal of the product of the gradient's rows with the input's.

That takes channels apart: `planes` turns the maps round to (C, B*H, PITCH), `maps` turns the result back and does what
is fused behind the convolution. `bands` lays out each row of taps backwards between zeros, eight times, each shifted by
one, so that all rows of a matrix are read in units of 16 bytes.

Taps are rounded to the maps' type, as torch's autocast does it. A value that is not finite makes its row not finite,
and those that its taps reach up and down.

Shapes: B batch, H height, W width, C channels, I taps down, J taps across, R = B*H rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from mixnas.kernels import configs, dispatch
from mixnas.kernels.depthwise_banded_kernels import (
    depthwise_banded_kernel,
    depthwise_bands_kernel,
    depthwise_correlation_kernel,
    depthwise_maps_kernel,
    depthwise_planes_kernel,
)
from mixnas.kernels.dispatch import cdiv, launch, next_power_of_2
from mixnas.kernels.tools.aot import Example

WIDEST_BLOCK = 64  # columns of a block
# Multiplications below which four launches take longer than one; fewer of wide kernels, whose one launch waits most.
LEAST_PRODUCTS, LEAST_OF_WIDE = 1 << 27, 1 << 25
WANTED_PROGRAMS = 528  # of the weight's gradient: four for each multiprocessor of a large GPU


def worth_it(x: torch.Tensor, down: int, across: int, gradient: bool = False) -> bool:
    """Whether a GPU is predicted to be faster with products than tap by tap (`python -m mixnas.kernels.report`).

    Args:
        x: (B, H, W, C).
        down: Taps down, of those that reach the map.
        across: Taps across.
        gradient: Of the weight's gradient, whose other form takes longer.
    """
    on_gpu = x.is_cuda or dispatch.is_recording()  # the interpreter takes it where a test asks for it
    if not on_gpu or x.element_size() != 2 or min(down, across) < 2 or across > WIDEST_BLOCK:
        return False
    least = LEAST_OF_WIDE if across >= 13 or gradient else LEAST_PRODUCTS
    return down * across >= 49 and x.numel() * down * across >= least


@dataclass(frozen=True)
class _Planes:
    """The sizes of planes.

    Attributes:
        rows: B*H.
        height, width, channels: H, W, C.
    """

    rows: int
    height: int
    width: int
    channels: int

    @classmethod
    def of(cls, x: torch.Tensor) -> "_Planes":
        """The planes of maps (B, H, W, C)."""
        batch, height, width, channels = x.shape
        return cls(batch * height, height, width, channels)

    @property
    def pitch(self) -> int:
        """Columns of a row with those of zeros, a multiple of 16."""
        return cdiv(self.width, 16) * 16

    @property
    def size(self) -> int:
        """Values of a plane."""
        return self.rows * self.pitch

    @property
    def block(self) -> int:
        """Columns of a block of a product."""
        return min(WIDEST_BLOCK, next_power_of_2(self.pitch))

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return cdiv(self.pitch, self.block)

    @property
    def span(self) -> int:
        """Blocks of the input that reach into one of the output."""
        return 1 if self.blocks == 1 else 3

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Planes without values, in the type of `like`."""
        return torch.empty(self.channels, self.rows, self.pitch, dtype=like.dtype, device=like.device)

    def features(self) -> dict[str, int]:
        """What the launch tables are bounded by."""
        return {"columns": self.block, "rows": self.rows, "positions": self.rows * self.width}


def planes(x: torch.Tensor) -> torch.Tensor:
    """Turn maps (B, H, W, C) round to (C, B*H, PITCH), with zeros behind the width."""
    sizes = _Planes.of(x)
    out = sizes.empty(x)
    config = configs.pick("depthwise_planes", x, **sizes.features())
    grid = (cdiv(sizes.size, config["BLOCK_P"]), cdiv(sizes.channels, config["BLOCK_C"]))
    operands = (x, out, sizes.size, sizes.width, sizes.channels)
    launch(depthwise_planes_kernel, grid, *operands, PITCH=sizes.pitch, **config)
    return out


def convolve(
    x: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor | None,
    gate: torch.Tensor | None,
    activation: str,
    used: tuple[tuple[int, int, int], tuple[int, int, int]],
    taps_pitch: int,
    keep_pre: bool,
    flip: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Do what `depthwise.convolve` does, by products; more than 1 tap across, 64 at most.

    Args:
        x: (B, H, W, C), contiguous, as are the other operands.
        taps: (I*J, C).
        bias: (C,).
        gate: (B, H, W, C).
        activation: See `epilogue.ACTIVATIONS`.
        used: First tap, number of taps and padding, down and across (see `depthwise.cropped`).
        taps_pitch: J of the whole kernel.
        keep_pre: Return what the activation is applied to.
        flip: Run the taps backwards.
    """
    (i0, down, top), (j0, across, left) = used
    if flip:
        top, left = down - 1 - top, across - 1 - left
    sizes = _Planes.of(x)
    features = sizes.features()
    source = planes(x)
    # Entry FROM - k of a band, and BLOCK_X from there, are row k of the matrix that joins a block to itself.
    begin = sizes.block * (sizes.span + 1) // 2
    length = sizes.block * (sizes.span + 1)
    bands = torch.empty(sizes.channels, down, 8, length, dtype=x.dtype, device=x.device)
    config = configs.pick("depthwise_bands", x, **features)
    grid: tuple[int, ...] = (cdiv(8 * length, config["BLOCK_P"]), cdiv(sizes.channels, config["BLOCK_C"]), down)
    shape = {
        "FIRST": (i0 + down - 1) * taps_pitch + j0 + across - 1 if flip else i0 * taps_pitch + j0,
        "STEP": -1 if flip else 1,
        "TAPS_PITCH": taps_pitch,
        "DOWN": down,
        "ACROSS": across,
        "LAST": begin + left,
        "LENGTH": length,
    }
    launch(depthwise_bands_kernel, grid, taps, bands, sizes.channels, **shape, **config)
    out_planes = torch.empty_like(source)
    config = configs.pick("depthwise_banded", x, **features)
    grid = (sizes.channels * cdiv(sizes.rows, config["BLOCK_M"]) * sizes.blocks,)
    operands = (source, bands, bias, out_planes, sizes.rows, sizes.height, sizes.size)
    shape = {"PITCH": sizes.pitch, "DOWN": down, "TOP": top, "FROM": begin, "LENGTH": length, "SPAN": sizes.span}
    common = {"GROUP": WIDEST_BLOCK // sizes.block, "BLOCK_X": sizes.block, "WIDEN": dispatch.INTERPRETING}
    launch(depthwise_banded_kernel, grid, *operands, **shape, **common, **config)
    out = torch.empty_like(x)
    pre = torch.empty_like(x) if keep_pre else None
    config = configs.pick("depthwise_maps", x, **features)
    grid = (cdiv(sizes.size, config["BLOCK_P"]), cdiv(sizes.channels, config["BLOCK_C"]))
    tensors = (out_planes, gate, out, pre, sizes.size, sizes.width, sizes.channels)
    launch(depthwise_maps_kernel, grid, *tensors, PITCH=sizes.pitch, ACTIVATION=activation, **config)
    return out, pre


def weight_gradient(
    grad: torch.Tensor, x: torch.Tensor, used: tuple[tuple[int, int, int], tuple[int, int, int]]
) -> torch.Tensor:
    """Return the gradient of the taps that are used, (C, down, across) in float32.

    Args:
        grad: Of the output, (B, H, W, C), contiguous.
        x: The input, likewise.
        used: See `convolve`.
    """
    sizes = _Planes.of(x)
    grad_planes, x_planes = planes(grad), planes(x)
    (_, down, top), (_, across, left) = used
    config = configs.pick("depthwise_correlation", x, **sizes.features())
    blocks_m = cdiv(sizes.rows, config["BLOCK_M"])
    group = WIDEST_BLOCK // sizes.block
    together = cdiv(down, group) * sizes.channels * sizes.blocks * sizes.span
    steps = cdiv(blocks_m, min(blocks_m, max(1, WANTED_PROGRAMS // together)))
    parts = cdiv(blocks_m, steps) * sizes.blocks * sizes.span
    sums = torch.empty(sizes.channels, parts, sizes.block, down, across, dtype=torch.float32, device=x.device)
    operands = (grad_planes, x_planes, sums, sizes.rows, sizes.height, sizes.size, steps)
    shape = {"PITCH": sizes.pitch, "DOWN": down, "ACROSS": across, "TOP": top, "LEFT": left, "SPAN": sizes.span}
    shape |= {"GROUP": group, "TAPS": next_power_of_2(group * across)}
    common = {"BLOCK_X": sizes.block, "WIDEN": dispatch.INTERPRETING}
    grid = (cdiv(down, group) * sizes.channels, parts)
    launch(depthwise_correlation_kernel, grid, *operands, **shape, **common, **config)
    return sums.sum((1, 2))


SMALL = {"positions": 8192}


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    side = {16: 14, 32: 28, 64: 56}[bounds.get("columns", 64)]
    batch = 1 if {"rows", "positions"} & set(bounds) else 32
    channels = 64 * 56 // side
    for size, activation, keep in ((7, "none", False), (31, "silu", True)):
        taps = min(size, 2 * side - 1)
        used = ((0, taps, taps // 2), (0, taps, taps // 2))
        x = torch.empty(batch, side, side, channels, dtype=torch.bfloat16, device="meta")
        weight = torch.empty(taps * taps, channels, device="meta")
        gate = x if keep else None
        macs = batch * side * channels * side * taps * next_power_of_2(side)
        maps = {"depthwise_bands": 0, "depthwise_maps": 4 if keep else 2}.get(kernel, 2)
        products = kernel in ("depthwise_banded", "depthwise_correlation")
        yield Example(
            label=f"bf16 {batch}x{side}x{side}x{channels} k{taps}x{taps}{' ' + activation if keep else ''}",
            call=partial(weight_gradient, x, x, used)
            if kernel == "depthwise_correlation"
            else partial(convolve, x, weight, weight[0], gate, activation, used, taps, keep, False),
            bytes=maps * x.numel() * 2,
            operations=2 * macs if products else 0,
            unit="matrix",
        )
