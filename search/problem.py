"""A configuration, checked against its task and space before any work is started; and the evaluators it may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mixnas.evaluators.protocol import Evaluator
from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.supernet.evaluator import SupernetEvaluator, SupernetSpec
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.predictors.latency.lookup import check_tables
from mixnas.predictors.latency.source import LatencySource
from mixnas.search.config import Config
from mixnas.search.study.feasibility import Corners, check_constraints, corners
from mixnas.search_space.enumeration import check_single, check_space
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec


class Problem:
    """What a configuration asks for.

    Attributes:
        config: The configuration.
        seed: Of trainings and measurements.
        task: Its task.
        space: Its search space.
        io: What networks read and answer.
        device: What latency is of.
        latency_tag: Through which runtime and with which batch size, as in the names of files.
        metrics: What objectives and constraints may name, from the evaluator.
        objectives: In order.
        constraints: What a result has to satisfy.
        corners: The cheapest and dearest architecture by each cost.

    Args:
        config: As resolved.
        source: Where it is from, for messages.
        seed: Of trainings and measurements; the search's if not given. A run that goes on with another seed of its
            search keeps that of its trainings: its trials compare.

    Raises:
        ConfigError: The task, the space, the device, an objective or a constraint is wrong.
        InfeasibleError: No architecture can meet a constraint on costs.
    """

    def __init__(self, config: Config, source: str = "configuration", seed: int | None = None) -> None:
        self.config = config
        self.seed = config.search.seed if seed is None else seed
        self.task: Task = by_name(config.task.to_plain())
        self.space = SearchSpace.from_dict(config.space, f"{source}: space")
        self.io: IOSpec = self.task.io
        check_space(self.space, self.io)
        self._check_batches()
        latency = self.latency()
        self.device, self.latency_tag = latency.device, latency.tag
        self.metrics = self.evaluator(latency).metrics
        if self.metrics["latency_ms"].cheap:  # it will be looked up
            check_tables(self.space, self.io)
        latency.check(self.space)
        self.objectives = config.parsed_objectives(self.metrics)
        self.constraints = config.parsed_constraints(self.metrics)
        self.corners: Corners = corners(self.space, self.io)
        check_constraints(self.constraints, self.corners)

    def _check_batches(self) -> None:
        """Refuse what cannot be trained on one example at a time, where a batch has but one."""
        config = self.config
        sizes = {"final.train.batch_size": config.final.train.batch_size}
        if config.search.evaluator == "standalone":
            sizes = {"train.batch_size": config.train.batch_size}
        elif config.search.evaluator == "supernet":
            sizes["supernet.batch_size"] = config.supernet.batch_size // config.supernet.processes
        if len(self.task.train) == 1:
            sizes = {"task: train has one example": 1}
        for where, size in sizes.items():
            if size == 1:
                check_single(self.space, self.io, where)

    def latency(self, directory: Path | None = None, reference_ms: float | None = None) -> LatencySource:
        """Where latency comes from.

        Args:
            directory: Where a profile of this machine is kept; None for the user's profiles.
            reference_ms: The sentinel's reference time, where an earlier session fixed it.
        """
        config = self.config
        return config.latency.spec(config.device, self.seed, directory, reference_ms).open()

    def evaluator(self, latency: LatencySource, checkpoint: Path | None = None) -> Evaluator:
        """The evaluator that the configuration names; nothing is prepared yet.

        Args:
            latency: Where latency comes from.
            checkpoint: File of the super-network, where there is one; None keeps it in memory only.

        Raises:
            ConfigError: No evaluator of that name, or it cannot do what is asked.
        """
        name = self.config.search.evaluator
        if name not in EVALUATORS:
            raise ConfigError(
                f"search.evaluator: no evaluator is called {name!r}.{nearest(name, EVALUATORS)} "
                f"Allowed: {', '.join(EVALUATORS)}."
            )
        return EVALUATORS[name](self, latency, checkpoint)


def _supernet(problem: Problem, latency: LatencySource, checkpoint: Path | None) -> Evaluator:
    config = problem.config
    spec = SupernetSpec(
        task=config.task.to_plain(),
        space=config.space,
        supernet=config.supernet,
        final=config.final.train,
        inherit=config.final.weights == "inherited",
        seed=problem.seed,
        latency=latency.spec,
        checkpoint=checkpoint,
    )
    return SupernetEvaluator(spec, task=problem.task, space=problem.space, latency=latency)


def _standalone(problem: Problem, latency: LatencySource, checkpoint: Path | None) -> Evaluator:
    config = problem.config
    spec = StandaloneSpec(
        task=config.task.to_plain(),
        space=config.space,
        train=config.train,
        seed=problem.seed,
        latency=latency.spec,
    )
    return StandaloneEvaluator(spec, task=problem.task, space=problem.space, latency=latency)


EVALUATORS: Mapping[str, Callable[[Problem, LatencySource, Path | None], Evaluator]] = {
    "supernet": _supernet,
    "standalone": _standalone,
}
"""What `search.evaluator` may name, and how it is made."""
