"""The benchmark of engines, in small."""

from __future__ import annotations

import pytest

from mixnas.search.engines.local import LocalEngine


@pytest.fixture
def engines(scripts):
    import engines

    return engines


def test_more_workers_take_less_simulated_time_until_the_driver_is_the_limit(engines, tmp_path):
    took = {}
    for workers in (1, 4, 64):
        with engines._study(tmp_path / f"{workers}", strategy="random") as study:
            took[workers], driver = engines._simulated(study, 64, workers, False, [10.0])
            assert study.results.counts["done"] == 64 and driver > 0
    assert 640 <= took[1] < 680 and 160 <= took[4] < 200 and 10 <= took[64] < 50


def test_batches_wait_for_their_last(engines, tmp_path):
    for batched, least in ((False, 35), (True, 40)):
        with engines._study(tmp_path / f"{batched}", strategy="random") as study:
            took, _ = engines._simulated(study, 8, 2, batched, [10.0, 5.0, 5.0, 10.0])
        assert least <= took < least + 5


def test_a_round_says_what_was_lost_doubled_and_left(engines, tmp_path):
    evaluator = engines.Sleeper(tmp_path, 0.001)
    found = engines._round(LocalEngine(), tmp_path, 20, evaluator, 3)
    assert found == {
        "acknowledged": 20, "lost": 0, "doubled": 0, "running": 0, "fronts_equal": True,
        "evaluated": 20, "failed": 0, "retries": 0, "processes_left": 0,
    }  # fmt: skip
    assert engines._judged(tmp_path / "j", {(99, "never")}, None)["lost"] == 1


def test_a_timed_search_is_no_quicker_than_ideal(engines):
    found = engines.timed_search(LocalEngine(), 4, 0.1)
    assert found["ideal_s"] == pytest.approx(0.2) and found["of_ideal_first_to_last"] >= 2
    assert found["done"] == 4 and found["ray_start_s"] == 0
