"""Projections of few bits: int8 by int8, fp8 by fp8, and floats by 4-bit weights in groups; for inference alone.

    scaled_linear: out[m, n] = x_scale[m] scale[n] sum_k x[m, k] weight[n, k] + shift[n]      int8 or fp8 (e4m3)
    int4_linear:   out[m, n] = sum_g scale[n, g] sum_{k in group g} x[m, k] weight[n, k] + bias[n]

Sums of int8 products are exact, in int32; scales stand in the epilogue. Weights of 4 bits lie two in a byte, the first
half of a group in the low halves and the second in the high ones, each plus 8: so a tile of bytes is two tiles of
weights, and nothing has to be interleaved.

Shapes: M rows (tokens), K inputs, N outputs, G groups of K / G inputs.
"""

from collections.abc import Iterator
from functools import partial

import torch

from mixnas.kernels import configs, dispatch
from mixnas.kernels.dispatch import cdiv, choose, launch, tl, triton
from mixnas.kernels.tools.aot import Example
from mixnas.kernels.work import counted

FP8 = torch.float8_e4m3fn
MIN_GROUP = 32  # two tiles of 16 inputs, less than which no product of matrices takes
SMALL = {"rows": 1024}


@triton.jit(do_not_specialize=["rows"])
def scaled_product_kernel(
    x_ptr,  # (M, K) int8, or the bits of fp8
    x_scale_ptr,  # (M,) or None
    weight_ptr,  # (N, K)
    scale_ptr,  # (N,)
    shift_ptr,  # (N,) or None
    out_ptr,  # (M, N)
    rows,
    inputs,
    outputs,
    INTEGER: tl.constexpr,
    WIDEN: tl.constexpr,  # products in float32: the interpreter has none in fp8
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * inputs + k[None, :]
    weight_ptrs = weight_ptr + n[None, :] * inputs + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32 if INTEGER else tl.float32)
    for k0 in range(0, inputs, BLOCK_K):
        k_ok = k < inputs - k0
        x = tl.load(x_ptrs + k0, mask=(m < rows)[:, None] & k_ok[None, :], other=0)
        weight = tl.load(weight_ptrs + k0, mask=(n < outputs)[None, :] & k_ok[:, None], other=0)
        if INTEGER:
            total = tl.dot(x, weight, total, out_dtype=tl.int32)
        else:
            x = x.to(tl.float8e4nv, bitcast=True)
            weight = weight.to(tl.float8e4nv, bitcast=True)
            if WIDEN:
                x = x.to(tl.float32)
                weight = weight.to(tl.float32)
            total = tl.dot(x, weight, total)
    out = total.to(tl.float32)
    if x_scale_ptr is not None:
        out *= tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)[:, None]
    out *= tl.load(scale_ptr + n, mask=n < outputs, other=0.0)[None, :]
    if shift_ptr is not None:
        out += tl.load(shift_ptr + n, mask=n < outputs, other=0.0)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs)[None, :])


@triton.jit(do_not_specialize=["rows"])
def int4_product_kernel(
    x_ptr,  # (M, K)
    packed_ptr,  # (N, K / 2) uint8
    scale_ptr,  # (N, G)
    bias_ptr,  # (N,) or None
    out_ptr,  # (M, N)
    rows,
    groups,
    outputs,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # products in float32: the interpreter has none in bfloat16
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of each half of a group at a time
):
    HALF: tl.constexpr = GROUP // 2
    TILE: tl.constexpr = min(HALF, BLOCK_K)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, TILE)
    m_ok = (m < rows)[:, None]
    n_ok = (n < outputs)[None, :]
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * (groups * GROUP) + k[None, :]
    packed_ptrs = packed_ptr + n[None, :] * (groups * HALF) + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for group in range(groups):
        part = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k0 in range(0, HALF, TILE):
            packed = tl.load(packed_ptrs + group * HALF + k0, mask=n_ok, other=0x88)
            first = tl.load(x_ptrs + group * GROUP + k0, mask=m_ok, other=0.0)
            second = tl.load(x_ptrs + group * GROUP + HALF + k0, mask=m_ok, other=0.0)
            low = ((packed & 15).to(tl.float32) - 8.0).to(x_ptr.dtype.element_ty)
            high = ((packed >> 4).to(tl.float32) - 8.0).to(x_ptr.dtype.element_ty)
            if WIDEN:
                first = first.to(tl.float32)
                second = second.to(tl.float32)
                low = low.to(tl.float32)
                high = high.to(tl.float32)
            part = tl.dot(first, low, part, input_precision=PRECISION)
            part = tl.dot(second, high, part, input_precision=PRECISION)
        scale = tl.load(scale_ptr + n * groups + group, mask=n < outputs, other=0.0)
        total += part * scale.to(tl.float32)[None, :]
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=m_ok & n_ok)


