"""Tasks: what a network is trained and judged on.

A task is one small class: three splits, the shape of a network for them, a loss, and a metric with its direction. The
search sees `train` and `validation`; `test` is for the final table. `Task` is a classification, of examples or of
positions. A task of your own inherits from it, gives `name`, `io` and the splits, and overrides what is different.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mixnas.evaluators.tasks.preparing import Prepared
from mixnas.search_space.cost import METRICS as COSTS
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.units import IOSpec

if TYPE_CHECKING:
    from mixnas.evaluators.starting import Start
    from mixnas.evaluators.teaching import Teacher

IGNORE = -100
"""A target that is not scored, as in `torch.nn.functional.cross_entropy`."""

SPLITS = ("train", "validation", "test")

RESERVED_METRICS = (
    "loss",
    *COSTS,
    *("latency_ms", "latency_low_ms", "latency_high_ms", "energy_mj", "train_steps", "train_seconds"),
)
"""What evaluators call their other results: no name for a task's metric."""


class Examples(Protocol):
    """A split: examples that can be counted, and gathered by their numbers.

    The same numbers always give the same examples: the order in which they are asked for, and all that is drawn at
    random, is decided elsewhere. A training in several processes gives each a pickled copy.
    """

    def __len__(self) -> int:
        """Number of examples."""

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of examples.

        Args:
            indices: (n,) int64 on the CPU, from 0 to `len` - 1, in any order.

        Returns:
            Inputs (n, *size, features) float32, or (n, length) integer tokens; targets (n, *grid, ...), see
            `IOSpec.grid`.
        """


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Split:
    """Examples of one split, whole, in memory. See `Examples` for one that reads or computes them.

    Attributes:
        inputs: (N, H, W, C) float32 for images; (N, L) integer tokens or (N, L, C) float32 for sequences.
        targets: (N,) with the "pool" head; (N, *grid) with a dense one, `IGNORE` where nothing is asked.

    Examples:
        >>> import mixnas, torch
        >>> split = mixnas.Split(torch.zeros(100, 8, 8, 1), torch.zeros(100, dtype=torch.long))
        >>> split
        Split(100 examples, inputs (8, 8, 1) float32, targets () int64)
        >>> inputs, targets = split.gather(torch.tensor([3, 1]))
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        for name in ("inputs", "targets"):
            if not isinstance(getattr(self, name), Tensor):
                given = type(getattr(self, name)).__name__
                raise ConfigError(f"Split: {name} is a {given}. Give a tensor, for example torch.as_tensor({name}).")

    def __repr__(self) -> str:
        inputs, targets = (
            f"{tuple(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}" for t in (self.inputs, self.targets)
        )
        return f"Split({len(self)} examples, inputs {inputs}, targets {targets})"

    def __len__(self) -> int:
        return len(self.inputs)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of examples; `indices` (n,) may lie where the tensors are."""
        return self.inputs[indices], self.targets[indices]

    def to(self, device: str | torch.device) -> Split:
        """The same examples on a device."""
        return Split(self.inputs.to(device), self.targets.to(device))


class Accumulator(Protocol):
    """A metric of a split, of which batch after batch is seen."""

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch in."""

    def result(self) -> float:
        """The metric of all that was taken in."""


