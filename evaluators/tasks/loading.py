"""Finding a task by its name, and checking that it is one before anything is trained."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mixnas.evaluators.tasks.task import SPLITS, Task
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.network import IOSpec

_FIELDS = ("name", "io", "metric", "direction", *SPLITS)

_BUILT_IN = {"digits": "mixnas.evaluators.tasks.digits:Digits", "mqar": "mixnas.evaluators.tasks.mqar:Mqar"}

# Names of an evaluator's other results, which a task's metric must not take.
_RESERVED = ("loss", "params", "macs", "weight_bytes", "latency_ms")


def names() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(_BUILT_IN)


def by_name(spec: str | Mapping[str, Any], /, **options: Any) -> Task:
    """Build a task.

    Args:
        spec: A name ("digits"), "package.module:Class", or a mapping {name: ..., option: value} as in a
            configuration file.
        **options: Keyword arguments of the task's class, added to those of the mapping.

    Returns:
        The task, checked for all that a task must have.

    Raises:
        ConfigError: No such task, module, class or option, or the class does not make a task.
    """
    if isinstance(spec, Mapping):
        options = {**{key: value for key, value in spec.items() if key != "name"}, **options}
        if "name" not in spec:
            raise ConfigError(f"task: no name is given. Write name: with one of {', '.join(names())} or module:Class.")
        spec = spec["name"]
    if not isinstance(spec, str):
        raise ConfigError(f"task: {spec!r} is not a name. Give one of {', '.join(names())} or package.module:Class.")
    cls = _find_class(spec)
    _check_options(spec, cls, options)
    return check_task(cls(**options), spec)


def _find_class(name: str) -> type:
    path = _BUILT_IN.get(name, name)
    module_name, colon, class_name = path.partition(":")
    if not colon or not module_name or not class_name:
        raise ConfigError(
            f"task: no task is called {name!r}.{nearest(name, _BUILT_IN)} Allowed: {', '.join(names())}, "
            "or a class of your own as package.module:Class."
        )
    # A user's own module lies beside the configuration more often than it is installed.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise ConfigError(f"task {name!r}: importing {module_name} failed: {error}.") from error
        raise ConfigError(
            f"task {name!r}: no module {error.name!r} is found. Run from the directory that it lies in, "
            "install it, or put its directory on PYTHONPATH."
        ) from error
    except Exception as error:
        raise ConfigError(f"task {name!r}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    cls = getattr(module, class_name, None)
    if not isinstance(cls, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        own = [key for key in classes if vars(module)[key].__module__ == module.__name__]
        raise ConfigError(
            f"task {name!r}: {module_name} has no class {class_name!r}.{nearest(class_name, own)} "
            f"Its classes: {', '.join(own) or 'none'}."
        )
    return cls


def _check_options(name: str, cls: type, options: Mapping[str, Any]) -> None:
    parameters = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    allowed = [p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY]
    for option in options:
        if option not in allowed:
            raise ConfigError(
                f"task {name!r}: no option {option!r}.{nearest(option, allowed)} "
                f"Allowed: {', '.join(allowed) or 'none, it takes no options'}."
            )
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ConfigError(f"task {name!r}: option {parameter.name!r} must be given; it has no default.")


def check_task(task: Any, source: str) -> Task:
    """Check that an object has what a task must have, so that a mistake shows before anything is trained.

    Args:
        task: An instance of `Task` or of a user's class.
        source: How the configuration names it, for messages.

    Raises:
        ConfigError: Something is missing or does not fit together; the message names all that is missing.
    """
    missing = [a for a in _FIELDS if not hasattr(task, a)]
    missing += [f"{m}()" for m in ("loss", "score", "augment") if not callable(getattr(task, m, None))]
    if missing:
        raise ConfigError(
            f"task {source!r}: it lacks {', '.join(missing)}. A task has {', '.join(_FIELDS)}, loss(), score() and "
            "augment(). Inherit from mixnas.evaluators.tasks.Task and give name, io and the splits."
        )
    if not isinstance(task.io, IOSpec):
        raise ConfigError(f"task {source!r}: io is {type(task.io).__name__}, it must be an IOSpec.")
    if task.direction not in ("max", "min"):
        raise ConfigError(f"task {source!r}: direction is {task.direction!r}. Allowed: max, min.")
    if not isinstance(task.metric, str) or not task.metric.isidentifier() or task.metric in _RESERVED:
        raise ConfigError(
            f"task {source!r}: metric is {task.metric!r}. It must be one word, and none of {', '.join(_RESERVED)}."
        )
    for split_name in SPLITS:
        _check_split(getattr(task, split_name), task.io, f"task {source!r}: {split_name}")
    _check_loss(task, source)
    checked: Task = task
    return checked


def _check_split(split: Any, io: IOSpec, where: str) -> None:
    inputs, targets = getattr(split, "inputs", None), getattr(split, "targets", None)
    if not isinstance(inputs, Tensor) or not isinstance(targets, Tensor):
        raise ConfigError(f"{where} must have the tensors inputs and targets, as mixnas.evaluators.tasks.Split has.")
    if len(inputs) == 0 or len(inputs) != len(targets):
        raise ConfigError(
            f"{where} has {len(inputs)} inputs and {len(targets)} targets; as many of both, at least one."
        )
    expected = tuple(io.size) if io.tokens else (*io.size, io.in_features)
    if tuple(inputs.shape[1:]) != expected:
        raise ConfigError(f"{where}: an input has shape {tuple(inputs.shape[1:])}, io says {expected} (channels last).")
    if io.tokens:
        if inputs.is_floating_point():
            raise ConfigError(f"{where}: inputs are {inputs.dtype}, but io says tokens, which are integers.")
        low, high = int(inputs.min()), int(inputs.max())
        if low < 0 or high >= io.in_features:
            raise ConfigError(f"{where}: tokens range from {low} to {high}, io allows 0 to {io.in_features - 1}.")
    elif not inputs.is_floating_point():
        raise ConfigError(f"{where}: inputs are {inputs.dtype}, they must be floating point.")
    elif not bool(torch.isfinite(inputs).all()):
        raise ConfigError(f"{where}: inputs hold NaN or infinity.")


def _check_loss(task: Any, source: str) -> None:
    """Run the loss and the score once, on the outputs of a network that says nothing."""
    targets = task.train.targets[:2]
    shape = (len(targets), *(task.io.size if task.io.head == "token" else ()), task.io.num_outputs)
    outputs = torch.zeros(shape, requires_grad=True)
    try:
        loss = task.loss(outputs, targets, 0.0)
        usable = loss.ndim == 0 and loss.requires_grad and bool(torch.isfinite(loss))
        score = float(task.score(outputs.detach(), targets))
    except Exception as error:
        raise ConfigError(
            f"task {source!r}: loss or score fails on outputs of shape {shape} and targets of shape "
            f"{tuple(targets.shape)} {targets.dtype}: {type(error).__name__}: {error}"
        ) from error
    if not usable or score != score:
        raise ConfigError(
            f"task {source!r}: on all-zero outputs the loss is {loss} and the score {score}; "
            "the loss must be one finite differentiable number, the score a number."
        )
