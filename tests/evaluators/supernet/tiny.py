"""A tiny space and its super-network, for the tests beside this file (and the processes that they start)."""

from __future__ import annotations

import torch
from torch import Tensor

from mixnas.evaluators.supernet.training import SupernetConfig
from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet

CONFIG = SupernetConfig(steps=20, batch_size=32, samples=1, checkpoint_every=0)


def tiny_space(norm: object = "layer", stride: int = 2) -> SearchSpace:
    block = {
        "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}, {"name": "attention", "heads": 2}],
        "gate": ["none", "se"],
        "channel_mixer": {"name": "mlp", "expansion": [1, 2]},
    }
    stage = {"width": [4, 8], "depth": [1, 2], "block": block}
    return SearchSpace.from_dict({"stem": {"name": "conv", "stride": stride}, "norm": norm, "stages": [stage]})


def tiny_supernet(task: Task, norm: object = "layer") -> Supernet:
    # A dense answer is wanted at every position of the input.
    space = tiny_space(norm, stride=1 if task.io.grid else 2)
    return Supernet(space, task.io, torch.Generator().manual_seed(0))


def weights(supernet: Supernet) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in supernet.state_dict().items()}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
