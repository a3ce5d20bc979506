"""Every operator that is proved to be the real one, against what proves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixnas.search_space import registry

from .proofs import COUNTS, PROOFS, Count, Proof, register_all

register_all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
@pytest.mark.parametrize("proof", PROOFS, ids=str)
def test_equals_its_oracle(proof: Proof, dtype):
    assert proof.difference(dtype) <= (proof.single if dtype == torch.float32 else proof.double)


@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_has_the_published_number_of_parameters(count: Count):
    assert count.rebuilt() == count.published


@pytest.mark.parametrize("axis", [axis for axis in registry.AXES if axis != "quant"])
def test_every_operator_is_proved_and_on_the_page(axis):
    page = (Path(__file__).parents[3] / "docs" / "operators.md").read_text()
    names = [
        name for name in registry.names(axis) if (axis, name) != ("channel_mixer", "none")
    ]  # that one is not built
    assert set(names) - {p.name for p in PROOFS if p.axis == axis} == set()
    assert [name for name in names if f"| `{name}` |" not in page] == []
