"""Judging thousands of sub-networks with the super-network's weights, and bringing chosen ones to final weights.

The last layer of a super-network serves the features of every sub-network and suits those best that are trained in
every step. A linear probe (Alain and Bengio 2016, arXiv 1610.01644) judges the features themselves: where it is asked
for, the last layer of a sub-network is fitted to training examples before it is judged, as running statistics are
recalibrated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import DivergedError, Progress, TrainConfig, TrainResult, recalibrate, train
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.network import Head, Network, Unit, cost, plan
from mixnas.search_space.operators.norms import has_running_statistics
from mixnas.search_space.supernet import Supernet

_BATCH_SIZE = 512

# Of the linear probe: steps of L-BFGS, the price of leaving the inherited weights (times the squared distance), and the
# label smoothing. On 96 architectures, 8 steps, a price from 3e-3 to 0.1 and no smoothing ranked alike.
_PROBE_STEPS = 15
_PROBE_STAY = 1e-2
_PROBE_SMOOTHING = 0.1


class SupernetEvaluator:
    """Callable that judges an architecture on the validation split with inherited weights.

    Each architecture is judged once; later calls answer from memory. Between two architectures judged in a row, the
    activations behind the units that they begin with in common are computed once; `evaluate_many` orders its
    architectures so that they have most in common.

    Args:
        supernet: Trained; moved to `device`.
        task: Whose validation split they are judged on.
        device: Where.
        latency: Latency of an architecture in ms, for example a predictor's; None leaves `latency_ms` out.
        seed: Of the training examples that running statistics are recalibrated on and the probe is fitted to.
        probe: Training examples that a sub-network's last layer is fitted to before it is judged; 0 leaves it.
    """

    def __init__(
        self,
        supernet: Supernet,
        task: Task,
        *,
        device: str | torch.device = "cpu",
        latency: Callable[[Architecture], float] | None = None,
        seed: int = 0,
        probe: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.supernet = supernet.to(self.device)
        self.task = task
        self.seed = seed
        self._latency = latency
        self._known: dict[str, dict[str, float]] = {}
        self._targets = task.validation.targets.to(self.device).split(_BATCH_SIZE)
        probed = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[:probe]
        self._probe_targets = task.train.targets[probed].to(self.device)
        # Batches to be judged on, and behind them those that the probe is fitted to.
        judged, fitted_to = task.validation.inputs.split(_BATCH_SIZE), task.train.inputs[probed].split(_BATCH_SIZE)
        self._inputs = tuple(part.to(self.device) for part in (*judged, *(fitted_to if probe else ())))
        # Units of the last architecture, and behind each the activations of every batch.
        self._trail: list[tuple[Unit, tuple[Tensor, ...]]] = []

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what a call returns."""
        latency = [] if self._latency is None else ["latency_ms"]
        return (self.task.metric, "loss", "params", "macs", "weight_bytes", *latency)

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """Metrics of one architecture; see `metrics`.

        Raises:
            ConfigError: It is not one of the space.
            DivergedError: Its loss is NaN or infinite.
        """
        found = self._known.get(architecture.id)
        if found is None:
            score, loss = self._judge(architecture)
            found = {self.task.metric: score, "loss": loss}
            found |= {name: float(value) for name, value in asdict(cost(architecture, self.supernet.io)).items()}
            if self._latency is not None:
                found["latency_ms"] = float(self._latency(architecture))
            self._known[architecture.id] = found
        return dict(found)

    def evaluate_many(self, architectures: Sequence[Architecture]) -> list[dict[str, float]]:
        """Metrics of each, in the order given; judged in the order in which most is shared."""
        for i in self.order(architectures):
            self(architectures[i])
        return [self(architecture) for architecture in architectures]

    def order(self, architectures: Sequence[Architecture]) -> list[int]:
        """Positions in the order in which neighbours have most in common."""
        prefixes = [tuple(map(hash, plan(architecture, self.supernet.io))) for architecture in architectures]
        return sorted(range(len(architectures)), key=prefixes.__getitem__)

    def remember(self, known: Mapping[str, Mapping[str, float]]) -> None:
        """Take metrics that were found before, by architecture id."""
        self._known.update({identity: dict(metrics) for identity, metrics in known.items()})

    def forget(self) -> None:
        """Forget everything: the weights of the super-network have changed."""
        self._known, self._trail = {}, []

    def _judge(self, architecture: Architecture) -> tuple[float, float]:
        network = self.supernet.subnet(architecture)
        if has_running_statistics(network):
            # The statistics in the store are those of whatever ran last; no activation behind them can be kept.
            generator = torch.Generator(self.device).manual_seed(self.seed)
            recalibrate(network, self.task, generator=generator, device=self.device)
            self._trail = []
        network.eval()
        planned = plan(architecture, self.supernet.io)
        shared = 0
        for unit, (known, _) in zip(planned, self._trail, strict=False):
            if unit != known:
                break
            shared += 1
        with torch.inference_mode():
            del self._trail[shared:]
            x = self._trail[-1][1] if self._trail else self._inputs
            *body, (_, head) = zip(planned, (module for _, module in network.units()), strict=True)
            for unit, module in body[shared:]:
                x = tuple(module(part) for part in x)
                self._trail.append((unit, x))
            assert isinstance(head, Head)
            features = [head.features(part) for part in x]
        last = self._fitted(head.linear, features[len(self._targets) :])
        with torch.inference_mode():
            score = loss = 0.0
            for part, y in zip(features[: len(self._targets)], self._targets, strict=True):
                outputs = F.linear(part, *last)
                score += self.task.score(outputs, y) * len(y)
                loss += self.task.loss(outputs, y).item() * len(y)
        if has_running_statistics(network):
            self._trail = []
        if not math.isfinite(loss):
            self._trail = []
            raise DivergedError(
                f"the validation loss of {architecture.id} is {loss} with inherited weights.", loss=loss
            )
        examples = len(self.task.validation)
        return score / examples, loss / examples

    def _fitted(self, linear: nn.Linear, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weight and bias of a last layer, fitted to the probe's features where there are any."""
        inherited = (linear.weight.detach(), linear.bias.detach())
        if not features:
            return inherited
        x = torch.cat(list(features))
        weight, bias = (tensor.clone().requires_grad_() for tensor in inherited)
        optimizer = torch.optim.LBFGS((weight, bias), max_iter=_PROBE_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.task.loss(F.linear(x, weight, bias), self._probe_targets, _PROBE_SMOOTHING)
            loss = loss + _PROBE_STAY * (weight - inherited[0]).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return weight, bias


def fine_tune(
    supernet: Supernet,
    architecture: Architecture,
    task: Task,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    inherit: bool = True,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[Network, TrainResult]:
    """Train an architecture on from the super-network's weights, or from scratch, as a network of its own.

    Args:
        supernet: Left as it is.
        architecture: One of its space.
        task: What to train on.
        config: How.
        generator: On the CPU; source of whatever is drawn.
        inherit: Whether to begin with the super-network's weights rather than with fresh ones.
        device: Where.
        progress: See `mixnas.evaluators.training.Progress`.
        should_stop: Asked before each step.

    Raises:
        ConfigError: The architecture is not one of the space.
        DivergedError: The loss became NaN or infinite.
        StoppedEarly: `should_stop` said so.
    """
    network = supernet.extract(architecture) if inherit else Network(architecture, supernet.io, generator=generator)
    result = train(
        network, task, config, generator=generator, device=device, progress=progress, should_stop=should_stop
    )
    return network, result
