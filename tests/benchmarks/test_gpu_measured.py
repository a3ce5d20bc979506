"""gpu.py's step "measured": what a memory does not hold, and where a GPU's launches are counted."""

import time

import pytest
import torch

from mixnas.predictors.latency import profile as profile_module
from mixnas.predictors.latency.gpus import GPUS
from mixnas.predictors.latency.profile import ProfileConfig, Profiler
from mixnas.predictors.measuring import runtimes
from mixnas.predictors.measuring.measure import MeasureConfig


@pytest.mark.parametrize("where", ["built_on", "prepare"])
def test_a_network_that_the_memory_does_not_hold_is_left_out(scripts, monkeypatch, where, tmp_path):
    import _gpu_measured
    import numpy as np
    from _gpu_context import Context

    context = Context(out=tmp_path, work=tmp_path, deadline=time.monotonic(), dry=True)
    (setting,) = _gpu_measured._DRY
    space, _ = _gpu_measured._space(setting, True)
    three = space.decode_many(space.sample_many(3, np.random.default_rng(0)))
    plain, calls = getattr(runtimes, where), []

    def full(*given, **named):
        calls.append(given)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(*given, **named)

    monkeypatch.setattr(runtimes, where, full)
    quick = MeasureConfig(passes=1, window_ms=0.2, sentinel_repeats=2, max_extra_passes=0)
    found = _gpu_measured._times(context, setting, three, quick, 1.0, 10)
    assert [ms is not None for ms in found] == [True, False, True]
    monkeypatch.setattr(runtimes, where, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _gpu_measured._times(context, setting, three, quick, 1.0, 10)


class _CountedError(Exception):
    pass


def test_a_gpus_launches_are_counted_without_it(scripts, monkeypatch, tmp_path):
    """Running every unit once on the device took half a minute before the first window."""
    import _gpu_measured

    def counting(batch, device, gpu):
        assert (batch, device, gpu.name) == (32, "cpu", "nvidia-h200")
        raise _CountedError

    monkeypatch.setattr(profile_module, "Works", counting)
    monkeypatch.setattr(profile_module, "gpu_of", lambda name, device: GPUS[name])
    monkeypatch.setattr(profile_module, "require_cuda", lambda: None)
    monkeypatch.setattr(
        profile_module, "device_name", lambda kind, threads: "cpu-1t" if kind == "cpu" else "nvidia-h200"
    )
    monkeypatch.setattr(runtimes, "clock_of", lambda runtime, device: None)
    setting = next(setting for setting in _gpu_measured.SETTINGS if setting.batch == 32)
    space, _ = _gpu_measured._space(setting, False)
    config = ProfileConfig(measure=MeasureConfig(batch_size=32))
    with pytest.raises(_CountedError):
        Profiler(space, setting.io, device="cuda", runtime="graph", directory=tmp_path, config=config)
