"""The tours' configurations hold every operator that their kind of task has: a new one is one line there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixnas.evaluators.tasks.loading import by_name
from mixnas.search.config import load_config
from mixnas.search_space import registry
from mixnas.search_space.enumeration import check_space
from mixnas.search_space.space import SearchSpace

CONFIGS = Path(__file__).parents[1] / "configs"
AXES = {
    "operators-tour": ("stem", "norm", "downsample", "mixer", "gate", "channel_mixer"),
    "sequence-tour": ("norm", "mixer", "gate", "channel_mixer"),
}


def names_in(space: SearchSpace, axis: str) -> set[str]:
    """The operators that may stand on an axis, anywhere in a space."""
    if axis in ("stem", "norm"):
        choices = [getattr(space.tree, axis)]
    elif axis == "downsample":
        choices = [stage.downsample for stage in space.tree.stages]
    else:
        choices = [getattr(block, axis) for stage in space.tree.stages for block in stage.blocks]
    return {option.name for choice in choices for option in choice.options}


@pytest.mark.parametrize("tour", AXES)
def test_every_operator_is_on_the_tour(tour: str):
    config = load_config(CONFIGS / f"{tour}.yaml")
    space, io = SearchSpace.from_dict(config.space, tour), by_name(config.task.to_plain()).io
    check_space(space, io)
    missing = []
    for axis in AXES[tour]:
        serving = [name for name in registry.names(axis) if io.kind in registry.get(axis, name).kinds]
        missing += [f"a line `- {name}` under {axis}" for name in serving if name not in names_in(space, axis)]
    assert not missing, f"configs/{tour}.yaml lacks " + ", ".join(missing)
