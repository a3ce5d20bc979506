"""Counting a forward: bit widths apart, and a GPU's launches without a GPU."""

import torch
from torch import nn

from mixnas.kernels import dispatch, work
from mixnas.predictors.latency import counting
from mixnas.predictors.latency.counting import count
from mixnas.predictors.latency.features import Works
from mixnas.predictors.latency.gpus import GPUS
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import ABOUT
from mixnas.search_space.cost import unit_cost
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

from .spaces import PLAIN

H200 = GPUS["nvidia-h200"]


def _units(size=(32, 32)):
    return list(SpaceUnits(SearchSpace.from_dict(PLAIN), IOSpec("image", size, 3, 10)).units)


def test_a_units_launches_are_known_without_a_gpu():
    launched = set()
    here, there = Works(), Works(gpu=H200)
    for unit in _units():
        on_cpu, on_gpu = here.of(unit), there.of(unit)
        assert not any(name.startswith((ABOUT, "launches", "mixnas", "raw.")) for name in on_cpu)
        assert on_gpu == Works(gpu=H200).of(unit), "counts do not depend on values"
        assert not any(name.startswith("raw.") for name in on_gpu)
        kernels = {name.removesuffix(".launches") for name in on_gpu if name.endswith(".launches")}
        launched |= kernels
        assert on_gpu["launches"] >= sum(on_gpu[f"{kernel}.launches"] for kernel in kernels)
        if not kernels:
            continue
        assert all(on_gpu[f"{k}.waves"] >= on_gpu[f"{k}.launches"] for k in kernels)
        assert all(on_gpu[f"{k}.rounds.bytes"] >= on_gpu[f"{k}.bytes"] for k in kernels)
        assert on_gpu[f"{ABOUT}registers"] >= 16 and 1 <= on_gpu[f"{ABOUT}resident_warps"] <= 64
        assert 0 <= on_gpu.get(f"{ABOUT}tail", 0) < 1 and 0 < on_gpu[f"{ABOUT}blocks_busy"] <= 1
    assert {"norm_forward", "depthwise_forward", "glu_forward"} <= launched
    assert dispatch.choose(torch.zeros(1)) == "aten", "counting leaves the choice of implementation as it was"


def test_counts_by_shapes_alone_are_those_of_a_real_forward(monkeypatch):
    real = counting._Counter
    large = _units((64, 64))  # large enough that every way of counting is taken
    works = Works(16, gpu=H200)
    by_shapes = [works.of(unit) for unit in large]
    monkeypatch.setattr(counting, "_Counter", lambda shapes_only: real(False))
    works = Works(16, gpu=H200)
    assert by_shapes == [works.of(unit) for unit in large]


def test_work_grows_with_the_batch():
    (unit, *_) = [u for u in _units() if u.role == "token" and "dwconv" in str(u) and u.before.width == 64]
    one, many = Works(1, gpu=H200).of(unit), Works(256, gpu=H200).of(unit)
    assert many["depthwise_forward.waves"] > one["depthwise_forward.waves"]
    assert many[f"{ABOUT}blocks_busy"] > one[f"{ABOUT}blocks_busy"]
    # The convolution multiplies; the norm only scales and adds.
    assert one["depthwise_forward.rounds.macs"] > 0 and "norm_forward.rounds.macs" not in one
    assert one["kernel.depthwise_conv2d.macs"] == unit_cost(unit).macs


@work.counted(lambda x, weight: x.numel() * weight.shape[-1])
def int8_linear(x, weight):
    return x.float() @ weight.float()


@work.counted(lambda x, weight: 2 * x.numel() * weight.shape[-1], bits=4)
def packed_linear(x, weight):
    return torch.cat([x.float() @ weight.float()] * 2, dim=-1)


class _Integers(nn.Module):
    def forward(self, x):
        eight, packed = (torch.zeros(x.shape[-1], 4, dtype=dtype) for dtype in (torch.int8, torch.uint8))
        torch._int_mm(torch.ones(32, 8, dtype=torch.int8), torch.ones(8, 8, dtype=torch.int8))
        return int8_linear(x, eight), packed_linear(x, packed), x @ eight.float(), x.bfloat16() @ eight.bfloat16()


def test_bit_widths_have_columns_of_their_own():
    sums, _ = count(_Integers(), (torch.randn(2, 8),))
    macs = {name: value for name, value in sums.items() if name.endswith(".macs")}
    assert macs == {
        "kernel.int8_linear.8.macs": 64,
        "kernel.packed_linear.4.macs": 128,
        "matmul.macs": 64,
        "matmul.16.macs": 64,
        "matmul.8.macs": 32 * 8 * 8,
    }
