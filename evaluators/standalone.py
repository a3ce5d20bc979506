"""Stand-alone evaluation: an architecture is built, trained from scratch, judged on validation and measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict

import numpy as np
import torch

from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import TrainConfig, TrainResult, evaluate, train
from mixnas.predictors.measuring.measure import (
    CudaClock,
    Latency,
    MeasureConfig,
    cpu_clock,
    forward_call,
    make_sentinel,
    measure_networks,
)
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SILENT, Report

Keep = Callable[[Architecture, Network, dict[str, float]], None]
"""Called with each trained network, on its device and in evaluation mode, and its metrics."""


class StandaloneEvaluator:
    """Callable that trains an architecture from scratch and returns its metrics.

    Every architecture is trained with the same seed, hence on the same batches: differences between two of them are
    then theirs rather than those of luck.

    Args:
        task: What to train on. The test split is read by `test` alone.
        config: How to train.
        device: "cpu" or a CUDA device; training and measuring happen there.
        seed: Of the initial weights, the order of examples and the augmentation.
        measure: How to measure latency; None leaves `latency_ms` out.
        reference_ms: The sentinel's reference time. Latencies compare only under the same one, so a search that
            resumes, or runs in several processes, passes on the one it began with; measured if not given.
        report: See `mixnas.evaluators.training.train`.
        should_stop: Asked before each training step; `StoppedEarly` is raised when it says so.
        keep: See `Keep`.
    """

    def __init__(
        self,
        task: Task,
        config: TrainConfig,
        *,
        device: str | torch.device = "cpu",
        seed: int = 0,
        measure: MeasureConfig | None = MeasureConfig(),  # noqa: B008 - frozen
        reference_ms: float | None = None,
        report: Report = SILENT,
        should_stop: Callable[[], bool] | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.task = task
        self.config = config
        self.device = torch.device(device)
        self.seed = seed
        self._measure = measure
        self._reference_ms = reference_ms
        self._report = report
        self._should_stop = should_stop
        self._keep = keep
        self._rng = np.random.default_rng(seed)
        self._sentinel = None if measure is None else make_sentinel(str(self.device))
        self._clock = CudaClock(graph=False) if self.device.type == "cuda" else cpu_clock

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what a call returns."""
        names = [self.task.metric, "loss", "params", "macs", "weight_bytes", "train_steps", "train_seconds"]
        latency = [] if self._measure is None else ["latency_ms", "latency_low_ms", "latency_high_ms"]
        return (*names, *latency)

    @property
    def reference_ms(self) -> float:
        """The sentinel's reference time, to be passed on to whoever continues this search."""
        if self._reference_ms is None:
            assert self._sentinel is not None, "latency is not measured"
            (itself,) = measure_networks(
                [self._sentinel], rng=self._rng, config=self._measure, sentinel=self._sentinel, clock=self._clock
            )
            self._reference_ms = itself.latency_ms / itself.ratio
        return self._reference_ms

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """Metrics on the validation split, cost and latency; see `metrics`.

        Raises:
            ConfigError: The architecture does not fit the task.
            DivergedError: Training or validation gave NaN or infinity.
            StoppedEarly: `should_stop` said so.
        """
        network, result = self.train(architecture)
        judged = evaluate(network, self.task, "validation", device=self.device)
        metrics = {
            self.task.metric: judged.score,
            "loss": judged.loss,
            **self.cost(architecture),
            "train_steps": float(result.steps),
            "train_seconds": result.seconds,
        }
        if self._measure is not None:
            (latency,) = self.latencies([network])
            metrics["latency_ms"] = latency.latency_ms
            metrics["latency_low_ms"] = latency.low_ms
            metrics["latency_high_ms"] = latency.high_ms
        if self._keep is not None:
            self._keep(architecture, network, metrics)
        return metrics

    def cost(self, architecture: Architecture) -> dict[str, float]:
        """Parameters, multiply-accumulates and weight bytes: exact, and known before anything is trained."""
        return {name: float(value) for name, value in asdict(cost(architecture, self.task.io)).items()}

    def train(self, architecture: Architecture, seed: int | None = None) -> tuple[Network, TrainResult]:
        """Build and train; the network depends on nothing but its arguments and, on a CPU, the number of threads."""
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        network = Network(architecture, self.task.io, generator=generator)
        result = train(
            network,
            self.task,
            self.config,
            generator=generator,
            device=self.device,
            report=self._report,
            should_stop=self._should_stop,
        )
        return network, result

    def test(self, network: torch.nn.Module) -> dict[str, float]:
        """Metric and loss on the test split, as `test_...`: for the final table, after all choices are made."""
        judged = evaluate(network, self.task, "test", device=self.device)
        return {f"test_{self.task.metric}": judged.score, "test_loss": judged.loss}

    def latencies(self, networks: Sequence[Network], measure: MeasureConfig | None = None) -> list[Latency]:
        """Measure networks as deployed, together in shuffled passes; the networks are left as they are.

        Args:
            networks: Trained or not: weights have no influence on time.
            measure: Other than the evaluator's own, for example more passes for the final table.
        """
        measure = measure or self._measure or MeasureConfig()
        generator = torch.Generator().manual_seed(self.seed)
        calls = []
        for network in networks:
            inputs = self.task.io.example(measure.batch_size, generator=generator).to(self.device)
            calls.append(forward_call(copy.deepcopy(network).deploy().to(self.device), inputs))
        return measure_networks(
            calls,
            rng=self._rng,
            config=measure,
            sentinel=self._sentinel,
            reference_ms=self.reference_ms,
            clock=self._clock,
        )
