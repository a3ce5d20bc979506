"""The quantizers equal torch's bit by bit; the observers find the ranges that they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixnas.search_space.errors import ConfigError
from mixnas.search_space.operators.quantization.affine import (
    EPSILON,
    affine_parameters,
    check_scales,
    dequantize,
    fake_rows,
    integer_range,
    learned_step,
    quantize,
    quantize_rows,
    symmetric_scale,
)
from mixnas.search_space.operators.quantization.observers import OBSERVERS, LeastError, MinMax, Percentile

ODD = torch.tensor([0.0, -0.0, 1e-30, -1e30, 1e30, 3.0, -3.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5])


def values(seed: int, *shape: int) -> torch.Tensor:
    """Normal numbers, halves among them, and the odd ones in front."""
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[::3] = (4 * x.view(-1)[::3]).round() / 8
    x.view(-1)[: len(ODD)] = ODD
    return x


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 20),
    scale=st.sampled_from([1.0, 0.25, 0.037, 1e-3, 7.3]),
    zero_point=st.integers(-20, 20),
    bits=st.sampled_from([2, 4, 8]),
    signed=st.booleans(),
)
def test_one_scale_is_torchs(seed, scale, zero_point, bits, signed):
    low, high = integer_range(bits, signed=signed)
    zero_point = min(max(zero_point, low), high)
    x, step = values(seed, 40, 8), torch.tensor(scale)
    whole = quantize(x, step, zero_point, low, high)
    assert whole.dtype == (torch.int8 if signed else torch.uint8) and low <= whole.min() and whole.max() <= high
    assert torch.equal(
        dequantize(whole, step, zero_point), torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    )
    assert dequantize(quantize(torch.zeros(1), step, zero_point, low, high), step, zero_point) == 0  # exactly


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 20), bits=st.sampled_from([4, 8]), rows=st.integers(1, 9), columns=st.integers(13, 40))
def test_a_scale_a_row_is_torchs_and_loses_nothing(seed, bits, rows, columns):
    x = values(seed, rows, columns)
    x[x.abs() > 1e6] = 0
    whole, scale = quantize_rows(x, bits)
    low, high = integer_range(bits, narrow=True)
    zeros = torch.zeros(rows, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale.squeeze(1), zeros, 0, low, high)
    assert torch.equal(dequantize(whole, scale), expected)
    assert torch.equal(fake_rows(x, bits), expected)
    assert torch.equal(scale, symmetric_scale(x, bits)) and whole.abs().max() <= high
    assert (dequantize(whole, scale) - x).abs().max() <= 0.501 * scale.max()


def test_rounding_is_half_to_even_and_saturates():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 300.0, -300.0])
    assert quantize(x, torch.tensor(1.0), 0, -128, 127).tolist() == [0, 2, 2, 0, -2, 127, -128]
    assert quantize(x, torch.tensor(1.0), 3, 0, 255).tolist() == [3, 5, 5, 3, 1, 255, 0]


def test_a_row_of_zeros_stays_so():
    whole, scale = quantize_rows(torch.zeros(2, 5), 8)
    assert not whole.any() and (scale == EPSILON).all()


def test_gradients_pass_within_the_range():
    x = torch.tensor([[0.3, -1.0, 0.7]], requires_grad=True)
    (fake_rows(x, 8) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[1.0, 2.0, 3.0]]


@settings(max_examples=60, deadline=None)
@given(a=st.floats(-50, 50), b=st.floats(-50, 50), signed=st.booleans())
def test_a_range_contains_zero_exactly(a, b, signed):
    low, high = integer_range(8, signed=signed)
    least, greatest = torch.tensor(min(a, b)), torch.tensor(max(a, b))
    scale, zero_point = affine_parameters(least, greatest, low, high)
    assert low <= zero_point <= high
    assert dequantize(quantize(torch.zeros(()), scale, zero_point, low, high), scale, zero_point) == 0
    for end in (least, greatest):
        assert (dequantize(quantize(end, scale, zero_point, low, high), scale, zero_point) - end).abs() <= scale


def test_observers_find_what_they_say():
    x = torch.linspace(-1, 3, 10001)
    with_outlier = torch.cat([x, torch.tensor([1000.0])])
    found = {}
    for name, make in OBSERVERS.items():
        observer = make()
        observer.see(with_outlier[:5000])
        observer.see(with_outlier[5000:])
        found[name] = [bound.item() for bound in observer.range()]
    assert found["minmax"] == [-1, 1000]
    assert found["percentile"][0] == pytest.approx(-1, abs=1e-3)
    assert found["percentile"][1] < 1000
    assert found["mse"][0] >= -1 and found["mse"][1] <= 1000


def test_the_mean_square_error_is_the_least_of_those_tried():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    x[7] = 20  # of so many, one may saturate

    def error(observer):
        for part in x.split(50_000):
            observer.see(part)
        scale, zero_point = affine_parameters(*observer.range(), 0, 255)
        return (dequantize(quantize(x, scale, zero_point, 0, 255), scale, zero_point) - x).square().mean()

    best = error(LeastError())
    assert best < error(MinMax()) and best <= error(Percentile())


@pytest.mark.parametrize("make", OBSERVERS.values(), ids=OBSERVERS)
def test_what_has_no_range_is_refused(make):
    with pytest.raises(ConfigError, match="the calibration set is empty"):
        make().range()
    with pytest.raises(ConfigError, match="the calibration set is empty"):
        make().see(torch.empty(0, 3))
    with pytest.raises(ConfigError, match="2 of 3 activations of the calibration set are NaN or infinite"):
        make().see(torch.tensor([1.0, float("nan"), float("inf")]))


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_no_positive_number_are_refused(wrong):
    check_scales(torch.tensor([1.0, 2.0]), "here")
    with pytest.raises(ConfigError, match="here: 1 of 2 scales are no positive number"):
        check_scales(torch.tensor([1.0, wrong]), "here")


def test_a_learned_steps_gradient_is_the_published_one():
    """Esser et al. 2019, equations 2 to 5, written out."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 40, generator=generator, dtype=torch.float64).requires_grad_()
    step = (0.1 + torch.rand(5, 1, generator=generator, dtype=torch.float64)).requires_grad_()
    back = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    found = learned_step(weight, step, 4)
    found.backward(back)
    with torch.no_grad():
        ratio = weight / step
        torch.testing.assert_close(found, ratio.clamp(-7, 7).round() * step, rtol=1e-12, atol=1e-12)
        inside = ratio.abs() < 7
        assert 0 < inside.float().mean() < 1
        torch.testing.assert_close(weight.grad, back * inside)
        of_step = torch.where(inside, ratio.round() - ratio, ratio.sign() * 7)
        torch.testing.assert_close(step.grad, (back * of_step).sum(1, keepdim=True) / (40 * 7) ** 0.5)
