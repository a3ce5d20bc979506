"""Products of few bits on a CPU: which path takes a shape, and proof that the path is right here.

Nothing is tried at run time, or a network's latency would depend on what ran before it. `products.json` holds which
path was fastest for each kind of product at some shapes (`benchmarks/quantization.py crossover` measures and writes
it); a shape takes that of the nearest. A path is used only if it gives, on this machine, what exact arithmetic gives:
that is tried once in a process for each size of weights (torch's int8 product has been wrong on some CPUs, and is at
some sizes).

On a GPU the products are Triton kernels (`kernels.quantized_linear`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mixnas.kernels import dispatch
from mixnas.kernels.quantized_linear import MIN_GROUP, unpack_int4
from mixnas.search_space.errors import ConfigError, nearest

log = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("products.json")
"""Which path is fastest: {"provenance": ..., "shapes": [{"rows", "inputs", "outputs", "paths": {kind: path}}]}."""

KINDS: dict[str, tuple[str, ...]] = {
    "int8": ("int_mm", "float32", "int32"),
    "int8_static": ("int_mm", "float32", "onednn", "int32"),
    "weight_int8": ("widened", "int8pack"),
    "weight_int4": ("widened", "int4pack"),
}
"""Kinds of product, and the paths that each may take, the one without a table first.

`int_mm`: torch's int8 product, `float32`: a float product of whole numbers, exact as long as they are small, `int32`:
slow and always right, `onednn`: the fused quantized linear layer, `int8pack` and `int4pack`: torch's products of floats
and packed weights, `widened`: the weights are turned into float32 once, and what runs is float32.
"""

_GRAPHS = {
    kind: tuple(path for path in paths if path not in ("onednn", "int8pack", "int4pack"))
    for kind, paths in KINDS.items()
}
_EXACT = 1 << 24  # float32 holds every whole number up to it
_forced: dict[str, str] = {}


@contextlib.contextmanager
def only(**paths: str) -> Iterator[None]:
    """Within it, products of a kind take this path, whatever the table says: `only(int8="float32")`.

    Raises:
        ConfigError: No such kind or path.
    """
    for kind, path in paths.items():
        if kind not in KINDS:
            raise ConfigError(f"no product is called {kind!r}.{nearest(kind, KINDS)} Allowed: {', '.join(KINDS)}.")
        if path not in KINDS[kind]:
            raise ConfigError(f"{kind} has no path {path!r}. Allowed: {', '.join(KINDS[kind])}.")
    before = dict(_forced)
    _forced.update(paths)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def choose(kind: str, rows: int, inputs: int, outputs: int) -> str:
    """The path of a product of (rows, inputs) by (inputs, outputs); in a traced graph, one that graphs can hold."""
    if kind in _forced:
        return _forced[kind]
    if dispatch.tracing() or not isinstance(rows, int):
        return next(path for path in _GRAPHS[kind] if _can(path, inputs, outputs))
    return _chosen(kind, rows, inputs, outputs)


@functools.lru_cache(maxsize=1 << 14)
def _chosen(kind: str, rows: int, inputs: int, outputs: int) -> str:
    place = [math.log2(max(extent, 1)) for extent in (rows, inputs, outputs)]
    measured = min(_table().get(kind, ()), key=lambda entry: math.dist(entry[0], place), default=(place, ""))[1]
    return next(path for path in (measured, *KINDS[kind]) if path and _can(path, inputs, outputs))


def _can(path: str, inputs: int, outputs: int) -> bool:
    return fits(path, inputs) and (path not in CHECKED or works(path, inputs, outputs))


@functools.cache
def _table() -> dict[str, list[tuple[list[float], str]]]:
    found: dict[str, list[tuple[list[float], str]]] = {}
    if TABLE.exists():
        for shape in json.loads(TABLE.read_text(encoding="utf-8"))["shapes"]:
            place = [math.log2(shape[name]) for name in ("rows", "inputs", "outputs")]
            for kind, path in shape["paths"].items():
                found.setdefault(kind, []).append((place, path))
    return found


def fits(path: str, inputs: int) -> bool:
    """Whether a path can take so many inputs: floats hold exact sums of so many, and torch's int8 product is wrong
    with one (2.13: a column's strides say nothing of its layout)."""
    if path == "float32":
        return inputs * 255 * 127 < _EXACT
    return path != "int_mm" or inputs > 1


# -- whole products ----------------------------------------------------------------------------------------------------


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    return torch._int_mm(x, weight.T)


def _float32(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float())


def _int32(x: Tensor, weight: Tensor) -> Tensor:
    return x.int() @ weight.int().T


def onednn_pack(weight: Tensor, rows: int) -> Tensor:
    """Weights (N, K) int8 as oneDNN's linear layer wants them; not to be stored."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, [rows, weight.shape[1]])
    return packed


def onednn_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor, packed: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> Tensor:
    """oneDNN's linear layer on (M, K) uint8 of one scale and zero point; (M, N) float32."""
    zeros = torch.zeros(len(weight_scale), dtype=torch.int32)
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, scale, zero_point, packed, weight_scale, zeros, bias, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """The sums alone, to be checked."""
    one, zero = torch.ones(()), torch.zeros((), dtype=torch.int32)
    return onednn_linear(x, one, zero, onednn_pack(weight, len(x)), torch.ones(len(weight)), None)


SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"int_mm": _int_mm, "float32": _float32, "int32": _int32}
"""Sums of products of (M, K) int8 or uint8 and (N, K) int8, each a whole number; int32 or float32."""

