"""How long calls should take on an H200, from the machine code of what they launch; nothing here is timed.

The instructions that a warp runs (`sass`) times the warps of the busiest multiprocessor, over what its four schedulers
issue: with one warp a scheduler most of the time is waiting. That is good to about a factor of 1.5: it ranks kernels
and shows what a change does to them, and is no measurement. Beside it stands the floor, the time of the least bytes,
products and exponentials of the call, which no form of it beats.
"""

import math
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mixnas.kernels import configs
from mixnas.kernels.tools import aot, sass
from mixnas.kernels.tools.reasons import BECAUSE

MULTIPROCESSORS = 132
SCHEDULERS = 4
CLOCK_HZ = 1.755e9
SPECIAL_A_CLOCK = 16  # lanes of a multiprocessor
TENSOR_A_CLOCK = aot.OPERATIONS_PER_S["matrix"] / MULTIPROCESSORS / CLOCK_HZ  # operations of one, in bfloat16
MOVED_A_CLOCK = 128  # bytes between one's lanes and L1 or shared memory, without bank conflicts
LAUNCH_US = 2.0  # no launch takes less
FAR = 8.0  # times its floor: a call that is predicted to take longer has its reason in `reasons.BECAUSE`
_IPC = (0.30, 0.15, 0.75)  # of a scheduler: with no warp, more with each, at most


