from __future__ import annotations

import numpy as np
import pytest
import torch

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import Shapes
from mixnas.search_space.errors import ConfigError, NasError
from mixnas.search_space.network import Network
from mixnas.search_space.operators.norms import has_running_statistics, reset_running_statistics
from mixnas.search_space.supernet import Supernet, slice_of

from .spaces import IMAGE, IOS, basic, covering, everything


def randomise_norms(supernet: Supernet) -> None:
    """Norm weights start at one and zero, which would hide a wrong slice."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*supernet.named_parameters(), *supernet.named_buffers()]:
            if "norm" in name and tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)


@pytest.mark.parametrize("kind", IOS)
def test_extracted_networks_equal_their_subnetworks(kind):
    """Architectures with every registered operator and policy of every kind: outputs, gradients, strict loading."""
    space, io = everything(kind), IOS[kind]
    supernet = Supernet(space, io, torch.Generator().manual_seed(0))
    randomise_norms(supernet)
    for i, architecture in enumerate(covering(space)):
        extracted, subnet = supernet.extract(architecture), supernet.subnet(architecture)
        with torch.device("meta"), Shapes():  # without the time that its first weights take
            same = Network(architecture, io)
        same.load_state_dict(extracted.state_dict(), strict=True, assign=True)
        x = io.example(2)
        for network in (extracted, subnet):
            network.eval()
        torch.testing.assert_close(extracted(x), subnet(x), rtol=1e-6, atol=1e-6)
        if i % 3 == 0:
            supernet.zero_grad()
            subnet(x).square().mean().backward()
            extracted(x).square().mean().backward()
            for (name, p), (_, q) in zip(extracted.named_parameters(), subnet.named_parameters(), strict=True):
                # None of what is there for training alone, as a progressive norm's layer norm is.
                grad = torch.zeros_like(q.grad) if p.grad is None else p.grad
                scale = grad.abs().max().clamp(min=1e-3)
                assert (grad - q.grad).abs().max() <= 1e-4 * scale, name


def test_gradients_land_in_the_store_and_nowhere_else():
    supernet = Supernet(basic("image"), IMAGE, torch.Generator().manual_seed(0))
    architecture = supernet.smallest()
    supernet.subnet(architecture)(IMAGE.example(4)).square().mean().backward()
    touched = {name for name, p in supernet.named_parameters() if p.grad.abs().sum() > 0}
    used = dict(supernet.subnet(architecture).named_parameters())
    assert touched and touched <= set(used)
    for name in touched:
        assert torch.count_nonzero(dict(supernet.named_parameters())[name].grad) <= used[name].numel()
    supernet.zero_grad()
    assert all(torch.count_nonzero(p.grad) == 0 for p in supernet.parameters())
    assert all(torch.count_nonzero(p.grad) == 0 for p in used.values())


def test_an_optimiser_step_on_the_store_moves_the_subnetwork():
    supernet = Supernet(basic("sequence"), IOS["sequence"], torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    subnet = supernet.subnet(supernet.largest()).train()
    x = IOS["sequence"].example(8)
    losses = []
    for _ in range(5):
        supernet.zero_grad()
        loss = (subnet(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_slices_lead_and_kernels_are_centred():
    tensor = torch.arange(4 * 1 * 5 * 5).view(4, 1, 5, 5)
    view = slice_of(tensor, (2, 1, 3, 3), ("lead", "lead", "center", "center"))
    assert torch.equal(view, tensor[:2, :, 1:4, 1:4])


def test_a_saved_store_is_read_back():
    space = basic("image")
    first, second = (Supernet(space, IMAGE, torch.Generator().manual_seed(s)) for s in (0, 1))
    architecture = space.sample(np.random.default_rng(0))
    x = IMAGE.example(2)
    assert not torch.equal(first.subnet(architecture).eval()(x), second.subnet(architecture).eval()(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.subnet(architecture).eval()(x), second.subnet(architecture).eval()(x))


def test_equal_seeds_give_equal_stores_and_evaluation_leaves_the_global_generator_alone():
    space = basic("image")
    first, second = (Supernet(space, IMAGE, torch.Generator().manual_seed(0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    state = torch.random.get_rng_state()
    first.subnet(space.sample(np.random.default_rng(0)))
    first.extract(space.sample(np.random.default_rng(1)))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_running_statistics_are_the_subnetworks_own_after_recalibration():
    space = basic("image")
    supernet = Supernet(space, IMAGE, torch.Generator().manual_seed(0))
    plain = basic("image").sample(np.random.default_rng(0)).to_dict() | {"norm": "batch"}
    for stage in plain["stages"]:
        stage["blocks"] = [block | {"recursion": 1} for block in stage["blocks"]]  # each pass has statistics of its own
    architecture = Architecture.from_dict(plain)
    subnet = supernet.subnet(architecture)
    assert has_running_statistics(subnet)
    x = IMAGE.example(64)
    reset_running_statistics(subnet)
    with torch.no_grad():
        trained = subnet.train()(x)
        # Unbiased variances make the two differ a little.
        assert (subnet.eval()(x) - trained).norm() < 0.02 * trained.norm()


def test_a_subnetwork_is_not_deployed_in_the_store():
    supernet = Supernet(basic("image"), IMAGE)
    with pytest.raises(NasError, match=r"deploy what Supernet\.extract gives"):
        supernet.subnet(supernet.smallest()).deploy()
    supernet.extract(supernet.smallest()).deploy()


def test_an_architecture_of_another_space_is_refused():
    supernet = Supernet(basic("image"), IMAGE)
    block = {"mixer": "identity", "channel_mixer": "mlp"}
    foreign = Architecture.from_dict({"stem": "conv", "stages": [{"width": 20, "block": block}] * 2})
    with pytest.raises(ConfigError, match="not in this space"):
        supernet.subnet(foreign)
