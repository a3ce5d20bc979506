"""Training a super-network, so that thousands of its sub-networks can be judged without training them.

A step trains several sub-networks on one batch (`FairSampler.step`) and then moves the store once. The largest
learns from the labels and the others from the largest (in-place distillation, Yu and Huang 2019, arXiv 1903.05134,
section 3.4).

Whatever is drawn at a step (order of examples, augmentation, dropout, sub-networks) comes from the seed and the step's
number, so a checkpoint holds no generators, and a training that goes on from one ends with the same weights, bit
for bit on a CPU with the same number of threads. In a `torch.distributed` process group each process takes its share
of every batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.evaluators.supernet.processes import processes
from mixnas.evaluators.supernet.sampling import CORNERS, FairSampler
from mixnas.evaluators.tasks.task import IGNORE, Task
from mixnas.evaluators.training import (
    DivergedError,
    Progress,
    TrainConfig,
    batches_of,
    global_seed,
    learning_rate,
    parameter_groups,
    precision_of,
)
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError, StoppedEarly
from mixnas.search_space.formats.safetensors import load_tensors, save_tensors
from mixnas.search_space.network import IOSpec
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet

Tensors = dict[str, Tensor]

FORMAT = "mixnas-supernet-1"

_PROBE_SHARE = 0.03  # of the time budget is spent on measuring how long a step takes
_MIN_PROBES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SupernetConfig(TrainConfig):
    """How to train a super-network: as a network (`TrainConfig`, without early stopping), and

    Attributes:
        seconds: Time for the training; where given, it decides the number of steps, from steps measured beforehand,
            instead of `epochs` and `steps`.
        samples: Sub-networks a step beside the corners.
        corners: Which of the sandwich rule's two every step trains too: "both", "largest" or "none".
        omissions: How often a block's channel mixer is "none", where the space offers that, against each of its other
            options; above 1, the rest of a network learns to do without (see `fair_sampling`).
        distillation: Share of the others' loss that compares them with the largest, rather than with the labels.
        probe: Training examples that the last layer of a sub-network is fitted to before it is judged (see
            `inherited`), 0 to judge it with the last layer that it inherits. Of no concern to the training.
        processes: Processes that share each batch, on this machine, as long as the training lasts.
        checkpoint_every: Seconds between checkpoints.
    """

    seconds: float | None = None
    samples: int = 2
    corners: str = "both"
    omissions: int = 1
    distillation: float = 1.0
    probe: int = 0
    processes: int = 1
    checkpoint_every: float = 10.0
    lr: float = 2e-3
    batch_size: int = 64
    ema: float = 0.98

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        for name, allowed, ok in (
            ("seconds", "a number above 0, or nothing", self.seconds is None or 0 < self.seconds < math.inf),
            ("samples", "a whole number from 0", isinstance(self.samples, int) and self.samples >= 0),
            ("omissions", "a whole number from 1", isinstance(self.omissions, int) and self.omissions >= 1),
            ("corners", f"one of {', '.join(CORNERS)}", self.corners in CORNERS),
            ("distillation", "a share from 0 to 1", 0 <= self.distillation <= 1),
            ("distillation", "0 without corners: the largest teaches", self.corners != "none" or not self.distillation),
            ("samples", "at least 1 without corners", self.corners != "none" or self.samples > 0),
            ("probe", "a whole number from 0", isinstance(self.probe, int) and self.probe >= 0),
            ("processes", "a whole number from 1", isinstance(self.processes, int) and self.processes >= 1),
            ("checkpoint_every", "a number from 0", 0 <= self.checkpoint_every < math.inf),
            ("stop_at", "left out: it is for single networks", self.stop_at is None),
            ("validate_every", "left out: it is for single networks", self.validate_every == 0),
        ):
            if not ok:
                raise ConfigError(f"supernet: {name} is {getattr(self, name)!r}, it must be {allowed}.")

    @property
    def subnets(self) -> int:
        """Sub-networks a step."""
        return len(CORNERS[self.corners]) + self.samples


@dataclass(frozen=True, kw_only=True, slots=True)
class SupernetResult:
    """What a training did.

    Attributes:
        steps: Steps in all, those before a resume included.
        subnets: Sub-networks trained, as many times as they were.
        loss: Mean training loss of the largest sub-network over the last epoch, or what there was of it.
        seconds: Wall-clock time, that before a resume up to the checkpoint included.
    """

    steps: int
    subnets: int
    loss: float
    seconds: float


def train_supernet(
    supernet: Supernet,
    task: Task,
    config: SupernetConfig,
    *,
    seed: int,
    device: str | torch.device = "cpu",
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> SupernetResult:
    """Train a super-network in place; where the checkpoint exists already, from there on.

    Args:
        supernet: Initialised; it is moved to `device`.
        task: Only its training split is looked at.
        config: How.
        seed: Of all that is drawn.
        device: Where.
        checkpoint: Where the state is kept, atomically; at the end it holds the weights alone (`load_supernet`).
        progress: See `mixnas.evaluators.training.Progress`; the loss is that of the largest sub-network.
        should_stop: Asked after each step.

    Raises:
        ConfigError: The checkpoint is of another space, task, configuration or seed.
        DivergedError: The loss became NaN or infinite.
        IntegrityError: The checkpoint is damaged.
        StoppedEarly: `should_stop` said so; the checkpoint holds all steps that were taken.
    """
    training = _Training(supernet, task, config, seed, torch.device(device), checkpoint)
    if config.processes == 1 or dist.is_initialized() or training.finished:
        return training.run(progress, should_stop)
    with processes(config.processes, _help, supernet.space, supernet.io, task, config, seed, str(device)):
        return training.run(progress, should_stop)


def _help(space: SearchSpace, io: IOSpec, task: Task, config: SupernetConfig, seed: int, device: str) -> None:
    """What a process does that takes a share of the batches."""
    supernet = Supernet(space, io, torch.Generator().manual_seed(0))
    with contextlib.suppress(StoppedEarly):
        _Training(supernet, task, config, seed, torch.device(device), None).run(None, None)


def is_trained(checkpoint: str | Path) -> bool:
    """Whether a checkpoint exists and is that of a training that has ended.

    Raises:
        IntegrityError: It is damaged.
    """
    if not Path(checkpoint).exists():
        return False
    facts = json.loads(load_tensors(checkpoint, FORMAT)[1]["facts"])
    return bool(facts["step"] == facts["steps"])


def load_supernet(supernet: Supernet, path: str | Path) -> None:
    """Give a super-network the weights of a checkpoint: the averaged ones where it keeps an average.

    Raises:
        ConfigError: No such file, or it is of another space.
        IntegrityError: It is damaged.
    """
    tensors, metadata = load_tensors(path, FORMAT)
    _check_same(path, metadata, {"space": _space_digest(supernet)})
    _load_store(supernet, {**_part(tensors, "store."), **_part(tensors, "ema.")})


def distillation_loss(outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities, over what is labelled; temperature 1.

    Args:
        outputs: (B, K) or (B, *size, K) logits.
        teacher: The same shape; no gradient goes there.
        targets: (B,) or (B, *size); `IGNORE` where nothing is asked.
    """
    losses = -(teacher.detach().softmax(-1) * F.log_softmax(outputs, -1)).sum(-1)
    labelled = targets != IGNORE
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)


