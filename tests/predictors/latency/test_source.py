"""Latency as a search asks for it: which predictor, measured under which reference, and what is refused."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixnas.predictors.latency.predictor import installed
from mixnas.predictors.latency.profile import profile
from mixnas.predictors.latency.source import LatencySource, LatencySpec
from mixnas.predictors.measuring import device, runtimes
from mixnas.predictors.measuring.device import device_name
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec
from tests.elsewhere import elsewhere

IO = IOSpec("image", (8, 8), 1, 10)
SPACE = SearchSpace.from_dict(
    {
        "stem": {"name": "conv", "stride": 2},
        "stages": [
            {
                "width": [8, 256],
                "block": {
                    "mixer": {"name": "attention", "heads": 2},
                    "channel_mixer": "mlp",
                    "quant": ["fp32", "bf16"],
                },
            }
        ],
    }
)
PROFILED = SearchSpace.from_dict(
    {
        "stem": {"name": "conv", "stride": 2},
        "stages": [
            {
                "width": [4, 8],
                "depth": [1, 2],
                "block": {"mixer": ["identity", "pooling"], "channel_mixer": {"name": "mlp", "expansion": [1, 2]}},
            }
        ],
    }
)
HERE = LatencySpec(
    device="cpu", runtime="eager", threads=1, batch_size=1, directory=None, profile_s=30.0, passes=2, seed=0
)


def network(width: int, quant: str = "fp32") -> Network:
    architecture = SPACE.from_params({"stages.0.width": width, "stages.0.blocks.0.quant": quant})
    return Network(architecture, IO, generator=torch.Generator().manual_seed(0))


def test_devices() -> None:
    assert HERE.open().here and HERE.open().device == device_name("cpu", 1)
    two = replace(HERE, device="auto", threads=2).open()
    assert two.here and (two.device.endswith("-2t") or two.torch_device == "cuda")
    named = replace(HERE, device=device_name("cpu", 2), threads=2).open()
    assert named.here and named.torch_device == "cpu"
    assert not replace(HERE, device=device_name("cpu", 2)).open().here  # it is measured with one thread
    assert not replace(HERE, device="nvidia-h100").open().here
    assert replace(HERE, batch_size=8).open().tag == "eager-b8"


def test_cuda_without_a_gpu_is_refused_and_is_not_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`nas search --set device=cuda` went by latencies of the CPU, without a word."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "gpu_models", list)
    for asked in ("device", "torch_device", "processor"):
        with pytest.raises(ConfigError, match="device 'cuda': this machine has no NVIDIA GPU"):
            getattr(replace(HERE, device="cuda").open(), asked)
    assert replace(HERE, device="auto").open().torch_device == "cpu"
    monkeypatch.setattr(device, "gpu_models", lambda: ["nvidia-h200"])
    with pytest.raises(ConfigError, match=r"torch .* cannot use this machine's GPU"):
        _ = replace(HERE, device="cuda").open().torch_device
    with pytest.raises(ConfigError, match=r"torch .* cannot use this machine's GPU"):
        profile(SPACE, IO, device="cuda", runtime="eager", directory=None)


def test_a_runtime_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="'graph' is not available here"):
        replace(HERE, runtime="graph").open().check(SPACE)
    HERE.open().check(SPACE)
    with pytest.raises(ConfigError, match='no measurements of device "nobody\'s"'):
        replace(HERE, device="nobody's").open().check(SPACE)


def test_larger_networks_take_longer_and_share_one_reference() -> None:
    source = HERE.open()
    reference = source.reference_ms
    networks = [network(8), network(256)]
    before = {name: value.clone() for name, value in networks[0].state_dict().items()}
    small, large = source.measure(networks)
    assert small.ms < large.ms and small.kind == large.kind == "measured" and small.outside == ()
    assert small.low_ms <= small.ms <= small.high_ms
    assert source.reference_ms == reference == source.spec.reference_ms
    assert networks[0].training  # measured as a copy
    assert all(torch.equal(before[name], value) for name, value in networks[0].state_dict().items())
    # twice the reference time, twice the latency
    twice = replace(HERE, reference_ms=2 * reference).open()
    assert twice.reference_ms == 2 * reference
    assert twice.measure(networks, passes=3)[1].ms > 1.3 * large.ms


def test_quantized_networks_are_measured_as_deployed() -> None:
    quantized = network(8, "bf16")
    (latency,) = HERE.open().measure([quantized])
    assert latency.ms > 0
    assert {p.dtype for p in quantized.parameters()} == {torch.float32}


def test_a_network_that_the_runtime_gets_wrong_has_no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = network(256)
    prepare = runtimes.prepare

    def wrong(module, inputs, runtime, threads, name="the network"):
        if wide.architecture.id in name:
            raise ConfigError(f"runtime 'eager' does not compute {name}")
        return prepare(module, inputs, runtime, threads, name)

    monkeypatch.setattr(runtimes, "prepare", wrong)
    source = HERE.open()
    first, reason, last = source.measure_each([network(8), wide, network(8)])
    assert first.ms > 0 and last.ms > 0 and reason == f"runtime 'eager' does not compute network {wide.architecture.id}"
    with pytest.raises(ConfigError, match="does not compute"):
        source.measure([network(8), wide])


def test_what_is_asked_is_what_was_profiled(tmp_path: Path) -> None:
    """Runtime and batch size tell predictors apart (they were looked up as eager, one input, whatever was profiled)."""
    asked = replace(HERE, batch_size=4, directory=tmp_path)
    source = asked.open()
    source.prepare(PROFILED, IO)
    assert [(device, tag) for device, tag, _ in installed(tmp_path)] == [(device_name("cpu", 1), "eager-b4")]
    architecture = PROFILED.sample(np.random.default_rng(0))
    predicted = source.predict(architecture, IO)
    assert predicted.kind == "predicted" and predicted.low_ms < predicted.ms < predicted.high_ms
    many = source.predict_many(PROFILED.encode_many([architecture]), PROFILED, IO)
    assert many[0] == pytest.approx(predicted.ms, rel=1e-5)

    again = asked.open()
    again.prepare(PROFILED, IO, should_stop=lambda: True)  # nothing is left to be stopped
    assert again.predict(architecture, IO) == predicted
    assert again.reference_ms == source.reference_ms == source.spec.reference_ms
    assert asked.open().find().tag == "eager-b4"
    with pytest.raises(ConfigError, match=r"through 'eager'\..*There are: .*\(eager-b4\)"):
        replace(asked, batch_size=1).open().find()


@pytest.fixture(scope="module")
def other_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with elsewhere(tmp_path_factory.mktemp("tables"), PROFILED, IO) as device:
        yield device


def test_another_device_is_predicted_from_what_is_installed(other_device: str) -> None:
    source = replace(HERE, device=other_device).open()
    source.prepare(PROFILED, IO)
    assert source.predict(PROFILED.sample(np.random.default_rng(0)), IO).ms > 0
    with pytest.raises(ConfigError, match=rf"no measurements of device '{other_device}' through 'eager-b8'"):
        replace(HERE, device=other_device, batch_size=8).open().prepare(SPACE, IO)


def test_a_stored_predictor_is_found_without_torch(other_device: str) -> None:
    code = (
        "import sys; from mixnas.predictors.latency.source import LatencySpec; "
        f"spec = LatencySpec(device={other_device!r}, runtime='eager', threads=1, batch_size=1, "
        "directory=None, profile_s=1.0, passes=1, seed=0); "
        "assert spec.open().find().device == spec.device; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_is_opened_by_making_one() -> None:
    assert isinstance(replace(HERE, directory=Path("/nowhere"), device="nobody's").open(), LatencySource)
