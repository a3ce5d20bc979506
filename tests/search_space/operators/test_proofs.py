"""Every operator that is proved to be the real one, against what proves it."""

from __future__ import annotations

import pytest
import torch

from .proofs import (
    COUNTS,
    PROOFS,
    Count,
    Proof,
    attention,
    channel_mixers,
    convolutions,
    earlier,
    gates,
    global_mixers,
)

assert all((attention, channel_mixers, convolutions, earlier, gates, global_mixers))  # they register their proofs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("proof", PROOFS, ids=str)
def test_equals_its_oracle(proof: Proof, dtype):
    assert proof.difference(dtype) <= (proof.single if dtype == torch.float32 else proof.double)


@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_has_the_published_number_of_parameters(count: Count):
    assert count.rebuilt() == count.published
