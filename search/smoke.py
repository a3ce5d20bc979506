"""A user's own configuration, shrunk so that a search goes through every one of its phases in under a minute."""

from __future__ import annotations

from dataclasses import replace

from mixnas.evaluators.training import TrainConfig
from mixnas.search.config import Config
from mixnas.search.study.objectives import parse_constraints

TRIALS, CANDIDATES, STEPS = 12, 2, 4
SEARCH_S, PROFILE_S, SUPERNET_S = 10.0, 8.0, 6.0

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
        search=replace(search, trials=min(search.trials, TRIALS), time=min(search.time or SEARCH_S, SEARCH_S)),
        train=_short(config.train),
        supernet=replace(config.supernet, seconds=min(config.supernet.seconds or SUPERNET_S, SUPERNET_S), steps=None),
        final=replace(
            config.final, candidates=min(config.final.candidates, CANDIDATES), train=_short(config.final.train)
        ),
        latency=replace(config.latency, profile=min(config.latency.profile, PROFILE_S), passes=1, final_passes=1),
    )
    return small, omitted


def _short(train: TrainConfig) -> TrainConfig:
    return replace(train, steps=min(train.steps or STEPS, STEPS), stop_at=None, validate_every=0)