def _distiller(task: Task) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """The task's own `distillation(outputs, teacher, targets)`, else the one above where targets are classes."""
    own: Callable[[Tensor, Tensor, Tensor], Tensor] | None = getattr(task, "distillation", None)
    classes = not task.train.targets.is_floating_point() and task.io.num_outputs > 1
    return own or (distillation_loss if classes else None)


def update(optimizer: torch.optim.Optimizer, touched: Sequence[nn.Parameter], clip: float) -> None:
    """One update of a store, of the parameters that this step's sub-networks are views of.

    The others have no gradient; left to the optimiser with one of zeros, they would be moved by their momentum, and it
    would cost the time of the whole store.

    Args:
        optimizer: Over the store's parameters.
        touched: `Supernet.touched` of the step's architectures.
        clip: Largest norm of the gradient; 0 leaves it.
    """
    if clip:
        nn.utils.clip_grad_norm_(touched, clip, foreach=True)
    moved = set(touched)
    idle = [p for group in optimizer.param_groups for p in group["params"] if p not in moved]
    gradients = [p.grad for p in idle]  # sub-networks' gradients are views of them: they must come back
    for p in idle:
        p.grad = None
    try:
        optimizer.step()
    finally:
        for p, gradient in zip(idle, gradients, strict=True):
            p.grad = gradient


