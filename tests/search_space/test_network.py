from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost, unit_cost
from mixnas.search_space.enumeration import check_space
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import Network, checked_plan
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search_space.units import IOSpec, plan

from .spaces import IMAGE, IOS, covering, everything


def architectures(kind: str, times: int = 1) -> list[Architecture]:
    return covering(everything(kind), times, seed=7)


@pytest.mark.parametrize("kind", IOS)
def test_every_registered_operator_is_among_those_that_are_tested(kind):
    found = {
        (axis, op.name) for a in architectures(kind) for _, unit in plan(a, IOS[kind]) for axis, op in unit.choices
    }
    for axis in ("norm", "mixer", "gate", "channel_mixer", "quant"):
        serving = {name for name in registry.names(axis) if kind in registry.get(axis, name).kinds}
        assert serving - {"none"} <= {name for a, name in found if a == axis}


@pytest.mark.parametrize("kind", IOS)
def test_networks_answer_in_the_shape_of_the_head(kind):
    io = IOS[kind]
    for architecture in architectures(kind, 2):
        network = Network(architecture, io)
        output = network(io.example(2))
        assert output.shape == ((2, io.num_outputs) if io.head == "pool" else (2, *io.size, io.num_outputs))
        output.square().mean().backward()
        missing = [name for name, p in network.named_parameters() if p.grad is None]
        assert not missing, f"{missing} have no part in the output of {architecture}"


@pytest.mark.parametrize("kind", IOS)
def test_parameters_and_macs_are_exact(kind):
    io = IOS[kind]
    for architecture in architectures(kind):
        # The one counts the pairs that attend, and multiplies whole boxes and masks on a CPU; the other makes its taps
        # anew only where something is learned, as here.
        if any(name in str(architecture) for name in ("neighborhood_attention", "tv_conv")):
            continue
        network = Network(architecture, io).eval()
        counted = cost(architecture, io)
        assert counted.params == sum(p.numel() for p in network.parameters())
        # The math backend, because torch's counter does not know the fused attention of a CPU.
        # With gradients, because it does not know products of integers either: those are floats then.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.enable_grad():
            network(io.example(1))
        assert counter.get_total_flops() == 2 * counted.macs, str(architecture)


def test_causal_networks_do_not_see_the_future():
    io = IOS["causal"]
    for architecture in architectures("causal", 2):
        network = Network(architecture, io).eval()
        x = io.example(1)
        changed = x.clone()
        changed[0, 7:] = (changed[0, 7:] + 1) % io.in_features
        with torch.no_grad():
            before, after = network(x), network(changed)
        torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-5, atol=1e-5)
        assert not torch.equal(before[:, 7:], after[:, 7:])


def test_equal_seeds_give_equal_networks_and_the_global_generator_is_left_alone():
    architecture = architectures("image")[0]
    state = torch.random.get_rng_state()
    first, second, third = (Network(architecture, IMAGE, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    vectors = [torch.nn.utils.parameters_to_vector(n.parameters()) for n in (first, second, third)]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])


def test_a_network_is_its_units_in_order():
    architecture = architectures("image")[0]
    network = Network(architecture, IMAGE).eval()
    x = y = IMAGE.example(2)
    for (planned, unit), (name, module) in zip(plan(architecture, IMAGE), network.units(), strict=True):
        assert planned == name and y.shape[1:] == (*unit.before.size, unit.before.width)
        y = module(y)
    assert torch.equal(y, network(x))


def test_cost_is_the_sum_over_units():
    for architecture in architectures("image")[:5]:
        units = plan(architecture, IMAGE)
        counted = cost(architecture, IMAGE)
        assert sum(unit_cost(unit).macs for _, unit in units) == counted.macs
        assert sum(unit_cost(unit).params for unit in dict(units).values()) == counted.params


def one_block(**block):
    block = {"mixer": "identity", "channel_mixer": "mlp"} | block
    return Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]})


def test_recursion_repeats_one_set_of_weights():
    once, thrice = one_block(mixer="dwconv"), one_block(mixer="dwconv", recursion=3)
    assert cost(once, IMAGE).params == cost(thrice, IMAGE).params
    ends = [name for name, _ in plan(once, IMAGE)]
    token, channel = ends[1:3]
    assert [name for name, _ in plan(thrice, IMAGE)] == [ends[0], *[token, channel] * 3, ends[-1]]
    network, single = Network(thrice, IMAGE).eval(), Network(once, IMAGE).eval()
    single.load_state_dict(network.state_dict())
    modules = dict(single.units())
    x = IMAGE.example(2)
    y = modules["stem"](x)
    for _ in range(3):
        y = modules[channel](modules[token](y))
    torch.testing.assert_close(network(x), modules["head"](y))


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
    with torch.no_grad():
        assert torch.equal(network.deploy()(x), after)  # a second time changes nothing


