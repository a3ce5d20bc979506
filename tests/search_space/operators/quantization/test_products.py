"""Paths of products: right or refused, chosen by a table, and seen from outside."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from mixnas.search_space.architecture import Op
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.operators.layers import Conv, Linear
from mixnas.search_space.operators.quantization import products
from mixnas.search_space.operators.quantization.affine import dequantize, quantize_rows
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.operators.quantization.projected import calibrating
from mixnas.search_space.operators.quantization.ran import products_that_ran, what_ran

QUANTS = {
    "w8a8": Op("w8a8"),
    "w8a8_static": Op("w8a8_static", (("observer", "minmax"),)),
    "w8a16": Op("w8a16"),
    "w4a16": Op("w4a16", (("group", 32),)),
    "w4a8": Op("w4a8", (("step", "found"),)),
    "fp8": Op("fp8"),
    "sparse24": Op("sparse24", (("bits", 32),)),
}
FROM_FLOAT = {
    "w8a8": 0.02,
    "w8a8_static": 0.03,
    "w8a16": 0.01,
    "w4a16": 0.2,
    "w4a8": 0.25,
    "fp8": 0.08,
    "sparse24": 0.6,
}
"""How far a normal layer's outputs may be from float32's, as a share of their norm."""


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Has `products` read another table."""

    def use(shapes):
        path = tmp_path / "products.json"
        path.write_text(json.dumps({"provenance": {"device": "made up"}, "shapes": shapes}))
        monkeypatch.setattr(products, "TABLE", path)
        products._table.cache_clear()
        products._chosen.cache_clear()

    yield use
    monkeypatch.undo()
    products._table.cache_clear()
    products._chosen.cache_clear()


def layer_and_input(inputs=96, outputs=40, rows=7):
    generator = torch.Generator().manual_seed(0)
    layer = Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
        layer.bias.normal_(generator=generator)
    return layer, torch.randn(rows, inputs, generator=generator)


def deployed(quant, layer, x):
    prepared = policy_of(quant).prepare(copy.deepcopy(layer)).eval()
    with torch.no_grad(), calibrating(prepared):
        prepared(x)
    return prepared, policy_of(quant).deploy(copy.deepcopy(prepared))


@pytest.mark.parametrize("path", products.CHECKED)
def test_every_path_is_right_here(path):
    for inputs, outputs in ((2, 1), (3, 5), (17, 31), (128, 96)):
        assert products.fits(path, inputs) and products.works(path, inputs, outputs)


def test_a_size_at_which_torchs_product_is_wrong_goes_elsewhere():
    """`_int_mm` of one input answers with memory that nobody wrote (torch 2.13): found by the contract of policies."""
    assert products.choose("int8", 5, 1, 8) == products.choose("int8_static", 5, 1, 8) == "float32"
    layer, x = Linear(1, 8), torch.randn(5, 1)
    _, stored = deployed(QUANTS["w8a8"], layer, x)
    with torch.no_grad():
        assert (stored(x) - layer(x)).abs().max() <= 0.02 * layer(x).abs().max()


def test_a_wrong_path_is_refused_and_another_taken(table, monkeypatch, caplog):
    shapes = [{"rows": 8, "inputs": 8, "outputs": 8, "paths": {"int8": "int_mm"}}]
    table(shapes)
    assert products.choose("int8", 8, 8, 8) == "int_mm"
    monkeypatch.setitem(products.CHECKED, "int_mm", lambda x, w: (x.int() @ w.int().T).clamp(max=32767))
    products.works.cache_clear()
    table(shapes)
    assert products.choose("int8", 8, 8, 8) == "float32"
    assert "it is wrong here" in caplog.text
    assert products.choose("int8", 8, 1024, 8) == "int32"  # more than float32 holds exactly
    monkeypatch.undo()
    products.works.cache_clear()


def test_the_nearest_shape_of_the_table_decides(table):
    table(
        [
            {"rows": 1, "inputs": 64, "outputs": 64, "paths": {"weight_int8": "int8pack"}},
            {"rows": 1024, "inputs": 64, "outputs": 64, "paths": {"weight_int8": "widened"}},
        ]
    )
    assert products.choose("weight_int8", 4, 64, 64) == "int8pack"
    assert products.choose("weight_int8", 400, 64, 64) == "widened"
    assert products.choose("weight_int4", 400, 64, 64) == "widened"  # not in the table: the first there is
    assert products.which_table() == {"file": "products.json", "measured": True, "device": "made up"}
    assert "at the shapes" in policy_of(QUANTS["w8a16"]).instead("cpu", "eager")
    with products.only(weight_int8="int8pack"):
        assert products.choose("weight_int8", 400, 64, 64) == "int8pack"


