"""Tasks on pictures that are arrays already: what CIFAR, IDX and .npz have in common."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixnas.evaluators.tasks.options import PictureOptions
from mixnas.evaluators.tasks.pictures import (
    PictureTask,
    Stored,
    cut,
    digest_of_arrays,
    moments,
)
from mixnas.evaluators.tasks.task import SPLITS
from mixnas.search_space.errors import ConfigError, visible

_AT_ONCE = 4096  # pictures whose moments are summed at a time
_CLASSES = 10_000


class ArrayPictures(PictureTask):
    """A classification of pictures in memory; sub-classes read them."""

    def hold(
        self,
        where: str,
        found: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
        labels: Sequence[str] | None = None,
        *,
        options: PictureOptions,
    ) -> None:
        """What the `__init__` of a sub-class ends with.

        Args:
            where: The data, for messages.
            found: Pixels (n, H, W) or (n, H, W, C) and labels (n,) by split; "train" and those that the data has.
            labels: Names of the classes, of labels that are their numbers; the labels themselves if not given.
            options: What the task was told.

        Raises:
            ConfigError: Shapes, types or labels do not fit together, a value is not finite, a class is too small.
        """
        options.check(where)
        pixels = {name: _pixels(f"{where}: {name}", array) for name, (array, _) in found.items()}
        shapes = {array.shape[1:] for array in pixels.values()}
        types = {array.dtype for array in pixels.values()}
        if len(shapes) > 1 or len(types) > 1:
            raise ConfigError(
                f"{where}: pictures of its splits have different shapes or types: {sorted(map(str, shapes))}."
            )
        classes, targets = class_numbers(where, {name: of for name, (_, of) in found.items()}, labels)
        for name, array in pixels.items():
            if len(array) != len(targets[name]):
                raise ConfigError(f"{where}: {name} has {len(array)} pictures and {len(targets[name])} labels.")
        shares = {"validation": options.validation, "test": options.test}
        asked = {"train": 1.0, **{name: share for name, share in shares.items() if name not in found}}
        parts = cut(targets["train"], asked, options.seed, classes, where)
        tensors = {name: torch.from_numpy(array) for name, array in pixels.items()}
        answers = {name: torch.from_numpy(of) for name, of in targets.items()}
        splits, of_splits = {}, {}
        for name in SPLITS:
            pool = "train" if name in parts else name
            chosen = torch.from_numpy(parts[name] if name in parts else np.arange(len(targets[name])))
            splits[name] = Stored(tensors[pool], answers[pool], chosen)
            of_splits[name] = splits[name].targets
        size, channels = next(iter(shapes))[:2], next(iter(shapes))[2]
        train = pixels["train"]
        if options.randaugment and train.dtype != np.uint8:
            raise ConfigError(
                f"{where}: randaugment is of pixels from 0 to 255, and these are {train.dtype}. Leave it."
            )
        sums = np.zeros((2, channels))
        for start in range(0, len(parts["train"]), _AT_ONCE):
            sums += moments(train[parts["train"][start : start + _AT_ONCE]])
        arrays = [array for name in found for array in (pixels[name], targets[name])]
        self.set_up(
            splits,
            of_splits,
            classes,
            (int(size[0]), int(size[1])),
            sums,
            options,
            about={
                "sha256": digest_of_arrays(*arrays),
                "split": {name: parts[name].tolist() if name in parts else "its own" for name in SPLITS},
                **({} if train.dtype == np.uint8 else {"pictures": None}),  # numbers of some other scale
            },
        )


def check_file(path: Path) -> None:
    """Refuse what is no file: a pipe, on which a read might wait for ever, a device.

    Raises:
        ConfigError: It is none, or is not there.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise ConfigError(f"{visible(str(path))[:200]}: cannot be read: {error}.") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{visible(str(path))}: is no file.")


def _pixels(where: str, array: NDArray[Any]) -> NDArray[Any]:
    """(n, H, W, C), bytes or float32."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or 0 in array.shape:
        raise ConfigError(f"{where}: pictures have shape {array.shape}; it must be (n, height, width, channels).")
    _check_order(where, array.shape)
    if array.dtype == np.uint8:
        return np.require(array, requirements=["C", "W"])  # torch takes what can be written to
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"{where}: pictures are {array.dtype}; they must be numbers, best bytes (uint8).")
    array = as_float32(f"{where}: pictures", array)
    if not np.isfinite(array).all():
        first = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ConfigError(f"{where}: pictures hold NaN or infinity, picture {first} first.")
    return array


def as_float32(where: str, array: NDArray[Any]) -> NDArray[np.float32]:
    """Numbers as networks read them; NaN and infinity stay.

    Raises:
        ConfigError: A finite number is larger than a float32 holds.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        found = array.astype(np.float32)
    large = np.isinf(found) & np.isfinite(array)
    if large.any():
        raise ConfigError(
            f"{where} hold {array[large][0]:.4g}, too large for a float32 (at most {np.finfo(np.float32).max:.2g}), "
            f"example {int(np.argwhere(large)[0][0])} first. Give them in a larger unit."
        )
    return found


def _check_order(where: str, shape: Sequence[int]) -> None:
    """Refuse pictures whose channels come first, as torch has them: they would be a few rows of many channels."""
    _, first, *rest = shape
    if first in (1, 3, 4) and min(rest) > 4:
        raise ConfigError(
            f"{where}: pictures have shape {tuple(shape)}, with channels first, it seems; it must be (n, height, "
            "width, channels). Save x.transpose(0, 2, 3, 1)."
        )


def class_numbers(
    where: str, given: Mapping[str, NDArray[Any]], names: Sequence[str] | None, example: str = "picture"
) -> tuple[tuple[str, ...], dict[str, NDArray[np.int64]]]:
    """Names of the classes, and the class of each example by split; `example` is what messages call one."""
    flat = {}
    for split, array in given.items():
        of = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
        if of.ndim != 1 or of.dtype.kind not in "iubUS":
            raise ConfigError(
                f"{where}: labels of {split} have shape {array.shape} and type {array.dtype}; "
                f"a whole number or a word for each {example}."
            )
        if of.dtype.kind == "u" and len(of) and int(of.max()) >= 1 << 63:
            raise ConfigError(
                f"{where}: labels of {split} go up to {int(of.max())}; whole numbers must be below 2^63. Number the "
                "classes from 0, or give words."
            )
        flat[split] = of.astype(np.int64) if of.dtype.kind in "iub" else of.astype(np.str_)
    together = np.concatenate(list(flat.values()))
    values, numbers = np.unique(together, return_inverse=True)
    if names is not None:
        if together.dtype.kind != "i" or values[0] < 0 or values[-1] >= len(names):
            raise ConfigError(
                f"{where}: labels range from {values[0]} to {values[-1]}; there are {len(names)} classes."
            )
        values, numbers = np.array(names), together
    if len(values) < 2:
        same = f"all labels are {visible(str(values[0]))[:50]!r}" if len(values) else "there are no labels"
        raise ConfigError(f"{where}: {same}; there is nothing to tell apart. Give examples of two classes at least.")
    if len(values) > _CLASSES:
        raise ConfigError(f"{where}: labels have {len(values):,} different values, a class each; at most {_CLASSES:,}.")
    cuts = np.cumsum([len(of) for of in flat.values()])[:-1]
    by_split = dict(zip(flat, np.split(numbers.astype(np.int64), cuts), strict=True))
    return tuple(map(str, values)), by_split
