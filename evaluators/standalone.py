"""Stand-alone evaluation: an architecture is built, trained from scratch, judged on validation and measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mixnas.evaluators.costs import SpaceCosts, costs
from mixnas.evaluators.metrics import energy_of, metrics_of
from mixnas.evaluators.other_devices import OtherDevices
from mixnas.evaluators.pausing import NotThisTrainingError
from mixnas.evaluators.protocol import Metric, Outcome, Part, Request, attempt
from mixnas.evaluators.starting import begun
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import TrainConfig, TrainResult, evaluate, steps_of, train
from mixnas.predictors.latency.source import LatencySource, LatencySpec
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.space import SearchSpace

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StandaloneSpec:
    """What a `StandaloneEvaluator` is made from.

    Attributes:
        task: The task as in a configuration: a name, or a mapping with options.
        space: The search space as in a configuration.
        train: How networks are trained.
        seed: Of the initial weights, the order of examples and the augmentation.
        latency: What latency is measured of; None leaves it out.
        device: Where networks are trained, "cpu" or a CUDA device; None for where latency is measured, or a CPU.
        keep: Whether outcomes have the network of a shortened training too, for whoever measures it.
        other_devices: Names of devices whose latency is looked up too; see `OtherDevices`.
        memory: Whether peak memory is counted too; see `search_space.memory`.
        energy: Whether energy is measured too, where latency is; see `predictors.measuring.energy`.
    """

    task: str | Mapping[str, Any]
    space: Mapping[str, Any]
    train: TrainConfig
    seed: int = 0
    latency: LatencySpec | None = None
    device: str | None = None
    keep: bool = False
    other_devices: tuple[str, ...] = ()
    memory: bool = False
    energy: bool = False

    def open(self) -> StandaloneEvaluator:
        """Make the evaluator."""
        return StandaloneEvaluator(self)


class StandaloneEvaluator:
    """Trains each architecture from scratch; an `Evaluator`, and `Apart`: latency is measured where it searches.

    Every architecture is trained with the same seed, hence on the same batches: differences between two of them are
    then theirs rather than those of luck.

    Args:
        spec: What it is made from.
        task: The spec's task, where it was made already. The test split is not read.
        space: The spec's space, likewise.
        latency: The spec's latency, likewise.

    Raises:
        ConfigError: The device that latency refers to is not this machine.
    """

    finishing = "judge on the test split"  # a trial ends with the final weights

    def __init__(
        self,
        spec: StandaloneSpec,
        *,
        task: Task | None = None,
        space: SearchSpace | None = None,
        latency: LatencySource | None = None,
    ) -> None:
        self._spec = spec
        self.task = task or by_name(spec.task)
        self.space = space or SearchSpace.from_dict(spec.space)
        self._costs = SpaceCosts(self.space, self.task.io, memory=spec.memory)
        self.latency: LatencySource | None = latency or (None if spec.latency is None else spec.latency.open())
        if self.latency is not None and not self.latency.here:
            raise ConfigError(
                f"device {self.latency.device!r} is not this machine, so networks cannot be measured on it during the "
                "search. Use search.evaluator: supernet, which predicts latency, or device: auto."
            )
        self._other_devices = OtherDevices(
            spec.other_devices, None if self.latency is None else self.latency.spec, self.space, self.task.io
        )
        self.device = spec.device or (self.latency.torch_device if self.latency is not None else "cpu")

    @property
    def quiet(self) -> bool:
        """See `Apart`."""
        return self.latency is None or self.latency.shares_machine

    @property
    def spec(self) -> StandaloneSpec:
        """See `Evaluator`."""
        return replace(self._spec, latency=None if self.latency is None else self.latency.spec)

    def elsewhere(self) -> StandaloneSpec:
        """See `Apart`: it trains and judges, and its outcomes have the network, which `complete` measures."""
        return replace(self._spec, latency=None, other_devices=(), energy=False, device=self.device, keep=True)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See `Evaluator`. An outcome also has train_steps, train_seconds, the ends of the latency's interval and
        the metric's standard error."""
        spec = self._spec
        own = metrics_of(self.task, latency=self.latency is not None, memory=spec.memory, energy=spec.energy)
        return own | self._other_devices.metrics

    def prepare(self, report: Report = SILENT, should_stop: Callable[[], bool] | None = None) -> None:
        """Fix the sentinel's reference time, under which all latencies of a search compare."""
        if self.latency is not None:
            _ = self.latency.reference_ms

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """See `Evaluator`."""
        return self._costs.of(matrix) | self._other_devices.of(matrix)

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """See `Evaluator`."""
        return [attempt(self._evaluate, request) for request in requests]

    def _evaluate(self, request: Request) -> Outcome:
        network, result = self.train(
            request.architecture, fidelity=request.fidelity, parts=request.parts, part=request.part
        )
        judged = evaluate(network, self.task, "validation", device=self.device)
        metrics = {
            **judged.named(self.task.metric),
            **costs(request.architecture, self.task.io, memory=self._spec.memory),
            "train_steps": float(result.steps),
            "train_seconds": result.seconds,
        }
        return self._measured(request, Outcome(metrics, network=network, state=result.state))

    def complete(self, request: Request, outcome: Outcome) -> Outcome:
        """See `Apart`: the latency of a network that was trained elsewhere."""
        found = attempt(lambda asked: self._measured(asked, outcome), request)
        return replace(found, seconds=outcome.seconds + found.seconds)

    def _measured(self, request: Request, outcome: Outcome) -> Outcome:
        """With its latency, if there is one to be measured; the network is kept of a whole training only."""
        metrics, network = {**outcome.metrics, **self._other_devices.of_one(request.architecture)}, outcome.network
        assert network is not None
        if self.latency is not None:
            (latency,) = self.latency.measure([network])
            metrics |= {"latency_ms": latency.ms, **latency.ends}
            if self._spec.energy:
                metrics |= energy_of(network, self.latency)
        whole = request.fidelity == 1 and (request.part is None or request.part.until == 1)
        kept = network.cpu() if whole or self._spec.keep else None
        return replace(outcome, metrics=metrics, network=kept)

    def train(
        self,
        architecture: Architecture,
        *,
        fidelity: float = 1.0,
        parts: int = 1,
        part: Part | None = None,
        report: Report = SILENT,
        should_stop: Callable[[], bool] | None = None,
    ) -> tuple[Network, TrainResult]:
        """Build and train; the network depends on nothing but its arguments and, on a CPU, the number of threads.

        Args:
            architecture: Which.
            fidelity: Share of the steps.
            parts: See `Request`.
            part: See `Request`; the network is then fit to be judged, and the result has the state to go on from.
            report: Told of the steps.
            should_stop: Asked before each step.

        Raises:
            ConfigError: The architecture does not fit the task.
            DivergedError: Training gave NaN or infinity.
            StoppedEarly: `should_stop` said so.
        """
        config = self._shortened(fidelity)
        until = None
        if part is not None:
            steps = steps_of(config, len(self.task.train))
            until = max(1, round(part.until * steps))

        def trained(begin: bytes | None) -> tuple[Network, TrainResult]:
            generator = torch.Generator().manual_seed(self._spec.seed)
            network = begun(Network(architecture, self.task.io, generator=generator), self.task)
            result = train(
                network,
                self.task,
                config,
                generator=generator,
                device=self.device,
                parts=parts,
                until=until,
                begin=begin,
                report=report,
                should_stop=should_stop,
            )
            return network, result

        try:
            return trained(None if part is None else part.state)
        except NotThisTrainingError as error:
            _logger.info("architecture %s is trained from the beginning: %s", architecture.id, error)
            return trained(None)

    def _shortened(self, fidelity: float) -> TrainConfig:
        config = self._spec.train
        if fidelity == 1:
            return config
        return replace(config, steps=max(1, round(fidelity * steps_of(config, len(self.task.train)))))

    def finish(
        self, architecture: Architecture, report: Report = SILENT, should_stop: Callable[[], bool] | None = None
    ) -> Network:
        """See `Evaluator`: trained as in the search. Whoever kept that network need not ask for it."""
        network, _ = self.train(architecture, report=report, should_stop=should_stop)
        return network.cpu().eval()
