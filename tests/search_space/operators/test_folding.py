"""Batch norms in inference form."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.cost import cost, op_cost
from mixnas.search_space.formats.safetensors import load_network, save_network
from mixnas.search_space.network import IOSpec, Network
from mixnas.search_space.operators.folding import Folded, declared, fold, foldable
from mixnas.search_space.operators.layers import Conv, DepthwiseConv, Linear
from mixnas.search_space.operators.quantization.policy import policy_of, stored_bytes
from mixnas.search_space.registry import Context

from ...contracts.cases import Whole, cases

GRID = Context(8, (4, 6), "image")


class Pair(nn.Module):
    folds = (("norm", "layer"),)

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.layer, self.norm = layer, nn.BatchNorm1d(channels)

    def forward(self, x):
        y = self.layer(x)
        return self.norm(y.flatten(0, -2)).view(y.shape)


def pair(layer: nn.Module, channels: int) -> Pair:
    """Statistics, factors and biases that would hide nothing."""
    made = Pair(layer, channels).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (made.norm.weight, made.norm.running_var):
            tensor.uniform_(0.3, 3, generator=generator)
        for tensor in (made.norm.bias, made.norm.running_mean):
            tensor.uniform_(-2, 2, generator=generator)
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda bias: (Linear(8, 5, bias=bias), 5),
        lambda bias: (Conv(8, 6, 3, 2, padding=1, bias=bias), 6),
        lambda bias: (Conv(8, 8, 3, padding=1, groups=4, bias=bias), 8),
        lambda bias: (DepthwiseConv(GRID, 3, bias=bias), 8),
    ],
    ids=["linear", "strided", "grouped", "depthwise"],
)
def test_a_folded_norm_computes_the_same_and_is_gone(make, bias):
    before = pair(*make(bias))
    x = torch.randn(3, 4, 6, 8, generator=torch.Generator().manual_seed(1))
    after = fold(copy.deepcopy(before))
    with torch.no_grad():
        torch.testing.assert_close(after(x), before(x), rtol=1e-5, atol=1e-5)
    assert isinstance(after.norm, Folded) and set(after.state_dict()) == {"layer.weight", "layer.bias"}
    again = copy.deepcopy(after.state_dict())
    assert all(torch.equal(tensor, again[name]) for name, tensor in fold(after).state_dict().items())


def test_a_layer_that_a_policy_stores_otherwise_keeps_its_norm():
    for name, folds in (("fp32", True), ("bf16", False), ("w8a8", False)):
        operator = policy_of(Op(name)).prepare(pair(Linear(8, 5), 5))
        assert bool(foldable(operator)) is folds and list(declared(operator)) == [("norm", "layer")]


@pytest.mark.parametrize("axis", [axis for axis in registry.AXES if axis != "quant"])
def test_of_every_operator_what_is_declared_folds_exactly_and_is_counted(axis):
    for case in cases(axis, knobs=False):
        operator = case.build().eval()
        norms = [
            path for path, m in operator.named_modules() if path and isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        assert {norm for norm, _ in declared(operator)} <= set(norms), f"{case}: no norm of that name"
        x = case.example(3)
        with torch.no_grad():
            before = Whole(case, operator)(x)
            torch.testing.assert_close(Whole(case, fold(operator))(x), before, rtol=1e-5, atol=1e-5)
        counted = op_cost(case.axis, case.op, None, case.before, case.after, case.tokens)
        assert counted.weight_bytes == stored_bytes(operator)


def folding_network(quant: str) -> Network:
    block = {"mixer": {"name": "ssm", "expansion": 1, "state": 8}, "channel_mixer": "mlp", "quant": quant}
    plain = {"stem": "conv", "stages": [{"width": 8, "block": block}]}
    io = IOSpec("image", (4, 6), 3, 5)
    return Network(Architecture.from_dict(plain), io, generator=torch.Generator().manual_seed(0)).eval()


@pytest.mark.parametrize("quant", ["fp32", "bf16"])
def test_a_deployed_network_is_folded_counted_and_comes_back(tmp_path, quant):
    network = folding_network(quant)
    x = network.io.example(3)
    with torch.no_grad():
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm1d)):
            norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(0.5, 2)
        before = network(x)
        unfolded = copy.deepcopy(network).deploy(folded=False)
        after = network.deploy()(x)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5 if quant == "fp32" else 1e-2)
    assert any(isinstance(m, Folded) for m in network.modules()) is (quant == "fp32")
    assert stored_bytes(network) == cost(network.architecture, network.io).weight_bytes
    for name, one in (("folded", network), ("as_before", unfolded)):  # a file of before says nothing of it
        save_network(tmp_path / name, one)
        with torch.no_grad():
            assert torch.equal(load_network(tmp_path / name)(x), one(x))


def test_a_norm_that_merges_leaves_one_factor_and_one_summand():
    context = Context(8, (5,), "sequence")
    operator = nn.Sequential(registry.get("norm", "prep_batch").build(context, steps=3), Linear(8, 4)).eval()
    with torch.no_grad():
        for tensor in operator[0].state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    after = fold(copy.deepcopy(operator))
    assert set(after.state_dict()) == {"0.scale", "0.shift", "1.weight", "1.bias"}
    with torch.no_grad():
        torch.testing.assert_close(after(x), operator(x), rtol=1e-6, atol=1e-6)
        assert torch.equal(fold(copy.deepcopy(after))(x), after(x))
