"""Selective state space models: Mamba for causal tasks, PlainMamba in several directions for the others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.glu import glu
from mixnas.kernels.selective_scan import selective_scan
from mixnas.search_space.operators.layers import DepthwiseConv, Linear, normed
from mixnas.search_space.registry import Context, Knob, Value, register

_START, _RIGHT, _LEFT, _UP, _DOWN = range(5)
_STEPS = (1e-3, 1e-1)  # range of the initial step sizes
_CHANNELS_PER_RANK = 16  # the steps come through ceil(C / 16) channels


def _initial_step_bias(channels: int) -> Tensor:
    """Inverse softplus of log-uniform step sizes."""
    low, high = (math.log(step) for step in _STEPS)
    steps = torch.exp(low + (high - low) * torch.rand(channels))
    return steps + torch.log(-torch.expm1(-steps))


def _initial_log_decay(channels: int, state: int) -> Tensor:
    """log(1), ..., log(state) for each channel (S4D-real)."""
    return torch.arange(1, state + 1, dtype=torch.float32).log().repeat(channels, 1)


class Mamba(nn.Module):
    """Mamba's block: silu(causal convolution), selective scan, gate silu(z). Inner width E = expansion * C.

    Shape:
        (B, L, C) to the same.
    """

    def __init__(self, context: Context, *, state: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        width, inner, rank = context.width, expansion * context.width, -(-context.width // _CHANNELS_PER_RANK)
        self.input, self.gate = (Linear(width, inner, bias=False) for _ in range(2))
        self.conv = DepthwiseConv(Context(inner, context.size, context.kind), kernel_size)
        self.step_low = Linear(inner, rank, bias=False)
        self.step = Linear(rank, inner, bias=False)
        self.step_bias = nn.Parameter(_initial_step_bias(inner))
        self.b, self.c = (Linear(inner, state, bias=False) for _ in range(2))
        self.log_decay = nn.Parameter(_initial_log_decay(inner, state))
        self.skip = nn.Parameter(torch.ones(inner))
        self.out = Linear(inner, width, bias=False)
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        u = self.conv(self.input(x), "silu")
        step = self.step(self.step_low(u))
        y = selective_scan(u, step, -self.log_decay.exp(), self.b(u), self.c(u), self.skip, self.step_bias)
        return self.out(glu(self.gate(x), y, "silu"))


@lru_cache(maxsize=256)
def snakes(size: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """The continuous orders in which an image (rows, its reverse, columns, its reverse) or a sequence is scanned.

    Returns:
        For each order the token of each step, and the direction (0 to 4: start, right, left, up, down) of each step.
    """
    height, width = size if len(size) == 2 else (1, size[0])
    rows = [(y, x) for y in range(height) for x in (range(width) if y % 2 == 0 else range(width - 1, -1, -1))]
    columns = [(y, x) for x in range(width) for y in (range(height) if x % 2 == 0 else range(height - 1, -1, -1))]
    paths = [rows, rows[::-1]] + ([columns, columns[::-1]] if len(size) == 2 else [])
    named = {(0, 1): _RIGHT, (0, -1): _LEFT, (-1, 0): _UP, (1, 0): _DOWN}
    orders, steps = [], []
    for path in paths:
        moves = itertools.pairwise(path)
        orders.append(tuple(y * width + x for y, x in path))
        steps.append((_START, *(named[b[0] - a[0], b[1] - a[1]] for a, b in moves)))
    return tuple(orders), tuple(steps)


class PlainMamba(nn.Module):
    """PlainMamba2D as VCMamba has it: batch norm, silu(depthwise convolution), four snake scans, no gate.

    As the authors' code has it, and so the checkpoints: the bias of the steps is added twice; steps, b and c of a scan
    stay in raster order while its tokens follow the snake; b gets a learned vector of the step's direction. A sequence
    is scanned forwards and backwards.

    Shape:
        (B, H, W, C) or (B, L, C) to the same.
    """

    folds = (("input_norm", "input"), ("out_norm", "out"))
    orders: Tensor
    steps: Tensor
    places: Tensor

    def __init__(self, context: Context, *, state: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        width, inner, rank = context.width, expansion * context.width, -(-context.width // _CHANNELS_PER_RANK)
        self.input = Linear(width, inner)
        self.input_norm = nn.BatchNorm1d(inner)
        self.conv = DepthwiseConv(Context(inner, context.size, context.kind), kernel_size)
        self.step_low = Linear(inner, rank, bias=False)
        self.step = nn.Linear(rank, inner)  # its bias is read below, so no policy may take its place
        self.b, self.c = (Linear(inner, state, bias=False) for _ in range(2))
        self.log_decay = nn.Parameter(_initial_log_decay(inner, state))
        self.skip = nn.Parameter(torch.ones(inner))
        self.direction = nn.Parameter(torch.empty(5 if len(context.size) == 2 else 3, state))
        self.norm = nn.LayerNorm(inner)
        self.out = Linear(inner, width)
        self.out_norm = nn.BatchNorm1d(width)
        with torch.no_grad():
            self.step.bias.copy_(_initial_step_bias(inner))
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        nn.init.trunc_normal_(self.direction, std=0.02)
        self._set_orders(context.size)

    def _set_orders(self, size: tuple[int, ...]) -> None:
        self._size = size
        orders, steps = (torch.tensor(table) for table in snakes(size))
        device = self.skip.device
        self.register_buffer("orders", orders.flatten().to(device), persistent=False)
        self.register_buffer("steps", steps.to(device), persistent=False)
        self.register_buffer("places", orders.argsort(1).to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if tuple(x.shape[1:-1]) != self._size:
            self._set_orders(tuple(x.shape[1:-1]))
        B, tokens, scans = x.shape[0], self.places.shape[1], len(self.places)
        u = normed(self.input_norm, self.input(x).flatten(0, -2)).view(*x.shape[:-1], -1)
        u = self.conv(u, "silu").flatten(1, -2)
        step = self.step(self.step_low(u).to(u.dtype))
        b = self.b(u).to(u.dtype).unsqueeze(1) + self.direction[self.steps]
        scanned = u[:, self.orders].view(B * scans, tokens, -1)
        step, c = (t.unsqueeze(1).expand(B, scans, tokens, -1).flatten(0, 1) for t in (step, self.c(u).to(u.dtype)))
        a, bias = -self.log_decay.exp(), self.step.bias
        y = selective_scan(scanned, step, a, b.flatten(0, 1), c, self.skip, bias)
        # Back in raster order, all scans in one gather.
        places = self.places + torch.arange(scans, device=x.device).unsqueeze(1) * tokens
        y = y.view(B, scans * tokens, -1)[:, places].sum(1)
        y = self.out(F.relu(normed(self.norm, y)))
        return normed(self.out_norm, y.flatten(0, 1)).view(x.shape)


def _kernel_is_centred(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if context.kind != "causal" and int(knobs["kernel_size"]) % 2 == 0:
        return f"kernel_size {knobs['kernel_size']} has no centre; only causal tasks take an even one"
    return None


@register(
    "mixer",
    "ssm",
    paper="Gu and Dao 2023, Mamba (arXiv 2312.00752), section 3; VCMamba (arXiv 2509.04669) and Yang et al. 2024, "
    "PlainMamba (arXiv 2403.17695), section 3.3",
    knobs={
        "state": Knob(16, choices=(8, 16, 32), doc="states of a channel"),
        "expansion": Knob(2, low=1, high=4, doc="inner width over width"),
        "kernel_size": Knob(7, choices=(3, 4, 5, 7), doc="taps of the convolution; Mamba's own, causal, has 4"),
    },
    check=_kernel_is_centred,
)
class SelectiveStateSpace(nn.Module):
    """`Mamba` for causal tasks, `PlainMamba` for images (four scans) and sequences (two)."""

    def __init__(self, context: Context, *, state: int, expansion: int, kernel_size: int) -> None:
        super().__init__()
        block = Mamba if context.kind == "causal" else PlainMamba
        self.scan = block(context, state=state, expansion=expansion, kernel_size=kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        y: Tensor = self.scan(x)
        return y
