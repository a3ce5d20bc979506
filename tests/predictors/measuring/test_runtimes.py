"""Each runtime computes what the module computes, and says what is missing where it is."""

import copy

import numpy as np
import pytest
import torch

from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring import runtimes
from mixnas.predictors.measuring.device import device_name
from mixnas.predictors.measuring.measure import MeasureConfig, measure_networks
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

PLAIN = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [
        {
            "width": [8, 16],
            "depth": [1, 2],
            "block": {"mixer": ["identity", "attention"], "channel_mixer": {"name": "mlp", "expansion": [1, 2]}},
        }
    ],
}
IO = IOSpec("image", (8, 8), 1, 10)


@pytest.fixture(scope="module")
def network():
    generator = torch.Generator().manual_seed(0)
    space = SearchSpace.from_dict(PLAIN)
    architecture = space.from_params({v.name: v.values[-1] for v in space.variables})
    return Network(architecture, IO, generator=generator).eval().requires_grad_(False), IO.example(
        2, generator=generator
    )


@pytest.mark.parametrize("runtime", ["eager", "onnxruntime", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_runtime_computes_the_network(network, runtime):
    if missing := runtimes.missing(runtime):
        pytest.skip(missing)
    module, inputs = network
    call = runtimes.prepare(module, inputs, runtime, threads=1)
    quick = MeasureConfig(passes=1, window_ms=1.0)
    (measured,) = measure_networks([call], rng=np.random.default_rng(0), config=quick)
    assert measured.latency.ms > 0 and measured.latency.kind == "measured"
    found = call()
    found = torch.as_tensor(found[0]) if isinstance(found, list) else found
    torch.testing.assert_close(found, module(inputs), rtol=1e-4, atol=1e-5)


WRONG = {
    "onnxruntime": lambda output: [output.numpy() * 1.01],
    "compiled": lambda output: output[:1],
    "graph": lambda output: torch.full_like(output, torch.nan),
}


@pytest.mark.parametrize("runtime", WRONG)
def test_a_runtime_that_answers_wrongly_is_refused(network, monkeypatch, runtime):
    module, inputs = network
    monkeypatch.setattr(runtimes, "missing", lambda *_: "")
    monkeypatch.setattr(runtimes, f"_{runtime}", lambda module, inputs, *_: lambda: WRONG[runtime](module(inputs)))
    with pytest.raises(ConfigError, match=rf"'{runtime}' does not compute the unit of tests as eager") as error:
        runtimes.prepare(module, inputs, runtime, 1, "the unit of tests")
    text = str(error.value)
    assert {"onnxruntime": "0.01 away", "compiled": "(1, 10) instead of (2, 10)", "graph": "nan away"}[runtime] in text


def test_how_exact_answers_must_be_depends_on_the_weights(network, monkeypatch):
    module, inputs = network
    monkeypatch.setattr(runtimes, "missing", lambda *_: "")
    monkeypatch.setattr(runtimes, "_graph", lambda module, inputs: lambda: 1.01 * module(inputs))
    rounded = copy.deepcopy(module)
    head = rounded.head.output[0].linear
    head.weight.data = head.weight.data.bfloat16()
    head.bias.data = head.bias.data.bfloat16()
    head.compute = torch.bfloat16
    runtimes.prepare(rounded, inputs, "graph", 1)
    with pytest.raises(ConfigError, match=r"0\.002 is allowed"):
        runtimes.prepare(module, inputs, "graph", 1)


def test_a_profile_counts_no_wrong_time(tmp_path, monkeypatch):
    """No runtime's time counts before its outputs agree: what differs is left out, and the fit says so."""
    monkeypatch.setattr(runtimes, "missing", lambda *_: "")
    monkeypatch.setattr(runtimes, "_onnxruntime", lambda module, inputs, threads: lambda: module(inputs) + 1)
    config = ProfileConfig(budget_s=4, max_networks=12, measure=MeasureConfig(passes=1, window_ms=0.2))
    space = SearchSpace.from_dict(PLAIN)
    with pytest.raises(ConfigError, match="left out, the first because: runtime 'onnxruntime' does not compute "):
        profile(space, IO, device="cpu", runtime="onnxruntime", directory=tmp_path, config=config)
    table = MeasurementTable.load(tmp_path, device_name("cpu"), "onnxruntime")
    assert not table.windows


def test_what_is_missing_is_said(tmp_path):
    assert "GPU" in runtimes.missing("graph", "cpu") and "CPU only" in runtimes.missing("onnxruntime", "cuda")
    with pytest.raises(ConfigError, match="Did you mean 'compiled'"):
        runtimes.missing("compile")
    with pytest.raises(ConfigError, match="'graph' is not available here"):
        profile(SearchSpace.from_dict(PLAIN), IO, device="cpu", runtime="graph", directory=tmp_path)


def test_a_batch_size_has_its_own_table(tmp_path):
    space = SearchSpace.from_dict(PLAIN)
    measure = {"passes": 1, "window_ms": 0.5, "sentinel_repeats": 4, "max_extra_passes": 1}
    for batch, tag in ((1, "eager"), (4, "eager-b4")):
        config = ProfileConfig(budget_s=60, max_networks=12, measure=MeasureConfig(**measure, batch_size=batch))
        predictor = profile(space, IO, device="cpu", directory=tmp_path, config=config)
        assert predictor.tag == tag and predictor.meta["batch"] == batch
        assert LatencyPredictor.load(predictor.device, tag, tmp_path).meta["batch"] == batch
    assert len(list(tmp_path.glob("*.csv"))) == 2
