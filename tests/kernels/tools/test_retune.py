"""Retuning, tried out in the interpreter: what it drops, keeps, goes on from, and writes."""

import json
import math
import time
from concurrent.futures import Future

import pytest
import torch

from mixnas.kernels import configs
from mixnas.kernels.tools import retune, rows, timing

_ROW = configs.rows("norm_forward", configs.INTERPRETER)[-1]
_JOB = rows.Job("norm", "norm_forward", {"channels": 32, "positions": 16}, _ROW.launch)


class Compiled:
    """Stands for the compiling processes: says what each launch would use."""

    uses = staticmethod(lambda launch: {})

    def __init__(self, workers):
        pass

    def submit(self, job, launch, example=0):
        future = Future()
        try:
            future.set_result(self.uses(launch))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self):
        pass


@pytest.fixture
def tune(monkeypatch):
    """Tune the row for a while; with pretended times, and pretended compilers."""

    def run(times, uses=lambda launch: {}, known=None, seconds=60.0, most=12):
        monkeypatch.setattr(Compiled, "uses", staticmethod(uses))
        monkeypatch.setattr(retune, "Compilers", Compiled)
        now = {}

        def bench_run(self, launch):
            now["launch"] = dict(launch)
            return plain(self, launch)

        plain = timing.Bench.run
        monkeypatch.setattr(timing.Bench, "run", bench_run)
        monkeypatch.setattr(timing.Clock, "__call__", lambda self, call: times(now["launch"]))
        kept = []
        tuner = retune.Tuner(
            time.monotonic() + seconds, lambda r: kept.append((r.key, r.state)), device="cpu", most=most
        )
        found = tuner.run([_JOB], known or {})
        monkeypatch.setattr(timing.Bench, "run", plain)
        return found, kept

    return run


def test_neighbours_change_one_value_or_trade_two_within_limits():
    launch = {"BLOCK": 64, "ROWS": 2, "num_warps": 4, "num_stages": 1}
    found = list(retune.neighbours(launch))
    assert len({tuple(n.items()) for n in found}) == len(found)
    assert launch not in found
    assert {n["ROWS"] for n in found} == {1, 2}
    assert {n["num_stages"] for n in found} == {1, 2}
    assert {"BLOCK": 32, "ROWS": 2, "num_warps": 8, "num_stages": 1} in found
    assert {"BLOCK": 32, "ROWS": 2, "num_warps": 4, "num_stages": 1} in found


def test_every_row_is_a_job_and_small_launches_are_jobs_of_their_own():
    jobs = rows.jobs(["depthwise"])
    bounds = [job.bounds for job in jobs if job.kernel == "depthwise_forward" and not job.small]
    assert bounds == [row.up_to for row in configs.rows("depthwise_forward", configs.ANY_GPU)]
    small = [job for job in jobs if job.small]
    assert len(small) == len(jobs) / 2
    assert all(" 1x" in job.examples()[0].label for job in small), "a small launch is of batch 1"
    assert {label.split()[0] for label in (e.label for job in jobs for e in job.examples())} == {"bf16", "fp32"}


def test_walks_to_the_fastest_and_writes_each_step(tune):
    best = {"BLOCK_R": 8, "num_warps": 4, "num_stages": 1}
    times = lambda launch: 10.0 + sum(abs(math.log2(launch[n] / best[n])) for n in best)  # noqa: E731
    (record,), kept = tune(times, most=60)
    assert [state for _, state in kept] == ["timed", "tuning", "tuned"]
    assert record.best["launch"] == best
    assert record.present["launch"] == _ROW.launch
    assert record.ratio == 14.0 / retune.LAUNCH_US


def test_drops_what_spills_and_what_gives_another_result(tune, monkeypatch):
    plain = timing.Bench.run

    def run(self, launch):
        wrong, call = plain(self, launch)
        return ("another result: 1e+00" if launch["BLOCK_R"] == 64 else wrong), call

    monkeypatch.setattr(timing.Bench, "run", run)
    (record,), _ = tune(lambda launch: float(launch["BLOCK_R"] == 32), lambda launch: {"stack_bytes": 8})
    assert record.best["launch"] == _ROW.launch
    assert {entry.get("why") for entry in record.tried[1:]} == {"spills: a stack of 8 bytes"}
    (record,), _ = tune(lambda launch: 1.0 if launch["BLOCK_R"] == 64 else 2.0, most=4)
    assert record.best["launch"]["BLOCK_R"] != 64
    assert "another result: 1e+00" in {entry.get("why") for entry in record.tried}


