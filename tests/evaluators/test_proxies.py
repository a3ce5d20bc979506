"""Zero-cost proxies: against their definitions where those can be computed otherwise, and for what they must rank."""

import math

import pytest
import torch

from mixnas.evaluators import proxies
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import Network


def image_network(depth: int, width: int, **block: object) -> Architecture:
    mixer = {"mixer": {"name": "dwconv", "kernel_size": 3}, "channel_mixer": "mlp", **block}
    stage = {"width": width, "blocks": [mixer] * depth}
    return Architecture.from_dict({"stem": {"name": "conv", "stride": 2}, "stages": [stage]})


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


@pytest.fixture(scope="module")
def mqar() -> Task:
    return by_name("mqar", vocab_size=32, length=16, pairs=2, train_size=64, validation_size=16, test_size=16)


def test_all_are_finite_reproducible_and_leave_the_network_and_the_global_generator_alone(digits):
    architecture = image_network(2, 8)
    network = Network(architecture, digits.io, generator=torch.Generator().manual_seed(0))
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    for name, proxy in proxies.PROXIES.items():
        first, second = (proxy(network, digits, 16, torch.Generator().manual_seed(1)) for _ in range(2))
        assert first == second and math.isfinite(first), name
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert proxies.score(architecture, digits) == proxies.score(architecture, digits)


@pytest.mark.parametrize("mixer", ["attention", "linear_attention", "pooling"])
def test_they_serve_sequences_of_tokens(mqar, mixer):
    stage = {"width": 8, "blocks": [{"mixer": mixer, "channel_mixer": "swiglu"}]}
    architecture = Architecture.from_dict({"stem": "embedding", "norm": "rms", "stages": [stage]})
    scores = proxies.score(architecture, mqar, batch_size=8)
    assert set(scores) == set(proxies.PROXIES)
    assert all(math.isfinite(value) for value in scores.values())


def test_trivial_ones_are_the_costs(digits):
    architecture = image_network(1, 8)
    scores = proxies.score(architecture, digits, ["params", "macs"])
    known = cost(architecture, digits.io)
    assert scores == {"params": known.params, "macs": known.macs}


def test_deeper_networks_score_higher(digits):
    shallow, deep = (proxies.score(image_network(depth, 8), digits) for depth in (1, 3))
    for name in ("grad_norm", "synflow", "naswot", "zen"):
        assert deep[name] > shallow[name], name


def test_synflow_of_a_linear_network_is_its_number_of_layers_times_its_output(digits):
    """Without norms and non-linearities R is multilinear in the layers' weights (Euler): each gives R, biases less."""
    stage = {"width": 4, "blocks": [{"mixer": "identity", "channel_mixer": "none"}]}
    architecture = Architecture.from_dict({"stem": {"name": "conv", "stride": 2}, "stages": [stage]})
    network = Network(architecture, digits.io, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name.endswith("bias"):
                p.zero_()
    flow = proxies.synflow(network, digits, 1, torch.Generator())
    for p in network.parameters():
        p.data.abs_()
    x = torch.ones(1, 8, 8, 1, dtype=torch.float64)
    with torch.no_grad():
        for name, module in network.units():
            if name == "stem":
                x = module(x)
            elif name == "head":
                x = module.linear(x.flatten(1, 2).mean(1))
            else:
                x = 2 * x  # x + identity(x)
    assert math.exp(flow) == pytest.approx(2 * x.sum().item())


def test_an_unknown_proxy_names_the_nearest(digits):
    with pytest.raises(ConfigError, match="Did you mean 'naswot'"):
        proxies.score(image_network(1, 4), digits, ["nasswot"])
