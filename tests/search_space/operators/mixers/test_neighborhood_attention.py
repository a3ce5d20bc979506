from __future__ import annotations

import pytest
import torch

from mixnas.kernels.neighborhood_attention import attended
from mixnas.search_space.architecture import Op
from mixnas.search_space.cost import op_cost
from mixnas.search_space.operators.mixers.attention import Attention
from mixnas.search_space.operators.mixers.neighborhood_attention import NeighborhoodAttention
from mixnas.search_space.registry import Context


def neighborhood(width, size, kind, **knobs):
    knobs = {"heads": 2, "window": 3, "stride": 1, "dilation": 1} | knobs
    return NeighborhoodAttention(Context(width, size, kind), **knobs)


def test_number_of_parameters_is_that_of_attention():
    assert sum(p.numel() for p in neighborhood(64, (8, 8), "image").parameters()) == 4 * 64**2 + 4 * 64


@pytest.mark.parametrize(("size", "kind"), [((4, 5), "image"), ((6,), "sequence"), ((6,), "causal")])
def test_a_window_as_wide_as_the_grid_is_full_attention(size, kind):
    mixer = neighborhood(8, size, kind, window=9)
    full = Attention(Context(8, size, kind), heads=2)
    full.load_state_dict(mixer.state_dict())
    x = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer(x), full(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("knobs", [{}, {"window": 4, "stride": 2}, {"dilation": 2}, {"window": 2, "dilation": 3}])
def test_each_token_sees_its_window(knobs):
    size = (7, 6)
    mixer = neighborhood(4, size, "image", **knobs)
    x = torch.randn(1, *size, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    options = [(knobs.get("window", 3), knobs.get("stride", 1), knobs.get("dilation", 1))] * 2
    along = [attended(n, *option) for n, option in zip(size, options, strict=True)]
    y = mixer(x)
    for i, j in ((0, 0), (3, 2), (6, 5)):
        (grad,) = torch.autograd.grad(y[0, i, j].sum(), x, retain_graph=True)
        seen = {(int(a), int(b)) for a, b in grad[0].abs().sum(-1).nonzero()}
        assert seen == {(a, b) for a in along[0][i] for b in along[1][j]} | {(i, j)}


def test_no_token_sees_a_later_one():
    mixer = neighborhood(8, (17,), "causal", window=5, stride=2, dilation=2)
    x = torch.randn(1, 17, 8, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 9:] += 1.0
    before, after = mixer(x), mixer(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def test_macs_are_those_of_the_pairs_that_attend():
    def macs(size: tuple[int, ...], kind: str, **knobs: int) -> int:
        options = {"heads": 4, "window": 3, "stride": 1, "dilation": 1, **knobs}
        op = Op("neighborhood_attention", tuple(sorted(options.items())))
        context = Context(16, size, kind)
        projections = 4 * context.tokens * 16 * 16
        return op_cost("mixer", op, None, context, context).macs - projections

    assert macs((8, 8), "image") == 2 * 64 * 9 * 16
    assert macs((8, 8), "image", window=99) == 2 * 64 * 64 * 16
    assert macs((5,), "causal") == 2 * (1 + 2 + 3 * 3) * 16
