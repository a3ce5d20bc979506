"""The contract of the policies there are, and of one with a parameter of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mixnas.search_space.architecture import Op

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