def test_unknown_products_and_paths_are_named():
    with pytest.raises(ConfigError, match="no product is called 'int9'"), products.only(int9="int_mm"):
        pass
    with pytest.raises(ConfigError, match="int8 has no path"), products.only(int8="onednn"):
        pass


@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
def test_a_layer_is_near_its_floats_on_every_path(quant):
    layer, x = layer_and_input()
    prepared, stored = deployed(quant, layer, x)
    with torch.no_grad():
        exact, expected = layer(x), prepared(x)
        assert torch.equal(stored(x), expected)
        assert (expected - exact).norm() <= FROM_FLOAT[quant.name] * exact.norm()
        for kind, paths in products.KINDS.items():
            for path in paths:
                with products.only(**{kind: path}):
                    same, fresh = copy.deepcopy(stored)(x), prepared(x)
                assert torch.equal(same, fresh)  # judged as deployed
                assert (same - expected).norm() <= 3e-3 * expected.norm(), (kind, path)
        assert (policy_of(quant).prepare(copy.deepcopy(layer)).train()(x) - expected).norm() <= 1e-5 * exact.norm() or (
            quant.name == "w8a8_static"
        )
    with torch.enable_grad():  # fake quantization: as near as rounding of sums goes
        assert (prepared(x) - expected).norm() <= 2e-3 * expected.norm()


def test_integer_sums_are_exact_whatever_the_path():
    layer, x = layer_and_input()
    _, stored = deployed(QUANTS["w8a8"], layer, x)
    whole, scale = quantize_rows(x, 8)
    sums = (whole.int() @ stored.weight.int().T).double()
    with torch.no_grad():
        expected = sums * scale.double() * stored.scale.double() + layer.bias.double()
        found = stored(x)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        for path in ("float32", "int32"):
            with products.only(int8=path):
                assert torch.equal(stored(x), found)


@pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)
def test_a_convolution_is_a_product_of_its_windows(quant):
    layer = Conv(32, 12, 3, 2, padding=1)
    x = torch.randn(2, 6, 9, 32, generator=torch.Generator().manual_seed(0))
    prepared, stored = deployed(quant, layer, x)
    with torch.no_grad():
        exact, found = layer(x), stored(x)
        assert torch.equal(found, prepared(x)) and found.shape == exact.shape
        assert (found - exact).norm() <= FROM_FLOAT[quant.name] * exact.norm()


def test_a_convolution_in_groups_stays_as_it_is():
    layer = Conv(8, 8, 3, padding=1, groups=2)
    assert policy_of(QUANTS["w8a8"]).prepare(layer) is layer


def test_layers_that_read_the_same_quantize_it_once():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.q(x) + self.k(x) + self.v(2 * x)

    module = policy_of(QUANTS["w8a8"]).deploy(policy_of(QUANTS["w8a8"]).prepare(Three())).eval()
    entered = []
    policy = type(module.q.policy)
    original = policy.enter
    x = torch.randn(5, 16)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(policy, "enter", lambda self, rows, ready: entered.append(1) or original(self, rows, ready))
        first = module(x)
        assert len(entered) == 2  # x, and twice x
        x.mul_(3)  # the same tensor, in the next forward, holds something else
        second = module(x)
        assert len(entered) == 4
        assert torch.equal(copy.deepcopy(module)(x), second) and not torch.equal(first, second)


def test_what_ran_is_seen_and_changes_with_the_path():
    layer, x = layer_and_input()
    _, stored = deployed(QUANTS["w8a8"], layer, x)

    def multiplied():
        return {ran.operation: ran.multiplies for ran in products_that_ran(stored, x)}

    assert multiplied() == {"aten::_int_mm": "int8"}
    with products.only(int8="float32"):
        assert set(multiplied().values()) == {"float"}
    assert all(0 < ran.share < 1 for ran in products_that_ran(stored, x))
    assert products_that_ran(layer, x)[0].multiplies == "float"