@dataclass(frozen=True, kw_only=True)
class Point:
    """One call whose time is predicted.

    Attributes:
        family: Name of the family's module.
        label: The shape in short.
        call: Makes the launches, on tensors of the "meta" device.
        bytes: Least traffic to device memory: every operand once.
        fp32, matrix: Operations in plain fp32, on the tensor cores (a fused multiply-add is two).
        special: Exponentials and their like that no form does without.
    """

    family: str
    label: str
    call: Callable[[], Any]
    bytes: int
    fp32: int = 0
    matrix: int = 0
    special: int = 0

    def floors_us(self) -> dict[str, float]:
        """Microseconds that no form takes less than, by what they are spent on."""
        rates = aot.OPERATIONS_PER_S
        return {
            "bytes": self.bytes / aot.COPY_BYTES_PER_S * 1e6,
            "fp32": self.fp32 / rates["fp32"] * 1e6,
            "matrix": self.matrix / rates["matrix"] * 1e6,
            "special": self.special / rates["special"] * 1e6,
            "launch": LAUNCH_US,
        }


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What one launch of a point was compiled to, and the time it should take.

    Attributes:
        loop: Instructions in the body of the longest loop.
        trips: Of that loop.
        instructions: That a warp runs, from its start to its end.
        resident: Blocks that a multiprocessor holds at once.
        waves: Blocks over what the GPU holds at once.
        us: Predicted time.
        bound_by: "issue", "special" (the unit of exponentials), "matrix" (tensor cores), "L1" (with shared memory),
            "bytes" (every operand of the launch once, whether or not L2 still has it), or "launch".
    """

    kernel: str
    options: Mapping[str, Any]
    blocks: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    loop: int
    trips: float
    instructions: float
    resident: int
    waves: float
    us: float
    bound_by: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """A point with its launches, its predicted time and its floor.

    Attributes:
        other_us: Of operations that are no kernels of ours: their bytes over the copy bandwidth, or a launch each.
        us: Sum over launches and others, at least the floor of the call's bytes.
        bound_by: What most of it is spent on.
        because: Why it takes more than `FAR` times its floor; empty where it does not.
    """

    family: str
    label: str
    launches: list[Predicted]
    other_us: float
    us: float
    bound_by: str
    floors_us: dict[str, float]
    because: str = ""

    @property
    def floor_us(self) -> float:
        """The largest of its floors."""
        return max(self.floors_us.values())

    @property
    def floor_by(self) -> str:
        """What the floor is made of."""
        return max(self.floors_us, key=lambda what: self.floors_us[what])


def resident_blocks(num_warps: int, registers: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor of Hopper holds at once (CUDA C++ Programming Guide, "Compute Capabilities")."""
    by_registers = SCHEDULERS * (16384 // (-(-32 * max(registers, 1) // 256) * 256)) // num_warps
    by_shared = 228 * 1024 // (shared_bytes + 1024)
    return max(1, min(32, 64 // num_warps, by_registers, by_shared))


def _time(
    blocks: int, num_warps: int, resident: int, counted: sass.Counts, operand_bytes: int = 0
) -> tuple[float, str]:
    """Predicted microseconds of a launch, and what they are spent on."""
    rounds = -(-blocks // MULTIPROCESSORS)
    warps = min(resident, rounds) * num_warps
    schedulers = min(SCHEDULERS, warps)
    idle, gain, most = _IPC
    ipc = min(most, idle + gain * warps / schedulers)
    times = {
        "issue": rounds * num_warps * counted.total / (schedulers * ipc) / CLOCK_HZ * 1e6,
        "special": rounds * num_warps * counted.special * 32 / SPECIAL_A_CLOCK / CLOCK_HZ * 1e6,
        "matrix": rounds * num_warps * counted.tensor / TENSOR_A_CLOCK / CLOCK_HZ * 1e6,
        "L1": rounds * num_warps * counted.moved / MOVED_A_CLOCK / CLOCK_HZ * 1e6,
        "bytes": operand_bytes / aot.COPY_BYTES_PER_S * 1e6,
        "launch": LAUNCH_US,
    }
    bound = max(times, key=lambda what: times[what])
    return times[bound], bound


class _Others(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the time of operations that read or write memory: that of their bytes, and of a launch at least."""

    def __init__(self) -> None:
        super().__init__()
        self.us = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        makes = any(word in func.name() for word in ("empty", "view", "detach", "alias", "new_"))
        if func.namespace == "aten" and not func.is_view and not makes:
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.us += max(LAUNCH_US, moved / aot.COPY_BYTES_PER_S * 1e6)
        return out


def _mean_trips(launch: aot.Launch) -> Callable[[int], float]:
    """Trips of the loops whose bounds are no constants, on the mean over a launch's programs."""
    if launch.name == "depthwise_forward":
        height, options = launch.arguments[7], launch.options
        rows, down, top = options["ROWS"], options["DOWN"], options["TOP"]
        starts = range(0, height, rows)
        spans = [min(rows + down - 1, height + top - y) - max(top - y, 0) for y in starts]
        return lambda _: sum(spans) / len(spans)

    if launch.name == "depthwise_correlation":
        return lambda _: launch.arguments[6]

    if launch.name == "depthwise_weight":
        strips_each, width, unroll = launch.arguments[4], launch.arguments[6], launch.options["UNROLL"]
        return lambda loop: strips_each if loop == 0 else -(-width // unroll)

    def unknown(number: int) -> float:
        raise ValueError(f"{launch.name}: loop {number} has no constant bounds, and nobody says how often it runs")

    return unknown


def _counted(launch: aot.Launch) -> tuple[sass.Counts, dict[str, Any]]:
    import triton

    source, options = aot._specialise(launch.kernel, launch.arguments, launch.options)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        binary = triton.compile(source, target=aot._PretendedGPU().get_current_target(), options=options)
        code = Path(folder) / "kernel.cubin"
        code.write_bytes(binary.asm["cubin"])
        command = [aot._tool("cuobjdump"), "-sass", str(code)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        uses = aot._inspect([binary.asm["cubin"]], Path(folder))[0] | {"shared_bytes": binary.metadata.shared}
    counted = sass.counts(text, binary.asm["ptx"], binary.asm["ttir"], _mean_trips(launch), launch.name)
    return counted, uses


def predict(point: Point, gpu: str = configs.ANY_GPU) -> Row:
    """Compile what a point launches and predict its time."""
    others = _Others()
    with others:
        launches = aot.launches_of(point.call, gpu)
    predicted = []
    for launch in launches:
        numbers = [argument for argument in launch.arguments if isinstance(argument, int)]  # trips may depend on them
        found, _ = aot.kept([sass.__file__, __file__], launch, partial(_kept, launch), str(numbers))
        counted = sass.Counts(**found["counts"])
        num_warps, blocks = launch.options["num_warps"], math.prod(launch.grid)
        resident = resident_blocks(num_warps, found["registers"], found["shared_bytes"])
        operands = [argument for argument in launch.arguments if isinstance(argument, torch.Tensor)]
        operand_bytes = sum(tensor.numel() * tensor.element_size() for tensor in operands)
        us, bound = _time(blocks, num_warps, resident, counted, operand_bytes)
        predicted.append(
            Predicted(
                kernel=launch.name,
                options={name: value for name, value in launch.options.items() if _is_choice(name)},
                blocks=blocks,
                **{name: found[name] for name in ("registers", "stack_bytes", "shared_bytes")},
                loop=counted.loop,
                trips=counted.trips,
                instructions=counted.total,
                resident=resident,
                waves=blocks / (resident * MULTIPROCESSORS),
                us=us,
                bound_by=bound,
            )
        )
    floors = point.floors_us()
    other_us = others.us
    parts = {item.kernel + " " + item.bound_by: item.us for item in predicted} | {"other operations": other_us}
    total = sum(item.us for item in predicted) + other_us
    binding = max(parts, key=lambda part: parts[part]).split(" ")[-1]
    floor = max(floors.values())
    if total < floor:
        total, binding = floor, max(floors, key=lambda what: floors[what])
    return Row(
        family=point.family,
        label=point.label,
        launches=predicted,
        other_us=other_us,
        us=total,
        bound_by=binding,
        floors_us=floors,
        because=BECAUSE.get(f"{point.family} {point.label}", "") if total > FAR * floor else "",
    )


def _is_choice(name: str) -> bool:
    """Whether an option of a launch is one of its table's, not of the shape's."""
    return name.startswith(("BLOCK", "num_")) or name in ("ROWS", "STEPS", "STAGES", "UNROLL")


def _kept(launch: aot.Launch) -> dict[str, Any]:
    counted, uses = _counted(launch)
    return {"counts": asdict(counted)} | {name: uses[name] for name in ("registers", "stack_bytes", "shared_bytes")}


# -- the calls: the shapes of the review, which real spaces have -------------------------------------------------------


def _empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _depthwise(batch: int, size: tuple[int, int], channels: int, taps: tuple[int, int], causal: bool = False) -> Point:
    from mixnas.kernels import depthwise

    top, left = taps[0] // 2, taps[1] - 1 if causal else taps[1] // 2
    x, weight = _empty(batch, *size, channels), _weight(channels, taps)
    valid = depthwise.valid_taps(size[0], taps[0], top) * depthwise.valid_taps(size[1], taps[1], left)
    shape = "x".join(map(str, (batch, *size, channels)))
    return Point(
        family="depthwise",
        label=f"{shape} k{taps[0]}x{taps[1]}" if taps[0] > 1 else f"{batch}x{size[1]}x{channels} k{taps[1]} silu",
        call=partial(
            depthwise._forward, x, weight, weight[:, 0, 0, 0], None, "silu" if causal else "none", top, left, False
        ),
        bytes=2 * x.numel() * 2,
        **{"fp32" if causal else "matrix": 2 * batch * channels * valid},
        special=2 * x.numel() if causal else 0,
    )


def _weight(channels: int, taps: tuple[int, int]) -> torch.Tensor:
    """As a deployed network keeps it on a GPU: float32, in memory channels last."""
    return _empty(*taps, channels, dtype=torch.float32).permute(2, 0, 1).unsqueeze(1)


def _weight_gradient(batch: int, size: int, channels: int, taps: int) -> Point:
    from mixnas.kernels import depthwise

    x = _empty(batch, size, size, channels)
    valid = depthwise.valid_taps(size, taps, taps // 2) ** 2
    return Point(
        family="depthwise",
        label=f"{batch}x{size}x{size}x{channels} k{taps}x{taps}, gradient of the weight",
        call=partial(depthwise.weight_gradient, x, x, (taps, taps, taps // 2, taps // 2)),
        bytes=2 * x.numel() * 2,
        matrix=2 * batch * channels * valid,
    )


def _norm(rows: int, channels: int) -> Point:
    from mixnas.kernels import norm

    x, row = _empty(rows, channels), _empty(channels)
    return Point(
        family="norm",
        label=f"{rows}x{channels} layer, residual",
        call=partial(norm.forward, x, x, row, row, 1e-5, True),
        bytes=4 * x.numel() * 2,
        fp32=9 * x.numel(),
        special=rows,
    )


def _glu(rows: int, channels: int) -> Point:
    from mixnas.kernels import glu

    x = _empty(rows, channels)
    return Point(
        family="glu",
        label=f"{rows}x{channels} silu",
        call=partial(glu._forward, x, x, "silu"),
        bytes=3 * x.numel() * 2,
        fp32=5 * x.numel(),
        special=2 * x.numel(),
    )


def _gla(batch: int, length: int, heads: int, width: int, both: bool, backward: bool = False) -> Point:
    from mixnas.kernels import gated_linear_attention as gla

    q = _empty(batch, length, heads, width)
    operands = (q, q, q, q, q if both else None, width**-0.5)
    passes = 2 if both else 1
    maps = (5 if not backward else 9) + (passes - 1) * (1 if not backward else 2)
    products = 2 if not backward else 5
    return Point(
        family="gated_linear_attention",
        label=f"{batch}x{length} heads {heads}x{width} {'both directions' if both else 'causal'}"
        f"{', backward' if backward else ''}",
        call=partial(gla._backward, q, *operands) if backward else partial(gla._forward, *operands),
        bytes=maps * q.numel() * 2,
        matrix=passes * 2 * products * q.numel() * width,
        special=passes * 2 * q.numel(),
    )


def _scan(batch: int, length: int, channels: int, states: int, backward: bool = False) -> Point:
    from mixnas.kernels import selective_scan

    x, b = _empty(batch, length, channels), _empty(batch, length, states)
    a, row = _empty(channels, states, dtype=torch.float32), _empty(channels, dtype=torch.float32)
    operands = (x, x, a, b, b, row, row)
    return Point(
        family="selective_scan",
        label=f"{batch}x{length}x{channels} states {states}{', backward' if backward else ''}",
        call=partial(selective_scan._backward, x, *operands)
        if backward
        else partial(selective_scan._forward, *operands),
        bytes=((5 if backward else 3) * x.numel() + (4 if backward else 2) * b.numel()) * 2,
        fp32=(22 if backward else 6) * x.numel() * states,
        special=x.numel() * states,
    )


def _attention(
    batch: int, size: tuple[int, ...], heads: int, width: int, window: int, causal: bool = False, backward: bool = False
) -> Point:
    from mixnas.kernels import neighborhood_attention as na

    height, across = size if len(size) == 2 else (1, size[0])
    q = _empty(batch, height, across, heads, width)
    along_y = window if height > 1 else 1
    options = ([along_y, window], [1, 1], [1, 1], [False, causal], width**-0.5)
    pairs = batch * heads * na.num_pairs((height, across), *options[:4])
    lse = _empty(batch, height, across, heads, dtype=torch.float32)
    return Point(
        family="neighborhood_attention",
        label=f"{batch}x{'x'.join(map(str, size))} heads {heads}x{width} window {window}{' causal' if causal else ''}"
        f"{', backward' if backward else ''}",
        call=partial(na._backward, q, q, q, q, q, lse, *options)
        if backward
        else partial(na._forward, q, q, q, *options),
        bytes=(8 if backward else 4) * q.numel() * 2,
        matrix=(10 if backward else 4) * pairs * width,
        special=pairs,
    )


def _block(batch: int, size: int, channels: int, taps: int) -> Point:
    from mixnas.kernels import depthwise, fused_block

    x, row = _empty(batch, size, size, channels), _empty(channels)
    up, down, hidden = _empty(4 * channels, channels), _empty(channels, 4 * channels), _empty(4 * channels)
    operands = (x, _weight(channels, (taps, taps)), row, row, row, up, hidden, down, row)
    valid = depthwise.valid_taps(size, taps, taps // 2) ** 2
    one_kernel = batch * size * size >= fused_block.ENOUGH_POSITIONS
    return Point(
        family="fused_block",
        label=f"{batch}x{size}x{size}x{channels} k{taps} expansion 4 gelu",
        call=partial(fused_block._forward, *operands, True, "gelu", 1e-5, True)
        if one_kernel
        else partial(_by_operators, *operands),
        bytes=2 * x.numel() * 2,
        fp32=30 * x.numel(),
        matrix=2 * batch * channels * valid + 2 * 2 * x.numel() * 4 * channels,
        special=4 * x.numel(),
    )


def _by_operators(x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
    """What the block runs where it is too small for one kernel."""
    from mixnas.kernels import depthwise, norm

    bias, norm_weight, norm_bias, up, up_bias, down, down_bias = rest
    pad = weight.shape[-1] // 2
    z, _ = depthwise._forward(x, weight, bias, None, "none", pad, pad, False)
    z = norm.forward(z, None, norm_weight, norm_bias, 1e-5, True)[0]
    return x + F.linear(F.gelu(F.linear(z, up, up_bias)), down, down_bias)


def points() -> list[Point]:
    """The calls of the table: each family at the shapes of real spaces, and those of images at batch 32 and 1."""
    found = []
    maps = ((56, 64), (28, 128), (14, 256), (7, 512))
    for batch in (32, 1):
        for size, channels in maps:
            found += [_depthwise(batch, (size, size), channels, (taps, taps)) for taps in (3, 7, 31)]
    found += [_depthwise(1, (1, 8192), 1024, (1, 4), causal=True)]
    found += [_weight_gradient(32, 56, 64, 7), _weight_gradient(32, 14, 256, 7)]
    found += [_norm(100352, 96), _norm(3136, 96), _norm(8192, 1024), _glu(8192, 4096), _glu(196, 1536)]
    found += [_gla(1, 8192, 16, 64, False), _gla(32, 196, 4, 32, True), _gla(1, 196, 4, 32, True)]
    found += [_gla(1, 8192, 16, 64, False, True), _gla(32, 196, 4, 32, True, True)]
    found += [_scan(1, 8192, 2048, 16), _scan(32, 196, 384, 16), _scan(1, 196, 384, 16)]
    found += [_scan(1, 8192, 2048, 16, True), _scan(32, 196, 384, 16, True)]
    for batch in (32, 1):
        for size, heads in ((56, 2), (28, 4), (14, 8), (7, 16)):
            found.append(_attention(batch, (size, size), heads, 32, 7))
    found += [_attention(1, (8192,), 16, 64, 128, causal=True), _attention(32, (56, 56), 2, 32, 7, backward=True)]
    found.append(_attention(1, (8192,), 16, 64, 128, causal=True, backward=True))
    for batch in (32, 1):
        found += [_block(batch, 56, 64, 7), _block(batch, 28, 128, 7)]
    found.append(_block(32, 56, 64, 3))
    return found