class MeanScore:
    """Mean over examples of a score that is itself the mean over a batch.

    Args:
        score: Gives a number, or a tensor of one.
    """

    def __init__(self, score: Callable[[Tensor, Tensor], float | Tensor]) -> None:
        self._score = score
        self._sum = 0.0
        self._examples = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch in."""
        self._sum += float(self._score(outputs, targets)) * len(targets)
        self._examples += len(targets)

    def result(self) -> float:
        """The mean so far."""
        return self._sum / self._examples


class Task:
    """Base of all tasks, and a classification of examples or of positions.

    What may be overridden: `score` for a metric that is a mean over examples, `new_metric` for any other; `loss`, and
    `training_loss` where training should minimise something else; `augment`; `distillation`.

    Attributes:
        name: What the task is called in results.
        io: Shape of a network for it, and its head.
        metric: Name of the metric.
        direction: "max" or "min": which way the metric is better.
        label_smoothing: Of a classification: share of the target that training spreads over all classes, from 0 to
            below 1.
        train, validation, test: The splits; see `Split`, `Examples`.
        labels: Names of the classes in the order of the outputs, where they have names.
        is_share: Whether `score` is a share of what was asked, from 0 to 1, so that a score of 1 has a standard error;
            None where `score` tells: this class's own is one.
        prepared: How the inputs were made of raw ones, where the task does that itself and not the network (mean and
            std of `io`): an export's card says it, and its `load.py` does it.
        teacher: A trained network that networks learn from beside the targets; see `evaluators.teaching`.
        start: A run whose weights networks begin with where they fit; see `evaluators.starting`.

    Examples:
        >>> import mixnas, torch
        >>> class Bright(mixnas.Task):
        ...     name = "bright"
        ...     io = mixnas.IOSpec("image", (8, 8), in_features=1, num_outputs=2)
        ...     def __init__(self):
        ...         x = torch.rand(90, 8, 8, 1, generator=torch.Generator().manual_seed(0))
        ...         y = (x.mean((1, 2, 3)) > 0.5).long()
        ...         self.train, self.validation, self.test = (mixnas.Split(x[i::3], y[i::3]) for i in range(3))
        >>> Bright()
        Bright(bright: image 8x8, 2 outputs, accuracy max, 30/30/30 examples)
    """

    name: str
    io: IOSpec
    metric: str = "accuracy"
    direction: str = "max"
    label_smoothing: float = 0.1
    train: Examples
    validation: Examples
    test: Examples
    labels: tuple[str, ...] = ()
    is_share: bool | None = None
    prepared: Prepared | None = None
    teacher: Teacher | None = None
    start: Start | None = None

    _loss_smooths: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # A loss of a task's own need not know of smoothing. Decided here, not at every step of a training.
        cls._loss_smooths = "label_smoothing" in inspect.signature(cls.loss).parameters

    def __repr__(self) -> str:
        io = self.io
        size, counts = "x".join(map(str, io.size)), "/".join(str(len(getattr(self, name))) for name in SPLITS)
        what = f"{io.kind} {size}, {io.num_outputs} outputs, {self.metric} {self.direction}, {counts} examples"
        return f"{type(self).__name__}({self.name}: {what})"

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """What a network is judged by beside the metric: mean cross-entropy over what is labelled.

        A task's own may leave `label_smoothing` out: only `training_loss` passes it, and only to a loss that has it.

        Args:
            outputs: (B, K) or (B, *grid, K).
            targets: (B,) or (B, *grid).
            label_smoothing: See the class.

        Returns:
            One number, differentiable; 0 where nothing is labelled.
        """
        summed = F.cross_entropy(
            outputs.flatten(0, -2),
            targets.flatten(),
            ignore_index=IGNORE,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        return summed / (targets != IGNORE).sum().clamp(min=1)  # nothing labelled: 0, and not the mean of nothing

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What training minimises: `loss`, of a classification with its label smoothing.

        Args:
            outputs, targets: As of `loss`; targets as `augment` gives them.
        """
        if self._loss_smooths:
            return self.loss(outputs, targets, label_smoothing=self.label_smoothing)
        return self.loss(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> float | Tensor:
        """Mean over a batch's examples of the share of labelled positions whose largest output is the target.

        A metric that is a mean over examples overrides this: batches are then weighted by their number of examples. Of
        a classification, examples that have nothing labelled are left out before (see `asked`).
        """
        right = outputs.argmax(-1) == targets
        if targets.ndim == 1:
            return right.double().mean().item()
        labelled = targets != IGNORE
        asked = labelled.flatten(1).sum(1)
        share = (right & labelled).flatten(1).sum(1).double() / asked.clamp(min=1)
        return share[asked > 0].mean().item()

    def new_metric(self) -> Accumulator:
        """An accumulator of the metric for one split: the mean of `score` over its examples.

        A metric that is no mean over examples (mean intersection over union, F1, PSNR) overrides this.
        """
        return MeanScore(self.score)

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Randomly changed training examples. The base changes nothing.

        Args:
            inputs, targets: Of many examples at once, on the device that is trained on; not to be changed in place.
            generator: On the same device; the only source of what is drawn.

        Returns:
            Inputs of the same shape, and the targets that belong to them: where positions move, targets move along.
        """
        return inputs, targets

    def record(self) -> Mapping[str, Any]:
        """What a run writes down of its data, as plain data; a resume is refused where it has become another.

        "summary" is shown, and "labels" (and "pictures": size and channels) go into what is exported. The base says
        its labels, if it has any.
        """
        return {"task": self.name, "labels": list(self.labels)} if self.labels else {}

    def distillation(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor | None:
        """What makes a sub-network answer as the largest one; None where it learns from the targets alone.

        Args:
            outputs, targets: As of `training_loss`.
            teacher: Outputs of the largest sub-network, of the same shape; no gradient goes there.
        """
        return distillation_loss(outputs, teacher, targets) if _are_classes(outputs, targets) else None


def recorded(task: Task) -> dict[str, Any]:
    """`Task.record`, how its inputs were prepared, and which trained networks it goes by.

    A task that is none of `Task` need not have any of them.
    """
    said: Callable[[], Mapping[str, Any]] = getattr(task, "record", dict)
    trained = {"teacher": getattr(task, "teacher", None), "init": getattr(task, "start", None)}
    prepared = getattr(task, "prepared", None)
    return {
        **said(),
        **({} if prepared is None else {"prepared": prepared.to_plain()}),
        **{name: one.record() for name, one in trained.items() if one is not None},
    }


def _are_classes(outputs: Tensor, targets: Tensor) -> bool:
    return not targets.is_floating_point() and targets.shape == outputs.shape[:-1] and outputs.shape[-1] > 1


def asked(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, int]:
    """What of a batch is scored.

    Args:
        outputs: (B, ...).
        targets: (B, ...).

    Returns:
        Outputs and targets, of a classification without the examples that have nothing labelled; and what their mean
        loss counts: labelled positions of a classification, else examples.
    """
    if not _are_classes(outputs, targets):
        return outputs, targets, len(targets)
    labelled = (targets != IGNORE).reshape(len(targets), -1).sum(1)
    if not bool(labelled.all()):
        outputs, targets = outputs[labelled > 0], targets[labelled > 0]
    return outputs, targets, int(labelled.sum())


def distillation_loss(outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with the teacher's probabilities, over what is labelled; temperature 1.

    Args:
        outputs: (B, K) or (B, *grid, K) logits.
        teacher: The same shape; no gradient goes there.
        targets: (B,) or (B, *grid); `IGNORE` where nothing is asked.
    """
    losses = -(teacher.detach().softmax(-1) * F.log_softmax(outputs, -1)).sum(-1)
    labelled = targets != IGNORE
    return (losses * labelled).sum() / labelled.sum().clamp(min=1)
