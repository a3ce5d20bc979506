"""Multi-query associative recall against the numbers of the published generator."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.mqar import generate
from mixnas.evaluators.tasks.task import IGNORE, SPLITS, Task
from tests.contracts.task import DenseTaskContract


class TestMqar(DenseTaskContract):
    def make(self) -> Task:
        return by_name("mqar", vocab_size=24, length=16, pairs=2, train_size=64, validation_size=64, test_size=64)

    def truth(self, inputs: torch.Tensor) -> torch.Tensor:
        """What stood behind the same key in the pairs."""
        rows = [dict(zip(row[0:4:2], row[1:4:2], strict=True)) for row in inputs.tolist()]
        answers = [[book.get(key, IGNORE) for key in row] for book, row in zip(rows, inputs.tolist(), strict=True)]
        return torch.tensor(answers)


def _answers(inputs: torch.Tensor, targets: torch.Tensor) -> list[tuple[int, int, int]]:
    """(key, position, value) of each query of one example."""
    return [(int(inputs[p]), p, int(targets[p])) for p in torch.nonzero(targets != IGNORE).flatten().tolist()]


def test_first_rows_are_the_published_ones() -> None:
    inputs, targets = generate(num_examples=2, vocab_size=8192, length=64, pairs=4, seed=0)
    assert inputs[0, :9].tolist() == [583, 4250, 1962, 4168, 1958, 8036, 3194, 4336, 0]
    assert _answers(inputs[0], targets[0]) == [(1958, 26, 8036), (3194, 36, 4336), (1962, 52, 4168), (583, 60, 4250)]
    assert inputs[1, :8].tolist() == [1053, 6687, 2171, 6896, 1102, 5844, 2544, 6657]
    assert _answers(inputs[1], targets[1]) == [(1053, 8, 6687), (1102, 10, 5844), (2544, 16, 6657), (2171, 40, 6896)]


def test_a_thousand_rows_have_the_published_digests() -> None:
    inputs, targets = generate(num_examples=1000, vocab_size=8192, length=64, pairs=4, seed=123)

    def digest(x: torch.Tensor) -> str:
        return hashlib.sha256(x.numpy().astype("<i8").tobytes()).hexdigest()[:16]

    assert int(inputs.sum()) == 40_791_115
    assert digest(inputs) == "4656acd2f4f85793"
    assert digest(targets) == "2ab1c2cee61ba3e7"
    labelled = targets != IGNORE
    assert int(labelled.sum()) == 4000
    assert labelled[:, 8].float().mean().item() == pytest.approx(0.726, abs=5e-4)
    assert torch.nonzero(labelled)[:, 1].float().mean().item() == pytest.approx(22.165, abs=5e-4)


@pytest.mark.parametrize(("length", "pairs", "share"), [(64, 4, 0.2511), (128, 8, 0.2131), (256, 16, 0.1847)])
def test_the_first_slot_is_drawn_as_often_as_the_power_law_says(length: int, pairs: int, share: float) -> None:
    inputs, _ = generate(num_examples=4000, vocab_size=512, length=length, pairs=pairs, seed=1)
    # The first query drawn is that of the first key; later draws are without replacement.
    first_key_at_first_slot = inputs[:, 2 * pairs] == inputs[:, 0]
    assert first_key_at_first_slot.float().mean().item() == pytest.approx(share, abs=4 * (share / 4000) ** 0.5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_example_is_a_lookup(data: st.DataObject) -> None:
    pairs = data.draw(st.integers(1, 6))
    passes = data.draw(st.integers(1, 2))
    length = 2 * data.draw(st.integers(max(2, 2 * pairs, pairs * passes + pairs), 20))
    vocab_size = data.draw(st.integers(length + 1, 99))
    seed = data.draw(st.integers(0, 2**32 - 1))
    state = np.random.get_state()[1].copy()
    inputs, targets = generate(
        num_examples=3, vocab_size=vocab_size, length=length, pairs=pairs, num_passes=passes, seed=seed
    )
    assert (np.random.get_state()[1] == state).all()
    for row, target in zip(inputs, targets, strict=True):
        book = dict(zip(row[0 : 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist(), strict=True))
        assert len(book) == len(set(book.values())) == pairs
        assert all(1 <= key < vocab_size // 2 <= value < vocab_size for key, value in book.items())
        assert row[: 2 * pairs].tolist() * passes == row[: 2 * pairs * passes].tolist()
        assert {(key, value) for key, _, value in _answers(row, target)} == set(book.items())
        queries = target != IGNORE
        assert not queries[: 2 * pairs * passes].any()
        assert (row[2 * pairs * passes :][~queries[2 * pairs * passes :]] == 0).all()


def test_noise_replaces_filler_only() -> None:
    quiet, targets = generate(num_examples=50, vocab_size=99, length=32, pairs=4, seed=5)
    noisy, same_targets = generate(num_examples=50, vocab_size=99, length=32, pairs=4, seed=5, random_non_queries=True)
    assert torch.equal(targets, same_targets)
    assert torch.equal(noisy[quiet != 0], quiet[quiet != 0])
    assert len(torch.unique(noisy[quiet == 0])) > 80
    assert int(noisy.min()) >= 0 and int(noisy.max()) < 99


def test_splits_share_no_example_and_depend_on_the_seed_alone() -> None:
    options = {"vocab_size": 64, "length": 32, "pairs": 4, "train_size": 600, "validation_size": 300, "test_size": 300}
    task, again, other = by_name("mqar", **options), by_name("mqar", **options), by_name("mqar", **options, seed=1)
    rows = torch.cat([getattr(t, name).inputs for t in (task, other) for name in SPLITS])
    assert len(torch.unique(rows, dim=0)) == len(rows) == 2400
    for name in SPLITS:
        assert torch.equal(getattr(task, name).inputs, getattr(again, name).inputs)
        assert torch.equal(getattr(task, name).targets, getattr(again, name).targets)


def test_loss_is_the_cross_entropy_of_the_labelled_positions() -> None:
    task = by_name("mqar", vocab_size=64, length=32, pairs=4, train_size=7, validation_size=1, test_size=1)
    outputs = torch.randn(7, 32, 64, generator=torch.Generator().manual_seed(0))
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(
            outputs.transpose(1, 2), task.train.targets, ignore_index=IGNORE, label_smoothing=smoothing
        )
        torch.testing.assert_close(task.loss(outputs, task.train.targets, smoothing), expected)
    task.label_smoothing = 0.2
    torch.testing.assert_close(task.training_loss(outputs, task.train.targets), expected)
