"""The evaluators that a configuration may name, and how each is made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mixnas.evaluators.protocol import Evaluator
from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.supernet.evaluator import SupernetEvaluator, SupernetSpec
from mixnas.evaluators.tasks.task import Task
from mixnas.predictors.latency.source import LatencySource
from mixnas.search.config import Config
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.space import SearchSpace

Make = Callable[[Config, Task, SearchSpace, LatencySource, Path | None], Evaluator]


def _supernet(
    config: Config, task: Task, space: SearchSpace, latency: LatencySource, checkpoint: Path | None
) -> Evaluator:
    spec = SupernetSpec(
        task=config.task.to_plain(),
        space=config.space,
        supernet=config.supernet,
        final=config.final.train,
        inherit=config.final.weights == "inherited",
        seed=config.search.seed,
        latency=latency.spec,
        checkpoint=checkpoint,
    )
    return SupernetEvaluator(spec, task=task, space=space, latency=latency)


def _standalone(
    config: Config, task: Task, space: SearchSpace, latency: LatencySource, checkpoint: Path | None
) -> Evaluator:
    spec = StandaloneSpec(
        task=config.task.to_plain(),
        space=config.space,
        train=config.train,
        seed=config.search.seed,
        latency=latency.spec,
    )
    return StandaloneEvaluator(spec, task=task, space=space, latency=latency)


EVALUATORS: Mapping[str, Make] = {"supernet": _supernet, "standalone": _standalone}


def make_evaluator(
    config: Config, task: Task, space: SearchSpace, latency: LatencySource, checkpoint: Path | None = None
) -> Evaluator:
    """The evaluator that a configuration asks for.

    Args:
        config: Names it (`search.evaluator`), and holds its settings.
        task: The configuration's task.
        space: The configuration's space.
        latency: Where latency comes from.
        checkpoint: File of the super-network, where there is one; None keeps it in memory only.

    Raises:
        ConfigError: No evaluator of that name, or it cannot do what is asked.
    """
    name = config.search.evaluator
    if name not in EVALUATORS:
        raise ConfigError(
            f"search.evaluator: no evaluator is called {name!r}.{nearest(name, EVALUATORS)} "
            f"Allowed: {', '.join(EVALUATORS)}."
        )
    return EVALUATORS[name](config, task, space, latency, checkpoint)
