"""A configuration for somebody's data: the task that reads it, and an embedded space that suits its size."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixnas.evaluators.tasks.choosing import task_of
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task, recorded
from mixnas.search.config import Config, read_config
from mixnas.search_space import registry
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.files import load_yaml
from mixnas.search_space.settings import apply_overrides

_CONFIGS = Path(__file__).resolve().parents[1] / "configs"

_MOST_TOKENS = 16
"""Extent of the first stage's grid, at most: what two cores train in minutes."""

_KERNELS = {1: 3, 2: 3, 4: 7}  # of a stem by its stride; else one that overlaps as little as it can


def config_for(path: str | Path, *, base: str | Path | None = None, settings: Sequence[str] = ()) -> Config:
    """The configuration of a search on data that nobody has written a task or a space for.

    Args:
        path: The data, see `evaluators.tasks.choosing`.
        base: A configuration file whose space and settings are taken instead of the embedded ones.
        settings: `key=value` changes, as `--set`; options of the task too (`task.size=64`).

    Raises:
        ConfigError: The data cannot be read; or see `read_config`.
    """
    task = task_of(path)
    if base is not None:
        plain = dict(load_yaml(base))
        plain = {"space": plain, "task": task} if "stages" in plain else {**plain, "task": task}
        return read_config(plain, base, settings=settings)
    of_task = [setting for setting in settings if setting.strip().startswith("task.")]
    asked = apply_overrides({"task": task}, of_task)[0]["task"]
    made = by_name(asked)
    plain = _suited(made)
    plain["task"] = {**asked, **_as_it_was_read(made)}
    return read_config(plain, f"data {path}", settings=[s for s in settings if s not in of_task])


def _suited(task: Task) -> dict[str, Any]:
    """The embedded configuration for a task of this kind and size."""
    io = task.io
    own = _CONFIGS / f"{task.name}.yaml"  # of a task that has a space of its own
    general = "pictures.yaml" if io.kind == "image" else "series.yaml"
    plain: dict[str, Any] = load_yaml(own if own.is_file() else _CONFIGS / general)
    if general == "pictures.yaml" and not own.is_file():
        space = plain["space"]
        stride = stride_for(io.size)
        space["stem"] |= {"stride": stride, "kernel_size": min(_KERNELS.get(stride, stride - 1 + stride % 2), 15)}
        if any(extent // stride % 2 for extent in io.size):
            for stage in space["stages"][1:]:
                del stage["downsample"]  # an odd grid cannot be halved
    if io.padded:
        _without_what_cannot_be_told(plain["space"], io.kind)
    first, *_ = plain["objectives"]
    if task.metric != first:
        plain["objectives"] = {task.metric: task.direction, "latency_ms": "min", "params": "min"}
    return plain


def _without_what_cannot_be_told(space: dict[str, Any], kind: str) -> None:
    """Take the operators out that cannot pass over padding: the series have different lengths."""
    for stage in space["stages"]:
        for axis in ("mixer", "gate", "channel_mixer"):
            named = [(op if isinstance(op, str) else op["name"], op) for op in stage["block"][axis]]
            stage["block"][axis] = [op for name, op in named if registry.get(axis, name).serves_padded(kind)]


def _as_it_was_read(task: Task) -> dict[str, Any]:
    """Options that the data decided, written out: a run is of what was there when it was started."""
    options = inspect.signature(type(task)).parameters
    said = recorded(task)
    read = said.get("pictures") or said.get("reads") or {}
    return {name: read[name] for name in ("size", "channels") if name in read and name in options}


def stride_for(size: Sequence[int]) -> int:
    """The smallest stride of a stem that divides each extent and leaves at most 16 tokens of it, from an even grid if
    there is one.

    Raises:
        ConfigError: No stride up to 16 does.
    """
    fits = [s for s in range(1, 17) if all(extent % s == 0 and extent // s <= _MOST_TOKENS for extent in size)]
    even = [s for s in fits if all(extent // s % 2 == 0 for extent in size)]
    if not fits:
        shown = "x".join(map(str, size))
        raise ConfigError(
            f"size {shown}: no stride up to 16 divides it and leaves at most {_MOST_TOKENS}x{_MOST_TOKENS} tokens. "
            "Give another with --set task.size=..., a multiple of 8 up to 256, or a space of your own with -c."
        )
    return (even or fits)[0]
