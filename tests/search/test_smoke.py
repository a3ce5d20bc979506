"""A configuration in small: the same in kind, soon done."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixnas.search.config import load_config, read_config
from mixnas.search.smoke import CANDIDATES, TRIALS, shrunk
from mixnas.search_space.errors import ConfigError

ROOT = Path(__file__).parents[2]
KEPT = {"task", "device", "objectives", "space"}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*.yaml")]), ids=str)
def test_what_is_searched_stays_and_what_takes_time_does_not(path: Path):
    config = load_config(path)
    small, omitted = shrunk(config)
    before, after = config.to_plain(), small.to_plain()
    assert {key for key in before if before[key] != after[key]} <= {"search", "train", "supernet", "final", "latency"}
    assert all(before[key] == after[key] for key in KEPT) and not omitted
    for key in ("strategy", "evaluator", "engine", "seed"):
        assert before["search"][key] == after["search"][key]
    assert after["search"]["trials"] <= TRIALS and after["final"]["candidates"] <= CANDIDATES
    assert after["search"]["time"] + after["latency"]["profile"] + after["supernet"]["seconds"] <= 25
    for key in ("threads", "batch_size", "runtime"):
        assert before["latency"][key] == after["latency"][key]
    assert read_config(after, "again") == small and shrunk(small) == (small, ())


def test_what_only_training_decides_is_no_bound():
    config = read_config({"constraints": ["params <= 2e5", "accuracy >= 0.9", "latency_ms <= 3"]}, "c.yaml")
    small, omitted = shrunk(config)
    assert small.constraints == ("params <= 2e5", "latency_ms <= 3") and omitted == ("accuracy >= 0.9",)


def test_a_smaller_budget_stays():
    config = read_config({"search": {"trials": 3, "time": 2}, "train": {"steps": 2}, "final": {"candidates": 1}}, "c")
    small, _ = shrunk(config)
    assert (small.search.trials, small.search.time, small.train.steps, small.final.candidates) == (3, 2.0, 2, 1)


def test_a_text_that_is_two_constraints_is_kept_or_left_out_as_one():
    config = read_config({"constraints": ["about 20k parameters", "about 1 accuracy", "accuracy >= 0.8"]}, "c.yaml")
    small, omitted = shrunk(config)
    assert small.constraints == ("about 20k parameters",) and omitted == ("about 1 accuracy", "accuracy >= 0.8")


def test_a_seed_that_numpy_does_not_take_is_refused_as_it_is_read():
    assert read_config({"search": {"seed": 2**32 - 1}}, "c.yaml").search.seed == 2**32 - 1
    with pytest.raises(ConfigError, match=r"c.yaml: search.seed: .*4294967296.*from 0 to"):
        read_config({"search": {"seed": 2**32}}, "c.yaml")
