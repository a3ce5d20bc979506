"""Judging thousands of sub-networks with the super-network's weights, and bringing chosen ones to final weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mixnas.evaluators.batches import gather
from mixnas.evaluators.starting import begun
from mixnas.evaluators.supernet.probe import ends_linearly, fitted
from mixnas.evaluators.tasks.task import Examples, Task
from mixnas.evaluators.training import TrainConfig, TrainResult, calibrate, judged, recalibrate, train
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import Network
from mixnas.search_space.operators.norms import has_running_statistics
from mixnas.search_space.operators.quantization.projected import calibrated_layers
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.supernet import Supernet
from mixnas.search_space.units import plan

_BATCH_SIZE = 512
_KEPT_VALUES = 1 << 26  # so many values of inputs, and of activations, are kept at most (4 bytes each)


class SubnetJudge:
    """Callable that judges an architecture on the validation split with inherited weights: its metric and its loss.

    Each architecture is judged once; later calls answer from memory. Between two architectures judged in a row, the
    activations behind the units that they begin with in common are computed once; `judge_many` orders its
    architectures so that they have most in common.

    Args:
        supernet: Trained, or to be trained before the first is judged; moved to `device`.
        task: Whose validation split they are judged on.
        device: Where.
        seed: Of the training examples that running statistics and ranges are found on, and the probe is fitted to.
        probe: Training examples that a sub-network's last layer is fitted to before it is judged; 0 leaves it.

    Raises:
        ConfigError: There is a probe, and the head of the networks does not end in a linear layer.
    """

    def __init__(
        self, supernet: Supernet, task: Task, *, device: str | torch.device = "cpu", seed: int = 0, probe: int = 0
    ) -> None:
        self.device = torch.device(device)
        self.supernet = supernet.to(self.device)
        self.task = task
        self.seed = seed
        self._known: dict[str, dict[str, float]] = {}
        self._validation = _Parts(task.validation, torch.arange(len(task.validation)), self.device)
        self._probed: _Parts | None = None
        if probe:
            self._check_head(probe)
            chosen = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed))[:probe]
            self._probed = _Parts(task.train, chosen, self.device)
        self._trail = _Trail()

    def _check_head(self, probe: int) -> None:
        some = self.supernet.subnet(self.supernet.space.sample(np.random.default_rng(0)))
        _, head = some.units()[-1]
        if not ends_linearly(head):
            raise ConfigError(
                f"supernet: probe is {probe}, but the head {self.supernet.io.head!r} has no linear last layer to be "
                "fitted. Set probe: 0."
            )

    def __call__(self, architecture: Architecture) -> dict[str, float]:
        """The task's metric, by its name, its standard error, and "loss"; see `Metrics.named`.

        Raises:
            ConfigError: The architecture is not one of the space.
            DivergedError: Its loss or metric is NaN or infinite.
        """
        found = self._known.get(architecture.id)
        if found is None:
            found = self._known[architecture.id] = self._judge(architecture)
        return dict(found)

    def judge_many(self, architectures: Sequence[Architecture]) -> list[dict[str, float]]:
        """What a call gives for each, in the order given; judged in the order in which most is shared."""
        for i in self.order(architectures):
            self(architectures[i])
        return [self(architecture) for architecture in architectures]

    def order(self, architectures: Sequence[Architecture]) -> list[int]:
        """Positions in the order in which neighbours have most in common."""
        prefixes = [tuple(map(hash, plan(architecture, self.supernet.io))) for architecture in architectures]
        return sorted(range(len(architectures)), key=prefixes.__getitem__)

    def remember(self, known: Mapping[str, Mapping[str, float]]) -> None:
        """Take what was found before, by architecture id."""
        self._known.update({identity: dict(metrics) for identity, metrics in known.items()})

    def forget(self) -> None:
        """Forget everything: the weights of the super-network have changed."""
        self._known = {}
        self._trail.leave()

    def _judge(self, architecture: Architecture) -> dict[str, float]:
        network = self.supernet.subnet(architecture)
        changing = has_running_statistics(network) or bool(calibrated_layers(network))
        if changing:
            # The statistics and ranges in the store are those of whatever ran last; no activation behind can be kept.
            self.calibrate(network)
            self._trail.leave()
        self._trail.turn_to(plan(architecture, self.supernet.io)[:-1])
        with network.eval().as_deployed() as units:
            *body, head = (module for _, module in units)
            answer = self._answering(head, body)
            with torch.inference_mode():
                answers = ((answer(x), y) for x, y in self._behind(body, self._validation))
                metrics = judged(self.task, answers, f"with inherited weights, {architecture.id}'s validation")
        if changing:
            self._trail.leave()
        return metrics.named(self.task.metric)

    def calibrate(self, network: Network) -> None:
        """Find anew, on training examples, what belongs to one sub-network's weights: running statistics and ranges."""
        for find in (recalibrate, calibrate):
            generator = torch.Generator(self.device).manual_seed(self.seed)
            find(network, self.task, generator=generator, device=self.device)

    def _answering(self, head: nn.Module, body: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
        """The head, or one whose last layer is fitted to the probe's examples."""
        if self._probed is None:
            return head
        assert ends_linearly(head)
        with torch.inference_mode():
            examples = [(head.features(x), y) for x, y in self._behind(body, self._probed)]
        features, targets = zip(*examples, strict=True)
        last = fitted(head.linear, features, torch.cat(targets), self.task.training_loss)
        return lambda x: last(head.features(x))

    def _behind(self, body: Sequence[nn.Module], parts: _Parts) -> Iterator[tuple[Tensor, Tensor]]:
        """Activations behind all units but the head, and targets, part by part."""
        for i, (x, y) in enumerate(parts):
            yield self._trail.follow((parts, i), x, body), y


class _Parts:
    """Chosen examples of a split, in parts; on the device where they are few, else gathered each time."""

    def __init__(self, split: Examples, indices: Tensor, device: torch.device) -> None:
        self._split, self._indices, self._device = split, indices.split(_BATCH_SIZE), device
        self._kept: list[tuple[Tensor, Tensor]] = []
        example, _ = split.gather(indices[:1])
        if len(indices) * example.numel() <= _KEPT_VALUES:
            self._kept = list(self)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._kept:
            yield from self._kept
            return
        for part in self._indices:
            yield gather(self._split, part, self._device)


class _Trail:
    """Activations behind the units of the network that ran last, for each part of the data: as many as are kept."""

    def __init__(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Keep nothing."""
        self._units: Sequence[object] = ()
        self._behind: dict[object, list[Tensor]] = {}
        self._values = 0

    def turn_to(self, units: Sequence[object]) -> None:
        """Keep what lies behind the units that another network begins with too."""
        shared = 0
        for unit, known in zip(units, self._units, strict=False):
            if unit != known:
                break
            shared += 1
        for behind in self._behind.values():
            del behind[shared:]
        self._units = units
        self._values = sum(x.numel() for behind in self._behind.values() for x in behind)

    def follow(self, part: object, x: Tensor, body: Sequence[nn.Module]) -> Tensor:
        """Activations behind the last unit.

        Args:
            part: Which part of the data.
            x: Its inputs.
            body: The modules of the units turned to.
        """
        behind = self._behind.setdefault(part, [])
        if behind:
            x = behind[-1]
        for module in body[len(behind) :]:
            x = module(x)
            if self._values < _KEPT_VALUES:
                behind.append(x)
                self._values += x.numel()
        return x


def fine_tune(
    supernet: Supernet,
    architecture: Architecture,
    task: Task,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    inherit: bool = True,
    device: str | torch.device = "cpu",
    report: Report = SILENT,
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
        report: See `mixnas.evaluators.training.train`.
        should_stop: Asked before each step.

    Raises:
        ConfigError: The architecture is not one of the space.
        DivergedError: The loss became NaN or infinite.
        StoppedEarly: `should_stop` said so.
    """
    if inherit:
        network = supernet.extract(architecture)
    else:
        network = begun(Network(architecture, supernet.io, generator=generator), task)
    result = train(network, task, config, generator=generator, device=device, report=report, should_stop=should_stop)
    return network, result
