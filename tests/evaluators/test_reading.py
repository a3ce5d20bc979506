"""Examples that other processes read ahead: the same, in order, and an error is what it is."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixnas.evaluators import batches
from mixnas.evaluators.batches import Batches, in_order
from mixnas.evaluators.reading import Reader, workers_of
from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.training import TrainConfig, train
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import Network
from tests.evaluators.tasks.drawn import draw

CPU = torch.device("cpu")


class Slow:
    """Examples are their own number, and tell which process gathered them."""

    workers = 2

    def __init__(self, wait_s: float = 0.0) -> None:
        self.wait_s = wait_s

    def __len__(self) -> int:
        return 40

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.wait_s)
        if bool((indices == 99).any()):
            raise ConfigError("rose.jpg: is no picture")
        return indices.float()[:, None], torch.full((len(indices),), os.getpid())


def test_parts_come_in_order_and_from_other_processes():
    split = Slow()
    parts = torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(4)
    state = torch.get_rng_state()
    found = list(Reader(split, workers_of(split)).parts(parts))
    assert torch.equal(torch.cat([x[:, 0] for x, _ in found]), torch.cat(parts).float())
    readers = {int(y[0]) for _, y in found}
    assert os.getpid() not in readers and len(readers) == 2
    assert torch.equal(state, torch.get_rng_state())


def test_an_error_of_a_worker_is_the_error(tmp_path):
    with pytest.raises(ConfigError, match=r"^rose\.jpg: is no picture$"):
        list(Reader(Slow(), 2).parts([torch.tensor([0]), torch.tensor([99]), torch.tensor([1])]))


def test_a_reader_may_be_left_in_the_middle():
    given = Reader(Slow(), 2).parts(list(torch.arange(40).split(2)))
    assert next(given)[0].flatten().tolist() == [0, 1]
    given.close()


def test_who_waits_is_told(caplog, monkeypatch):
    from mixnas.evaluators import reading

    monkeypatch.setattr(reading, "_LOOKED_AT_S", 0.05)
    reader = Reader(Slow(0.02))
    with caplog.at_level(logging.WARNING):
        list(reader.parts(list(torch.arange(40).split(4))))
    assert "% of a training's time" in caplog.text and caplog.text.count("memory_gib") == 1
    assert 0.19 < reader.waited_s <= reader.seconds


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(draw(tmp_path / "d", each=12))


def test_batches_are_the_same_decoded_ahead_kept_in_part_or_whole(folder, monkeypatch):
    monkeypatch.setattr(batches, "_GATHERED_VALUES", 8 * 16 * 16 * 3)  # a batch at once
    some = 10 * 16 * 16 * 3 / 2**30
    epochs = []
    for options in ({}, {"memory_gib": 0, "workers": 0}, {"memory_gib": 0, "workers": 2}, {"memory_gib": some}):
        task = by_name("folder", path=folder, size=16, **options)
        data = Batches(task.train, 8, task.augment, CPU)
        assert task.record()["in_memory"] == (not options)
        generator = torch.Generator().manual_seed(5)
        epochs.append([*data.epoch(generator), *in_order(task.test, 4, CPU)])
    first, *others = epochs
    assert len(first) > 3
    for other in others:
        assert all(
            torch.equal(a, b) for one, two in zip(first, other, strict=True) for a, b in zip(one, two, strict=True)
        )


def test_a_training_is_the_same_with_workers_and_without(folder, monkeypatch):
    monkeypatch.setattr(batches, "_GATHERED_VALUES", 8 * 16 * 16 * 3)
    plain = {
        "stem": {"name": "conv", "stride": 4},
        "stages": [{"width": 8, "blocks": [{"mixer": "identity", "channel_mixer": "mlp"}]}],
    }
    weights = []
    for workers in (0, 1):
        task = by_name("folder", path=folder, size=16, memory_gib=0, workers=workers)
        generator = torch.Generator().manual_seed(0)
        network = Network(Architecture.from_dict(plain), task.io, generator=generator)
        train(network, task, TrainConfig(steps=6, batch_size=8), generator=generator)
        weights.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(*weights)
