"""Peak memory, computed unit by unit, is that of the whole network as it runs for real."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from mixnas.kernels.dispatch import TracedOtherwiseError, eager_alone, tracing
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.cost import cost
from mixnas.search_space.memory import LiveTensors, _peak, input_bytes, peak_memory_bytes
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.policy import uniform
from mixnas.search_space.units import IOSpec, plan

from .spaces import IMAGE, IOS, covering, everything


def deployed(architecture: Architecture, io: IOSpec) -> Network:
    return Network(architecture, io, generator=torch.Generator().manual_seed(0)).eval().deploy()


def test_what_lives_is_counted_by_hand():
    x = torch.zeros(100)  # 400 bytes
    with torch.no_grad(), LiveTensors() as live:
        live.hold(x)
        y = x + 1
        assert live.live == 800
        z = y.view(10, 10)[2:]  # a view is what it is of
        del y
        assert live.live == 800
        z = z.double() * 2  # 80 float64, twice until the first is dropped
        assert live.live == 400 + 640
        assert live.peak == 800 + 2 * 640
        x.t()
        assert live.live == 400 + 640


def test_counting_changes_nothing_of_what_runs():
    """Operators that ask whether they are traced are told no where tensors are real, and are refused on shapes."""
    with LiveTensors():
        assert not tracing()
    with FakeTensorMode():
        assert tracing()
        with LiveTensors():
            assert tracing()
            with eager_alone(), pytest.raises(TracedOtherwiseError):
                tracing()
    assert not tracing()


def profiled_peak(network: Network, x: torch.Tensor) -> int:
    """What PyTorch's allocator gave out at most at once, by its own profiler."""
    with torch.no_grad():
        network(x)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            network(x)
    now = most = 0
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def test_the_allocator_of_pytorch_says_the_same():
    """Of operators whose kernels take no scratch of their own."""
    io = IOSpec("image", (16, 16), 3, 10)
    block = {"mixer": ["pooling", "identity"], "gate": "none", "channel_mixer": "mlp"}
    for mixer in block["mixer"]:
        architecture = Architecture.from_dict(
            {"stem": "conv", "stages": [{"width": 32, "depth": 2, "block": block | {"mixer": mixer}}]}
        )
        network, x = deployed(architecture, io), io.example(1)
        activations = peak_memory_bytes(architecture, io) - cost(architecture, io).weight_bytes
        assert activations == input_bytes(io) + profiled_peak(network, x)


@pytest.mark.parametrize("kind", IOS)
def test_it_is_that_of_the_network_with_every_operator_and_policy(kind):
    io = IOS[kind]
    for architecture in covering(everything(kind), seed=3):
        network, x = deployed(architecture, io), io.example(1)
        with torch.no_grad():
            network(x)  # what is made once
            with LiveTensors() as live:
                live.hold(x)
                network(x)
        found = peak_memory_bytes(architecture, io)
        assert found == cost(architecture, io).weight_bytes + live.peak, str(architecture)


def test_what_a_network_standardises_counts():
    io = IOSpec("image", (8, 8), 3, 10, mean=(0.5,) * 3, std=(0.2,) * 3)
    for width in (2, 32):
        block = {"mixer": "identity", "channel_mixer": "none"}
        architecture = Architecture.from_dict({"stem": "conv", "stages": [{"width": width, "block": block}]})
        network, x = deployed(architecture, io), io.example(1)
        with torch.no_grad(), LiveTensors() as live:
            live.hold(x)
            network(x)
        assert peak_memory_bytes(architecture, io) == cost(architecture, io).weight_bytes + live.peak


def test_shapes_alone_give_the_same_as_running():
    fp32 = Op("fp32")
    units = {
        str(unit): unit for a in covering(everything("image"), seed=5) for _, unit in plan(uniform(a, fp32), IMAGE)
    }
    same = 0
    for unit in [units[name] for name in sorted(units)][::3]:
        # Such are run for real, whatever their size.
        with contextlib.suppress(DataDependentOutputException, TracedOtherwiseError):
            assert _peak(unit, shapes=True) == _peak(unit, shapes=False), str(unit)
            same += 1
    assert same > 0.8 * len(units) / 3
