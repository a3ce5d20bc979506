from typing import ClassVar

import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels import selective_scan as module
from mixnas.kernels.selective_scan import selective_scan, selective_scan_reference
from mixnas.kernels.testing import Case, KernelContract, compare, relative_error


def _case(B, L, E, N, bias=-2.0):
    tensors = {"x": (B, L, E), "step": (B, L, E), "a": (E, N), "b": (B, L, N), "c": (B, L, N)}
    return Case(
        tensors={**tensors, "skip": (E,), "step_bias": (E,)},
        prepare={"a": lambda a: -a.exp(), "step_bias": lambda drawn: drawn + bias},
    )


class TestSelectiveScan(KernelContract):
    function = staticmethod(selective_scan)
    reference = staticmethod(selective_scan_reference)
    operator = "mixnas::selective_scan"
    registered = _case(2, 3, 4, 2)
    cases: ClassVar = {
        "two parts": _case(2, 19, 37, 5),
        "a span exactly": _case(1, 16, 3, 16),
        "sixteen states": _case(1, 37, 24, 16),
        "small steps": _case(1, 9, 4, 2, bias=-8.0),
        "one token": _case(1, 1, 1, 1),
        "in segments, the last one short": _case(1, 67, 5, 3),
        "in segments that fill the sequence": _case(1, 80, 5, 3),
    }


def test_sequences_are_split_only_where_programs_are_few():
    assert module.segment_length(8192, module.ENOUGH_WARPS) == 8192
    assert module.segment_length(63, 1) == 63, "a short one is soon done"
    assert module.segment_length(8192, 64) == 256
    assert module.segment_length(196, 12) == 16, "of a span at least"
    assert module.segment_length(83, 3) % module.SPAN == 0


@pytest.mark.parametrize("length", [1, 3, 64, 65, 131])
def test_aten_form_crosses_spans(length):
    tensors = _case(2, length, 5, 4).draw(torch.float32)
    with dispatch.backend("aten"):
        actual = selective_scan(**tensors)
    expected = selective_scan_reference(**{name: t.double() for name, t in tensors.items()})
    assert relative_error(actual, expected) < 1e-5


def test_aten_form_of_large_inputs_goes_in_pieces(monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 300)
    tensors = _case(3, 13, 5, 4).draw(torch.float32)
    expected = selective_scan_reference(**{name: t.double() for name, t in tensors.items()})
    with dispatch.backend("aten"):
        assert relative_error(selective_scan(**tensors), expected) < 1e-5
        case = _case(3, 13, 5, 4)
        errors = compare(selective_scan, selective_scan_reference, case, torch.float32)
    assert max(errors.values()) < 1e-5


def test_aten_form_takes_16_bits():
    tensors = _case(1, 40, 4, 4).draw(torch.bfloat16)
    expected = selective_scan_reference(**{name: t.double() for name, t in tensors.items()})
    with dispatch.backend("aten"):
        actual = selective_scan(**tensors)
    assert actual.dtype == torch.bfloat16 and relative_error(actual, expected) < 1e-2


def test_large_steps_neither_overflow_nor_leak():
    tensors = _case(1, 18, 4, 4).draw(torch.float32)
    tensors["step"] = tensors["step"] * 100.0
    expected = selective_scan_reference(**{name: t.double() for name, t in tensors.items()})
    for backend in ("triton", "aten"):
        with dispatch.backend(backend):
            assert relative_error(selective_scan(**tensors), expected) < 1e-5


def test_is_causal():
    tensors = _case(1, 24, 3, 4).draw(torch.float32)
    changed = {name: t.clone() for name, t in tensors.items()}
    for name in ("x", "step", "b", "c"):
        changed[name][:, 17:] *= 0.5
    for backend in ("triton", "aten", "reference"):
        with dispatch.backend(backend):
            before, after = selective_scan(**tensors), selective_scan(**changed)
        assert torch.equal(before[:, :17], after[:, :17])
        assert not torch.equal(before[:, 17:], after[:, 17:])


def test_says_what_is_wrong():
    tensors = _case(1, 4, 3, 2).draw(torch.float32)
    with pytest.raises(ValueError, match="b has shape"):
        selective_scan(**{**tensors, "b": tensors["b"][:, :3]})
