"""NVIDIA GPUs as numbers: data sheets, what a multiprocessor holds, and how a launch spreads over the multiprocessors.

A launch of `blocks` thread blocks runs in waves of `multiprocessors x occupancy` blocks, where the occupancy is how
many blocks of it fit on a multiprocessor at once: as many as its registers, shared memory, warps and slots for blocks
allow (CUDA C++ Programming Guide, "Compute Capabilities"; the rounding is that of NVIDIA's occupancy calculator).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mixnas.predictors.measuring.device import INTERPRETER

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GPU:
    """A GPU's data sheet: peak rates in 10^12 operations a second (a fused multiply-add is two), without sparsity.

    Attributes:
        name: The device's standard name.
        fp32: Plain single precision; 0 where no data sheet is known.
        half: bf16 and fp16 on the tensor cores.
        int8: On the tensor cores.
        bandwidth: Memory, 10^12 bytes a second.
        multiprocessors: Streaming multiprocessors.
        arch: Compute capability as a number, 90 for 9.0.
    """

    name: str
    fp32: float
    half: float
    int8: float
    bandwidth: float
    multiprocessors: int
    arch: int

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON; `GPU(**plain)` is the inverse."""
        return asdict(self)


# NVIDIA's data sheets of the products (SXM where there are several).
_SHEETS = (
    GPU("nvidia-h200", 67, 989, 1979, 4.8, 132, 90),
    GPU("nvidia-h100", 67, 989, 1979, 3.35, 132, 90),
    GPU("nvidia-h100-pcie", 51, 756, 1513, 2.0, 114, 90),
    GPU("nvidia-h100-nvl", 60, 835, 1671, 3.9, 132, 90),
    GPU("nvidia-a100", 19.5, 312, 624, 2.0, 108, 80),
    GPU("nvidia-l4", 30.3, 121, 242, 0.30, 58, 89),
    GPU("nvidia-l40s", 91.6, 362, 733, 0.864, 142, 89),
    GPU("nvidia-t4", 8.1, 65, 130, 0.32, 40, 75),
    GPU("nvidia-geforce-rtx-4090", 82.6, 165, 330, 1.008, 128, 89),
    GPU("nvidia-geforce-rtx-3090", 35.6, 71, 142, 0.936, 82, 86),
)
GPUS: Mapping[str, GPU] = {gpu.name: gpu for gpu in _SHEETS}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a multiprocessor holds at once.

    Attributes:
        shared_bytes: Shared memory.
        warps: Resident warps.
        blocks: Resident blocks.
        reserved_bytes: Shared memory that every block takes beside its own.
    """

    shared_bytes: int
    warps: int
    blocks: int
    reserved_bytes: int


# CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability". All have 65,536 registers.
LIMITS: Mapping[int, Limits] = {
    75: Limits(64 * 1024, 32, 16, 0),
    80: Limits(164 * 1024, 64, 32, 1024),
    86: Limits(100 * 1024, 48, 16, 1024),
    89: Limits(100 * 1024, 48, 24, 1024),
    90: Limits(228 * 1024, 64, 32, 1024),
}
REGISTERS = 65536
_REGISTER_UNIT = 256  # a warp's registers are given out in such portions
_SHARED_UNIT = 128
_PARTITIONS = 4  # of a multiprocessor; a warp's registers come from its own partition's quarter

# Outputs of one block of a library's matrix product. Which of them is taken is not known; the fastest is assumed.
_TILES = ((128, 128), (128, 64), (64, 128), (64, 64), (64, 32), (32, 64), (32, 32))


def sheet_of(device: str) -> GPU | None:
    """The data sheet of a device, under the device's own name; None where there is none.

    A driver's name says more than the product's: an H100 is "nvidia-h100-80gb-hbm3". So the longest product whose words
    the name begins with is the one.
    """
    if device in GPUS:
        return GPUS[device]
    products = [name for name in GPUS if device.startswith(f"{name}-")]
    return replace(GPUS[max(products, key=len)], name=device) if products else None


def gpu_of(device: str, torch_device: str = "cpu") -> GPU | None:
    """The numbers of a device: those of the data sheet, corrected by what the driver says where the device is here.

    Args:
        device: Its standard name; part of a GPU, or one that has no data sheet here, has no peak rates, and a warning
            says so: floors are then no features.
        torch_device: "cuda" when `device` is this machine's GPU.

    Returns:
        None for what is no GPU, or one of which nothing is known. The interpreter counts as an H200, so that its path
        is a GPU's.
    """
    if device == INTERPRETER:
        return GPUS["nvidia-h200"]
    sheet = sheet_of(device)
    if torch_device != "cuda":
        return sheet
    import torch

    found = torch.cuda.get_device_properties(0)
    count, arch = found.multi_processor_count, 10 * found.major + found.minor
    if sheet is not None and (sheet.multiprocessors, sheet.arch) == (count, arch):
        return sheet
    log.warning(
        "%s: %s. What it takes at least is unknown to the predictor; add its data sheet to `gpus._SHEETS`.",
        device,
        "no data sheet is here"
        if sheet is None
        else f"{count} multiprocessors of compute capability {arch / 10}, not those of the data sheet",
    )
    return GPU(device, 0.0, 0.0, 0.0, 0.0, count, arch)


def occupancy(arch: int, num_warps: int, registers: int = 0, shared_bytes: int = 0) -> int:
    """How many blocks of a launch a multiprocessor holds at once; at least 1.

    Args:
        arch: 90 for compute capability 9.0; of one that is not in `LIMITS`, the nearest below.
        num_warps: Per block.
        registers: Per thread; 0 when not known.
        shared_bytes: Per block.
    """
    limits = LIMITS[max((known for known in LIMITS if known <= arch), default=min(LIMITS))]
    fits = [limits.blocks, limits.warps // num_warps]
    if registers:
        per_warp = -(-32 * registers // _REGISTER_UNIT) * _REGISTER_UNIT
        fits.append(_PARTITIONS * (REGISTERS // _PARTITIONS // per_warp) // num_warps)
    if shared_bytes:
        own = -(-(shared_bytes + limits.reserved_bytes) // _SHARED_UNIT) * _SHARED_UNIT
        fits.append(limits.shared_bytes // own)
    return max(1, min(fits))


@dataclass(frozen=True, slots=True)
class Spread:
    """How the blocks of a launch spread over a GPU.

    Attributes:
        waves: `ceil(blocks / (multiprocessors x occupancy))`.
        rounds: Blocks that the busiest multiprocessor runs: `ceil(blocks / multiprocessors)`. Blocks that share a
            multiprocessor also share what binds them, so this, not the waves, tells for how long its units are busy.
        busy: Share of the multiprocessors' time that is used when all blocks take equally long, above 0, at most 1.
        tail: Share of the last wave that is empty, at least 0, below 1.
    """

    waves: int
    rounds: int
    busy: float
    tail: float

    @classmethod
    def of(cls, blocks: int, multiprocessors: int, resident: int) -> Spread:
        """Of `blocks` blocks, `resident` of which a multiprocessor holds at once."""
        at_once = multiprocessors * resident
        waves, rounds = -(-blocks // at_once), -(-blocks // multiprocessors)
        return cls(waves, rounds, blocks / (rounds * multiprocessors), 1 - (blocks - (waves - 1) * at_once) / at_once)


def launch_work(name: str, spread: Spread, macs: float, moved: float) -> dict[str, float]:
    """The physical form's columns of one launch of a kernel with a fixed configuration.

    Launch cost, waves, waves times work per wave and bytes: what `model.UnitModel` fits its coefficients to. "rounds"
    counts a multiprocessor that waits for the busiest one as if it worked.

    Args:
        name: The kernel.
        spread: See above.
        macs: Multiply-accumulates of all its blocks; 0 when not known.
        moved: Bytes, each operand once.
    """
    columns = {
        f"{name}.launches": 1.0,
        f"{name}.waves": float(spread.waves),
        f"{name}.rounds.macs": macs / spread.busy,
        f"{name}.rounds.bytes": moved / spread.busy,
        f"{name}.bytes": float(moved),
    }
    return {column: value for column, value in columns.items() if value}


def matmul_busy(rows: float, columns: float, multiprocessors: int) -> float:
    """Share of the multiprocessors' time that a product's `rows x columns` outputs use, by the tile that is fastest."""

    def padded(tile: tuple[int, int]) -> float:
        blocks = -(-rows // tile[0]) * -(-columns // tile[1])
        return -(-blocks // multiprocessors) * multiprocessors * tile[0] * tile[1]

    return rows * columns / min(padded(tile) for tile in _TILES)


def floors_ms(gpu: GPU, macs: float, moved: float, bits: int, busy: float) -> tuple[float, float]:
    """Least milliseconds of one operation by its arithmetic and by its traffic; zeros without a data sheet.

    Args:
        gpu: On which.
        macs: Multiply-accumulates.
        moved: Bytes.
        bits: Of the narrowest operand: which unit does the arithmetic.
        busy: See `Spread`.
    """
    if not gpu.bandwidth:
        return 0.0, 0.0
    rate = gpu.int8 if bits <= 8 else gpu.half if bits == 16 else gpu.fp32
    return 2e3 * macs / (rate * 1e12 * busy), 1e3 * moved / (gpu.bandwidth * 1e12)
