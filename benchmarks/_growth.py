"""Toy operators in the numbers to come: some eighty on the axes of a block together, and nine policies.

They are small, but each has a forward, parameters and, some of them, knobs of its own; the policies round the weights
of projections to different numbers of bits, or compute them in bfloat16.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.predictors.latency.lookup import SpaceUnits, check_tables
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.search_space import registry
from mixnas.search_space.cost import METRICS
from mixnas.search_space.enumeration import check_space, cost_corner
from mixnas.search_space.operators.layers import Conv, DepthwiseConv, Linear
from mixnas.search_space.operators.quantization.policy import deployed_bytes, replace_projections
from mixnas.search_space.registry import Context, Knob, register
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search_space.units import IOSpec

_Result = TypeVar("_Result")

NUM_MIXERS, NUM_GATES, NUM_CHANNEL_MIXERS, NUM_POLICIES = 50, 15, 15, 9
_ACTIVATIONS = (torch.relu, torch.tanh, torch.sigmoid, F.silu, F.gelu)
_PAPER = "a toy of benchmarks/_growth.py"


def _make_mixer(number: int) -> None:
    activation = _ACTIVATIONS[number % len(_ACTIVATIONS)]
    with_knobs = number % 6 == 0
    knobs = {"kernel_size": Knob(3, choices=(3, 5, 7)), "share": Knob(0.5, choices=(0.25, 0.5))} if with_knobs else {}

    @register("mixer", f"toy_mixer_{number:02}", paper=_PAPER, kinds=("image",), knobs=knobs)
    class Mixer(nn.Module):
        def __init__(self, context: Context, kernel_size: int = 3, share: float = 0.5) -> None:
            super().__init__()
            inner = max(1, int(context.width * share))
            self.inside, self.outside = Linear(context.width, inner), Linear(inner, context.width)
            at = Context(inner, context.size, context.kind)
            self.mixing = nn.Sequential(*(DepthwiseConv(at, kernel_size) for _ in range(number % 3)))

        def forward(self, x: Tensor) -> Tensor:
            y = activation(self.inside(x))
            for layer in self.mixing:
                y = y + layer(y)
            for _ in range(number % 4):
                y = y - y.mean(dim=(1, 2), keepdim=True)
            out: Tensor = self.outside(y)
            return out


def _make_gate(number: int) -> None:
    activation = _ACTIVATIONS[number % len(_ACTIVATIONS)]
    knobs = {"reduction": Knob(4, choices=(2, 4))} if number % 5 == 0 else {}

    @register("gate", f"toy_gate_{number:02}", paper=_PAPER, kinds=("image",), knobs=knobs)
    class Gate(nn.Module):
        def __init__(self, context: Context, reduction: int = 4) -> None:
            super().__init__()
            inner = max(1, context.width // reduction)
            self.low, self.high = Linear(context.width, inner), Linear(inner, context.width)

        def forward(self, x: Tensor, mixer: Any) -> Tensor:
            factor = x.mean(dim=(1, 2), keepdim=True) if number % 2 else x
            gated: Tensor = mixer(x) * activation(self.high(self.low(factor)))
            return gated


def _make_channel_mixer(number: int) -> None:
    activation = _ACTIVATIONS[number % len(_ACTIVATIONS)]
    knobs = {"expansion": Knob(2.0, choices=(1.0, 2.0))} if number % 5 == 0 else {}

    @register("channel_mixer", f"toy_channel_mixer_{number:02}", paper=_PAPER, kinds=("image",), knobs=knobs)
    class ChannelMixer(nn.Module):
        def __init__(self, context: Context, expansion: float = 2.0) -> None:
            super().__init__()
            hidden = int(context.width * expansion)
            self.up, self.down = Linear(context.width, hidden), Linear(hidden, context.width)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            for _ in range(1 + number % 3):
                y = activation(y)
            out: Tensor = self.down(y)
            return out


class _Rounded(Linear):
    """A projection whose weights are rounded to so many bits, each row by itself."""

    bits = 8

    def forward(self, x: Tensor) -> Tensor:
        levels = 2.0 ** (self.bits - 1) - 1
        step = self.weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / levels
        weight = self.weight + (torch.round(self.weight / step) * step - self.weight).detach()
        return F.linear(x, weight, self.bias)


class _Stored(nn.Module):
    """What is stored of a rounded projection: integers, a step for each row, the bias."""

    def __init__(self, layer: _Rounded) -> None:
        super().__init__()
        levels = 2.0 ** (layer.bits - 1) - 1
        step = layer.weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-8) / levels
        self.register_buffer("weight", torch.round(layer.weight / step).to(torch.int8))
        self.register_buffer("step", step)
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.step, self.bias)


@dataclass(frozen=True)
class _Policy:
    bits: int

    def prepare(self, module: nn.Module) -> nn.Module:
        def rounded(layer: Linear | Conv) -> nn.Module:
            if type(layer) is Linear:
                layer.__class__ = _Rounded  # on the same parameters under the same names
                layer.bits = self.bits
            return layer

        return replace_projections(module, rounded)

    def deploy(self, module: nn.Module) -> nn.Module:
        return replace_projections(module, lambda layer: _Stored(layer) if isinstance(layer, _Rounded) else layer)

    def weight_bytes(self, module: nn.Module) -> int:
        return deployed_bytes(self, module)

    def why_not(self, device: str, runtime: str) -> str:
        return ""

    def instead(self, device: str, runtime: str) -> str:
        return "float32"


def _make_policy(number: int) -> None:
    @register("quant", f"toy_policy_{number}", paper=_PAPER)
    @dataclass(frozen=True)
    class Policy(_Policy):
        bits: int = 2 + number % 7


def toys() -> dict[str, list[str]]:
    """Register the toys, and return their names by axis."""
    for number in range(NUM_MIXERS):
        _make_mixer(number)
    for number in range(NUM_GATES):
        _make_gate(number)
    for number in range(NUM_CHANNEL_MIXERS):
        _make_channel_mixer(number)
    for number in range(NUM_POLICIES):
        _make_policy(number)
    return {axis: registry.names(axis, "toy_*") for axis in ("mixer", "gate", "channel_mixer", "quant")}


def _choices(axis: str, names: list[str]) -> list[Any]:
    """Every operator, with all that its knobs may be."""
    found: list[Any] = []
    for name in names:
        knobs: Mapping[str, Knob] = registry.get(axis, name).knobs
        found.append({"name": name, **{knob: list(k.choices or ()) for knob, k in knobs.items()}} if knobs else name)
    return found


def space_of_toys(names: Mapping[str, list[str]], depth: int = 3) -> dict[str, Any]:
    """The default space's two stages, with all toys in every block and each branch's policy chosen by itself."""
    block = {axis: _choices(axis, names[axis]) for axis in ("mixer", "gate", "channel_mixer")}
    block["quant"] = {"mixer": names["quant"], "channel_mixer": names["quant"]}
    return {
        "stem": {"name": "conv", "kernel_size": 3, "stride": 1, "position": "learned"},
        "norm": "layer",
        "stages": [
            {"width": [4, 8, 16, 32], "depth": list(range(1, depth + 1)), "block": block},
            {"width": [8, 16, 32], "depth": list(range(1, depth + 1)), "downsample": "patch", "block": block},
        ],
    }


def rate(predictor: LatencyPredictor, space: SearchSpace, count: int, seed: int = 5) -> dict[str, float]:
    """Architectures a second of `predict_many`, its tables made before."""
    encoded = space.sample_many(count, np.random.default_rng(seed))
    predictor.predict_many(encoded[:10], space)
    found = []
    for _ in range(7):
        begun = time.perf_counter()
        predictor.predict_many(encoded, space)
        found.append(count / (time.perf_counter() - begun))
    return {"median": round(statistics.median(found)), "min": round(min(found)), "max": round(max(found))}


def grow(io: IOSpec, directory: Path, budget_s: float, measure: MeasureConfig) -> dict[str, Any]:
    """Everything that a space of eighty operators and nine policies must go through, each with its seconds."""
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], _Result]) -> _Result:
        begun = time.perf_counter()
        result = work()
        seconds[name] = round(time.perf_counter() - begun, 2)
        print(f"{name}: {seconds[name]:.2f} s", file=sys.stderr, flush=True)
        return result

    names = toys()
    plain = space_of_toys(names)
    space = timed("read the space", lambda: SearchSpace.from_dict(plain))
    timed("check it, as `nas space check` does", lambda: (check_space(space, io), check_tables(space, io)))
    size = timed("count it exactly", space.size)
    corners = {
        f"{end} {metric}": timed(
            f"{end} {metric}", lambda metric=metric, end=end: cost_corner(space, io, metric, largest=end == "largest")
        ).value
        for metric in METRICS
        for end in ("smallest", "largest")
    }
    own = SpaceUnits(space, io)
    units = timed("tables without numbers", lambda: own.units)
    settings = ProfileConfig(budget_s=budget_s, measure=measure)
    predictor = timed("profile", lambda: profile(space, io, directory=directory, config=settings, plain=plain))
    path = directory / f"{predictor.device}.{predictor.tag}.npz"
    opened = timed("open the predictor", lambda: LatencyPredictor.open(path))
    timed("one prediction", lambda: opened.predict(space.sample(np.random.default_rng(0)), io))
    timed("tables with numbers", lambda: opened.table_of(space, io))
    speed = rate(opened, space, 500_000)
    store = timed("build the store", lambda: Supernet(space, io, torch.Generator().manual_seed(0)))
    return {
        "operators": {axis: len(found) for axis, found in names.items()},
        "variables": len(space.variables),
        "architectures": f"{size:.3e}",
        "units": len(units),
        "cells": sum(len(cells.units) for cells in own.parts.tables),
        "corners": corners,
        "seconds": seconds,
        "profile": {
            "units": predictor.meta["num_units"],
            "networks": predictor.meta["num_networks"],
            "held_out": predictor.accuracy,
            "half_width_log": predictor.half_width,
        },
        "predictor_bytes": path.stat().st_size,
        "table_bytes": path.with_suffix(".csv").stat().st_size,
        "predict_many_per_second": speed,
        "store_parameters": sum(parameter.numel() for parameter in store.parameters()),
    }
