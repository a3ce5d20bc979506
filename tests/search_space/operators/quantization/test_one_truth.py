"""What a search judges is what is deployed, saved and loaded again; and exported bytes are predicted bytes.

`benchmarks/quantization.py truth` does the same with 100 architectures.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from mixnas.evaluators.supernet.judging import SubnetJudge
from mixnas.evaluators.supernet.sampling import FairSampler
from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.training import evaluate
from mixnas.search_space import registry
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.formats.safetensors import load_network, save_network
from mixnas.search_space.operators.quantization.policy import stored_bytes
from mixnas.search_space.operators.quantization.projected import calibrated_layers
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet


def space(**block) -> SearchSpace:
    """Every policy, over a few operators."""
    block = {
        "mixer": [{"name": "attention", "heads": 2}, {"name": "dwconv", "kernel_size": 3}, "identity"],
        "gate": ["none", "se"],
        "channel_mixer": [{"name": "mlp", "expansion": 2}, {"name": "swiglu", "expansion": 2}],
        "quant": {"mixer": registry.names("quant"), "channel_mixer": registry.names("quant")},
    } | block
    stage = {"width": [32, 64], "depth": [1, 2], "block": block}
    stem = {"name": "conv", "stride": 2}
    return SearchSpace.from_dict({"stem": stem, "norm": ["layer", "batch"], "stages": [stage]})


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def test_judged_is_deployed_is_saved_is_loaded(digits, tmp_path):
    torch.manual_seed(0)
    supernet = Supernet(space(), digits.io, torch.Generator().manual_seed(0))
    judge = SubnetJudge(supernet, digits)
    rng = np.random.default_rng(0)
    inputs, _ = digits.validation.gather(torch.arange(40))
    seen = set()
    for i in range(14):
        architecture = supernet.space.sample(rng)
        judge(architecture)  # finds its ranges and statistics, after those of others
        subnet = supernet.subnet(architecture).eval()
        with subnet.as_deployed() as units, torch.inference_mode():
            judged = torch.nn.Sequential(*(module for _, module in units))(inputs)
        with torch.inference_mode():
            network = supernet.extract(architecture).eval()
            save_network(tmp_path / f"{i}", network, {})
            deployed = network.deploy()(inputs)
            save_network(tmp_path / f"{i}.deployed", network, {})
            again = load_network(tmp_path / f"{i}.deployed").eval()(inputs)
            trained_on = load_network(tmp_path / f"{i}").deploy().eval()(inputs)
        for other in (deployed, again, trained_on):
            assert torch.equal(judged, other)
        assert stored_bytes(network) == cost(architecture, digits.io).weight_bytes
        blocks = [block for stage in architecture.stages for block in stage.blocks]
        seen |= {quant.name for block in blocks for quant in (block.quant, block.channel_quant)}
    assert seen == set(registry.names("quant"))


def test_what_is_folded_or_merged_is_judged_so(digits):
    """The judge's loss is the deployed network's to the last bit, for each operator that has another form then."""
    mixers = ["ls_conv", "single_head_attention", "conv_projection_attention", "low_res_attention", "large_kernel"]
    quant = ["fp32", "w8a8", "w4a8"]
    some = space(mixer=mixers, gate="none", channel_mixer=["inverted_residual", "uib"], quant=quant)
    supernet = Supernet(some, digits.io, torch.Generator().manual_seed(0))
    judge = SubnetJudge(supernet, digits)
    left, rng, differed = set(mixers), np.random.default_rng(0), 0
    while left:
        architecture = some.sample(rng)
        here = {block.mixer.name for stage in architecture.stages for block in stage.blocks}
        if not left & here:
            continue
        left -= here
        found = judge(architecture)
        network = supernet.extract(architecture).eval()
        assert found == evaluate(network, digits).named("accuracy")
        with torch.inference_mode():
            inputs = digits.validation.gather(torch.arange(200))[0]
            differed += not torch.equal(network(inputs), copy.deepcopy(network).deploy()(inputs))
        assert found == evaluate(network.deploy(), digits).named("accuracy")
    assert differed  # as it was before it was deployed, it is not the same to the last bit


def test_a_sub_network_is_judged_with_its_own_ranges(digits):
    """Whatever was judged before it."""
    supernet = Supernet(space(quant="w8a8_static", mixer="attention"), digits.io, torch.Generator().manual_seed(0))
    rng = np.random.default_rng(1)
    architectures = [supernet.space.sample(rng) for _ in range(5)]
    together = SubnetJudge(supernet, digits).judge_many(architectures)
    for architecture, metrics in zip(architectures, together, strict=True):
        assert SubnetJudge(supernet, digits)(architecture) == metrics
    subnet, judge = supernet.subnet(architectures[0]), SubnetJudge(supernet, digits)
    layers = calibrated_layers(subnet)
    judge.calibrate(subnet)
    before = [layer.ranges.scale.item() for layer in layers]
    assert before and all(scale != torch.full((), 8 / 255) for scale in before)
    with torch.no_grad():
        for layer in layers:
            layer.ranges.scale.mul_(7)
    judge.calibrate(subnet)
    assert [layer.ranges.scale.item() for layer in layers] == before


def test_an_example_that_is_not_finite_is_refused_before_any_judgement(digits):
    broken = dataclasses.replace(digits.train, inputs=digits.train.inputs * float("nan"))
    task = Digits()
    task.train = broken
    supernet = Supernet(space(quant="w8a8_static"), digits.io, torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="activations of the calibration set are NaN or infinite"):
        SubnetJudge(supernet, task)(supernet.smallest())


def test_a_space_with_a_group_that_does_not_divide_is_refused(digits):
    quant = {"name": "w4a16", "group": 32}
    with pytest.raises(
        ConfigError, match=r"stages.0.blocks.0.channel: channel mixer mlp\(expansion=1.5\): policy w4a16"
    ):
        Supernet(space(quant=quant, channel_mixer={"name": "mlp", "expansion": 1.5}), digits.io)


def test_training_deals_every_policy_equally_often():
    sampler = FairSampler(space(), 0)
    names = registry.names("quant")
    blocks = [sampler.draw().stages[0].blocks[0] for _ in range(5 * len(names))]
    assert Counter(block.quant.name for block in blocks) == dict.fromkeys(names, 5)
    assert Counter(block.channel_quant.name for block in blocks) == dict.fromkeys(names, 5)


def test_learned_steps_are_the_stores(digits):
    """They are trained with the super-network, and judged and deployed as they stand there."""
    quant = {"name": "w4a8", "step": "learned"}
    some = space(quant=quant, mixer="attention", gate="none", channel_mixer="mlp")
    supernet = Supernet(some, digits.io, torch.Generator().manual_seed(0))
    steps = {name: p for name, p in supernet.named_parameters() if name.endswith(".w4a8.log")}
    assert steps and all(not p.any() for p in steps.values())
    architecture = supernet.largest()
    inputs, targets = digits.validation.gather(torch.arange(24))
    digits.loss(supernet.subnet(architecture).train()(inputs), targets).backward()
    assert all(p.grad is not None and p.grad.any() for p in steps.values())
    with torch.no_grad():
        for p in steps.values():
            p.uniform_(-0.4, 0.1, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        judged = supernet.subnet(architecture).eval()(inputs)
        network = supernet.extract(architecture).eval().deploy()
        assert torch.equal(network(inputs), judged)
    assert stored_bytes(network) == cost(architecture, digits.io).weight_bytes
