"""Waves, occupancy and ahead-of-time counts; then the physical form on published measurements of an A100."""

import csv
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mixnas.kernels import configs, dispatch
from mixnas.kernels.tools import aot, resources
from mixnas.predictors.latency import profile as profile_module
from mixnas.predictors.latency.estimate import estimate
from mixnas.predictors.latency.gpus import (
    GPU,
    GPUS,
    LIMITS,
    Spread,
    floors_ms,
    gpu_of,
    launch_work,
    matmul_busy,
    occupancy,
)
from mixnas.predictors.latency.model import ABOUT, Columns, FitConfig, UnitModel
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.profile import ProfileConfig
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

from .spaces import PLAIN

H200 = GPUS["nvidia-h200"]
PUBLISHED = Path(os.environ.get("MIXNAS_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared_bytes", "blocks"),
    [  # worked out by hand from the rules of NVIDIA's occupancy calculator
        (90, 4, 0, 0, 16),  # 64 warps
        (90, 1, 16, 0, 32),  # slots for blocks
        (90, 4, 64, 0, 8),  # 2,048 registers a warp: 8 warps in a quarter
        (90, 4, 40, 0, 12),  # 1,280 a warp: 12 in a quarter
        (90, 8, 128, 0, 2),
        (90, 4, 255, 0, 2),
        (90, 4, 0, 100 * 1024, 2),
        (90, 4, 0, 227 * 1024, 1),
        (80, 4, 0, 100 * 1024, 1),
        (86, 4, 0, 0, 12),
        (75, 4, 0, 32 * 1024, 2),
        (87, 4, 0, 0, 12),  # no table of its own: as 8.6
    ],
)
def test_occupancy(arch, warps, registers, shared_bytes, blocks):
    assert occupancy(arch, warps, registers, shared_bytes) == blocks


def test_blocks_spread_over_multiprocessors():
    exact = Spread.of(264, 132, 2)
    assert (exact.waves, exact.rounds, exact.busy, exact.tail) == (1, 2, 1.0, 0.0)
    one_more = Spread.of(265, 132, 2)
    assert (one_more.waves, one_more.rounds) == (2, 3)
    assert one_more.busy == pytest.approx(265 / 396) and one_more.tail == pytest.approx(263 / 264)
    work = launch_work("k", one_more, 1000.0, 500)
    assert work["k.waves"] == 2 and work["k.rounds.macs"] == pytest.approx(1000 * 396 / 265) and work["k.bytes"] == 500
    assert matmul_busy(132 * 128, 128, 132) == 1.0 and matmul_busy(1, 1000, 132) < 0.1


def test_floors():
    arithmetic, bandwidth = floors_ms(H200, 67e9 / 2, 4.8e9, 32, 0.5)
    assert arithmetic == pytest.approx(2.0) and bandwidth == pytest.approx(1.0)
    assert floors_ms(GPU("unknown", 0, 0, 0, 0, 100, 90), 1e9, 1e9, 32, 1.0) == (0.0, 0.0)
    half, packed = (floors_ms(H200, 1e9, 1.0, bits, 1.0)[0] for bits in (16, 4))
    assert arithmetic > half > packed == floors_ms(H200, 1e9, 1.0, 8, 1.0)[0]
    assert gpu_of("cpu-some-1t") is None and gpu_of("nvidia-h200") is H200
    assert all(gpu.arch in LIMITS for gpu in GPUS.values())


IMAGES = IOSpec("image", (16, 16), 3, 10)


def test_an_estimate_counts_what_it_was_not_made_for_alike():
    space = SearchSpace.from_dict(PLAIN)
    other = SearchSpace.from_dict({**PLAIN, "norm": "rms"})
    architecture = other.sample(np.random.default_rng(0))
    here, there = estimate("nvidia-a100", other, IMAGES), estimate("nvidia-a100", space, IMAGES)
    assert there.predict(architecture).latency.ms == pytest.approx(here.predict(architecture).latency.ms)
    # The smallest networks are all launches: the data sheet's rates do not matter, what a launch costs does.
    small = space.decode(np.zeros(len(space.variables), dtype=int))
    latencies = [estimate(name, space, IMAGES).predict(small).latency.ms for name in ("nvidia-t4", "nvidia-h200")]
    eager = estimate("nvidia-h200", space, IMAGES, runtime="eager").predict(small).latency.ms
    assert latencies[0] < 1.5 * latencies[1] and eager > 2.5 * latencies[1]


