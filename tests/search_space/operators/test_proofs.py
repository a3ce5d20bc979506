"""Every operator that is proved to be the real one, against what proves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixnas.search_space import registry

from .proofs import (
    COUNTS,
    PROOFS,
    Count,
    Proof,
    attention,
    channel_mixers,
    coarse_attention,
    convolutions,
    earlier,
    gates,
    global_mixers,
    mixtures,
)

assert all((attention, channel_mixers, coarse_attention, convolutions))  # they register their proofs
assert all((earlier, gates, global_mixers, mixtures))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("proof", PROOFS, ids=str)
def test_equals_its_oracle(proof: Proof, dtype):
    assert proof.difference(dtype) <= (proof.single if dtype == torch.float32 else proof.double)


@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_has_the_published_number_of_parameters(count: Count):
    assert count.rebuilt() == count.published


ELSEWHERE = {"convnext", "gla", "identity", "linear_attention", "neighborhood_attention", "none", "pooling", "ssm"} | {
    "inverted_residual",
    "mlp",
    "output_sigmoid",
    "swiglu",
}
"""Operators that other tests prove, in the mixers' folder and by the definition of their parts."""


@pytest.mark.parametrize("axis", ["mixer", "gate", "channel_mixer"])
def test_every_operator_is_proved_and_on_the_page(axis):
    page = (Path(__file__).parents[3] / "docs" / "operators.md").read_text()
    names = registry.names(axis)
    assert {name for name in names if name not in ELSEWHERE} <= {p.name for p in PROOFS if p.axis == axis}
    assert [name for name in names if f"| `{name}` |" not in page and (axis, name) != ("channel_mixer", "none")] == []
