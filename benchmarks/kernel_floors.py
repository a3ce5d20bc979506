#!/usr/bin/env python3
"""Which operators would gain from a fused kernel: floors of what runs on a GPU now, and of one fused pass.

    python benchmarks/kernel_floors.py          # the table, also in docs/operators.md

Nothing is timed. What runs now is listed launch by launch, as the operators' code calls ATen and the kernels that there
are, on (B, tokens, C) in bfloat16. A launch's floor is the largest of its bytes over the bandwidth, its operations over
the peak and `LAUNCH_US`, of an H100's data sheet; an operator's the sum of its launches'. A fused form reads what comes
in and writes what goes out once. Projections are matrix products in both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import use_checkout

use_checkout()

from mixnas.predictors.latency.gpus import GPUS  # noqa: E402

H100 = GPUS["nvidia-h100"]
LAUNCH_US = 2.0
"""No launch takes less (as `kernels.tools.retune` has it)."""
HALF, SINGLE, COMPLEX = 2, 4, 8
"""Bytes of a number."""


@dataclass(frozen=True)
class Launch:
    """One kernel: what it moves, and its operations on tensor cores and beside them (a multiply-add is two)."""

    bytes: float
    products: float = 0.0
    plain: float = 0.0

    @property
    def us(self) -> float:
        """Its floor."""
        seconds = (self.bytes / H100.bandwidth, self.products / H100.half, self.plain / H100.fp32)
        return max(LAUNCH_US, 1e6 * max(seconds) / 1e12)


@dataclass(frozen=True)
class Shape:
    """Where an operator stands: batch, grid or length, width; a width and grid of `config`."""

    config: str
    batch: int
    size: tuple[int, ...]
    width: int

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        count = self.batch
        for extent in self.size:
            count *= extent
        return count

    def __str__(self) -> str:
        return "x".join(map(str, (self.batch, *self.size, self.width)))


IMAGES = [
    Shape("imagenet.yaml, " + stage, b, (n, n), c)
    for b in (1, 32)
    for stage, n, c in (("stage 1", 56, 96), ("stage 3", 14, 384))
]
SEQUENCES = [Shape("lm.yaml", b, (n,), 1024) for b, n in ((1, 1024), (8, 8192))]

Launches = list[Launch]


def elementwise(s: Shape, reads: float, writes: float) -> Launch:
    """Over so many maps of (tokens, width) in bfloat16."""
    return Launch((reads + writes) * s.tokens * s.width * HALF)


def projection(s: Shape, inputs: float = 1.0, outputs: float = 1.0) -> Launch:
    """A linear layer between shares of the width."""
    i, o = inputs * s.width, outputs * s.width
    return Launch((s.tokens * (i + o) + i * o) * HALF, products=2 * s.tokens * i * o)


def window(s: Shape, extent: int, share: float = 1.0, reads: float = 1.0) -> Launch:
    """A depthwise window, with what is read beside it."""
    taps = extent ** len(s.size)
    return Launch((reads + 1) * share * s.tokens * s.width * HALF, plain=2 * share * taps * s.tokens * s.width)


def attention(s: Shape, keys: int, maps: float = 4.0) -> Launch:
    """Softmax attention of so many keys a query: q, k and v are read, the answer is written."""
    return Launch(maps * s.tokens * s.width * HALF, products=4 * s.tokens * keys * s.width)


def window_attention(s: Shape) -> tuple[Launches, Launches]:
    """Tiles are copied out and back; the table of distances is copied twice."""
    layers, copy = [projection(s)] * 4, elementwise(s, 1, 1)
    table = Launch(2 * 4 * 49 * 49 * HALF)
    return [*layers, copy, table, table, attention(s, 49), copy], [*layers, attention(s, 49)]


def retention_2d(s: Shape) -> tuple[Launches, Launches]:
    """Turning is four passes for each of q and k; the second axis copies all three and the answer; a sum."""
    layers, turning = [projection(s)] * 4, [elementwise(s, 1, 1)] * 3 + [elementwise(s, 2, 1)]
    rows, columns = attention(s, s.size[1]), attention(s, s.size[0])
    copies = [elementwise(s, 1, 1)] * (4 if s.batch > 1 else 1)
    now = [*layers, *turning, *turning, rows, *copies, columns, window(s, 5), elementwise(s, 2, 1)]
    return now, [*layers, rows, attention(s, s.size[0], maps=5)]


def gnconv(s: Shape) -> tuple[Launches, Launches]:
    """Order 3: the windows take their factor along (the kernels that there are); factors of a third are passes."""
    shares = (1.0, 0.5, 0.25)
    features = [projection(s, outputs=share) for share in shares]
    windows = [window(s, 7, share, reads=2) for share in shares]
    steps = [projection(s, 0.25, 0.5), projection(s, 0.5, 1.0)]
    thirds = [Launch(2 * share * s.tokens * s.width * HALF) for share in (0.25, 0.5, 1.0)]
    now = [projection(s, outputs=0.25), *features, *windows, *steps, *thirds, projection(s)]
    return now, [projection(s, outputs=2.0), *windows, *steps, projection(s)]


def focal_modulation(s: Shape) -> tuple[Launches, Launches]:
    """Two levels: a window, a product with its gate and a sum for each; the mean and its product and sum."""
    layers, gates = [projection(s)] * 4, [projection(s, outputs=2 / s.width), projection(s, outputs=1 / s.width)]
    level = [elementwise(s, 1, 1), elementwise(s, 2, 1)]
    levels = [window(s, 3), *level, window(s, 5), *level]
    tail = [elementwise(s, 1, 0), elementwise(s, 0, 1), elementwise(s, 2, 1)]
    product = elementwise(s, 2, 1)
    fused = [window(s, 3, reads=2), window(s, 5, reads=3), elementwise(s, 1, 1)]
    return [*layers, *gates, *levels, *tail, product], [*layers, projection(s, outputs=3 / s.width), *fused, product]


def long_conv(s: Shape) -> tuple[Launches, Launches]:
    """Causal: padded copies, two transforms of twice the length, a product, one back with its copy; then the layers."""
    numbers, taps = s.tokens * s.width, s.size[0] * s.width
    layers = [projection(s)] * 2

    def transform(count: int) -> Launches:
        # A pass of a transform that fits on chip: read, written; five operations a number and halving.
        work = 5 * 2 * count * (2 * s.size[0] - 1).bit_length()
        return [Launch(count * (SINGLE + 2 * SINGLE)), Launch(count * (2 * SINGLE + COMPLEX), plain=work)]

    product = Launch(2 * numbers * COMPLEX + taps * COMPLEX)
    back = [Launch(2 * numbers * COMPLEX), transform(numbers)[1]]
    cast, shrink = Launch(numbers * (HALF + SINGLE)), [Launch(2 * taps * SINGLE)] * 4
    skip, gelu, gate = elementwise(s, 2, 1), elementwise(s, 1, 1), elementwise(s, 2, 1)
    now = [cast, *shrink, *transform(numbers), *transform(taps), product, *back, cast, skip, skip, gelu, *layers, gate]
    # As FlashFFTConv: transforms as products with two matrices of sqrt(2 L) on tensor cores, the spectrum kept on chip.
    side = (2 * s.size[0]) ** 0.5
    fused = Launch(2 * numbers * HALF + taps * COMPLEX, products=2 * 2 * 2 * 4 * 2 * numbers * side)
    return now, [*shrink[:1], *transform(taps), fused, *layers, gate]


WEIGHED: dict[str, tuple[Callable[[Shape], tuple[Launches, Launches]], list[Shape], str]] = {
    "window_attention": (
        window_attention,
        IMAGES,
        "Left. What a kernel saves is two copies; `neighborhood_attention` with a stride of its window has the same "
        "tiles without them, and has its kernel.",
    ),
    "retention_2d": (
        retention_2d,
        IMAGES,
        "Left, and the first to build when a space of real size has it: neither configuration does. Half of the gain "
        "is the turning of q and k, which `torch.compile` makes one pass of without a kernel of ours.",
    ),
    "gnconv": (
        gnconv,
        IMAGES,
        "Left. Its windows take their factor along in the depthwise kernels already; what is left are matrix products.",
    ),
    "focal_modulation": (
        focal_modulation,
        IMAGES,
        "Left. The context alone would gain twofold, the operator, whose projections remain, does not.",
    ),
    "long_conv": (
        long_conv,
        SEQUENCES,
        "Left. The gain is clear, and is a transform on tensor cores with its own way back (FlashFFTConv): no simple "
        "kernel, for an operator that lm.yaml does not have.",
    ),
}


def lines() -> Iterator[str]:
    """The table, and why each is built or left."""
    yield "| operator | shape | launches now | floor now, µs | launches fused | floor fused, µs | gain |"
    yield "| --- " * 7 + "|"
    for name, (listed, shapes, _) in WEIGHED.items():
        for shape in shapes:
            now, fused = listed(shape)
            floors = [sum(launch.us for launch in launches) for launches in (now, fused)]
            cells = f"{len(now)} | {floors[0]:.1f} | {len(fused)} | {floors[1]:.1f} | {floors[0] / floors[1]:.1f}"
            yield f"| `{name}` | {shape} ({shape.config}) | {cells} |"
    yield ""
    yield from (f"- `{name}`: {why}" for name, (_, _, why) in WEIGHED.items())


def main() -> int:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("\n".join(lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