def test_a_gpus_numbers_travel_with_its_predictor(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_module, "gpu_of", lambda *_: H200)
    quick = MeasureConfig(passes=1, window_ms=0.2, sentinel_repeats=2, max_extra_passes=0)
    config = ProfileConfig(budget_s=60, max_networks=16, measure=quick, fit=FitConfig(num_trees=10))
    space = SearchSpace.from_dict(PLAIN)
    predictor = profile_module.profile(space, IMAGES, device="cpu", directory=tmp_path, config=config)
    again = LatencyPredictor.load(predictor.device, directory=tmp_path)
    assert GPU(**again.meta["gpu"]) == H200
    assert {"norm_forward.waves", f"{ABOUT}tail", "launches"} <= set(again.model.work_names)
    unseen = SearchSpace.from_dict({**PLAIN, "norm": "rms"}).sample(np.random.default_rng(0))
    assert again.predict(unseen).latency.ms == predictor.predict(unseen).latency.ms > 0


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton isn't installed")
def test_every_launch_of_the_tables_has_its_resources():
    """Whatever changes a launch needs `python -m mixnas.kernels.tools.resources`."""
    asked = list(resources.launches())
    for version, rows in resources.read().items():
        assert resources.launches_in(rows) == asked, f"Triton {version}"
    assert set(resources.load()) == {k for k in configs.kernels() if set(configs.gpus(k)) != {configs.INTERPRETER}}