def test_each_branch_has_its_own_policy():
    quant = {"mixer": "fp32", "channel_mixer": "bf16"}
    network = Network(one_block(mixer="attention", quant=quant), IMAGE).deploy()
    dtypes = {name: {p.dtype for p in module.parameters()} for name, module in network.units()}
    assert dtypes["stages.0.blocks.0.token"] == {torch.float32}
    assert dtypes["stages.0.blocks.0.channel"] == {torch.float32, torch.bfloat16}  # its norm keeps its precision


@pytest.mark.parametrize("kind", IOS)
def test_every_operator_answers_alike_before_and_after_it_is_deployed(kind):
    io = IOS[kind]
    for architecture in architectures(kind):
        network = Network(architecture, io, generator=torch.Generator().manual_seed(0)).eval()
        deployed = copy.deepcopy(network).deploy()
        x = io.example(2, generator=torch.Generator().manual_seed(1))
        # Unit by unit: through many, a last digit that is rounded to another whole number would grow.
        for (name, unit), (_, after) in zip(network.units(), deployed.units(), strict=True):
            with torch.no_grad():
                y, found = unit(x), after(x)
            # What folding moves by its last digit may be rounded to the next number of bfloat16.
            share = 2**-9 if torch.bfloat16 in {p.dtype for p in after.parameters()} else 1e-5
            allowed = share * max(1.0, y.abs().max().item())
            torch.testing.assert_close(found, y, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")
            x = y
        network = deployed
        stored = sum(t.numel() * t.element_size() for t in network.state_dict().values())
        assert stored == cost(architecture, io).weight_bytes, str(architecture)


@pytest.mark.parametrize(
    ("block", "io", "says"),
    [
        ({"mixer": {"name": "attention", "heads": 3}}, "image", r"blocks\.0\.token: mixer .*3 heads do not divide"),
        ({"gate": "se"}, "causal", "'se' does not serve causal tasks .* Allowed: .*none, output_sigmoid"),
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
        checked_plan(Architecture.from_dict(plain), IOS[io])


def test_a_dense_head_is_checked_where_it_answers():
    """Behind a strided stem there are fewer tokens than targets (`IOSpec.grid`)."""
    io = IOSpec("image", (8, 8), 3, 5, head="token")
    space = {"stem": {"name": "conv", "stride": 2}, "stages": [{"width": 8, "block": {"mixer": "identity",
             "channel_mixer": "none"}}]}  # fmt: skip
    with pytest.raises(ConfigError, match=r"head 'token' answers on 4x4, and the task's targets are 8x8.*task\.stride"):
        check_space(SearchSpace.from_dict(space), io)
    with pytest.raises(ConfigError, match="answers on 4x4"):
        Network(Architecture.from_dict(space), io)
    coarse = IOSpec("image", (8, 8), 3, 5, head="token", out_size=(4, 4))
    check_space(SearchSpace.from_dict(space), coarse)
    assert Network(Architecture.from_dict(space), coarse)(coarse.example(2)).shape == (2, 4, 4, 5)
    assert IOSpec.from_plain(coarse.to_plain()) == coarse and IOSpec.from_plain(io.to_plain()) == io


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


def test_a_network_of_raw_inputs_brings_them_to_mean_0_and_variance_1_itself():
    """With the same weights it answers to x as the plain one to (x - mean) / std: whole, unit by unit, shared."""
    plain = IOSpec("image", (8, 8), 3, 5)
    raw = replace(plain, mean=(100.0, 3.0, -7.0), std=(50.0, 0.25, 2.0))
    assert IOSpec.from_plain(json.loads(json.dumps(raw.to_plain()))) == raw
    space = SearchSpace.from_dict(
        {"stem": "conv", "stages": [{"width": [8, 16], "block": {"mixer": "attention", "channel_mixer": "none"}}]}
    )
    supernets = [Supernet(space, io, torch.Generator().manual_seed(0)) for io in (plain, raw)]
    architecture = space.sample(np.random.default_rng(0))
    x = raw.example(64, generator=torch.Generator().manual_seed(1))
    assert 80 < x[..., 0].mean() < 120 and x[..., 1].std() < 0.3
    standard = (x - torch.tensor(raw.mean)) / torch.tensor(raw.std)
    for made in ("subnet", "extract"):
        expected, network = (getattr(supernet, made)(architecture).eval() for supernet in supernets)
        assert network.state_dict().keys() == expected.state_dict().keys()
        assert torch.allclose(network(x), expected(standard), atol=1e-5)
        y = x
        for _, unit in network.units():
            y = unit(y)
        assert torch.equal(y, network(x))
        assert dict(network.units())["stem"] is network.stem


@pytest.mark.parametrize(
    "wrong", [{"mean": (1.0,) * 3}, {"mean": (1.0,) * 3, "std": (1.0, 0.0, 1.0)}, {"mean": (1.0,), "std": (1.0,)},
              {"mean": (float("nan"),) * 3, "std": (1.0,) * 3}]
)  # fmt: skip
def test_a_mean_and_spread_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match="mean and std are given together, 3 finite numbers"):
        IOSpec("image", (8, 8), 3, 5, **wrong)
