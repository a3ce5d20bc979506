"""Trained networks under other quantization policies: their weights taken, judged as they are, and trained on shortly.

A policy changes no parameter's name, so that one set of weights serves every policy of an architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixnas.evaluators.batches import gather
from mixnas.evaluators.protocol import Metric, Outcome, Part, Request, attempt
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import DivergedError, Metrics, TrainConfig, calibrate, evaluate, train
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import NasError
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SILENT, Report


def with_weights(architecture: Architecture, other: Network) -> Network:
    """A network with another's weights under other policies.

    What a policy adds of its own (ranges, steps) is the other's where both have it, and else as it begins: `calibrate`
    finds ranges anew.

    Args:
        architecture: The other's but for policies.
        other: Left as it is.
    """
    network = Network(architecture, other.io, generator=torch.Generator().manual_seed(0))
    mine, theirs = network.state_dict(), other.state_dict()
    network.load_state_dict({name: theirs.get(name, tensor) for name, tensor in mine.items()})
    return network


def calibrated(
    architecture: Architecture, other: Network, task: Task, seed: int = 0, device: str | torch.device = "cpu"
) -> Network:
    """`with_weights`, ranges found on training examples: post-training quantization. In evaluation mode, on `device`.

    Raises:
        ConfigError: See `calibrate`.
    """
    network = with_weights(architecture, other).to(device).eval()
    calibrate(network, task, generator=torch.Generator(device).manual_seed(seed), device=device)
    return network


def sensitivities(
    network: Network,
    alternatives: Sequence[Architecture],
    task: Task,
    examples: int,
    device: str | torch.device = "cpu",
) -> list[float]:
    """How much the loss on training examples rises under other policies of some branches, post-training.

    Of alternatives that change one branch each it is the question that HAWQ answers by the Hessian (Dong et al. 2019,
    section 3), asked directly.

    Args:
        network: Trained; left as it is.
        alternatives: Its architecture but for policies.
        task: Gives examples and the loss.
        examples: How many, at most; they find the ranges too.
        device: Where.

    Returns:
        For each at least 0; infinite where the network cannot be calibrated so, or its loss is not finite.
    """
    device = torch.device(device)
    drawn = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0))[:examples]
    inputs, targets = gather(task.train, drawn.to(device), device)

    def loss(architecture: Architecture) -> float:
        def judged(request: Request) -> Outcome:
            of = with_weights(request.architecture, network).to(device).eval()
            found = torch.Generator(device).manual_seed(0)
            calibrate(of, task, generator=found, device=device, batches=1, batch_size=examples)
            with torch.inference_mode():
                return Outcome({"loss": float(task.loss(of(inputs), targets))})

        found = attempt(judged, Request(architecture)).metrics.get("loss", math.inf)
        return found if math.isfinite(found) else math.inf

    before = loss(network.architecture)
    return [max(0.0, loss(one) - before) if math.isfinite(before) else math.inf for one in alternatives]


@dataclass(frozen=True, kw_only=True, slots=True)
class VaryingSpec:
    """What a `VaryingEvaluator` is made from.

    Attributes:
        task: The task as in a configuration.
        train: How a network is trained on under its new policies.
        seed: Of the examples that find ranges, the order of examples and the augmentation.
        device: Where, "cpu" or a CUDA device.
    """

    task: str | Mapping[str, Any]
    train: TrainConfig
    seed: int = 0
    device: str = "cpu"

    def open(self) -> VaryingEvaluator:
        """Make the evaluator."""
        return VaryingEvaluator(self)


class VaryingEvaluator:
    """Brings architectures to final weights from those of a network that differs in policies; `InParts`.

    The one part there is holds that network. It takes nothing else, so that any engine does it anywhere.

    Args:
        spec: What it is made from.
        task: The spec's task, where it was made already.
    """

    metrics: Mapping[str, Metric] = {}
    finishing = "train other policies"

    def __init__(self, spec: VaryingSpec, task: Task | None = None) -> None:
        self.spec, self.task = spec, task or by_name(spec.task)

    @property
    def device(self) -> str:
        """See `Evaluator`."""
        return self.spec.device

    def prepare(self, report: Report = SILENT, should_stop: Callable[[], bool] | None = None) -> None:
        """See `Evaluator`: there is nothing to do."""

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """See `Evaluator`: nothing."""
        return {}

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """See `Evaluator`: the task's metrics, post-training."""

        def judged(request: Request) -> Outcome:
            assert request.part is not None and request.part.network is not None
            found = self.judge(calibrated(request.architecture, request.part.network, *self._how))
            return Outcome(found.named(self.task.metric))

        return [attempt(judged, request) for request in requests]

    def finish(
        self, architecture: Architecture, report: Report = SILENT, should_stop: Callable[[], bool] | None = None
    ) -> Network:
        """See `Evaluator`.

        Raises:
            NasError: It is always one: there are no weights to begin with.
        """
        raise NasError(f"{architecture.id}: there are no weights to begin with. Ask for a part with a network.")

    def finish_part(
        self,
        architecture: Architecture,
        part: Part,
        report: Report = SILENT,
        should_stop: Callable[[], bool] | None = None,
    ) -> Network:
        """See `InParts`. Where training failed, or made it worse on validation, the network as it was calibrated."""
        assert part.network is not None
        before = calibrated(architecture, part.network, *self._how)
        network = with_weights(architecture, before)
        generator = torch.Generator().manual_seed(self.spec.seed)
        told: dict[str, Any] = {"report": report, "should_stop": should_stop}
        try:
            train(network, self.task, self.spec.train, generator=generator, device=self.device, **told)
        except DivergedError:
            return before.cpu().eval()
        sign = 1 if self.task.direction == "max" else -1
        worse = sign * self.judge(network).score < sign * self.judge(before).score
        return (before if worse else network).cpu().eval()

    @property
    def _how(self) -> tuple[Task, int, str]:
        return self.task, self.spec.seed, self.spec.device

    def judge(self, network: Network) -> Metrics:
        """A network on the validation split."""
        return evaluate(network, self.task, "validation", device=self.device)
