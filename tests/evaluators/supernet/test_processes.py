"""Several processes that train one super-network."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from mixnas.evaluators.supernet.processes import Group, processes
from mixnas.evaluators.supernet.training import SupernetConfig, load_supernet, train_supernet
from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.errors import ConfigError, NasError, StoppedEarly
from tests.evaluators.streamed import Signs
from tests.evaluators.supernet.tiny import CONFIG, assert_equal, tiny_supernet, weights


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


@pytest.mark.parametrize("make", [Digits, Signs])
def test_a_helping_process_takes_its_share_from_where_the_first_is(make, tmp_path):
    """Begun by one process, gone on with by two: the weights of one process alone, to round-off."""
    # Adam divides by gradients that are nearly zero at the start, which makes much of round-off: few, small steps.
    task = make()
    config = dataclasses.replace(CONFIG, steps=6, lr=1e-3)
    path = tmp_path / "supernet.safetensors"
    with pytest.raises(StoppedEarly):
        train_supernet(tiny_supernet(task), task, config, seed=0, checkpoint=path, should_stop=lambda: True)
    threads = torch.get_num_threads()
    supernet = tiny_supernet(task)
    train_supernet(supernet, task, dataclasses.replace(config, processes=2), seed=0, checkpoint=path)
    assert (torch.get_num_threads(), dist.is_initialized()) == (threads, False)
    alone = tiny_supernet(task)
    train_supernet(alone, task, config, seed=0)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(supernet)[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_one_process_is_a_group_of_its_own():
    group = Group()
    assert (group.size, group.rank, group.agree(3)) == (1, 0, 3)
    tensors, extras = [torch.ones(2)], torch.tensor([5.0])
    assert torch.equal(group.average(tensors, extras), extras) and torch.equal(tensors[0], torch.ones(2))


def test_a_batch_that_cannot_be_shared_is_refused(digits, monkeypatch):
    monkeypatch.setattr(Group, "__init__", lambda group: group.__dict__.update(together=False, size=3, rank=0))
    with pytest.raises(ConfigError, match="batch_size 32 cannot be shared by 3 processes"):
        train_supernet(tiny_supernet(digits), digits, CONFIG, seed=0)


def test_a_helper_that_fails_is_reported(tmp_path):
    with pytest.raises(NasError, match="helping process"), processes(2, _fail):
        dist.all_reduce(torch.zeros(1))
    assert not dist.is_initialized()


def _fail() -> None:
    raise SystemExit(3)


def _train_with_another(rank: int, path: str, config: SupernetConfig) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    try:
        task = by_name("digits")
        supernet = tiny_supernet(task)
        train_supernet(supernet, task, config, seed=0, checkpoint=f"{path}/supernet.safetensors")
        torch.save(weights(supernet), f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_a_group_do_what_one_does_with_the_joined_batch(digits, tmp_path):
    config = dataclasses.replace(CONFIG, steps=6, lr=1e-3)
    torch.multiprocessing.spawn(_train_with_another, args=(str(tmp_path), config), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_equal(first, second)
    alone = tiny_supernet(digits)
    initial = weights(alone)
    train_supernet(alone, digits, config, seed=0)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    moved = max((tensor - initial[name]).abs().max() for name, tensor in weights(alone).items())
    assert moved > 2e-3
    loaded = tiny_supernet(digits)
    load_supernet(loaded, tmp_path / "supernet.safetensors")
    assert_equal(first, weights(loaded))
