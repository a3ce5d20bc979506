import contextlib
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from mixnas.kernels import configs, dispatch
from mixnas.kernels.gated_linear_attention import gated_linear_attention, gated_linear_attention_reference
from mixnas.kernels.testing import LIMITS, Case, KernelContract, compare, relative_error


def _decay(sharpness):
    return lambda x: F.logsigmoid(x * sharpness) / 4


def _case(B, L, H, D, E, *, both, sharpness=1.0):
    tensors = {"q": (B, L, H, D), "k": (B, L, H, D), "v": (B, L, H, E), "log_decay": (B, L, H, D)}
    prepare = {"log_decay": _decay(sharpness)}
    if both:
        tensors["reverse_log_decay"] = tensors["log_decay"]
        prepare["reverse_log_decay"] = _decay(sharpness)
    return Case(tensors=tensors, prepare=prepare)


class TestGatedLinearAttention(KernelContract):
    function = staticmethod(gated_linear_attention)
    reference = staticmethod(gated_linear_attention_reference)
    operator = "mixnas::gated_linear_attention"
    registered = _case(2, 17, 1, 3, 2, both=False)
    cases: ClassVar = {
        "causal": _case(2, 37, 1, 5, 7, both=False),
        "both directions": _case(1, 63, 2, 8, 16, both=True),
        "keys in parts": _case(1, 17, 1, 31, 13, both=True),
        "strong decays": _case(1, 33, 1, 4, 8, both=True, sharpness=300.0),  # e^{-b} of a chunk overflows float32
        "one token": _case(1, 1, 1, 1, 1, both=True),
        "a chunk exactly": _case(1, 16, 1, 16, 16, both=False),
        "many chunks": _case(1, 100, 1, 4, 5, both=True),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_64_as_on_a_gpu(dtype):
    launch = {"BLOCK_C": 64, "BLOCK_D": 32, "BLOCK_E": 32, "num_warps": 1, "num_stages": 1}
    kernels = ("states", "forward", "gradient")
    case = _case(1, 150, 1, 40, 24, both=True, sharpness=4.0)
    with contextlib.ExitStack() as stack:
        for kernel in kernels:
            stack.enter_context(configs.override(f"gated_linear_attention_{kernel}", launch))
        stack.enter_context(dispatch.backend("triton"))
        errors = compare(gated_linear_attention, gated_linear_attention_reference, case, dtype)
    assert max(errors.values()) < LIMITS[dtype], errors


@pytest.mark.parametrize("case", ["both directions", "many chunks"])
def test_rounds_no_worse_than_the_recurrence_in_bfloat16(case):
    """Both against float64: scores, states and factors in bfloat16 cost less than a state that is kept in it."""
    case = TestGatedLinearAttention.cases[case]
    with dispatch.backend("triton"):
        ours = compare(gated_linear_attention, gated_linear_attention_reference, case, torch.bfloat16)
    naive = compare(gated_linear_attention_reference, gated_linear_attention_reference, case, torch.bfloat16)
    assert all(ours[name] < naive[name] for name in ours), (ours, naive)


def test_operands_of_several_types_are_multiplied_in_float32():
    tensors = _case(1, 20, 1, 5, 6, both=False).draw(torch.bfloat16)
    tensors["v"] = tensors["v"].float()
    with dispatch.backend("triton"):
        actual = gated_linear_attention(**tensors)
    expected = gated_linear_attention_reference(**{name: x.double() for name, x in tensors.items()})
    assert actual.dtype == torch.float32 and relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("length", [300, 64])
def test_aten_form_crosses_chunks(length):
    case = _case(1, length, 2, 4, 6, both=True, sharpness=4.0)
    tensors = case.draw(torch.float32)
    with dispatch.backend("aten"):
        actual = gated_linear_attention(**tensors)
    expected = gated_linear_attention_reference(**{name: x.double() for name, x in tensors.items()})
    assert relative_error(actual, expected) < 1e-5


def test_is_causal_without_reverse_decays():
    tensors = _case(1, 40, 1, 4, 4, both=False).draw(torch.float32)
    changed = {name: x.clone() for name, x in tensors.items()}
    for x in changed.values():
        x[:, 25:] *= 0.5
    for backend in ("triton", "aten", "reference"):
        with dispatch.backend(backend):
            before, after = gated_linear_attention(**tensors), gated_linear_attention(**changed)
        assert torch.equal(before[:, :25], after[:, :25])
        assert not torch.equal(before[:, 25:], after[:, 25:])


def test_says_what_is_wrong():
    q = torch.zeros(1, 3, 2, 4)
    with pytest.raises(ValueError, match="expected"):
        gated_linear_attention(q, q[:, :2], q, q)
    with pytest.raises(ValueError, match="reverse_log_decay"):
        gated_linear_attention(q, q, q, q, q[:, :1])