CHECKED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {**SUMS, "onednn": _onednn}
"""Paths that are tried against exact arithmetic before they are used."""


@functools.cache
def works(path: str, inputs: int, outputs: int) -> bool:
    """Whether a path gives here what int32 arithmetic gives, with weights of this size, also at the ends of 8 bits.

    Tried once in a process for each size: torch's int8 product has been wrong at some sizes only.
    """
    generator = torch.Generator().manual_seed(0)
    # Out of any trace: torch.export would write down that gradients are switched, and lose in which module it is.
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        weight[0] = 127
        for dtype in (torch.uint8,) if path == "onednn" else (torch.int8, torch.uint8):
            limits = torch.iinfo(dtype)
            x = torch.randint(limits.min, limits.max + 1, (5, inputs), generator=generator, dtype=dtype)
            x[0], x[1] = limits.max, limits.min  # sums that overflow 16 bits
            for rows in (x, x[:1]):
                try:
                    right = torch.equal(CHECKED[path](rows, weight).double(), rows.double() @ weight.double().T)
                except RuntimeError as error:
                    log.warning("the path %s of products of few bits is not used: %s", path, error)
                    return False
                if not right:
                    sizes = f"{inputs} inputs and {outputs} outputs"
                    log.warning(
                        "the path %s of products of few bits is not used with %s: it is wrong here", path, sizes
                    )
                    return False
    return True


def paths_of(kind: str) -> set[str]:
    """The paths that the table has for a kind of product: the first there is, where it has none."""
    return {path for _, path in _table().get(kind, ())} or {KINDS[kind][0]}


def kernel_takes_group(group: int) -> bool:
    """Whether the Triton kernel for 4-bit weights takes groups of so many inputs."""
    return group >= MIN_GROUP and group & (group - 1) == 0


def int4pack_takes(group: int) -> bool:
    """Whether torch's product of floats and 4-bit weights takes groups of so many inputs."""
    return group in (32, 64, 128, 256)


def int4_pack(packed: Tensor, scale: Tensor, inputs: int) -> tuple[Tensor, Tensor]:
    """Weights of `pack_int4` and their scales (N, G) as torch's product for a CPU wants them; not to be stored."""
    outputs, groups = scale.shape
    more = -outputs % 16
    whole = F.pad(unpack_int4(packed, inputs, inputs // groups).int() + 8, (0, 0, 0, more))
    scales = F.pad(scale.float().T.unsqueeze(-1), (0, 1, 0, more)).contiguous()  # (G, N, 2): scale, and a zero
    return torch._convert_weight_to_int4pack_for_cpu(whole, 1), scales


def which_table() -> dict[str, Any]:
    """Where the table in use comes from: its provenance, with "file"; no more than the file where there is none."""
    if not TABLE.exists():
        return {"file": TABLE.name, "measured": False}
    provenance: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))["provenance"]
    return {"file": TABLE.name, "measured": True, **provenance}
