"""Every operator that is proved to be the real one, against what proves it."""

from __future__ import annotations

import json
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


ROOT = Path(__file__).parents[3]


def built(axis: str) -> list[str]:
    """Operators that there is something of."""
    return [name for name in registry.names(axis) if (axis, name) != ("channel_mixer", "none")]


@pytest.mark.parametrize("axis", [axis for axis in registry.AXES if axis != "quant"])
def test_every_operator_is_proved_and_on_the_page(axis):
    page = (ROOT / "docs" / "operators.md").read_text()
    assert set(built(axis)) - {proof.name for proof in PROOFS if proof.axis == axis} == set()
    assert [name for name in built(axis) if f"| `{name}` |" not in page] == []
    assert "| - |" not in page and "|  |" not in page, "a cell says nothing, not even why"


@pytest.mark.parametrize("axis", ["mixer", "gate", "channel_mixer", "norm"])
def test_every_operator_was_timed_beside_its_oracle(axis):
    """As `benchmarks/operator_times.py` measured last."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "operator-times.json").read_text())["operators"]
    for name in set(built(axis)) - {"identity", "none"}:
        kinds = measured.get(f"{axis} {name}", {})
        expected = {"image", "sequence"} & set(registry.get(axis, name).kinds)
        if name == "random_mixing":  # 3136 tokens are more than it takes
            expected -= {"image"}
        assert set(kinds) == expected, f"{axis} {name}: python benchmarks/operator_times.py --only {name}"
