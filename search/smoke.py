"""A user's own configuration, shrunk so that a search goes through every one of its phases in under a minute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import SPLITS
from mixnas.evaluators.tasks.thinning import OPTION
from mixnas.evaluators.training import TrainConfig
from mixnas.search.config import Config
from mixnas.search.naming import Named
from mixnas.search.promotion import Asynchronous
from mixnas.search.study.objectives import parse_constraints
from mixnas.search_space.enumeration import cost_corner
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

TRIALS, CANDIDATES, STEPS = 12, 2, 4
SEARCH_S, PROFILE_S, SUPERNET_S = 10.0, 8.0, 6.0

PASS_MACS, JUDGED_MACS = 1e9, 5e9
"""Multiply-accumulates of the dearest network with a batch, and with a split."""

_LEAST_BATCH, _LEAST_EXAMPLES = 2, 4

COSTS = ("latency_ms", "params", "macs", "weight_bytes")
"""What a network has before it is trained: bounds on these can be kept in a smoke run."""


def shrunk(config: Config) -> tuple[Config, tuple[str, ...]]:
    """The same task, space, objectives, evaluator, strategy and engine, with budgets that are soon spent.

    Its numbers mean nothing: networks are trained for a few steps. So bounds on what training decides are left out.

    Args:
        config: As it would be searched.

    Returns:
        The configuration, and the constraints that were left out.
    """
    omitted = tuple(  # one text may be two constraints: "about 20k parameters"
        text for text in config.constraints if any(part.metric not in COSTS for part in parse_constraints([text]))
    )
    search = config.search
    small = replace(
        config,
        constraints=tuple(text for text in config.constraints if text not in omitted),
        search=replace(
            search,
            trials=min(search.trials, TRIALS),
            time=min(search.time or SEARCH_S, SEARCH_S),
            halving=Asynchronous(rungs=2, factor=2.0) if search.halving.on else search.halving,
        ),
        train=_short(config.train),
        supernet=replace(config.supernet, seconds=min(config.supernet.seconds or SUPERNET_S, SUPERNET_S), steps=None),
        final=replace(
            config.final, candidates=min(config.final.candidates, CANDIDATES), train=_short(config.final.train)
        ),
        latency=replace(config.latency, profile=min(config.latency.profile, PROFILE_S), passes=1, final_passes=1),
        storage=None,  # what means nothing is not for a team
    )
    return small, omitted


def lighter(config: Config) -> tuple[Config, str]:
    """What `shrunk` gave, lighter still where its networks are large: fewer examples, smaller batches, and as a last
    resort without the greatest widths and depths.

    By multiply-accumulates of the dearest network, which a core or two do some ten thousand million of in a second.

    Returns:
        The configuration, and what was made lighter, in words; empty where nothing was.
    """
    task = by_name(config.task.to_plain())
    space, left_out = config.space, False
    macs = _dearest(space, task.io)
    while macs * _LEAST_BATCH > PASS_MACS and (smaller := _without_largest(space)) is not None:
        space, left_out = smaller, True
        macs = _dearest(space, task.io)
    batch = max(_LEAST_BATCH * config.supernet.processes, int(PASS_MACS / macs))
    examples = max(_LEAST_EXAMPLES, batch, int(JUDGED_MACS / macs))
    said = []
    if left_out:
        said.append("the greatest widths and depths are left out")
    if batch < max(config.train.batch_size, config.supernet.batch_size, config.final.train.batch_size):
        said.append(f"batches of {batch}")
    if examples < max(len(getattr(task, split)) for split in SPLITS):
        said.append(f"at most {examples} examples of each split")
    if not said:
        return config, ""
    # What is left of the space may be too small for a lower bound.
    kept = tuple(text for text in config.constraints if not left_out or "<" in text)
    said += [f"{text!r} is no bound" for text in config.constraints if text not in kept]
    steps = max(1, min(STEPS, int(STEPS * PASS_MACS / (macs * batch))))
    supernet = replace(config.supernet, batch_size=min(config.supernet.batch_size, batch))
    if macs * batch > PASS_MACS:  # even the steps that tell how long one takes would take too long
        supernet = replace(supernet, seconds=None, steps=1, samples=min(supernet.samples, 1))
    small = replace(
        config,
        task=Named(config.task.name, {**config.task.options, OPTION: examples}),
        space=space,
        constraints=kept,
        train=_in_batches(config.train, batch, steps),
        supernet=supernet,
        final=replace(config.final, train=_in_batches(config.final.train, batch, steps)),
    )
    return small, ", ".join(said)


def _dearest(space: Any, io: IOSpec) -> float:
    """Multiply-accumulates of the dearest network."""
    return cost_corner(SearchSpace.from_dict(space, "space"), io, "macs", largest=True).value


def _without_largest(space: Mapping[str, Any]) -> dict[str, Any] | None:
    """A space without the greatest of each stage's widths and depths; None where no stage has a choice of them."""
    stages, changed = [], False
    for stage in space["stages"]:
        fewer = dict(stage)
        for key in ("width", "depth"):
            values = stage.get(key)
            if isinstance(values, Sequence) and len(values) > 1:
                fewer[key], changed = sorted(values)[:-1], True
        stages.append(fewer)
    return {**space, "stages": stages} if changed else None


def _in_batches(train: TrainConfig, batch: int, steps: int) -> TrainConfig:
    return replace(train, batch_size=min(train.batch_size, batch), steps=min(train.steps or steps, steps))


def _short(train: TrainConfig) -> TrainConfig:
    return replace(train, steps=min(train.steps or STEPS, STEPS), stop_at=None, validate_every=0)
