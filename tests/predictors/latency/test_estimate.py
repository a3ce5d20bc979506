"""Estimates from data sheets."""

import numpy as np
import pytest

from mixnas.predictors.latency.estimate import estimate
from mixnas.predictors.latency.gpus import GPUS
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import SearchSpace

from .devices import IO, PLAIN


def test_estimates_are_labelled_and_never_kept(tmp_path):
    space = SearchSpace.from_dict(PLAIN)
    architecture = space.sample(np.random.default_rng(0))
    slow = estimate("nvidia-t4", space, IO, batch_size=8, plain=PLAIN)
    answer = slow.predict(architecture)
    assert answer.estimate and answer.latency.high_ms / answer.latency.low_ms > 4
    assert sum(unit.latency_ms for unit in answer.units) == pytest.approx(answer.latency.ms)
    assert answer.latency.ms > 0
    assert slow.stored_space(PLAIN) is slow.spaces[0]
    fast = estimate("nvidia-h200", space, IO, batch_size=8)
    assert fast.predict(architecture).latency.ms < answer.latency.ms
    with pytest.raises(ConfigError, match="not kept among the measured"):
        slow.save(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'nvidia-h200'"):
        estimate("nvidia-h20", space, IO)
    with pytest.raises(ConfigError, match="allowed are eager, graph"):
        estimate("nvidia-t4", space, IO, runtime="compiled")
    assert all(gpu.int8 > gpu.half > gpu.fp32 for gpu in GPUS.values())
