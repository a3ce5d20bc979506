"""A configuration in small: the same in kind, soon done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.thinning import Thinned
from mixnas.search.config import load_config, read_config
from mixnas.search.problem import Problem
from mixnas.search.smoke import CANDIDATES, JUDGED_MACS, PASS_MACS, TRIALS, lighter, shrunk
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


SIZES = ("train_size", "validation_size", "test_size")
WIDE = {
    "task": {"name": "mqar", "vocab_size": 512, "length": 256, **dict.fromkeys(SIZES, 300)},
    "objectives": {"recall": "max", "latency_ms": "min"},
    "constraints": ["params >= 2e6", "params <= 9e9"],
    "space": {
        "stem": "embedding",
        "stages": [
            {"width": [64, 512, 1024], "depth": [1, 2, 8], "block": {"mixer": "attention", "channel_mixer": "mlp"}}
        ],
    },
}


def test_large_networks_are_taken_in_small_batches_of_few_examples_and_the_greatest_not_at_all():
    config = read_config(WIDE, "wide.yaml")
    small, _ = shrunk(config)
    light, said = lighter(small)
    (stage,), wide = light.space["stages"], read_config(WIDE, "wide.yaml").space["stages"][0]
    assert set(stage["width"]) < set(wide["width"]) and set(stage["depth"]) < set(wide["depth"])
    assert stage["block"] == wide["block"] and light.constraints == ("params <= 9e9",)
    problem = Problem(light)
    macs = problem.corners["macs"]["largest"].value
    for train in (light.train, light.final.train, light.supernet):
        assert 2 <= train.batch_size < 64 and macs * train.batch_size <= PASS_MACS
    task = problem.task
    assert len(task.train) == len(task.validation) == len(task.test) < 300
    assert max(4, light.train.batch_size) <= len(task.train) and macs * len(task.test) <= JUDGED_MACS
    for part in ("the greatest widths and depths are left out", "batches of ", f"at most {len(task.test)} examples"):
        assert part in said
    assert lighter(light)[0].space == light.space


def test_what_is_soon_done_stays_as_it_is():
    small, _ = shrunk(load_config(ROOT / "configs" / "digits.yaml"))
    assert lighter(small) == (small, "")


def test_a_task_with_fewer_examples_is_the_same_task():
    whole, few = by_name("digits"), by_name({"name": "digits", "at_most": 50})
    assert (len(few.train), len(few.validation), len(few.test)) == (50, 50, 50)
    inputs, targets = few.test.gather(torch.tensor([0, 49]))
    wanted = whole.test.gather(torch.tensor([0, 49 * len(whole.test) // 50]))
    assert torch.equal(inputs, wanted[0]) and torch.equal(targets, wanted[1])
    assert len(by_name({"name": "digits", "at_most": 10**6}).train) == len(whole.train)
    streamed = Thinned(whole.test, torch.arange(3) * 7)
    assert len(streamed) == 3 and torch.equal(
        streamed.gather(torch.tensor([2]))[0], whole.test.gather(torch.tensor([14]))[0]
    )
    for wrong in (0, -1, True, 1.5, "many"):
        with pytest.raises(ConfigError, match=r"at_most is .*, it must be a whole number from 1"):
            by_name({"name": "digits", "at_most": wrong})