def test_shares_are_those_of_the_median_forward():
    """They were of 3 forwards together: another program in one of them moved all."""

    class Held(torch.nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls % 5 == 2:
                torch.bmm(torch.ones(1, 300, 300), torch.ones(1, 300, 300))
            return torch.mm(x, x)

    ran = {one.operation: one for one in what_ran(Held(), torch.ones(64, 64))}
    assert sum(one.share for one in ran.values()) == pytest.approx(1.0)
    assert ran["aten::mm"].calls == 1 and ran["aten::mm"].share > 0.5 and "aten::bmm" not in ran


def test_looking_at_what_ran_writes_nothing(capfd):
    """torch's profiler writes lines of its own, past Python's streams."""
    assert products_that_ran(torch.nn.Linear(8, 8), torch.ones(4, 8))
    assert capfd.readouterr() == ("", "")


def test_what_is_widened_says_so():
    assert "widened" in policy_of(QUANTS["fp8"]).instead("cpu", "eager")
    assert policy_of(QUANTS["fp8"]).instead("cuda", "eager") == ""
    assert policy_of(QUANTS["w8a8"]).instead("cpu", "eager") == ""
    for device in ("cpu", "cuda"):
        assert "dense" in policy_of(QUANTS["sparse24"]).instead(device, "eager")


def test_bytes_of_each_policy():
    """96 to 40 with a bias of 160 bytes."""
    found = {}
    for name, quant in QUANTS.items():
        found[name] = policy_of(quant).weight_bytes(policy_of(quant).prepare(Linear(96, 40)))
    assert found == {
        "w8a8": 96 * 40 + 4 * 40 + 160,
        "w8a8_static": 96 * 40 + 4 * 40 + 8 + 160,
        "w8a16": 96 * 40 + 4 * 40 + 160,
        "w4a16": 96 * 40 // 2 + 2 * 3 * 40 + 160,
        "w4a8": 96 * 40 // 2 + 4 * 40 + 160,
        "fp8": 96 * 40 + 4 * 40 + 160,
        "sparse24": 96 * 40 * 2 + 96 * 40 // 8 + 160,
    }


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="w4a16 cannot take a Linear layer, 96 to 4: groups of 64 do not divide 96"):
        policy_of(Op("w4a16", (("group", 64),))).prepare(Linear(96, 4))
    with pytest.raises(ConfigError, match="sparse24 cannot take a Linear layer, 6 to 4: 4 does not divide 6 inputs"):
        policy_of(QUANTS["sparse24"]).prepare(Linear(6, 4))


def test_ranges_that_were_not_found_are_not_deployed():
    prepared = policy_of(QUANTS["w8a8_static"]).prepare(Linear(8, 8))
    prepared.ranges.scale.zero_()
    with pytest.raises(ConfigError, match="policy w8a8_static, input_scale of a layer: 1 of 1 scales are no positive"):
        policy_of(QUANTS["w8a8_static"]).deploy(prepared)


@pytest.mark.parametrize("wrong", [0.0, float("nan")])
@pytest.mark.parametrize("name", ["w8a8", "w4a16", "w8a8_static"])
def test_scales_of_a_file_that_are_no_positive_number_are_refused(name, wrong):
    policy = policy_of(QUANTS[name])
    stored, again = (policy.deploy(policy.prepare(Linear(32, 8))) for _ in range(2))
    state = {key: tensor.clone() for key, tensor in stored.state_dict().items()}
    again.load_state_dict(state)
    state["scale"].view(-1)[-1] = wrong
    with pytest.raises(ConfigError, match=rf"policy {name}, scale of a layer: 1 of 8 scales are no positive number"):
        again.load_state_dict(state)


def test_dequantized_weights_are_what_is_stored():
    layer, x = layer_and_input()
    _, stored = deployed(QUANTS["w8a16"], layer, x)
    whole, scale = quantize_rows(layer.weight.detach(), 8)
    assert torch.equal(dequantize(stored.weight, stored.scale.unsqueeze(1)), dequantize(whole, scale))


def test_a_learned_step_begins_as_what_is_found_and_gets_better():
    layer, x = layer_and_input(inputs=512, outputs=24, rows=600)
    with torch.no_grad():
        layer.weight.copy_(layer.weight * layer.weight.abs())  # long tails: the greatest makes a step too coarse
        wanted = layer(x)
    found = policy_of(QUANTS["w4a8"]).prepare(copy.deepcopy(layer)).eval()
    learned = policy_of(Op("w4a8", (("step", "learned"),))).prepare(copy.deepcopy(layer)).eval()
    steps = learned.steps
    with torch.no_grad():
        before = learned(x)
        assert torch.equal(before, found(x))
    optimizer = torch.optim.Adam(steps.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        with torch.enable_grad():
            (learned(x) - wanted).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = learned(x)
        assert (after - wanted).norm() < 0.9 * (before - wanted).norm()
        stored = policy_of(Op("w4a8", (("step", "learned"),))).deploy(copy.deepcopy(learned))
        assert torch.equal(stored(x), after)
        assert "log" not in "".join(stored.state_dict())
