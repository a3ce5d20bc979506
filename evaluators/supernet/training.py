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
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mixnas.evaluators.batches import Batches
from mixnas.evaluators.supernet.processes import Group, processes
from mixnas.evaluators.supernet.sampling import CORNERS, FairSampler
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.teaching import answers_of_teacher, taught_loss
from mixnas.evaluators.training import (
    DivergedError,
    TrainConfig,
    learning_rate,
    optimizer_of,
    precision_of,
    unchanged_globals,
    update_average,
)
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError, StoppedEarly
from mixnas.search_space.formats.safetensors import load_tensors, save_tensors
from mixnas.search_space.operators.auxiliary import collected
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search_space.units import IOSpec

Tensors = dict[str, Tensor]

FORMAT = "mixnas-supernet-2"

_MOST = 256  # sub-networks a step, and processes
_PROBE_SHARE = 0.03  # of the time budget is spent on measuring how long a step takes
_MIN_PROBES = 4
_LOOKS = 40  # at the time, over the planned steps
_LATE = 0.1  # of the time budget by which the steps may be late, or early, before there are fewer of them, or more
_EARLY = 0.5  # share of the steps until which there may be more: later the learning rate has come down
_LEAST_END = 0.05  # of the steps so far are taken in any case: the learning rate has to come down


