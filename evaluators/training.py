"""Training a network on a task, and judging it on a split."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from mixnas.evaluators.batches import Batches, gather, in_order
from mixnas.evaluators.pausing import Stream, captured, opened, restore, restore_random
from mixnas.evaluators.protocol import standard_error
from mixnas.evaluators.tasks.task import Accumulator, Task, asked
from mixnas.evaluators.teaching import answers_of_teacher, taught_loss
from mixnas.search_space.errors import ConfigError, NasError, StoppedEarly
from mixnas.search_space.network import Network
from mixnas.search_space.operators.auxiliary import collected
from mixnas.search_space.operators.norms import norms_with_running_statistics, reset_running_statistics
from mixnas.search_space.operators.quantization.projected import calibrated_layers, calibrating
from mixnas.search_space.reporting import SILENT, Report

_GROUPS = 16  # that a split is dealt to for the standard error, which they tell to within some 20%
_CHECK_EVERY_ON_GPU = 16  # steps between looks at the loss, each of which waits for the device


class DivergedError(NasError):
    """A loss is NaN or infinite.

    Attributes:
        step: Step at which it was seen, None when it was in an evaluation.
        loss: The loss.
    """

    def __init__(self, message: str, step: int | None = None, loss: float | None = None) -> None:
        super().__init__(message)
        self.step = step
        self.loss = loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train; AdamW (Loshchilov and Hutter, 2019) with a linear warm-up and a cosine to zero.

    Attributes:
        epochs: Passes over the training split.
        steps: Number of steps; where given, it counts instead of `epochs`.
        batch_size: Examples a step; the incomplete last batch of an epoch is left out.
        lr: Peak learning rate.
        weight_decay: Of matrices and convolution kernels; biases, norms and other vectors have none.
        betas: AdamW's two decay rates.
        warmup: Share of the steps over which the learning rate rises.
        clip: Largest norm of the gradient; 0 for no limit.
        ema: Decay of the moving average of the weights that replaces them at the end; 0 for none.
        augment: Whether the task's augmentation is applied.
        stop_at: Validation score at which training ends before its last step; None for never.
        validate_every: Steps between validations; 0 for once an epoch with `stop_at` and never without it.
        mixed_precision: bfloat16 autocast on a GPU; a CPU always computes as the network says.
    """

    epochs: int = 20
    steps: int | None = None
    batch_size: int = 64
    lr: float = 8e-3
    weight_decay: float = 0.05
    betas: tuple[float, ...] = (0.9, 0.99)
    warmup: float = 0.1
    clip: float = 1.0
    ema: float = 0.0
    augment: bool = True
    stop_at: float | None = None
    validate_every: int = 0
    mixed_precision: bool = True

    PLACE: ClassVar[str] = "training"
    MOVED: ClassVar[dict[str, str]] = {
        "label_smoothing": "is an option of the task now, for example task: {name: digits, label_smoothing: 0.1}"
    }

    def __post_init__(self) -> None:
        betas = self.betas
        for name, allowed, ok in (
            ("epochs", "a whole number from 1", _whole(self.epochs, 1)),
            ("steps", "a whole number from 1, or nothing", self.steps is None or _whole(self.steps, 1)),
            ("batch_size", "a whole number from 1", _whole(self.batch_size, 1)),
            ("lr", "a number above 0", _between(self.lr, 0, math.inf) and self.lr > 0),
            ("weight_decay", "a number from 0", _between(self.weight_decay, 0, math.inf)),
            ("betas", "two numbers from 0 to below 1", len(betas) == 2 and all(_between(b, 0, 1) for b in betas)),
            ("warmup", "a share from 0 to below 1", _between(self.warmup, 0, 1)),
            ("clip", "a number from 0", _between(self.clip, 0, math.inf)),
            ("ema", "a decay from 0 to below 1", _between(self.ema, 0, 1)),
            ("augment", "true or false", isinstance(self.augment, bool)),
            ("stop_at", "a number, or nothing", self.stop_at is None or _between(self.stop_at, -math.inf, math.inf)),
            ("validate_every", "a whole number from 0", _whole(self.validate_every, 0)),
            ("mixed_precision", "true or false", isinstance(self.mixed_precision, bool)),
        ):  # fmt: skip
            if not ok:
                raise ConfigError(f"{self.PLACE}: {name} is {getattr(self, name)!r}, it must be {allowed}.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a training did.

    Attributes:
        steps: Steps taken, fewer than planned where `stop_at` was reached.
        planned_steps: Steps that the configuration asks for.
        loss: Mean training loss of the last epoch, or of all steps where there were fewer.
        seconds: Wall-clock time, validations included.
        validations: (step, score) of each validation on the way.
        state: What it takes to go on, of a training that was left off; None of one that has ended.
    """

    steps: int
    planned_steps: int
    loss: float
    seconds: float
    validations: tuple[tuple[int, float], ...]
    state: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Metrics:
    """A network's task metric and loss on a split.

    Attributes:
        score: The metric.
        loss: Mean over the examples; of a classification, over all that is labelled.
        error: Standard error of the metric: how far it would scatter over splits of this size. None of fewer than
            two examples.
    """

    score: float
    loss: float
    error: float | None = None

    def named(self, metric: str) -> dict[str, float]:
        """By name: the metric, the loss, and the metric's standard error where it is known."""
        found = {metric: self.score, "loss": self.loss}
        return found if self.error is None else {**found, standard_error(metric): self.error}


def train(
    network: nn.Module,
    task: Task,
    config: TrainConfig,
    *,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
    parts: int = 1,
    until: int | None = None,
    begin: bytes | None = None,
    report: Report = SILENT,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a network in place; it is moved to `device` and left in evaluation mode.

    The same network, generator state and number of threads give the same weights, bit for bit, on a CPU. The
    global generators are left as they were found.

    Args:
        network: Initialised; `Network(..., generator=...)` makes that reproducible.
        task: What to train on; only its training split, and its validation split for `stop_at`.
        config: How.
        generator: On the CPU; source of the order of examples, augmentation and dropout.
        device: Where.
        parts: See `Request`. The gradient is that of the whole batch, but for norms over a batch, which see a part.
        until: Step after which it is left off, fit to be judged; None for the end. The schedule is the whole one's.
        begin: The state in which the same training was left off before; the weights are then those of one that never
            was, bit for bit, on a CPU. `network` and `generator` are as at its beginning.
        report: Given `(step, steps, loss=..., score=...)`, the loss of a batch, and the validation score where it was
            just measured; what it raises ends the training.
        should_stop: Asked before each step.

    Raises:
        DivergedError: The loss became NaN or infinite.
        NotThisTrainingError: `begin` is of another training, or of a step beyond `until`.
        StoppedEarly: `should_stop` said so.
    """
    device = torch.device(device)
    started = time.perf_counter()
    seed = int(torch.randint(1 << 62, (), generator=generator))
    local = torch.Generator(device).manual_seed(seed)
    batches = Batches(task.train, config.batch_size, task.augment if config.augment else None, device)
    steps = config.steps or config.epochs * batches.per_epoch
    last = steps if until is None else min(until, steps)
    of = f"{config} {steps} {seed}"
    before = None if begin is None else opened(begin, of, last)
    validate_every = config.validate_every or (batches.per_epoch if config.stop_at is not None else 0)
    check_every = 1 if device.type == "cpu" else _CHECK_EVERY_ON_GPU

    network.to(device).train()
    parameters: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
    optimizer = optimizer_of(network, config)
    average = [p.detach().clone() for p in parameters] if config.ema else []
    losses: list[Tensor] = []  # of the last epoch; on the device
    step = 0
    if before is not None:
        restore(before, network, optimizer, average)
        local.set_state(before["epoch"])
        losses, step = list(before["losses"].to(device)), before["step"]
    data = Stream(batches, local, 0 if before is None else before["taken"])
    validations: list[tuple[int, float]] = []
    state: bytes | None = None
    with unchanged_globals(seed, device):
        if before is not None:
            restore_random(before, device)
        while step < last:
            if should_stop is not None and should_stop():
                raise StoppedEarly(f"training was stopped after {step} of {steps} steps.")
            x, y = next(data)
            lr = learning_rate(step, steps, config.lr, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            loss = torch.zeros((), device=device)
            for some_x, some_y in _in_parts(x, y, parts):
                with precision_of(config, device), collected() as added:
                    taught, outputs = answers_of_teacher(task, some_x), network(some_x)
                    share = (taught_loss(task, outputs, some_y, taught) + sum(added)) * (len(some_x) / len(x))
                share.backward()
                loss = loss + share.detach()
            if config.clip:
                nn.utils.clip_grad_norm_(parameters, config.clip, foreach=True)
            optimizer.step()
            step += 1
            if average:
                update_average(average, parameters, config.ema, step)
            losses.append(loss)
            if step % check_every == 0 or step == last:
                report(step, steps, loss=_last_finite(losses[-check_every:], step))
                del losses[: -batches.per_epoch]
            if validate_every and (step % validate_every == 0 or step == last):
                score = evaluate(network, task, "validation", device=device).score
                network.train()
                validations.append((step, score))
                report(step, steps, loss=losses[-1].item(), score=score)
                if config.stop_at is not None and _reached(score, config.stop_at, task.direction):
                    break
        if last < steps:  # what follows makes it fit to be judged, and is no part of the training
            state = captured(of, step, network, optimizer, average, data, losses, device)
        if average:
            with torch.no_grad():
                torch._foreach_copy_(parameters, average)
            recalibrate(network, task, device=device, generator=local)
        calibrate(network, task, device=device, generator=local)
    network.eval()
    return TrainResult(
        steps=step,
        planned_steps=steps,
        loss=torch.stack(losses[-batches.per_epoch :]).float().mean().item(),
        seconds=time.perf_counter() - started,
        validations=tuple(validations),
        state=state,
    )


def _in_parts(x: Tensor, y: Tensor, parts: int) -> Iterator[tuple[Tensor, Tensor]]:
    parts = min(parts, len(x))
    return zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    task: Task,
    split_name: str = "validation",
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 512,
) -> Metrics:
    """The task's metric and honest loss of a network in evaluation mode, in which it is left; as it is deployed.

    Raises:
        DivergedError: The loss or the metric is NaN or infinite.
    """
    device = torch.device(device)
    network.to(device).eval()
    batches = in_order(getattr(task, split_name), batch_size, device)
    form = network.as_deployed() if isinstance(network, Network) else contextlib.nullcontext([("", network)])
    with form as units:
        answer = nn.Sequential(*(module for _, module in units))
        return judged(task, ((answer(x), y) for x, y in batches), f"the {split_name}")


def judged(task: Task, answers: Iterable[tuple[Tensor, Tensor]], what: str) -> Metrics:
    """The task's metric and honest loss of a network's answers.

    Args:
        task: Whose.
        answers: Outputs and targets, batch by batch.
        what: Of what, as a message begins: "the validation".

    Raises:
        ConfigError: Nothing is labelled.
        DivergedError: The loss or the metric is NaN or infinite.
    """
    metric = task.new_metric()
    groups = [task.new_metric() for _ in range(_GROUPS)]
    loss, examples, weight = 0.0, 0, 0
    for batch in answers:
        outputs, targets, counts = asked(*batch)
        if counts == 0:
            continue
        metric.update(outputs, targets)
        for g, group in enumerate(groups):
            first = (g - examples) % _GROUPS  # of the group, in this batch
            if first < len(targets):
                group.update(outputs[first::_GROUPS], targets[first::_GROUPS])
        loss += task.loss(outputs, targets).item() * counts
        examples += len(targets)
        weight += counts
    if not examples:
        raise ConfigError(f"{what} has no labelled target, so nothing can be judged on it. Label some of its examples.")
    if not math.isfinite(loss):
        raise DivergedError(f"{what} loss is {loss}. Lower the learning rate.", loss=loss)
    score = float(metric.result())
    if not math.isfinite(score):
        raise DivergedError(f"{what} {task.metric} is {score}, with a loss of {loss / weight:.4g}.", loss=loss)
    of_share = examples if is_share(task) else None
    return Metrics(score, loss / weight, standard_error_of(groups[:examples], of_share))


def is_share(task: Task) -> bool:
    """Whether a task's metric is a share of what was asked, from 0 to 1; a class of its own says so."""
    said: bool | None = getattr(task, "is_share", None)
    if said is not None:
        return said
    cls = type(task)
    return getattr(cls, "score", None) is Task.score and getattr(cls, "new_metric", None) is Task.new_metric


def standard_error_of(groups: Sequence[Accumulator], of_share: int | None = None) -> float | None:
    """Of a metric whose examples were dealt to groups: the scatter between the groups' values.

    The random group method (Wolter 2007, Introduction to Variance Estimation, section 2.2): it asks nothing of the
    metric but to be computable on a part of the examples. Of a share it is half of Wilson's interval for one standard
    error (Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference), with that scatter in the
    place of `p (1 - p) / n`: a share of 1 is not known without error because no group had a mistake.

    Args:
        groups: Each with its part of the examples.
        of_share: How many examples, where the metric is a share; else None.

    Returns:
        Above 0; None where one group can't tell, or where groups are equal and the metric is no share.
    """
    values = [float(group.result()) for group in groups]
    values = [value for value in values if math.isfinite(value)]  # a group may have nothing that is scored
    if len(values) < 2:
        return None
    scatter = statistics.stdev(values) / math.sqrt(len(values))
    if of_share is None:
        return scatter or None
    return math.hypot(scatter, 1 / (2 * of_share)) / (1 + 1 / of_share)


@torch.no_grad()
def recalibrate(
    network: nn.Module,
    task: Task,
    *,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
    batches: int = 8,
) -> None:
    """Recompute the running statistics of batch norms for the weights as they are, as an equal-weight average.

    A network without running statistics is left alone and costs nothing.

    Args:
        generator: On `device`; picks the training examples.
    """
    norms = norms_with_running_statistics(network)
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    reset_running_statistics(network)
    device = torch.device(device)
    order = torch.randperm(len(task.train), generator=generator, device=device)
    order = order[: batches * batch_size]
    # In parts that differ by at most one example: a last one of a single example may leave a norm one value a channel.
    _observe(network, task, order.tensor_split(math.ceil(len(order) / batch_size)), device, training=True)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def calibrate(
    network: nn.Module,
    task: Task,
    *,
    generator: torch.Generator,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
    batches: int = 2,
) -> None:
    """Find the ranges of activations anew for the weights as they are, where a policy needs them; the mode is kept.

    A network without such a policy is left alone and costs nothing.

    Args:
        generator: On `device`; picks the training examples.

    Raises:
        ConfigError: There are no examples, or activations are NaN or infinite.
    """
    if not calibrated_layers(network):
        return
    device = torch.device(device)
    order = torch.randperm(len(task.train), generator=generator, device=device)
    if not len(order):
        raise ConfigError("the calibration set is empty. Give the task at least one training example.")
    _observe(network, task, order[: batches * batch_size].split(batch_size), device, training=False)


def _observe(network: nn.Module, task: Task, chunks: Iterable[Tensor], device: torch.device, *, training: bool) -> None:
    """Run training examples through a network in one mode, with ranges of these weights; its own mode is kept."""
    mode = network.training
    network.train(training)
    with calibrating(network):
        for chunk in chunks:
            inputs, _ = gather(task.train, chunk, device)
            network(inputs)
    network.train(mode)


def steps_of(config: TrainConfig, examples: int) -> int:
    """How many steps a training on so many examples has."""
    return config.steps or config.epochs * (examples // min(config.batch_size, examples))


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for an optimiser: matrices and kernels, which decay, and vectors and scalars, which do not."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def optimizer_of(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over a network's parameters, as configured."""
    beta1, beta2 = config.betas
    groups = parameter_groups(network, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), fused=True)


def update_average(average: list[Tensor], parameters: list[Tensor], decay: float, step: int) -> None:
    """Take the weights behind a step (1, 2, ...) into their moving average, in place.

    The decay rises towards its value: the average of a short training must not remember the initial weights.
    """
    torch._foreach_lerp_(average, parameters, 1 - min(decay, (1 + step) / (10 + step)))


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of step 0 .. steps - 1: a linear rise over a share of the steps, then a cosine towards 0."""
    rise = warmup * steps
    if step < rise:
        return peak * (step + 1) / (math.floor(rise) + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


@contextlib.contextmanager
def unchanged_globals(seed: int, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's global generators, from which dropout draws, and leave them as they were.

    Gradients are switched on within; a task's loss that switches them off leaves them so for nobody else.
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def precision_of(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if config.mixed_precision and device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _last_finite(losses: list[Tensor], step: int) -> float:
    """The last of the losses up to a step; none of them is NaN or infinite."""
    values = [losses[0].item()] if len(losses) == 1 else torch.stack(losses).tolist()
    for at, value in enumerate(values, start=step - len(values) + 1):
        if not math.isfinite(value):
            raise DivergedError(f"the training loss is {value} at step {at}. Lower lr or clip.", step=at, loss=value)
    return float(values[-1])


def _reached(score: float, target: float, direction: str) -> bool:
    return score >= target if direction == "max" else score <= target


def _whole(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _between(value: object, low: float, high: float) -> bool:
    """low <= value < high, and no NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value < high
