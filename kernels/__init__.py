"""Operators of the hot path: one file per family, the same functions on every device.

What a caller sees is a plain function, for example `depthwise_conv2d(x_BHWC, weight_C1KK, ...)`; on CUDA tensors it
runs a Triton kernel, on CPU tensors the fastest form ATen has, and on CPU tensors in a process started with
``TRITON_INTERPRET=1`` the Triton kernel in Triton's interpreter. Tensors are channels last throughout.

Import a function from its family, `from mixnas.kernels.depthwise_conv2d import depthwise_conv2d`: this package loads
nothing by itself, and the families load without Triton.

Conventions of a family file (`glu.py` is the short one to copy):

* `from mixnas.kernels.dispatch import launch, tl, triton`: never `import triton`, which may be absent. Kernels are
  `@triton.jit`, end in `_kernel`, and keep to what Triton 3.6 and 3.7 both compile and interpret: window loops are an
  outer `range` over a `tl.constexpr` and an inner `tl.static_range`, no `scalar & block`, no `tl.dot` below 16.
* Long kernels stand in `<family>_kernels.py`, their launches in `<family>.py`. Exponentials come from `fast_math`,
  scaled by log2(e) outside loops.
* Every launch goes through `launch(kernel, grid, *tensors_and_integers, **constants_and_options)`, so that the
  ahead-of-time compiler (`aot.py`) can record what would have been launched; block sizes, `num_warps` and `num_stages`
  come from `configs.pick("<kernel name without _kernel>", x, feature=value, ...)`, the table `<family>.json`.
* `<op>_reference` is the plain PyTorch truth in the dtype it is given (tests call it in float64).
* `torch.library.custom_op("mixnas::<op>")` with `register_fake` and `register_autograd`; the backward is a second
  custom operator, so that `torch.compile` and `torch.export` see two opaque nodes. Only `choose(x) == "triton"` takes
  that path: on a CPU the function calls ATen directly, since an operator's Python dispatch costs more than a small map.
* No `from __future__ import annotations` there: operator schemas are read from the annotations.
* `aot_examples(kernel, bounds)` yields `aot.Example`s for one row of the table, whose calls launch that kernel on
  tensors of the "meta" device; the module is listed in `FAMILIES`, its table is `<family>.json` beside it. `SMALL`
  names the feature that says how large a launch is, and up to where one is small: `retune.py` makes such launches rows
  of their own, on examples that lie within the row's bounds.

Tests of a family are in `tests/kernels/` and inherit `testing.KernelContract`; everything there runs in an
interpreting child process (see its `conftest.py`).
"""

FAMILIES: tuple[str, ...] = (
    "epilogue",
    "depthwise",
    "depthwise_banded",
    "norm",
    "glu",
    "gated_linear_attention",
    "selective_scan",
    "neighborhood_attention",
    "fused_block",
    "quantized_linear",
)
