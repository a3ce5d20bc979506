"""The contract of the policies there are, and of one with a parameter of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.operators.quantization.policy import uniform, with_policies
from mixnas.search_space.units import IOSpec, plan

from ....contracts.policy import PolicyContract
from . import toy


class TestFP32(PolicyContract):
    quant = Op("fp32")
    share = 0.0
    changes = False
    every_kind = False  # what is the same for all policies is tried with the two of w8a8


class TestBF16(PolicyContract):
    quant = Op("bf16")
    share = 0.0  # computing rounds the weights as storing does
    every_kind = False


class TestW8A8(PolicyContract):
    quant = Op("w8a8")
    share = 0.0  # judged with the arithmetic that is deployed


class TestW8A8Static(PolicyContract):
    quant = Op("w8a8_static", (("observer", "minmax"),))
    share = 0.0


class TestW8A16(PolicyContract):
    quant = Op("w8a16")
    share = 0.0
    every_kind = False


class TestW4A16(PolicyContract):
    quant = Op("w4a16", (("group", 16),))
    share = 0.0
    every_shape = False
    every_kind = False


class TestW4A8(PolicyContract):
    quant = Op("w4a8", (("step", "found"),))
    share = 0.0
    every_kind = False


class TestW4A8Learned(PolicyContract):
    quant = Op("w4a8", (("step", "learned"),))
    share = 0.0
    every_shape = False
    every_kind = False


class TestFP8(PolicyContract):
    quant = Op("fp8")
    share = 0.0
    every_kind = False


class TestSparse24(PolicyContract):
    quant = Op("sparse24", (("bits", 32),))
    share = 0.0
    every_shape = False
    every_kind = False


class TestSparse24Int8(PolicyContract):
    quant = Op("sparse24", (("bits", 8),))
    share = 0.0
    every_shape = False
    every_kind = False


@pytest.fixture
def toy_policy() -> Iterator[None]:
    with toy.registered():
        yield


@pytest.mark.usefixtures("toy_policy")
class TestToyInt8(PolicyContract):
    quant = toy.QUANT
    every_kind = False


def test_policies_go_to_the_branches_that_they_are_named_for():
    blocks = [{"mixer": "attention", "channel_mixer": "mlp", "quant": "fp32"}] * 2
    architecture = Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "blocks": blocks}]})
    io, quant = IOSpec("image", (8, 8), 1, 10), Op("w8a8")
    changed = with_policies(architecture, {"stages.0.blocks.1.token": quant})
    assert {name for name, unit in plan(changed, io) if unit.quant == quant} == {"stages.0.blocks.1.token"}
    names = [name for name, unit in plan(architecture, io) if unit.quant is not None]
    assert with_policies(architecture, dict.fromkeys(names, quant)) == uniform(architecture, quant)
    assert with_policies(architecture, {}) == architecture
