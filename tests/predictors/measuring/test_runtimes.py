"""Each runtime computes what the module computes, and says what is missing where it is."""

import numpy as np
import pytest
import torch

from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring import runtimes
from mixnas.predictors.measuring.measure import MeasureConfig, measure_networks
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import IOSpec, Network
from mixnas.search_space.space import SearchSpace

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
    (latency,) = measure_networks([call], rng=np.random.default_rng(0), config=MeasureConfig(passes=1, window_ms=1.0))
    assert latency.latency_ms > 0
    found = call()
    found = torch.as_tensor(found[0]) if isinstance(found, list) else found
    torch.testing.assert_close(found, module(inputs), rtol=1e-4, atol=1e-5)


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
