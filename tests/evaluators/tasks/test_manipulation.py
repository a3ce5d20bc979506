"""The token-manipulation tasks: the suite's own numbers, and that each answer can be told from what is read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mixnas.evaluators.tasks import manipulation
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import IGNORE, SPLITS, Task
from mixnas.search_space.errors import ConfigError
from tests.contracts.task import DenseTaskContract, TaskContract

FEW = {"train_size": 40, "validation_size": 30, "test_size": 30}


class TestCompression(DenseTaskContract):
    def make(self) -> Task:
        return by_name("compression", **FEW)

    def truth(self, inputs: Tensor) -> Tensor:
        return inputs


@pytest.fixture(params=manipulation.names())
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("which", ["in_context_recall", "noisy_recall", "fuzzy_recall", "selective_copying"])
class TestOthers:
    def test_the_contract(self, which: str) -> None:
        class Contract(TaskContract):
            def make(self) -> Task:
                return by_name(which, **FEW)

        for test in [getattr(Contract(), n) for n in dir(Contract) if n.startswith("test_")]:
            test()


def test_the_first_example_of_recall_is_the_suite_s():
    """Catalogue c, section 4.2: generator 12345, vocabulary 16, length 32."""
    task = by_name("in_context_recall", vocab_size=16, length=32, train_size=2, validation_size=1, test_size=1)
    assert task.train.inputs[0, :16].tolist() == [1, 14, 2, 9, 6, 13, 5, 15, 3, 14, 2, 9, 4, 12, 1, 14]


def test_draws_are_those_of_choice():
    """The suite draws with `choice`; whole numbers of the same range come from the same stream."""
    one, other = np.random.default_rng(12345), np.random.default_rng(12345)
    for size in (7, 8, 64, 3, 12):
        assert int(one.choice(np.arange(size))) == int(other.integers(size))
    assert one.choice(np.arange(5), size=4, replace=True).tolist() == other.integers(5, size=4).tolist()


def test_baselines_are_the_suite_s(name):
    task = by_name(name, validation_size=2, test_size=2)
    vocabulary, length, examples = {
        "in_context_recall": (16, 127, 12_800),
        "noisy_recall": (32, 127, 12_800),
        "fuzzy_recall": (16, 128, 12_800),
        "selective_copying": (16, 256, 12_800),
        "compression": (16, 32, 12_800),
        "memorisation": (256, 32, 256),
    }[name]
    assert (task.io.in_features, task.io.size, len(task.train)) == (vocabulary, (length,), examples)


def test_recall_asks_where_a_key_comes_again_and_for_the_value_that_it_had():
    for which, options in (("in_context_recall", {}), ("noisy_recall", {"noise": 0.4})):
        task = by_name(which, **FEW, **options)
        noise_from = 16 if which == "noisy_recall" else 99
        shares = []
        for row, asked in zip(task.test.inputs.tolist(), task.test.targets.tolist(), strict=True):
            book: dict[int, int] = {}
            for at in range(0, len(row), 2):
                key, answer = row[at], asked[at]
                if key in book:
                    assert answer == book[key]
                elif key < noise_from:
                    assert answer == IGNORE
                if key < noise_from and at + 1 < len(row):
                    book[key] = row[at + 1]
            assert asked[1::2] == [IGNORE] * (len(row) // 2) and asked[-1] != IGNORE
            shares.append(np.mean([a != IGNORE for a in asked]))
        if which == "in_context_recall":  # catalogue c: about 56 of 127 positions
            assert np.mean(shares) * 127 == pytest.approx(56, abs=1.5)
    assert bool((by_name("in_context_recall", **FEW).train.targets != IGNORE).all())  # training: the next token


def test_fuzzy_recall_ends_in_a_motif_that_stood_before():
    task = by_name("fuzzy_recall", vocab_size=24, length=64, motif=3, **FEW)
    for row, asked in zip(task.test.inputs.tolist(), task.test.targets.tolist(), strict=True):
        answer = [a for a in asked[-3:] if a != IGNORE]
        full = [*row, asked[-1]]
        keys = (24 - 1) // 2
        sizes = [n for n in (1, 2, 3) if all(keys <= t < 23 for t in full[-n:]) and full[-n - 1] < keys]
        (size,) = sizes
        probe = full[-size - 3 : -size]
        assert all(token < keys for token in probe) and len(set(probe)) == 3
        before = full[: -size - 3]
        there = [i for i in range(len(before) - 2) if before[i : i + 3] == probe]
        assert there and before[there[0] + 3 : there[0] + 3 + size] == full[-size:]
        assert answer == full[-size:][-len(answer) :]


def test_copying_tells_the_content_in_order():
    task = by_name("selective_copying", length=64, copied=8, **FEW)
    for row, asked in zip(task.train.inputs.tolist(), task.train.targets.tolist(), strict=True):
        content = [token for token in row[: row.index(15)] if token < 14]
        assert row.index(15) == 64 - 8 - 1 and row[-8:] == [14] * 8
        assert asked == [IGNORE] * 56 + content


def test_memorisation_has_one_book():
    task = by_name("memorisation")
    book: dict[int, int] = {}
    for split in SPLITS:
        inputs, targets = getattr(task, split).inputs, getattr(task, split).targets
        for key, value in zip(inputs[:, 0::2].flatten().tolist(), targets[:, 1::2].flatten().tolist(), strict=True):
            assert book.setdefault(key, value) == value and key < 127 <= value < 255
        assert bool((inputs[:, 1::2] == 255).all()) and bool((targets[:, 0::2] == IGNORE).all())
    assert len(book) == len(set(book.values())) == 127


def test_compression_is_answered_from_the_last_token_alone():
    from mixnas.search_space import registry
    from mixnas.search_space.registry import Context

    head = registry.get("head", "unrolled").build(Context(12, (9,), "causal"), Context(5, (9,), "causal"))
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[:, :-1] = 0
    assert torch.equal(head(x), head(other)) and head(x).shape == (2, 9, 5)
    rows = head(x)[0]
    assert len(torch.unique(rows, dim=0)) == 9  # each position is told apart


@pytest.mark.parametrize(
    ("which", "options", "said"),
    [
        ("in_context_recall", {"length": 31}, "must be even"),
        ("noisy_recall", {"noise": 1.0}, "noise is 1.0"),
        ("noisy_recall", {"noise_vocab": 30}, "noise_vocab is 30"),
        ("fuzzy_recall", {"length": 24}, "must be above 24"),
        ("fuzzy_recall", {"motif": 8}, "motif is 8"),
        ("selective_copying", {"copied": 128}, "copied is 128"),
        ("compression", {"vocab_size": 1}, "vocab_size is 1"),
        ("memorisation", {"train_size": 0}, "train_size is 0"),
        ("compression", {"train_size": 2**28}, "tokens in all"),
    ],
)
def test_what_cannot_be_is_refused(which, options, said):
    with pytest.raises(ConfigError, match=said):
        by_name(which, **options)
