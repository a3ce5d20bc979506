from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.enumeration import check_space, cost_corner
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import BlockModule, Network, build_unit, cost, plan, unit_cost
from mixnas.search_space.space import SearchSpace

from .spaces import IMAGE, IOS, everything, small


def architectures(kind: str, count: int) -> list[Architecture]:
    rng = np.random.default_rng(7)
    return [everything(kind).sample(rng) for _ in range(count)]


@pytest.mark.parametrize("kind", IOS)
def test_networks_answer_in_the_shape_of_the_head(kind):
    io = IOS[kind]
    for architecture in architectures(kind, 25):
        network = Network(architecture, io)
        output = network(io.example(2))
        assert output.shape == ((2, io.num_outputs) if io.head == "pool" else (2, *io.size, io.num_outputs))
        output.square().mean().backward()
        missing = [name for name, p in network.named_parameters() if p.grad is None]
        assert not missing, f"{missing} have no part in the output of {architecture}"


@pytest.mark.parametrize("kind", IOS)
def test_parameters_and_macs_are_exact(kind):
    io = IOS[kind]
    for architecture in architectures(kind, 25):
        if "neighborhood_attention" in str(architecture):
            continue  # counts the pairs that attend; the CPU form multiplies whole boxes and masks
        network = Network(architecture, io).eval()
        counted = cost(architecture, io)
        assert counted.params == sum(p.numel() for p in network.parameters())
        # The math backend, because torch's counter does not know the fused attention of a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            network(io.example(1))
        assert counter.get_total_flops() == 2 * counted.macs, str(architecture)


def test_causal_networks_do_not_see_the_future():
    io = IOS["causal"]
    for architecture in architectures("causal", 25):
        network = Network(architecture, io).eval()
        x = io.example(1)
        changed = x.clone()
        changed[0, 7:] = (changed[0, 7:] + 1) % io.in_features
        with torch.no_grad():
            before, after = network(x), network(changed)
        torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-5)
        assert not torch.equal(before[:, 7:], after[:, 7:])


def test_equal_seeds_give_equal_networks_and_the_global_generator_is_left_alone():
    architecture = architectures("image", 1)[0]
    state = torch.random.get_rng_state()
    first, second, third = (Network(architecture, IMAGE, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    vectors = [torch.nn.utils.parameters_to_vector(n.parameters()) for n in (first, second, third)]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])


def test_a_network_is_its_units_in_order():
    architecture = architectures("image", 1)[0]
    network = Network(architecture, IMAGE).eval()
    x = y = IMAGE.example(2)
    for unit, (name, module) in zip(plan(architecture, IMAGE), network.units(), strict=True):
        assert unit.name == name and y.shape[1:] == (*unit.before.size, unit.before.width)
        y = module(y)
    assert torch.equal(y, network(x))


def test_cost_is_the_sum_over_units_whatever_their_place():
    architecture = architectures("image", 1)[0]
    units = plan(architecture, IMAGE)
    assert sum(unit_cost(unit).macs for unit in units) == cost(architecture, IMAGE).macs
    assert all(unit_cost(unit.key) == unit_cost(unit) for unit in units)


def one_block(**block):
    block = {"mixer": "identity", "channel_mixer": "mlp"} | block
    return Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]})


def test_recursion_repeats_one_set_of_weights():
    once, thrice = one_block(mixer="dwconv"), one_block(mixer="dwconv", recursion=3)
    assert cost(once, IMAGE).params == cost(thrice, IMAGE).params
    unit = plan(thrice, IMAGE)[1]
    module = build_unit(unit).eval()
    assert isinstance(module, BlockModule)
    single = build_unit(plan(once, IMAGE)[1]).eval()
    single.load_state_dict(module.state_dict())
    x = torch.randn(2, 8, 8, 8)
    torch.testing.assert_close(module(x), single(single(single(x))))


def test_bf16_is_deployed_without_changing_the_answer():
    architecture = one_block(mixer={"name": "attention", "heads": 2}, quant="bf16")
    network = Network(architecture, IMAGE).eval()
    x = IMAGE.example(2)
    with torch.no_grad():
        before = network(x)
        stored_before = sum(p.numel() * p.element_size() for p in network.parameters())
        after = network.deploy()(x)
    assert torch.equal(before, after) and before.dtype == torch.float32
    stored = sum(p.numel() * p.element_size() for p in network.parameters())
    assert stored == cost(architecture, IMAGE).weight_bytes < stored_before


@pytest.mark.parametrize(
    ("block", "io", "says"),
    [
        ({"mixer": {"name": "attention", "heads": 3}}, "image", r"stages\.0\.blocks\.0: .*3 heads do not divide"),
        ({"gate": "se"}, "causal", "'se' does not serve causal tasks .* Allowed: none, output_sigmoid"),
    ],
)  # fmt: skip
def test_an_operator_that_cannot_stand_there_is_refused(block, io, says):
    stem = "conv" if io == "image" else "embedding"
    block = {"mixer": "identity", "channel_mixer": "mlp"} | block
    plain = {"stem": stem, "stages": [{"width": [8, 16], "block": block}]}
    with pytest.raises(ConfigError, match=says):
        check_space(SearchSpace.from_dict(plain), IOS[io])
    plain["stages"][0]["width"] = 8
    with pytest.raises(ConfigError, match=says):
        plan(Architecture.from_dict(plain), IOS[io])


def test_a_stem_that_does_not_fit_the_input_is_refused():
    block = {"mixer": "identity", "channel_mixer": "mlp"}
    for stem, io, says in [
        ("embedding", "image", "does not serve image tasks"),
        ("linear", "causal", "reads features, and the task gives tokens"),
        ({"name": "conv", "stride": 3}, "image", "stride 3 does not divide the input size 8x8"),
    ]:
        space = SearchSpace.from_dict({"stem": stem, "stages": [{"width": [8, 16], "block": block}]})
        with pytest.raises(ConfigError, match=says):
            check_space(space, IOS[io])


def test_corners_are_the_extremes_of_the_whole_space():
    plain = small()
    plain["stages"].append({"width": [4, 8], "downsample": ["none", "patch"], "block": plain["stages"][0]["block"]})
    plain["stages"][0]["block"] = plain["stages"][0]["block"] | {"gate": "none"}
    space = SearchSpace.from_dict(plain)
    sampled = [cost(a, IMAGE) for a in space.decode_many(space.sample_many(300, np.random.default_rng(0)))]
    for metric in ("params", "macs", "weight_bytes"):
        low, high = (cost_corner(space, IMAGE, metric, largest=largest) for largest in (False, True))
        for corner in (low, high):
            assert space.contains(corner.architecture)
            assert getattr(cost(corner.architecture, IMAGE), metric) == corner.value
        values = [getattr(c, metric) for c in sampled]
        assert low.value <= min(values) and max(values) <= high.value
