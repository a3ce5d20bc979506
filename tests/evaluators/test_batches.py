"""Batches of splits in memory and of streamed ones."""

import pytest
import torch
from torch import Tensor

from mixnas.evaluators import batches
from mixnas.evaluators.batches import Batches, gather, in_order
from mixnas.evaluators.tasks.task import Split
from tests.evaluators.streamed import Noise, Signs

CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(count: int) -> Split:
    """Each example is its own number."""
    return Split(torch.arange(count).float()[:, None], torch.arange(count))


def shaken(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return inputs + torch.rand(inputs.shape, generator=generator), targets


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches of five are gathered at once."""
    monkeypatch.setattr(batches, "_GATHERED_VALUES", 15)


def test_an_epoch_has_each_example_once_but_for_an_incomplete_batch() -> None:
    data = Batches(numbers(23), 5, None, CPU)
    assert (data.size, data.per_epoch) == (5, 4)
    epochs = data.forever(seeded())
    first, second = ([next(epochs) for _ in range(4)] for _ in range(2))
    for epoch in (first, second):
        seen = torch.cat([y for _, y in epoch]).tolist()
        assert len(set(seen)) == len(seen) == 20
        assert all(torch.equal(x[:, 0], y.float()) for x, y in epoch)
    assert not torch.equal(first[0][1], second[0][1])


def test_a_split_that_is_smaller_than_a_batch_is_one() -> None:
    data = Batches(numbers(3), 64, None, CPU)
    assert (data.size, data.per_epoch) == (3, 1)
    ((x, _),) = data.epoch(seeded())
    assert sorted(x[:, 0].tolist()) == [0, 1, 2]


@pytest.mark.usefixtures("small_parts")
def test_what_is_drawn_does_not_depend_on_where_examples_come_from() -> None:
    stream = Noise(0, 31, (1, 1))
    memory = Split(*stream.gather(torch.arange(31)))
    for seed_of in (None, lambda part: 100 + part):
        streamed, held = (
            list(Batches(split, 5, shaken, CPU).epoch(seeded(), seed_of=seed_of)) for split in (stream, memory)
        )
        assert len(streamed) == len(held) == 6
        for (x, y), (a, b) in zip(streamed, held, strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("skip", [0, 1, 3, 4, 6, 10, 11, 12])
def test_skipped_batches_change_nothing_of_the_others(skip: int) -> None:
    """With seeds for the parts and without."""
    for seed_of in (None, lambda part: 100 + part):
        whole = list(Batches(numbers(60), 5, shaken, CPU).epoch(seeded(), seed_of=seed_of))
        rest = list(Batches(numbers(60), 5, shaken, CPU).epoch(seeded(), skip=skip, seed_of=seed_of))
        assert len(whole) == 12 and len(rest) == 12 - skip
        for (x, y), (a, b) in zip(whole[skip:], rest, strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


@pytest.mark.usefixtures("small_parts")
def test_with_seeds_skipped_parts_are_not_gathered() -> None:
    stream = Noise(0, 60, (1, 1))
    data = Batches(stream, 5, None, CPU)
    stream.asked.clear()
    assert len(list(data.epoch(seeded(), skip=7, seed_of=lambda part: part))) == 5
    assert [len(indices) for indices in stream.asked] == [15, 15]  # of four parts


def test_many_batches_are_gathered_and_augmented_at_once() -> None:
    """So many that a default training on small images makes one call an epoch."""
    calls: list[int] = []

    def counted(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        calls.append(len(inputs))
        return inputs, targets

    task = Signs()
    for _ in Batches(task.train, 32, counted, CPU).epoch(seeded()):
        pass
    assert calls == [160]


def test_all_examples_in_order() -> None:
    parts = list(in_order(numbers(7), 3, CPU))
    assert [y.tolist() for _, y in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    inputs, targets = gather(numbers(7), torch.tensor([6, 0]), CPU)
    assert inputs[:, 0].tolist() == targets.tolist() == [6, 0]