def scaled_linear_reference(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Compute the definition in float64, where sums of so few bits are exact."""
    out = x.double() @ weight.double().T * scale.double()
    if x_scale is not None:
        out = out * x_scale.double().reshape(-1, 1)
    return (out if shift is None else out + shift.double()).to(dtype)


def _scaled(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    integer = x.dtype == torch.int8
    x, weight = x.contiguous().view(torch.int8), weight.contiguous().view(torch.int8)
    (rows, inputs), outputs = x.shape, weight.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device)
    config = configs.pick("scaled_product", x, rows=rows)
    grid = (cdiv(rows, config["BLOCK_M"]), cdiv(outputs, config["BLOCK_N"]))
    operands = (x, x_scale, weight, scale, shift, out, rows, inputs, outputs)
    widen = dispatch.INTERPRETING and not integer
    launch(scaled_product_kernel, grid, *operands, INTEGER=integer, WIDEN=widen, **config)
    return out


_scaled_linear = torch.library.custom_op("mixnas::scaled_linear", _scaled, mutates_args=())


@_scaled_linear.register_fake
def _(x, x_scale, weight, scale, shift, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


def _scaled_macs(x: torch.Tensor, x_scale: object, weight: torch.Tensor, *_: object, **__: object) -> int:
    return int(x.shape[0] * x.shape[1] * weight.shape[0])


@counted(_scaled_macs, bits=8)
def scaled_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Multiply rows of 8 bits by weights of 8 bits, with their scales.

    Args:
        x: (M, K), int8 or fp8 (e4m3).
        x_scale: (M,) or (M, 1) float32; None where `scale` holds it.
        weight: (N, K), as `x`.
        scale: (N,) float32.
        shift: (N,) float32, or None.
        dtype: Of the result.

    Returns:
        (M, N).

    Raises:
        ValueError: Types or shapes do not fit.
    """
    if x.dtype != weight.dtype or x.dtype not in (torch.int8, FP8):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}: both must be int8, or both float8_e4m3fn")
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} must be (M, K) and (N, K)")
    if x_scale is not None:
        x_scale = x_scale.reshape(-1)
    if choose(scale) == "triton":
        return _scaled_linear(x, x_scale, weight, scale, shift, dtype)
    if choose(scale) == "reference":
        return scaled_linear_reference(x, x_scale, weight, scale, shift, dtype)
    total = torch._int_mm(x, weight.T) if x.dtype == torch.int8 else x.float() @ weight.float().T
    return epilogue(total, None if x_scale is None else x_scale.unsqueeze(1), scale, shift).to(dtype)


def epilogue(
    total: torch.Tensor, x_scale: torch.Tensor | None, scale: torch.Tensor, shift: torch.Tensor | None
) -> torch.Tensor:
    """Scale (M, N) sums of whole numbers by `x_scale`, (M, 1), and `scale`, (N,), and add `shift`, (N,); float32.

    Each operation is rounded by itself, as in every runtime: `addcmul` is one rounding on some CPUs and two elsewhere.
    """
    out = total.to(torch.float32)
    for factor in (x_scale, scale):
        if factor is not None:
            out = out.mul_(factor) if out is not total else out * factor  # in place: new memory is slow to write
    return out if shift is None else out.add_(shift)


def pack_int4(whole: torch.Tensor, group: int) -> torch.Tensor:
    """Lay 4-bit numbers two in a byte, see the module.

    Args:
        whole: (N, K) int8, -8 to 7.
        group: Inputs of a group, which divides K; each takes half as many bytes, rounded up.

    Returns:
        (N, K / group x ceil(group / 2)) uint8.
    """
    groups = torch.nn.functional.pad((whole + 8).view(len(whole), -1, group), (0, group % 2), value=8)
    low, high = groups.to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).flatten(1)


