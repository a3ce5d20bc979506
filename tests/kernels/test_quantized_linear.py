import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels.quantized_linear import (
    FP8,
    int4_linear,
    int4_linear_reference,
    pack_int4,
    scaled_linear,
    scaled_linear_reference,
    unpack_int4,
)
from mixnas.kernels.testing import relative_error

SHAPES = {"one": (1, 16, 1), "odd": (63, 33, 7), "blocks": (70, 128, 65), "prime": (3, 97, 31)}


def scaled(dtype, shape, x_scale=True, shift=True):
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int8:
        x = torch.randint(-128, 128, (rows, inputs), generator=generator).to(dtype)
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator).to(dtype)
    else:
        x, weight = (torch.randn(n, inputs, generator=generator).to(dtype) for n in (rows, outputs))
    scales = [torch.rand(n, generator=generator) + 0.1 for n in (rows, outputs)]
    added = torch.randn(outputs, generator=generator) if shift else None
    return x, scales[0] if x_scale else None, weight, scales[1], added


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("backend", ["triton", "aten"])
def test_scaled_linear(dtype, shape, backend):
    for x_scale, shift in ((True, True), (False, True), (True, False)):
        operands = scaled(dtype, shape, x_scale, shift)
        with dispatch.backend(backend):
            found = scaled_linear(*operands)
        assert found.dtype == torch.float32 and found.shape == (shape[0], shape[2])
        assert relative_error(found, scaled_linear_reference(*operands, torch.float64)) <= 1e-6


@pytest.mark.parametrize("shape", [(1, 32, 1), (63, 64, 7), (5, 256, 33)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_int4_linear(shape, dtype):
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(0)
    for group in (32, 64, 128):
        if inputs % group:
            continue
        whole = torch.randint(-8, 8, (outputs, inputs), generator=generator, dtype=torch.int8)
        scale = (torch.rand(outputs, inputs // group, generator=generator) + 0.1).bfloat16()
        x, bias = torch.randn(rows, inputs, generator=generator).to(dtype), torch.randn(outputs, generator=generator)
        packed = pack_int4(whole, group)
        expected = int4_linear_reference(x.double(), packed, scale, bias.double())
        for backend in ("triton", "aten"):
            with dispatch.backend(backend):
                found = int4_linear(x, packed, scale, bias)
            assert found.dtype == dtype
            assert relative_error(found, expected) <= (1e-6 if dtype == torch.float32 else 1e-2), backend


@pytest.mark.parametrize(("inputs", "group"), [(64, 32), (33, 11), (5, 5), (16, 16)])
def test_packing_is_undone(inputs, group):
    whole = torch.randint(-8, 8, (9, inputs), dtype=torch.int8)
    packed = pack_int4(whole, group)
    assert packed.dtype == torch.uint8 and packed.shape == (9, inputs // group * -(-group // 2))
    assert torch.equal(unpack_int4(packed, inputs, group), whole)


def test_operators_are_registered_and_exported():
    packed, scale = pack_int4(torch.zeros(4, 64, dtype=torch.int8), 32), torch.ones(4, 2)
    calls = {
        "scaled_linear": (scaled_linear, scaled(torch.int8, (5, 16, 4))),
        "int4_linear": (int4_linear, (torch.randn(3, 64), packed, scale, torch.ones(4))),
    }
    for name, (function, operands) in calls.items():

        class Call(torch.nn.Module):
            def forward(self, *operands, function=function):
                return function(*operands)

        with dispatch.backend("triton"), torch.no_grad():
            program = torch.export.export(Call(), operands)
            seen = [str(node.target) for node in program.graph.nodes if "mixnas" in str(node.target)]
            assert seen == [f"mixnas.{name}.default"]
            torch.testing.assert_close(program.module()(*operands), function(*operands))
            operator = getattr(torch.ops.mixnas, name).default
            arguments = (*operands, torch.float32) if name == "scaled_linear" else operands
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_says_what_is_wrong():
    x, scale = torch.zeros(2, 8, dtype=torch.int8), torch.ones(3)
    with pytest.raises(ValueError, match="both must be int8"):
        scaled_linear(x, None, torch.zeros(3, 8), scale, None)
    with pytest.raises(ValueError, match=r"must be \(M, K\) and \(N, K\)"):
        scaled_linear(x, None, torch.zeros(3, 7, dtype=torch.int8), scale, None)
    with pytest.raises(ValueError, match="3 groups do not divide"):
        int4_linear(torch.zeros(2, 32), torch.zeros(4, 16, dtype=torch.uint8), torch.ones(4, 3), None)
    with pytest.raises(ValueError, match=r"packed is \(4, 8\), not \(4, 16\)"):
        int4_linear(torch.zeros(2, 32), torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 1), None)
