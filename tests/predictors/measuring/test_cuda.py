"""What is done with a GPU, on a pretended one: the order of events, shared memory, a memory that does not suffice."""

import logging
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from mixnas.predictors.latency import gpus
from mixnas.predictors.measuring import measure, runtimes


class _GPU:
    """Stands for torch.cuda: notes what is asked of it, in order; event pairs take what `took` says, milliseconds."""

    multi_processor_count, major, minor, L2_cache_size = 132, 9, 0, 1 << 20

    def __init__(self, monkeypatch):
        self.log, self.took, self.pools, self.captured = [], [], [], 0
        outer = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                outer.log.append("event")

            def elapsed_time(self, end):
                return outer.took.pop(0)

        class Graph:
            def __init__(self):
                outer.captured += 1
                self.number = outer.captured

            def replay(self):
                outer.log.append("replay")

            def pool(self):
                return f"pool of graph {self.number}"

        class Capture:
            def __init__(self, graph, pool=None):
                outer.pools.append(pool)

            def __enter__(self):
                assert not torch.is_inference_mode_enabled(), "a later capture outside it would fail"
                outer.log.append("capture")

            def __exit__(self, *_):
                outer.log.append("captured")

        class Stream:
            def wait_stream(self, other):
                pass

        class On:
            def __init__(self, stream):
                pass

            def __enter__(self):
                pass

            def __exit__(self, *_):
                pass

        class Scratch:
            def zero_(self):
                outer.log.append("flush")

        plain_empty, plain_zeros = torch.empty, torch.zeros

        def empty(*args, device=None, **kwargs):
            return Scratch() if device == "cuda" else plain_empty(*args, device=device, **kwargs)

        def zeros(*args, device=None, **kwargs):
            return plain_zeros(*args, **kwargs) if device == "cuda" else plain_zeros(*args, device=device, **kwargs)

        for name, value in {
            "Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream, "stream": On,
            "current_stream": Stream, "synchronize": lambda: self.log.append("synchronize"),
            "_sleep": lambda cycles: self.log.append("sleep"),
            "get_device_properties": lambda index: self,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value, raising=False)
        monkeypatch.setattr(torch, "empty", empty)
        monkeypatch.setattr(torch, "zeros", zeros)
        runtimes._first_graph.cache_clear()
        monkeypatch.setattr(runtimes, "require", lambda *_: None)


@pytest.fixture
def gpu(monkeypatch):
    yield _GPU(monkeypatch)
    runtimes._first_graph.cache_clear()


def test_the_clock_starts_when_all_is_submitted(gpu):
    """Flush, sleep, event, call, event: no start event fires before the graph is queued, and nothing waits between."""
    gpu.took = [0.004] * 20 + [0.010, 0.012]
    clock = measure.CudaClock(graph=True)
    assert clock.overhead_ns == pytest.approx(4000)
    del gpu.log[:]
    times = clock(lambda: gpu.log.append("call"), 2)
    assert gpu.log == ["flush", "sleep", "event", "call", "event"] * 2 + ["synchronize"]
    assert times == pytest.approx([6000, 8000])


def test_what_is_subtracted_never_takes_all(gpu):
    gpu.took = [0.004] * 20 + [0.003, 0.005]
    times = measure.CudaClock(graph=True)(lambda: None, 2)
    assert times == pytest.approx([300, 1000])


def test_an_input_that_was_just_written_is_written_again_after_the_flush(gpu):
    gpu.took = [0.004] * 20 + [0.010]
    clock = measure.CudaClock(graph=True)

    class Inputs:
        def mul_(self, factor):
            assert factor == 1
            gpu.log.append("write")

    del gpu.log[:]
    clock(measure.HotInput(lambda: gpu.log.append("call"), Inputs()), 1)
    assert gpu.log == ["flush", "write", "sleep", "event", "call", "event", "synchronize"]


def test_a_wait_for_the_caller_starts_after_the_flush_has_ended(gpu):
    clock = measure.CudaClock(graph=False)
    assert clock.overhead_ns == 0
    times = clock(lambda: gpu.log.append("call"), 1)
    assert gpu.log == ["flush", "synchronize", "call", "synchronize"]
    assert times[0] > 0


def test_an_empty_graph_that_cannot_be_captured_is_no_graph(gpu, monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("empty")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    gpu.took = [0.002] * 20
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        assert measure.CudaClock(graph=True).overhead_ns == pytest.approx(2000)
    assert "no empty CUDA graph" in caplog.text


def test_all_graphs_share_one_memory_which_stays(gpu):
    module, x = nn.Linear(3, 3).eval(), torch.randn(2, 3)
    for _ in range(2):
        runtimes.prepare(module, x, "graph", 1)
    assert gpu.pools == [None, "pool of graph 2", "pool of graph 2"]


@pytest.mark.parametrize(
    ("error", "yes"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("operation failed due to a previous error during capture"), False),
        (ValueError("shape"), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, yes):
    assert runtimes.is_out_of_memory(error) == yes


def test_out_of_memory_is_seen_behind_the_error_of_the_capture():
    try:
        try:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        assert runtimes.is_out_of_memory(error)


def test_a_driver_names_more_than_the_product():
    h100 = gpus.sheet_of("nvidia-h100-80gb-hbm3")
    assert h100 is not None and h100.bandwidth == gpus.GPUS["nvidia-h100"].bandwidth
    assert h100.name == "nvidia-h100-80gb-hbm3", "its launch tables are found by the device's own name"
    assert gpus.sheet_of("nvidia-h100-pcie").multiprocessors == 114
    assert gpus.sheet_of("nvidia-l40s").fp32 == gpus.GPUS["nvidia-l40s"].fp32
    assert gpus.sheet_of("nvidia-l400") is None and gpus.sheet_of("cpu-some-1t") is None
    assert np.all(np.array(gpus.floors_ms(h100, 1e9, 1e6, 2, 1.0)) > 0)


@pytest.mark.parametrize(
    ("device", "processors", "says"),
    [
        ("nvidia-h100-80gb-hbm3", 132, ""),
        ("nvidia-h100-80gb-hbm3", 66, "66 multiprocessors"),
        ("nvidia-b300", 148, "no data sheet"),
    ],
)
def test_a_gpu_without_floors_says_so(gpu, caplog, device, processors, says):
    gpu.multi_processor_count = processors
    found = gpus.gpu_of(device, "cuda")
    assert found.name == device and found.multiprocessors == processors
    assert (found.bandwidth > 0) == (not says)
    assert says in caplog.text and bool(caplog.text) == bool(says)


def test_a_module_is_made_on_its_device_or_brought_there(caplog):
    """On "meta", which as a GPU is not where tensors are made by themselves."""
    made = runtimes.built_on("meta", lambda: nn.Linear(3, 3))
    assert made.weight.device.type == "meta"
    assert runtimes.built_on("cpu", lambda: nn.Linear(3, 3)).weight.device.type == "cpu"

    def only_on_a_cpu():
        if torch.empty(0).device.type != "cpu":
            raise RuntimeError("a generator of the CPU")
        return nn.Linear(3, 3)

    with caplog.at_level(logging.WARNING):
        assert runtimes.built_on("meta", only_on_a_cpu).weight.device.type == "meta"
    assert "a generator of the CPU" in caplog.text

    def too_large():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        runtimes.built_on("meta", too_large)
