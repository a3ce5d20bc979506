"""A configuration, checked against its task and space before any work is started."""

from __future__ import annotations

from pathlib import Path

from mixnas.evaluators.protocol import Evaluator
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.predictors.latency.source import LatencySource
from mixnas.search.config import Config
from mixnas.search.evaluators import make_evaluator
from mixnas.search.study.feasibility import Corners, check_constraints, corners
from mixnas.search_space.enumeration import check_space
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec


class Problem:
    """What a configuration asks for.

    Attributes:
        config: The configuration.
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

    Raises:
        ConfigError: The task, the space, the device, an objective or a constraint is wrong.
        InfeasibleError: No architecture can meet a constraint on costs.
    """

    def __init__(self, config: Config, source: str = "configuration") -> None:
        self.config = config
        self.task: Task = by_name(config.task.to_plain())
        self.space = SearchSpace.from_dict(config.space, f"{source}: space")
        self.io: IOSpec = self.task.io
        check_space(self.space, self.io)
        latency = self.latency()
        self.device, self.latency_tag = latency.device, latency.tag
        self.metrics = self.evaluator(latency).metrics
        latency.check()
        self.objectives = config.parsed_objectives(self.metrics)
        self.constraints = config.parsed_constraints(self.metrics)
        self.corners: Corners = corners(self.space, self.io)
        check_constraints(self.constraints, self.corners)

    def latency(self, directory: Path | None = None, reference_ms: float | None = None) -> LatencySource:
        """Where latency comes from.

        Args:
            directory: Where a profile of this machine is kept; None for the user's profiles.
            reference_ms: The sentinel's reference time, where an earlier session fixed it.
        """
        config = self.config
        return config.latency.spec(config.device, config.search.seed, directory, reference_ms).open()

    def evaluator(self, latency: LatencySource, checkpoint: Path | None = None) -> Evaluator:
        """The evaluator; see `search.evaluators.make_evaluator`."""
        return make_evaluator(self.config, self.task, self.space, latency, checkpoint)
