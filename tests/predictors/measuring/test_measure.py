"""Measuring against the sentinel, on a simulated machine whose speed drifts, and once for real."""

import math
import os
import threading

import numpy as np
import pytest
import torch

from mixnas.predictors.measuring.measure import (
    MeasureConfig,
    Meter,
    Window,
    forward_call,
    measure_networks,
    measuring,
    repeats_of,
    summarise,
)
from mixnas.predictors.measuring.sentinel import make_sentinel


class Machine:
    """A clock of a machine whose speed follows `speed(time in seconds)`; a call has a cost in milliseconds."""

    def __init__(self, speed, noise, rng):
        self.now, self.speed, self.noise, self.rng = 0.0, speed, noise, rng

    def call(self, cost_ms):
        def run():
            self.now += cost_ms * 1e-3 / self.speed(self.now)

        run.cost_ms = cost_ms
        return run

    def clock(self, call, repeats):
        times = []
        for _ in range(repeats):
            start = self.now
            call()
            self.now += call.cost_ms * 1e-3 * self.noise * self.rng.exponential()  # others only ever make it slower
            times.append((self.now - start) * 1e9)
        return np.array(times)


def measure(machine, costs, rng, **options):
    calls = [machine.call(c) for c in costs]
    return measure_networks(
        calls, rng=rng, sentinel=machine.call(0.25), clock=machine.clock, reference_ms=0.25, **options
    )


def test_a_long_forward_is_repeated_less():
    """A network that takes 0.3 s would else take 4 s a window, in which a shared machine has drifted."""
    config = MeasureConfig()
    assert [repeats_of(ms, config) for ms in (0.01, 1.0, 1.5, 12.0, 24.0, 300.0)] == [80, 12, 8, 8, 4, 3]
    rng = np.random.default_rng(0)
    machine = Machine(lambda t: 1.0, 0.01, rng)
    called = {0.5: 0, 300.0: 0}

    def counted(cost_ms):
        call = machine.call(cost_ms)

        def run():
            called[cost_ms] += 1
            call()

        run.cost_ms = cost_ms
        return run

    calls = [counted(cost_ms) for cost_ms in called]
    few = MeasureConfig(passes=1, warmup=1)
    found = measure_networks(
        calls, rng=rng, config=few, sentinel=machine.call(0.25), clock=machine.clock, reference_ms=0.25
    )
    assert called[300.0] == 1 + 1 + 3 and called[0.5] > 1 + 2 + 1 + 20
    assert [one.latency.ms for one in found] == pytest.approx([0.5, 300.0], rel=0.05)


def test_drift_cancels():
    rng = np.random.default_rng(0)
    costs = np.geomspace(0.1, 5, 40)
    machine = Machine(lambda t: 1 + 0.3 * math.sin(t), 0.05, rng)
    measured = measure(machine, costs, rng)
    error = np.array([m.latency.ms for m in measured]) / costs - 1
    assert np.abs(error).mean() < 0.02
    found = [(m.latency, c * (1 + np.median(error))) for m, c in zip(measured, costs, strict=True)]
    assert np.mean([latency.low_ms <= cost <= latency.high_ms for latency, cost in found]) > 0.8
    assert all(m.passes == 3 and m.threads == 1 for m in measured)


def test_windows_with_a_jump_are_measured_again():
    rng = np.random.default_rng(1)
    machine = Machine(lambda t: 1.0 if int(t / 0.1) % 2 else 1.6, 0.01, rng)
    costs = np.full(30, 1.0)
    windows = []
    measured = measure(machine, costs, rng, keep=windows.append)
    assert sum(m.windows_dropped for m in measured) == sum(not w.accepted for w in windows) > 0
    assert all(m.passes == 3 for m in measured)
    assert np.ptp([m.ratio for m in measured]) / 4 < 0.05


def test_hopeless_drift_widens_the_interval():
    def window(before, after, pass_index):
        return Window(0, pass_index, np.full(10, 1e6), before, after)

    config = MeasureConfig()
    calm = summarise([window(1e6, 1e6, i) for i in range(3)], 1, config, 1.0)[0]
    wild = summarise([window(1e6, 1.5e6, i) for i in range(3)], 1, config, 1.0)[0]
    assert calm.passes == 3 and calm.windows_dropped == 0
    assert wild.passes == 0 and wild.windows_dropped == 3
    widths = [each.latency.high_ms / each.latency.low_ms for each in (wild, calm)]
    assert widths[0] > 1.5 > 1.01 > widths[1]
    with pytest.raises(ValueError, match="network 1 was not measured"):
        summarise([window(1e6, 1e6, 0)], 2, config, 1.0)
    stalled = summarise([window(1e5, 1e10, 0)], 1, config, 1.0)[0].latency  # the machine stood still for ten seconds
    assert 0 < stalled.low_ms < stalled.ms / 1e3 and stalled.ms * 1e3 < stalled.high_ms < math.inf


def test_the_real_clock_orders_networks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 8, 64, generator=generator)
    small = torch.nn.Linear(64, 64)
    large = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(20)])
    small_ms, large_ms = measure_networks([forward_call(m, x) for m in (small, large)], rng=np.random.default_rng(0))
    assert large_ms.ratio > small_ms.ratio > 0
    latency = small_ms.latency
    assert 0 < latency.low_ms < latency.ms < latency.high_ms and latency.kind == "measured"


def test_measuring_restores_the_state_and_the_sentinel_is_fixed():
    import gc

    before = torch.get_num_threads(), torch.get_rng_state()
    with measuring(2):
        assert torch.get_num_threads() == 2 and torch.is_inference_mode_enabled() and not gc.isenabled()
    with measuring(1):
        first, second = make_sentinel(), make_sentinel()
        assert torch.equal(first(), second())
        assert Meter(MeasureConfig()).window(first).ratio > 0
    assert torch.get_num_threads() == before[0] and gc.isenabled()
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no cores to be kept to here")
def test_one_thread_is_measured_on_a_heap_and_a_core_of_its_own():
    allowed = os.sched_getaffinity(0)
    seen = []

    def call():
        seen.append((threading.get_ident(), len(os.sched_getaffinity(0)), torch.is_inference_mode_enabled()))

    here = threading.get_ident()
    with measuring(1):
        Meter(MeasureConfig(warmup=2, min_repeats=3, max_repeats=3)).window(call)
    assert [thread == here for thread, _, _ in seen] == [True, True, False, False, False, False, False, False]
    assert {(cores, inference) for thread, cores, inference in seen if thread != here} == {(1, True)}
    assert os.sched_getaffinity(0) == allowed

    def fails():
        if threading.get_ident() != here:
            raise RuntimeError("no more memory")

    with measuring(1), pytest.raises(RuntimeError, match="no more memory"):
        Meter(MeasureConfig()).window(fails)
    assert os.sched_getaffinity(0) == allowed
    seen.clear()
    with measuring(2):
        Meter(MeasureConfig(threads=2)).window(call)
    assert {thread for thread, _, _ in seen} == {here}