def parted(packed: torch.Tensor, base: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo `low + base * high` of bytes, as float32: torch 2.13 writes shifts of bytes wrongly into ONNX graphs."""
    whole = packed.float()
    high = (whole * (1 / base)).floor()
    return whole - base * high, high


def unpack_int4(packed: torch.Tensor, inputs: int, group: int) -> torch.Tensor:
    """Undo `pack_int4`: (N, K) int8, where K is `inputs`."""
    low, high = parted(packed.view(len(packed), inputs // group, -1), 16)
    whole = torch.cat([low, high], dim=-1).to(torch.int8) - 8
    return whole[..., :group].reshape(len(packed), inputs)


def int4_linear_reference(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute the definition, in the dtype of `x`."""
    group = x.shape[1] // scale.shape[1]
    whole = unpack_int4(packed, x.shape[1], group).to(x.dtype)
    weight = whole.view(*scale.shape, group) * scale.to(x.dtype).unsqueeze(-1)
    return torch.nn.functional.linear(x, weight.flatten(1), None if bias is None else bias.to(x.dtype))


def _int4(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    rows, (outputs, groups) = x.shape[0], scale.shape
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    config = configs.pick("int4_product", x, rows=rows, itemsize=x.element_size())
    grid = (cdiv(rows, config["BLOCK_M"]), cdiv(outputs, config["BLOCK_N"]))
    launch(
        int4_product_kernel,
        grid,
        *(x, packed, scale, bias, out, rows, groups, outputs),
        GROUP=x.shape[1] // groups,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        WIDEN=dispatch.INTERPRETING,
        **config,
    )
    return out


_int4_linear = torch.library.custom_op("mixnas::int4_linear", _int4, mutates_args=())


@_int4_linear.register_fake
def _(x, packed, scale, bias):
    return x.new_empty(x.shape[0], scale.shape[0])


def _int4_macs(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *_: object, **__: object) -> int:
    return int(x.shape[0] * x.shape[1] * scale.shape[0])


@counted(_int4_macs, bits=4)
def int4_linear(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply rows by 4-bit weights that have a scale for each group.

    Args:
        x: (M, K), float32, bfloat16 or float16.
        packed: (N, K / 2) uint8 from `pack_int4`.
        scale: (N, G), any floating-point type.
        bias: (N,), or None.

    Returns:
        (M, N), as `x`.

    Raises:
        ValueError: Shapes do not fit.
    """
    groups = scale.shape[1]
    if x.dim() != 2 or x.shape[1] % groups:
        raise ValueError(f"{groups} groups do not divide the inputs of x {tuple(x.shape)}")
    group = x.shape[1] // groups
    if packed.shape != (scale.shape[0], groups * -(-group // 2)):
        raise ValueError(f"packed is {tuple(packed.shape)}, not {(scale.shape[0], groups * -(-group // 2))}")
    takes = group >= MIN_GROUP and group & (group - 1) == 0  # tiles are powers of two
    if takes and choose(x) == "triton":
        return _int4_linear(x, packed, scale, bias)
    return int4_linear_reference(x, packed, scale, bias)


def aot_examples(kernel: str, bounds: dict[str, int]) -> Iterator[Example]:
    """Yield what the ahead-of-time compiler compiles for one row of the table (see `aot.py`)."""
    rows = min(bounds.get("rows", 16384), 16384)
    inputs, outputs = 256, 512
    scale = torch.empty(outputs, dtype=torch.float32, device="meta")
    if kernel == "scaled_product":
        for dtype, name in ((torch.int8, "int8"), (FP8, "fp8")):
            x = torch.empty(rows, inputs, dtype=dtype, device="meta")
            x_scale = torch.empty(rows, dtype=torch.float32, device="meta")
            weight = torch.empty(outputs, inputs, dtype=dtype, device="meta")
            yield Example(
                label=f"{name} {rows}x{inputs}x{outputs}",
                call=partial(_scaled, x, x_scale, weight, scale, scale, torch.float32),
                bytes=rows * inputs + outputs * inputs + 4 * rows * outputs,
                operations=2 * rows * inputs * outputs,
                unit="matrix",
            )
        return
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        if dtype.itemsize > bounds.get("itemsize", 4) or ("itemsize" not in bounds and dtype.itemsize == 2):
            continue
        for group in (32, 128):
            x = torch.empty(rows, inputs, dtype=dtype, device="meta")
            packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device="meta")
            scales = torch.empty(outputs, inputs // group, dtype=torch.bfloat16, device="meta")
            yield Example(
                label=f"{name} {rows}x{inputs}x{outputs} groups of {group}",
                call=partial(_int4, x, packed, scales, scale),
                bytes=x.element_size() * rows * (inputs + outputs) + outputs * inputs // 2,
                operations=2 * rows * inputs * outputs,
                unit="matrix" if dtype == torch.bfloat16 else "fp32",
            )
