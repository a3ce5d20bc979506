"""Checking that a task is one, before anything is trained: each of its methods is run once, on two examples."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixnas.evaluators.tasks.task import IGNORE, RESERVED_METRICS, SPLITS, Examples, Split, Task, asked
from mixnas.search_space.errors import ConfigError, shown
from mixnas.search_space.units import IOSpec

_T = TypeVar("_T")

_FIELDS = ("name", "io", "metric", "direction", *SPLITS)
_METHODS = ("loss", "training_loss", "new_metric", "augment", "distillation")

_INHERIT = "Inherit from mixnas.evaluators.tasks.Task and give name, io and the splits."
_AUGMENT = "augment(inputs, targets, generator) -> (inputs, targets), so that targets can move along"


def check_class(cls: type, source: str) -> None:
    """Refuse a class that is no task's, before it is called.

    Args:
        cls: What the configuration names.
        source: How it names it, for messages.

    Raises:
        ConfigError: It lacks methods of a task; the message names them.
    """
    if issubclass(cls, Task):
        return
    missing = [f"{method}()" for method in _METHODS if not _has_method(cls, method)]
    if missing:
        raise ConfigError(f"task {shown(source)}: {cls.__name__} is no task, it lacks {', '.join(missing)}. {_INHERIT}")


def _has_method(cls: type, name: str) -> bool:
    """Whether a class itself defines a function, without asking it anything."""
    return inspect.isroutine(inspect.getattr_static(cls, name, None))


def check_task(task: object, source: str) -> Task:
    """Check that an object has what a task must have, so that a mistake shows before anything is trained.

    Splits in memory are looked through; of others, three examples are gathered.

    Args:
        task: An instance of `Task` or of a user's class.
        source: How the configuration names it, for messages.

    Raises:
        ConfigError: Something is missing or does not fit together; the message says which part, what it was given and
            what it must give.
    """
    where = f"task {source!r}"
    checked = _check_fields(task, where)
    for split_name in SPLITS:
        _check_split(getattr(checked, split_name), checked.io, f"{where}: {split_name}")
    _check_methods(checked, where)
    return checked


def _check_fields(task: Any, where: str) -> Task:
    missing = [name for name in _FIELDS if not hasattr(task, name)]
    missing += [f"{method}()" for method in _METHODS if not callable(getattr(task, method, None))]
    if missing:
        methods = ", ".join(f"{method}()" for method in _METHODS)
        raise ConfigError(
            f"{where}: it lacks {', '.join(missing)}. A task has {', '.join(_FIELDS)}, {methods}. {_INHERIT}"
        )
    if not isinstance(task.io, IOSpec):
        raise ConfigError(f"{where}: io is {type(task.io).__name__}, it must be an IOSpec.")
    if task.direction not in ("max", "min"):
        raise ConfigError(f"{where}: direction is {task.direction!r}. Allowed: max, min.")
    if not isinstance(task.metric, str) or not task.metric.isidentifier() or task.metric in RESERVED_METRICS:
        raise ConfigError(
            f"{where}: metric is {task.metric!r}. It must be one word, and none of {', '.join(RESERVED_METRICS)}."
        )
    smoothing = getattr(task, "label_smoothing", 0.0)
    if not isinstance(smoothing, int | float) or isinstance(smoothing, bool) or not 0 <= smoothing < 1:
        raise ConfigError(f"{where}: label_smoothing is {smoothing!r}, it must be a share from 0 to below 1.")
    checked: Task = task
    return checked


# -- splits ------------------------------------------------------------------------------------------------------


def _check_split(split: Any, io: IOSpec, where: str) -> None:
    if not callable(getattr(split, "gather", None)) or not hasattr(split, "__len__"):
        raise ConfigError(
            f"{where} is {type(split).__name__}. It must be a mixnas.evaluators.tasks.Split(inputs, targets), or have "
            "__len__() and gather(indices) -> (inputs, targets)."
        )
    inputs, targets, where = _in_memory(split, where) if isinstance(split, Split) else _some(split, where)
    expected = tuple(io.size) if io.tokens else (*io.size, io.in_features)
    if inputs.requires_grad or targets.requires_grad:
        raise ConfigError(f"{where}: inputs or targets require gradients, and nothing trains them. Detach them.")
    if tuple(inputs.shape[1:]) != expected:
        raise ConfigError(f"{where}: an input has shape {tuple(inputs.shape[1:])}, io says {expected} (channels last).")
    if io.tokens:
        if inputs.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"{where}: inputs are {inputs.dtype}, but io says tokens, which are integers, int64 or int32."
            )
        low, high = int(inputs.min()), int(inputs.max())
        if low < 0 or high >= io.in_features:
            raise ConfigError(f"{where}: tokens range from {low} to {high}, io allows 0 to {io.in_features - 1}.")
    elif inputs.dtype != torch.float32:
        raise ConfigError(f"{where}: inputs are {inputs.dtype}, they must be floating point, float32: inputs.float().")
    elif io.padded:
        _check_ends(inputs, where)
    elif not bool(torch.isfinite(inputs).all()):
        raise ConfigError(f"{where}: inputs hold NaN or infinity.")
    if tuple(targets.shape[1 : 1 + len(io.grid)]) != io.grid:
        raise ConfigError(
            f"{where}: a target has shape {tuple(targets.shape[1:])}, and io says that the head {io.head!r} answers on "
            f"the grid {io.grid}. Give targets of that grid, or say theirs in io: out_size."
        )
    if isinstance(split, Split) and not bool(_labelled(targets, io).any()):
        raise ConfigError(f"{where}: no target is labelled, all are {IGNORE}; nothing could be learned or judged.")


def _check_ends(inputs: Tensor, where: str) -> None:
    """Series that may be shorter: finite numbers, and behind the end NaN in each channel."""
    there = inputs.isfinite().all(-1)
    ended = inputs.isnan().all(-1)
    lengths = there.sum(1, keepdim=True)
    before = torch.arange(inputs.shape[1], device=inputs.device) < lengths
    if not bool((there | ended).all()) or not torch.equal(there, before) or not bool(lengths.all()):
        raise ConfigError(
            f"{where}: an input is no series of finite numbers with NaN behind its end, in each channel (io.padded)."
        )


def _labelled(targets: Tensor, io: IOSpec) -> Tensor:
    """(n,): which examples have something to be learned from."""
    if targets.is_floating_point() or tuple(targets.shape[1:]) != io.grid or io.num_outputs == 1:
        return torch.ones(len(targets), dtype=torch.bool)  # no classification
    return (targets != IGNORE).reshape(len(targets), -1).any(1)


def _in_memory(split: Split, where: str) -> tuple[Tensor, Tensor, str]:
    """Everything."""
    if len(split.inputs) == 0 or len(split.inputs) != len(split.targets):
        raise ConfigError(
            f"{where} has {len(split.inputs)} inputs and {len(split.targets)} targets; as many of both, at least one."
        )
    return split.inputs, split.targets, where


def _some(split: Examples, where: str) -> tuple[Tensor, Tensor, str]:
    """The first, a middle and the last example, and a place for messages that says so."""
    count = len(split)
    if count == 0:
        raise ConfigError(f"{where} has no examples; at least one is needed.")
    indices = torch.tensor(sorted({0, count // 2, count - 1}))
    where = f"{where} (examples {', '.join(map(str, indices.tolist()))} of {count} were looked at)"
    first, again = (_gathered(split, order, where) for order in (indices, indices.flip(0)))
    if not all(_same(a, b.flip(0)) for a, b in zip(first, again, strict=True)):
        raise ConfigError(
            f"{where}: gather gives other examples for the same indices in another order. An index must always give "
            "the same example; what is drawn at random belongs in augment, which is given a generator."
        )
    return *first, where


def _gathered(split: Examples, indices: Tensor, where: str) -> tuple[Tensor, Tensor]:
    given: Any = _run(f"{where}: gather({indices.tolist()})", lambda: split.gather(indices))
    if not _is_pair(given) or not len(given[0]) == len(given[1]) == len(indices):
        raise ConfigError(
            f"{where}: gather({indices.tolist()}) gave {_described(given)}; it must give two tensors, inputs and "
            f"targets, of {len(indices)} examples each."
        )
    inputs, targets = given
    return inputs, targets


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


# -- methods -----------------------------------------------------------------------------------------------------


def _check_methods(task: Task, where: str) -> None:
    """Run them on two training examples and on the outputs of a network that knows nothing."""
    indices = torch.arange(min(2, len(task.train)))
    if isinstance(task.train, Split):  # of others, looking for what is labelled would gather too many
        indices = _labelled(task.train.targets, task.io).nonzero()[:2, 0].cpu()
    x, y = task.train.gather(indices)
    _, moved = _augmented(task, x, y, where)
    shape = (len(indices), *task.io.grid, task.io.num_outputs)
    generator = torch.Generator().manual_seed(0)
    outputs, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    _check_loss(f"{where}: loss", task.loss, outputs, y)
    _check_loss(f"{where}: training_loss", task.training_loss, outputs, moved)
    _check_loss(f"{where}: distillation", task.distillation, outputs, teacher, moved, optional=True)
    _check_metric(task, outputs, y, where)


def _augmented(task: Task, x: Tensor, y: Tensor, where: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    try:
        inspect.signature(task.augment).bind(x, y, generator)
    except TypeError:
        raise ConfigError(
            f"{where}: augment{inspect.signature(task.augment)} cannot be called with inputs, targets and a generator. "
            f"It is given the targets and gives them back: {_AUGMENT}."
        ) from None
    given: Any = _run(
        f"{where}: augment(inputs, targets, generator) on {_described((x, y))}", lambda: task.augment(x, y, generator)
    )
    if not _is_pair(given) or given[0].shape != x.shape or given[0].dtype != x.dtype or len(given[1]) != len(y):
        raise ConfigError(
            f"{where}: augment gave {_described(given)} for {_described((x, y))}. It must give inputs of the same "
            f"shape and type and as many targets: {_AUGMENT}."
        )
    return given[0], given[1]


def _check_loss(
    what: str, method: Callable[..., Tensor | None], outputs: Tensor, *rest: Tensor, optional: bool = False
) -> None:
    outputs = outputs.clone().requires_grad_()
    what = f"{what} on outputs {_described(outputs)} and targets {_described(rest[-1])}"
    value: Any = _run(what, lambda: method(outputs, *rest))
    if optional and value is None:
        return
    usable = isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad and bool(torch.isfinite(value))
    if not usable:
        raise ConfigError(f"{what} gave {_described(value)}; it must give one finite differentiable number.")


def _check_metric(task: Task, outputs: Tensor, y: Tensor, where: str) -> None:
    what = f"{where}: the metric {task.metric} of outputs {_described(outputs)} and targets {_described(y)}"
    metric = _run(f"{where}: new_metric()", task.new_metric)
    if not callable(getattr(metric, "update", None)) or not callable(getattr(metric, "result", None)):
        raise ConfigError(
            f"{where}: new_metric() gave {_described(metric)}; it must give an object with update(outputs, targets) "
            "and result() -> float."
        )

    def measured() -> float:
        metric.update(outputs, y)
        return float(metric.result())

    outputs, y, counts = asked(outputs, y)
    if not counts:
        return  # nothing here is labelled, and the metric is given nothing
    value = _run(what, measured)
    if not math.isfinite(value):
        raise ConfigError(f"{what} is {value}; score or new_metric must give a finite number.")


def _run(what: str, call: Callable[[], _T]) -> _T:
    """The result; what is raised becomes an error that says what was run."""
    with torch.enable_grad():
        try:
            result = call()
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{what} fails: {type(error).__name__}: {error}") from error
        if not torch.is_grad_enabled():
            raise ConfigError(f"{what} switches gradients off for all that follows. Use `with torch.no_grad():`.")
    return result


def _is_pair(value: object) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and all(isinstance(part, Tensor) and part.ndim > 0 for part in value)  # type: ignore[attr-defined]


def _described(value: object) -> str:
    """A tensor by its shape and type, a small one by its value; anything else by its type."""
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} {value.item()}" if value.numel() == 1 and value.ndim == 0 else f"{kind} {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, int | float | str) else type(value).__name__