class _Group:
    """The processes that train together: just this one, or a `torch.distributed` group."""

    def __init__(self) -> None:
        self.together = dist.is_available() and dist.is_initialized()
        self.size = dist.get_world_size() if self.together else 1
        self.rank = dist.get_rank() if self.together else 0

    def agree(self, value: Any) -> Any:
        """The first process's value, everywhere."""
        if not self.together:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the first one's tensors, in place."""
        if self.together:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def average(self, tensors: list[Tensor], extras: Tensor) -> Tensor:
        """Average tensors in place over the processes; returns the averages of `extras` (1-D)."""
        if not self.together:
            return extras
        flat = torch.cat([*(t.reshape(-1) for t in tensors), extras.to(tensors[0].device)])
        dist.all_reduce(flat)
        flat /= self.size
        *parts, extras = flat.split([*(t.numel() for t in tensors), len(extras)])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])
        return extras


class _Training:
    def __init__(
        self,
        supernet: Supernet,
        task: Task,
        config: SupernetConfig,
        seed: int,
        device: torch.device,
        checkpoint: str | Path | None,
    ) -> None:
        self.supernet, self.task, self.config, self.seed, self.device = supernet.to(device), task, config, seed, device
        self.sampler = FairSampler(supernet.space, seed, config.omissions)
        self.inputs, self.targets = task.train.inputs.to(device), task.train.targets.to(device)
        self.batch_size = min(config.batch_size, len(self.inputs))
        self.epoch_steps = len(self.inputs) // self.batch_size
        self.distil = _distiller(task) if config.distillation else None
        self.parameters: list[Tensor] = list(supernet.parameters())
        self.optimizer = self._optimizer()
        self.average: list[Tensor] = []
        self.step = 0
        self.steps: int | None = None  # until it is decided
        self.seconds = 0.0
        self.finished_loss = math.nan
        self.path = None if checkpoint is None else Path(checkpoint)
        if self.path is not None and self.path.exists():
            self._load(self.path)

    @property
    def finished(self) -> bool:
        """Whether the checkpoint was of a finished training."""
        return self.step == self.steps

    def _optimizer(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.supernet, self.config.weight_decay)
        beta1, beta2 = self.config.betas
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=(beta1, beta2), fused=True)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self, progress: Progress | None, should_stop: Callable[[], bool] | None) -> SupernetResult:
        self._join()
        if self.steps is None:
            self.steps = self._planned_steps()
        if self.config.ema and not self.average and self.step < self.steps:
            self.average = [p.detach().clone() for p in self.parameters]
        started = saved = time.perf_counter()
        before = self.seconds
        losses: list[float] = []
        stop = False
        with global_seed(0, self.device):
            data = self._data(self.step)
            while self.step < self.steps and not stop:
                loss, stop = self._step(*next(data), asked=should_stop is not None and should_stop())
                losses = [*losses[1 - self.epoch_steps :], loss] if self.epoch_steps > 1 else [loss]
                now = time.perf_counter()
                self.seconds = before + now - started
                if progress is not None:
                    progress(self.step, self.steps, loss, None)
                if now - saved >= self.config.checkpoint_every and self.step < self.steps:
                    self._save()
                    saved = time.perf_counter()
        if stop and self.step < self.steps:
            self._save()
            raise StoppedEarly(f"training of the super-network was stopped after {self.step} of {self.steps} steps.")
        if losses:  # else it was finished before
            if self.average:
                with torch.no_grad():
                    torch._foreach_copy_(self.parameters, self.average)
            self._save(finished=True, loss=float(np.mean(losses)))
        subnets = self.steps * self.config.subnets
        loss = float(np.mean(losses)) if losses else self.finished_loss
        return SupernetResult(steps=self.steps, subnets=subnets, loss=loss, seconds=self.seconds)

    def _join(self) -> None:
        """Begin where the first process of the group is."""
        self.group = _Group()
        if self.batch_size % self.group.size:
            raise ConfigError(
                f"supernet: batch_size {self.batch_size} cannot be shared by {self.group.size} processes. "
                "Choose a multiple of their number."
            )
        state = self.group.agree((self.step, self.steps, self.seconds, self.finished_loss, self.sampler.state()))
        self.step, self.steps, self.seconds, self.finished_loss, dealt = state
        if self.group.rank:
            self.sampler.restore(dealt)
            if 0 < self.step != self.steps:  # room for what the first one sends
                self.optimizer.state.update({p: _no_updates(p) for p in self.parameters})
                self.average = [torch.zeros_like(p) for p in self.parameters] if self.config.ema else []
        moments = [m for p in self.parameters for m in self.optimizer.state.get(p, {}).values()]
        self.group.share([*self.supernet.state_dict().values(), *self.average, *moments])

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        return self.supernet.named_parameters()

    def _data(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from a step on; an epoch's order and augmentation come from the seed and the epoch's number."""
        augment = self.task.augment if self.config.augment else None
        epoch, skip = divmod(step, self.epoch_steps)
        while True:
            generator = torch.Generator(self.device).manual_seed(_seed(self.seed, 0, epoch))
            data = batches_of(self.inputs, self.targets, self.batch_size, augment, generator)
            yield from islice(data, skip, self.epoch_steps)
            epoch, skip = epoch + 1, 0

    def _step(self, x: Tensor, y: Tensor, *, asked: bool) -> tuple[float, bool]:
        assert self.steps is not None
        lr = learning_rate(self.step, self.steps, self.config.lr, self.config.warmup)
        _seed_global(_seed(self.seed, 1, self.step, self.group.rank), self.device)
        loss, stop = self._train(x, y, self.sampler, self.optimizer, lr, asked=asked)
        self.step += 1
        if self.average:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        return loss, stop

    def _train(
        self, x: Tensor, y: Tensor, sampler: FairSampler, optimizer: torch.optim.Optimizer, lr: float, *, asked: bool
    ) -> tuple[float, bool]:
        """One step; the loss of its first sub-network, and whether any process was asked to stop."""
        architectures = sampler.step(self.config.samples, self.config.corners)
        loss = self._backward(x, y, architectures)
        touched = self.supernet.touched(architectures)
        gradients = [p.grad for p in touched if p.grad is not None]
        extras = self.group.average(gradients, torch.tensor([loss, float(asked)]))
        loss = float(extras[0])
        if not math.isfinite(loss):
            raise DivergedError(
                f"the super-network's training loss is {loss} at step {self.step + 1}. Lower lr or clip.",
                self.step + 1,
                loss,
            )
        for group in optimizer.param_groups:
            group["lr"] = lr
        update(optimizer, touched, self.config.clip)
        return loss, bool(extras[1] > 0)

    def _backward(self, x: Tensor, y: Tensor, architectures: Sequence[Architecture]) -> float:
        """Gradients of one step's sub-networks on this process's share; the loss of the first."""
        x, y = x.chunk(self.group.size)[self.group.rank], y.chunk(self.group.size)[self.group.rank]
        self.supernet.zero_grad()
        teacher: Tensor | None = None
        first = 0.0
        for architecture in architectures:
            network = self.supernet.subnet(architecture).train()
            with precision_of(self.config, self.device):
                outputs = network(x)
                if teacher is None or self.distil is None:
                    loss = self.task.loss(outputs, y, self.config.label_smoothing)
                else:
                    share = self.config.distillation
                    loss = share * self.distil(outputs, teacher, y)
                    if share < 1:
                        loss = loss + (1 - share) * self.task.loss(outputs, y, self.config.label_smoothing)
            (loss / len(architectures)).backward()
            if teacher is None:
                teacher, first = outputs.detach(), loss.item()
        return first

    # -- time -------------------------------------------------------------------------------------------------------

    def _planned_steps(self) -> int:
        config = self.config
        if config.seconds is None:
            return config.steps or config.epochs * self.epoch_steps
        started = time.perf_counter()
        sampler, optimizer = FairSampler(self.supernet.space, self.seed + 1, config.omissions), self._optimizer()
        buffers = [b.clone() for b in self.supernet.buffers()]
        times: list[float] = []
        go_on = True
        with global_seed(0, self.device):
            data = self._data(0)
            while go_on:
                begun = time.perf_counter()
                self._train(*next(data), sampler, optimizer, 0.0, asked=False)  # moves nothing
                times.append(time.perf_counter() - begun)
                spent = time.perf_counter() - started
                go_on = self.group.agree(len(times) < _MIN_PROBES or spent < _PROBE_SHARE * config.seconds)
        for buffer, kept in zip(self.supernet.buffers(), buffers, strict=True):
            buffer.copy_(kept)
        self.supernet.zero_grad()
        left = config.seconds - (time.perf_counter() - started)
        self.seconds = time.perf_counter() - started
        steps: int = self.group.agree(max(1, round(left / float(np.mean(times[1:])))))  # the first warms up
        return steps

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must agree with."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("checkpoint_every", "probe", "processes")}
        return {
            "space": _space_digest(self.supernet),
            "task": self.task.name,
            "config": json.dumps(config, sort_keys=True),
            "seed": str(self.seed),
        }

    def _save(self, *, finished: bool = False, loss: float = math.nan) -> None:
        if self.path is None or self.group.rank:
            return
        tensors = {f"store.{name}": tensor for name, tensor in self.supernet.state_dict().items()}
        if not finished:
            for i, (name, p) in enumerate(self._named()):
                state = self.optimizer.state.get(p) or _no_updates(p)
                tensors |= {f"{part}.{name}": state[key] for part, key in _MOMENTS.items()}
                if self.average:
                    tensors[f"ema.{name}"] = self.average[i]
        facts = {"step": self.step, "steps": self.steps, "seconds": self.seconds, "dealt": self.sampler.state()}
        if finished:
            facts["loss"] = loss
        save_tensors(self.path, tensors, {"format": FORMAT, **self._identity(), "facts": json.dumps(facts)})

    def _load(self, path: Path) -> None:
        tensors, metadata = load_tensors(path, FORMAT)
        _check_same(path, metadata, self._identity())
        _load_store(self.supernet, _part(tensors, "store."))
        facts = json.loads(metadata["facts"])
        self.step, self.steps, self.seconds = facts["step"], facts["steps"], facts["seconds"]
        self.sampler.restore(facts["dealt"])
        self.finished_loss = facts.get("loss", math.nan)
        if not self.finished:
            states = {part: _part(tensors, f"{part}.") for part in _MOMENTS}
            average = _part(tensors, "ema.")
            for name, p in self._named():
                self.optimizer.state[p] = {key: states[part][name].to(self.device) for part, key in _MOMENTS.items()}
                if self.config.ema:
                    self.average.append(average[name].to(self.device))


# Names in a checkpoint, and in the state of AdamW, whose parameters each count their own updates.
_MOMENTS = {"updates": "step", "first": "exp_avg", "second": "exp_avg_sq"}


def _no_updates(parameter: Tensor) -> dict[str, Tensor]:
    """The state of a parameter that was never updated."""
    moment = torch.zeros_like(parameter)
    return {"step": torch.zeros((), device=parameter.device), "exp_avg": moment, "exp_avg_sq": moment.clone()}


def _seed(*parts: int) -> int:
    """A seed for torch from whole numbers, well mixed."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _seed_global(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _space_digest(supernet: Supernet) -> str:
    return hashlib.sha256(repr((supernet.space.tree, supernet.io)).encode()).hexdigest()[:16]


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _check_same(path: str | Path, metadata: dict[str, str], expected: dict[str, str]) -> None:
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise ConfigError(
                f"{path}: the super-network there was trained with another {name}: {metadata.get(name)}; now it is "
                f"{value}. Go on with the old one, or move the file away."
            )


def _load_store(supernet: Supernet, tensors: Tensors) -> None:
    try:
        supernet.load_state_dict(tensors)
    except RuntimeError as error:
        raise IntegrityError(f"the super-network's file does not hold its tensors: {error}") from error