def test_a_dead_compiler_costs_one_candidate_no_more(tune):
    def uses(launch):
        if launch["num_warps"] == 2:
            raise RuntimeError("killed")
        return {}

    (record,), _ = tune(lambda launch: 1.0, uses)
    assert record.state == "tuned"


def test_ends_with_its_time_and_goes_on_where_it_was(tune):
    found, kept = tune(lambda launch: 1.0, seconds=-1.0)
    assert (found, kept) == ([], [])
    (tuned,), _ = tune(lambda launch: 1.0)
    (again,), kept = tune(lambda launch: 1 / 0, known={tuned.key: tuned})
    assert again is tuned and kept == []
    died = retune.Record(**{**vars(tuned), "state": "tuning"})
    (found,), kept = tune(lambda launch: 1.0, known={died.key: died})
    assert found.state == "failed: the process died while it was tuned"


def test_a_row_that_loses_on_other_examples_stays_as_it_is(tune):
    times = lambda launch: 1.0 if launch == _ROW.launch else 2.0  # noqa: E731
    (record,), _ = tune(lambda launch: 3.0 - times(launch))
    assert record.best["launch"] != _ROW.launch
    record.present["us"] = {"a": 1.0}
    assert retune.launches({record.key: record}) == {record.key: record.best["launch"]}
    record.best["dropped"] = "other examples of the row lose"
    assert retune.launches({record.key: record}) == {record.key: _ROW.launch}


def test_a_table_gets_whole_rows_for_the_gpu():
    jobs = {job.key: job for job in rows.jobs(["norm"])}
    small = next(key for key, job in jobs.items() if job.small and job.kernel == "norm_forward")
    launch = {**jobs[small].launch, "num_warps": 16}
    table = rows.table_with("norm", "nvidia-test", {small: launch}, {"source": "a test"})
    found = table["kernels"]["norm_forward"]["nvidia-test"]
    assert found[0] == {"up_to": dict(jobs[small].bounds), "launch": launch}
    kept = [row for row in found if "positions" not in row.get("up_to", {})]
    assert [row["launch"] for row in kept] == [row.launch for row in configs.rows("norm_forward", configs.ANY_GPU)]
    assert "nvidia-test" not in table["kernels"]["norm_backward"]
    assert table["provenance"]["nvidia-test"] == {"source": "a test"}
    assert json.loads(rows.format_table(table)) == table


@pytest.mark.parametrize("family", configs.load())
def test_a_table_is_written_as_it_stands(family):
    text = (configs.TABLES / f"{family}.json").read_text(encoding="utf-8")
    assert json.loads(rows.format_table(json.loads(text))) == json.loads(text)


def test_an_override_is_scoped():
    x = torch.zeros(1)
    before = configs.pick("glu_forward", x)
    with configs.override("glu_forward", {"BLOCK": 16}):
        assert configs.pick("glu_forward", x) == {"BLOCK": 16}
    assert configs.pick("glu_forward", x) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_refuses_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        retune.main([])
    assert "needs a CUDA device" in capsys.readouterr().err


class _Event:
    """A recorded clock: notes what was asked of the device in which order."""

    def __init__(self, log):
        self._log = log

    def record(self):
        self._log.append("event")

    def elapsed_time(self, other):
        return 0.002


def test_the_clock_starts_after_the_graph_is_queued(monkeypatch):
    """On a pretended GPU: flush, sleep, event, replay, event; nothing waits in between."""
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    class Capture:
        def __init__(self, graph):
            pass

        def __enter__(self):
            log.append("capture")

        def __exit__(self, *_):
            log.append("captured")

    class Flush:
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flush())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: _Event(log))
    clock = timing.Clock("cuda", 2)
    assert clock(lambda: log.append("launch")) == pytest.approx(2.0)
    assert log[:6] == ["launch", "synchronize", "capture", "launch", "captured", "replay"]
    assert log[6:] == ["flush", "sleep", "event", "replay", "event"] * 2 + ["synchronize"]
