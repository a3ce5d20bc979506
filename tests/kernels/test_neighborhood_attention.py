from typing import ClassVar

import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels import neighborhood_attention as family
from mixnas.kernels.neighborhood_attention import (
    attended,
    neighborhood_attention,
    neighborhood_attention_reference,
    num_pairs,
)
from mixnas.kernels.testing import Case, KernelContract, relative_error
from mixnas.kernels.tools import aot


def _case(size, heads, channels, **options):
    shape = (2, *size, heads, channels)
    return Case(tensors={"q": shape, "k": shape, "v": shape}, options=options)


class TestNeighborhoodAttention(KernelContract):
    function = staticmethod(neighborhood_attention)
    reference = staticmethod(neighborhood_attention_reference)
    operator = "mixnas::neighborhood_attention"
    cases: ClassVar = {
        "image": _case((7, 11), 1, 5, window=(3, 5)),
        "image with stride and dilation": _case((9, 17), 1, 16, window=(4, 3), stride=(2, 3), dilation=(2, 3)),
        "image causal along one": _case((8, 6), 1, 7, window=(5, 3), stride=(5, 3), causal=(True, False)),
        "sequence": _case((83,), 1, 3, window=(7,)),
        "sequence with stride and dilation": _case((131,), 1, 8, window=(6,), stride=(4,), dilation=(5,)),
        "sequence causal": _case((97,), 2, 8, window=(9,), stride=(2,), dilation=(2,), causal=(True,)),
        "window wider than a causal sequence": _case((5,), 1, 4, window=(9,), causal=(True,)),
        "one position": _case((1, 1), 1, 1, window=(1, 1)),
    }


# Operator catalogue b, appendix B: masks of NATTEN's own flex backend. Size, window, stride, dilation, causal, number
# of pairs, keys of query 0, keys of query n // 2, sum over pairs of (7919 q + 104729 k + 13) mod 1009.
_MASKS = [
    ((16,), (5,), (1,), (1,), (False,), 80, [0, 1, 2, 3, 4], [6, 7, 8, 9, 10], 39308),
    ((16,), (5,), (3,), (1,), (False,), 80, [0, 1, 2, 3, 4], [5, 6, 7, 8, 9], 39282),
    ((16,), (4,), (2,), (1,), (False,), 64, [0, 1, 2, 3], [7, 8, 9, 10], 30841),
    ((16,), (5,), (2,), (2,), (False,), 80, [0, 2, 4, 6, 8], [6, 8, 10, 12, 14], 41118),
    ((16,), (6,), (4,), (1,), (True,), 64, [0], [6, 7, 8], 32572),
    ((17,), (5,), (2,), (3,), (False,), 85, [0, 3, 6, 9, 12], [2, 5, 8, 11, 14], 42705),
    ((8, 8), (4, 3), (2, 1), (1, 2), (False, False), 768, [0, 2, 4, 8, 10, 12, 16, 18, 20, 24, 26, 28],
     [24, 26, 28, 32, 34, 36, 40, 42, 44, 48, 50, 52], 388927),
    ((8, 6), (5, 3), (5, 3), (1, 1), (True, False), 486, [0, 1, 2],
     [0, 1, 2, 6, 7, 8, 12, 13, 14, 18, 19, 20, 24, 25, 26], 247291),
]  # fmt: skip


@pytest.mark.parametrize("expected", _MASKS, ids=str)
def test_masks_are_those_of_natten(expected):
    size, window, stride, dilation, causal, pairs, keys_of_0, keys_of_middle, checksum = expected
    along = [attended(*options) for options in zip(size, window, stride, dilation, causal, strict=True)]
    if len(size) == 1:
        keys = along[0]
    else:
        width = size[1]
        keys = [[y * width + x for y in ys for x in xs] for ys in along[0] for xs in along[1]]
    assert sum(map(len, keys)) == num_pairs(size, window, stride, dilation, causal) == pairs
    assert (keys[0], keys[len(keys) // 2]) == (keys_of_0, keys_of_middle)
    assert sum((7919 * q + 104729 * k + 13) % 1009 for q, ks in enumerate(keys) for k in ks) == checksum


def test_kernel_walks_every_pair():
    """Boxes of keys and of queries hold all that is attended, over many settings."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        window, dilation = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(2))
        stride = int(torch.randint(1, window + 1, (), generator=generator))
        n = window * dilation + int(torch.randint(0, 80, (), generator=generator))
        causal = bool(torch.randint(2, (), generator=generator))
        q = torch.randn(1, n, 1, 16, generator=generator)
        k = torch.randn(1, n, 1, 16, generator=generator)
        v = torch.randn(1, n, 1, 16, generator=generator)
        options = {"window": (window,), "stride": (stride,), "dilation": (dilation,), "causal": (causal,)}
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with dispatch.backend("triton"):
            actual = neighborhood_attention(*leaves, **options)
        expected = neighborhood_attention_reference(*leaves, **options)
        grad = torch.randn(expected.shape, generator=generator)
        assert relative_error(actual, expected) < 1e-5, options
        pairs = zip(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
        for one, other in pairs:
            assert torch.allclose(one, other, atol=1e-5), options


def test_aten_form_in_tiles():
    for case in (
        _case((21, 70), 2, 4, window=(5, 7), stride=(2, 1), dilation=(1, 1)),
        _case((40, 30), 1, 4, window=(3, 3), causal=(True, False)),
        _case((1300,), 1, 4, window=(9,), dilation=(2,)),
    ):
        tensors = case.draw(torch.float32)
        with dispatch.backend("aten"):
            actual = neighborhood_attention(**tensors, **case.options)
        expected = neighborhood_attention_reference(**{n: t.double() for n, t in tensors.items()}, **case.options)
        assert relative_error(actual, expected) < 1e-5


def test_full_window_is_full_attention():
    q, k, v = torch.randn(3, 1, 6, 2, 4, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    for backend in ("triton", "aten", "reference"):
        with dispatch.backend(backend):
            actual = neighborhood_attention(q, k, v, (6,))
        torch.testing.assert_close(actual, expected.transpose(1, 2))


def test_more_heads_than_a_grid_holds_are_launched_in_pieces(monkeypatch):
    """The second axis ends at 65,535: 1,024 images with 128 heads are more. In pieces the answer is the same."""
    q = torch.empty(1024, 8, 8, 128, 16, dtype=torch.bfloat16, device="meta")
    options = ([3, 3], [1, 1], [1, 1], [False, False], 1.0)
    launches = aot.launches_of(lambda: family._forward(q, q, q, *options), "any")
    assert [launch.grid[1] for launch in launches] == [511 * 128, 511 * 128, 2 * 128]
    tensors = _case((4, 5), 2, 4).draw(torch.float32)
    with dispatch.backend("triton"):
        whole = neighborhood_attention(**tensors, window=(3, 3))
        monkeypatch.setattr(family, "_MOST_HEADS", 2)
        assert torch.equal(neighborhood_attention(**tensors, window=(3, 3)), whole)


def test_says_what_is_wrong():
    q = torch.zeros(1, 6, 2, 4)
    for options in ({"window": (4,), "dilation": (2,)}, {"window": (3,), "stride": (4,)}, {"window": (0,)}):
        with pytest.raises(ValueError, match="expected 1 <= stride <= window"):
            neighborhood_attention(q, q, q, **options)
    with pytest.raises(ValueError, match="one value for each of 1 dimensions"):
        neighborhood_attention(q, q, q, (3, 3))
    with pytest.raises(ValueError, match="expected one shape"):
        neighborhood_attention(q, q[:, :3], q, (3,))