def test_the_most_similar_launch_is_taken():
    rows = resources.read()[resources.version_taken()]
    row = random.Random(0).choice([row for row in rows if row["kernel"] == "norm_forward"])
    options = {name: int(value) for name, value in (item.split("=") for item in row["options"].split())}
    exact = resources.resources_of("norm_forward", row["dtype"], options)
    assert exact is not None and exact.registers == int(row["registers"])
    near = resources.resources_of("norm_forward", row["dtype"], options | {"BLOCK_C": options["BLOCK_C"] * 3 // 2})
    assert near is not None and near.registers == exact.registers
    assert resources.resources_of("no_such_kernel", "float32", {}) is None


def test_resources_are_those_of_the_triton_that_runs(monkeypatch):
    monkeypatch.setattr(resources, "read", lambda: {"3.6.0": [], "3.7.1": []})
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    taken = {}
    for here in ("3.6.0", "3.6.1", "3.7.1", "3.10.0", "3.5.0"):
        monkeypatch.setattr(dispatch.triton, "__version__", here, raising=False)
        taken[here] = resources.version_taken()
    assert taken == {"3.6.0": "3.6.0", "3.6.1": "3.6.0", "3.7.1": "3.7.1", "3.10.0": "3.7.1", "3.5.0": "3.6.0"}
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert resources.version_taken() == "3.7.1"


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton isn't installed")
def test_the_resource_counts_are_written_as_they_stand(monkeypatch):
    """From what the compiler says; `tests/kernels/tools/test_aot.py` compiles, and finds the committed counts."""
    if dispatch.triton.__version__ not in resources.read():
        pytest.skip(f"resources.csv is of Triton {', '.join(resources.read())}, here is {dispatch.triton.__version__}")
    counts = ("registers", "stack_bytes", "shared_bytes")
    compiled = [
        SimpleNamespace(kernel=row["kernel"], label=row["example"], **{name: int(row[name]) for name in counts})
        for row in resources.read()[dispatch.triton.__version__]
    ]
    monkeypatch.setattr(aot, "compile_table", lambda: compiled)
    assert resources.PATH.read_text() == resources.table_text(), (
        "write it anew with `python -m mixnas.kernels.tools.resources`"
    )
    compiled[0].registers += 1
    assert resources.PATH.read_text() != resources.table_text()


def test_the_form_recovers_a_made_up_gpu():
    """Time in waves is learned from waves, and a tenth of the rows is as good as all where the form is the truth."""
    rng = np.random.default_rng(0)
    works, truth = [], []
    for blocks, each in zip(rng.integers(1, 3000, 400), rng.integers(1, 60, 400) * 1024, strict=True):
        work = launch_work("k", Spread.of(int(blocks), 132, 4), 0.0, float(blocks * each))
        works.append(work)
        truth.append(2e-3 + 5e-4 * work["k.waves"] + 2e-9 * work["k.rounds.bytes"])
    latency = np.array(truth) * np.exp(rng.normal(0, 0.01, 400))
    settings = [{"role=k": 1.0}] * 400
    some = Columns.of(settings[:40])
    few = UnitModel.fit(Columns.of(works[:40]), some, latency[:40], FitConfig(num_trees=5))
    assert np.abs(few.physical(Columns.of(works[40:])) / np.array(truth[40:]) - 1).mean() < 0.01
    plain = [{name: work[name] for name in ("k.launches", "k.bytes")} for work in works]
    without = UnitModel.fit(Columns.of(plain[:40]), some, latency[:40], FitConfig(num_trees=5))
    assert np.abs(without.physical(Columns.of(plain[40:])) / np.array(truth[40:]) - 1).mean() > 0.03


def test_what_only_describes_has_no_coefficient():
    rng = np.random.default_rng(0)
    works = [{"k.launches": float(n), f"{ABOUT}registers": float(rng.integers(16, 255))} for n in range(1, 40)]
    model = UnitModel.fit(Columns.of(works), Columns.of([{}] * 39), np.arange(1, 40) * 1e-3, FitConfig(num_trees=5))
    assert dict(zip(model.work_names, model.coefficients > 0, strict=True)) == {
        "k.launches": True,
        f"{ABOUT}registers": False,
    }


def _published():
    """NeuSight's measurements of batched fp32 products on an A100 (MIT licence), those of its one frequent kernel."""
    path = PUBLISHED / "neusight-a100-bmm.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there (MIXNAS_SHARED_DATA names its folder)")
    with open(path, newline="") as file:
        return [row for row in csv.DictReader(file) if row["Kernel Name"] == "ampere_sgemm_128x128_nn"]


RESIDENT_REGISTERS = 128


def _product(row, gpu):
    batch, m, inner, n = (int(row[name]) for name in ("B", "M", "N", "K"))
    blocks = batch * -(-m // 128) * -(-n // 128)
    assert blocks == int(row["Grid x"]) * int(row["Grid y"]) * int(row["Grid z"])
    # The registers of this kernel are not published. At most 128 a thread let two blocks of 256 threads reside; with
    # one or three the errors hardly differ.
    spread = Spread.of(blocks, gpu.multiprocessors, occupancy(gpu.arch, 8, RESIDENT_REGISTERS))
    moved = 4 * batch * (m * inner + inner * n + m * n)
    padded = blocks * 128 * 128 * inner  # a block multiplies a whole tile
    work = launch_work("sgemm", spread, padded, moved)
    about = {"intensity": padded / moved, "tail": spread.tail, "blocks_busy": spread.busy}
    work |= {f"{ABOUT}{name}": value for name, value in about.items()}
    floor, traffic = floors_ms(gpu, padded, moved, 4, spread.busy)
    work |= {f"{ABOUT}arithmetic_ms": floor, f"{ABOUT}bandwidth_ms": traffic}
    return work, {"b": batch, "m": m, "n": n, "k": inner}


def published_errors(count=3000, seed=0):
    """Mean error and share within 10%, in percent, on the measurements that `count` random ones leave over."""
    from sklearn.ensemble import RandomForestRegressor

    rows = _published()
    pairs = [_product(row, GPUS["nvidia-a100"]) for row in rows]
    works, settings = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    latency = np.array([float(row["Latency"]) for row in rows])
    order = np.random.default_rng(seed).permutation(len(rows))
    seen, rest = order[:count], order[count:]
    work, setting = Columns.of(works), Columns.of(settings)
    model, unseen = (
        (Columns(work.names, work.values[seen]), Columns(setting.names, setting.values[seen])),
        (
            Columns(work.names, work.values[rest]),
            Columns(setting.names, setting.values[rest]),
        ),
    )
    model = UnitModel.fit(*model, latency[seen], FitConfig())
    raw = np.array([list(row.values()) for row in settings])
    forest = RandomForestRegressor(n_estimators=30, random_state=0).fit(raw[seen], latency[seen])

    def errors(predicted):
        error = np.abs(predicted / latency[rest] - 1)
        return round(100 * float(error.mean()), 2), round(100 * float((error <= 0.10).mean()), 2)

    return {
        "coefficients": int((model.coefficients > 0).sum()),
        "physical form": errors(model.physical(unseen[0])),
        "with trees": errors(model.predict(*unseen)),
        "random forest": errors(forest.predict(raw[rest])),
    }


def test_the_form_on_published_measurements():
    found = published_errors()
    print(found)
    assert found["coefficients"] <= 5
    mean, within = found["physical form"]
    assert mean <= 5 and within >= 91
    mean, within = found["with trees"]
    assert mean <= 2.2 and within >= 98
    assert found["random forest"][0] > 3 * mean


def test_a_unit_that_does_not_fit_is_left_out_and_the_profile_goes_on(tmp_path, monkeypatch, caplog):
    """A call that raises out-of-memory, also where the capture's own error hides it; any other error is raised."""
    quick = MeasureConfig(passes=1, window_ms=0.2, sentinel_repeats=2, max_extra_passes=0)
    profiler = profile_module.Profiler(
        SearchSpace.from_dict(PLAIN), IMAGES, device="cpu", runtime="eager", directory=tmp_path,
        config=ProfileConfig(measure=quick),
    )  # fmt: skip
    subjects = [profiler.unit_subject(row) for row in range(4)]
    plain, seen = profiler.call_of, []

    def call_of(what):
        seen.append(what.id)
        if len(seen) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if len(seen) == 3:
            raise RuntimeError("capture") from torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(what)

    monkeypatch.setattr(profiler, "call_of", call_of)
    built, calls = profiler._built(subjects, time.monotonic() + 60)
    assert [what.id for what in built] == [subjects[0].id, subjects[3].id] and len(calls) == 2
    assert set(profiler.left_out) == {subjects[1].id, subjects[2].id}
    monkeypatch.setattr(profiler, "call_of", lambda what: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profiler._built(subjects, time.monotonic() + 60)
