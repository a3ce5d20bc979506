"""The tours have every operator there is: a new one is one line in a configuration, or has a reason."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mixnas.evaluators.tasks.loading import by_name
from mixnas.search.config import load_config
from mixnas.search_space import registry
from mixnas.search_space.enumeration import check_space
from mixnas.search_space.space import SearchSpace

ROOT = Path(__file__).parents[1]
TOURS = ("operators", "sequence")


@pytest.fixture
def tours(monkeypatch) -> ModuleType:
    """The script."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    spec = importlib.util.spec_from_file_location("benchmark_of_tours", ROOT / "benchmarks" / "tours.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def standing_in(tour: str) -> set[tuple[str, str]]:
    """The operators that may stand anywhere in a tour's networks."""
    config = load_config(ROOT / "configs" / f"{tour}-tour.yaml")
    space, io = SearchSpace.from_dict(config.space, tour), by_name(config.task.to_plain()).io
    check_space(space, io)
    tree = space.tree
    choices = [("stem", tree.stem), ("norm", tree.norm), *(("downsample", stage.downsample) for stage in tree.stages)]
    for block in (block for stage in tree.stages for block in stage.blocks):
        choices += [(axis, getattr(block, axis)) for axis in ("mixer", "gate", "channel_mixer")]
    return {("head", io.head)} | {(axis, option.name) for axis, choice in choices for option in choice.options}


@pytest.mark.parametrize("tour", TOURS)
def test_what_serves_a_tours_task_is_on_it_or_has_a_reason(tours, tour):
    here, serving, reasons = standing_in(tour), tours.serving(tour), tours.ELSEWHERE[tour]
    missing = [f"a line `- {name}` under {axis}" for axis, name in sorted(serving - here - set(reasons))]
    assert not missing, f"configs/{tour}-tour.yaml lacks {', '.join(missing)}; or benchmarks/tours.py a reason"
    stale = sorted(f"{axis} {name}" for axis, name in set(reasons) - (serving - here))
    assert not stale, f"benchmarks/tours.py says why these are not on the {tour} tour, and they are: {stale}"


def test_no_operator_is_on_neither_tour(tours):
    """One that serves bidirectional sequences alone would be on none of the two."""
    on_one = set().union(*(tours.serving(tour) for tour in TOURS))
    every = {(axis, name) for axis in tours.AXES for name in registry.names(axis) if name != "none"}
    assert every - on_one == set(), "neither tour's task is served: give its kinds, or a tour that has it"


def test_a_mixer_that_is_new_and_in_no_configuration_is_found(tours, monkeypatch):
    class Unheard:
        """Never built: only that it is registered matters."""

    monkeypatch.setattr(registry, "_operators", dict(registry._operators))
    registry.register("mixer", "unheard_mixer", paper="none", kinds=("sequence", "causal"))(Unheard)
    assert ("mixer", "unheard_mixer") in tours.wanted("sequence") - standing_in("sequence")
    assert ("mixer", "unheard_mixer") not in tours.wanted("operators")


@pytest.mark.parametrize("tour", TOURS)
def test_networks_for_the_rest_have_all_that_no_finalist_has(tours, tour):
    """Were there no finalist at all."""
    config = load_config(ROOT / "configs" / f"{tour}-tour.yaml")
    space, head = SearchSpace.from_dict(config.space, tour), by_name(config.task.to_plain()).io.head
    chosen, nowhere = tours.cover(space, head, tours.wanted(tour), 1000)
    assert not nowhere
    assert set().union(*(tours.operators_of(each, head) for each in chosen)) >= tours.wanted(tour)