@dataclass(frozen=True, kw_only=True, slots=True)
class SupernetConfig(TrainConfig):
    """How to train a super-network: as a network (`TrainConfig`, without early stopping), and

    Attributes:
        seconds: Time for the training; where given, it decides the number of steps, from steps measured beforehand,
            instead of `epochs` and `steps`; they become fewer where the machine becomes slower.
        samples: Sub-networks a step beside the corners.
        corners: Which of the sandwich rule's two every step trains too: "both", "largest" or "none".
        omissions: How often a block's channel mixer is "none", where the space offers that, against each of its other
            options; above 1, the rest of a network learns to do without (see `FairSampler`).
        distillation: Share of the others' loss that compares them with the largest, rather than with the targets, in a
            task that knows how (`Task.distillation`).
        probe: Training examples that the last layer of a sub-network is fitted to before it is judged (see
            `SubnetJudge`), 0 to judge it with the last layer that it inherits. Of no concern to the training.
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

    PLACE: ClassVar[str] = "supernet"

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
            ("samples", f"at most {_MOST}", self.samples <= _MOST),
            ("omissions", f"at most {_MOST}", self.omissions <= _MOST),
            (
                "processes",
                f"a whole number from 1 to {_MOST}",
                isinstance(self.processes, int) and 1 <= self.processes <= _MOST,
            ),
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
    report: Report = SILENT,
    should_stop: Callable[[], bool] | None = None,
    together: Callable[..., contextlib.AbstractContextManager[None]] = processes,
) -> SupernetResult:
    """Train a super-network in place; where the checkpoint exists already, from there on.

    Args:
        supernet: Initialised; it is moved to `device`.
        task: Only its training split is looked at.
        config: How.
        seed: Of all that is drawn.
        device: Where.
        checkpoint: Where the state is kept, atomically; at the end it holds the weights alone (`load_supernet`).
        report: Given `(step, steps, loss=...)`, the loss of the largest sub-network.
        should_stop: Asked after each step.
        together: How `config.processes` are had; see `processes`.

    Raises:
        ConfigError: The checkpoint is of another space, task, configuration or seed.
        DivergedError: The loss became NaN or infinite.
        IntegrityError: The checkpoint is damaged.
        StoppedEarly: `should_stop` said so; the checkpoint holds all steps that were taken.
    """
    training = _Training(supernet, task, config, seed, torch.device(device), checkpoint)
    if config.processes == 1 or dist.is_initialized() or training.finished:
        return training.run(report, should_stop)
    with together(config.processes, _help, supernet.space, supernet.io, task, config, seed, str(device)):
        return training.run(report, should_stop)


def _help(space: SearchSpace, io: IOSpec, task: Task, config: SupernetConfig, seed: int, device: str) -> None:
    """What a process does that takes a share of the batches."""
    supernet = Supernet(space, io, torch.Generator().manual_seed(0))
    with contextlib.suppress(StoppedEarly):
        _Training(supernet, task, config, seed, torch.device(device), None).run(SILENT, None)


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
    whole = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:  # quicker than to take the others' gradients away and bring them back
        group["params"] = [p for p in group["params"] if p in moved]
    try:
        optimizer.step()
    finally:
        for group, parameters in zip(optimizer.param_groups, whole, strict=True):
            group["params"] = parameters


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
        self.batches = Batches(task.train, config.batch_size, task.augment if config.augment else None, device)
        self.parameters: list[Tensor] = list(supernet.parameters())
        self.optimizer = optimizer_of(supernet, config)
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

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self, report: Report, should_stop: Callable[[], bool] | None) -> SupernetResult:
        self._join()
        if self.steps is None:
            self.steps = self._planned_steps()
        if self.config.ema and not self.average and self.step < self.steps:
            self.average = [p.detach().clone() for p in self.parameters]
        started = saved = now = time.perf_counter()
        before = self.seconds
        losses: list[float] = []
        times: list[float] = []
        stop = False
        epoch = self.batches.per_epoch
        look = max(1, self.steps // _LOOKS)
        with unchanged_globals(0, self.device):
            data = self._data(self.step)
            while self.step < self.steps and not stop:
                loss, stop = self._step(*next(data), asked=should_stop is not None and should_stop())
                losses = [*losses[1 - epoch :], loss] if epoch > 1 else [loss]
                last, now = now, time.perf_counter()
                self.seconds = before + now - started
                times.append(now - last)
                if self.config.seconds is not None and self.step % look == 0:
                    self._replan(float(np.mean(times[len(times) // 2 :])))
                report(self.step, self.steps, loss=loss)
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
        self.group = Group()
        if self.batches.size % self.group.size:
            raise ConfigError(
                f"supernet: batch_size {self.batches.size} cannot be shared by {self.group.size} processes. "
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
        epoch, skip = divmod(step, self.batches.per_epoch)
        while True:
            generator = torch.Generator(self.device).manual_seed(_seed(self.seed, 0, epoch))
            yield from self.batches.epoch(generator, skip=skip, seed_of=functools.partial(_seed, self.seed, 0, epoch))
            epoch, skip = epoch + 1, 0

    def _step(self, x: Tensor, y: Tensor, *, asked: bool) -> tuple[float, bool]:
        assert self.steps is not None
        lr = learning_rate(self.step, self.steps, self.config.lr, self.config.warmup)
        _seed_global(_seed(self.seed, 1, self.step, self.group.rank), self.device)
        loss, stop = self._train(x, y, self.sampler, self.optimizer, lr, asked=asked)
        self.step += 1
        if self.average:
            update_average(self.average, self.parameters, self.config.ema, self.step)
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
        with precision_of(self.config, self.device):
            taught = answers_of_teacher(self.task, x)
        teacher: Tensor | None = None
        first = 0.0
        for architecture in architectures:
            network = self.supernet.subnet(architecture).train()
            with precision_of(self.config, self.device), collected() as added:
                outputs = network(x)
                loss = self._loss(outputs, teacher, y, taught) + sum(added)
            (loss / len(architectures)).backward()
            if teacher is None:
                teacher, first = outputs.detach(), loss.item()
        return first

    def _loss(self, outputs: Tensor, teacher: Tensor | None, y: Tensor, taught: Tensor | None) -> Tensor:
        share = 0.0 if teacher is None else self.config.distillation
        distilled = self.task.distillation(outputs, teacher, y) if teacher is not None and share else None
        if distilled is None:
            return taught_loss(self.task, outputs, y, taught)
        loss = share * distilled
        return loss + (1 - share) * taught_loss(self.task, outputs, y, taught) if share < 1 else loss

    # -- time -------------------------------------------------------------------------------------------------------

    def _planned_steps(self) -> int:
        config = self.config
        if config.seconds is None:
            return config.steps or config.epochs * self.batches.per_epoch
        started = time.perf_counter()
        sampler = FairSampler(self.supernet.space, self.seed + 1, config.omissions)
        optimizer = optimizer_of(self.supernet, config)
        buffers = [b.clone() for b in self.supernet.buffers()]
        times: list[float] = []
        go_on = True
        with unchanged_globals(0, self.device):
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

    def _replan(self, step_s: float) -> None:
        """Fewer steps, where those that are left take longer than there is time: the machine is slower than it was.

        Or more, where they take less: the first steps are the slowest, since an operator's first call prepares much,
        and of a space with many operators there are many first calls.

        Args:
            step_s: Seconds of a step, of the latter half of those so far.
        """
        assert self.steps is not None and self.config.seconds is not None
        left_s, late_s, steps = self.config.seconds - self.seconds, _LATE * self.config.seconds, self.steps
        if (steps - self.step) * step_s > left_s + late_s:
            least = math.ceil(_LEAST_END * self.step)
            steps = min(steps, self.step + max(round(max(left_s, 0.0) / step_s), least))
        elif self.step <= _EARLY * steps and (steps - self.step) * step_s < left_s - late_s:
            steps = self.step + round(left_s / step_s)
        self.steps = self.group.agree(steps)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, str]:
        """What a checkpoint must agree with."""
        config = {k: v for k, v in asdict(self.config).items() if k not in ("checkpoint_every", "probe", "processes")}
        return {
            "space": _space_digest(self.supernet),
            "task": json.dumps(
                [self.task.name, getattr(self.task, "label_smoothing", None), *_trained_before(self.task)]
            ),
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


def _trained_before(task: Task) -> list[str]:
    """Digests of the networks that a training goes by."""
    return [one.digest for one in (getattr(task, "teacher", None), getattr(task, "start", None)) if one is not None]


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
