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


class TestBF16(PolicyContract):
    quant = Op("bf16")
    share = 0.0  # computing rounds the weights as storing does


@pytest.fixture
def toy_policy() -> Iterator[None]:
    with toy.registered():
        yield


@pytest.mark.usefixtures("toy_policy")
class TestToyInt8(PolicyContract):
    quant = toy.QUANT
