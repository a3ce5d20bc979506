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
    if array.dtype == np.uint8:
        return np.require(array, requirements=["C", "W"])  # torch takes what can be written to
    if array.dtype.kind not in "iuf":
        raise ConfigError(f"{where}: pictures are {array.dtype}; they must be numbers, best bytes (uint8).")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        first = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ConfigError(f"{where}: pictures hold NaN or infinity, picture {first} first.")
    return array


def class_numbers(
    where: str, given: Mapping[str, NDArray[Any]], names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, NDArray[np.int64]]]:
    """Names of the classes, and the class of each picture by split."""
    flat = {}
    for split, array in given.items():
        of = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
        if of.ndim != 1 or of.dtype.kind not in "iubUS":
            raise ConfigError(
                f"{where}: labels of {split} have shape {array.shape} and type {array.dtype}; "
                "a whole number or a word for each picture."
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
    if not 2 <= len(values) <= _CLASSES:
        raise ConfigError(f"{where}: labels have {len(values)} different values; a class each, from 2 to {_CLASSES:,}.")
    cuts = np.cumsum([len(of) for of in flat.values()])[:-1]
    by_split = dict(zip(flat, np.split(numbers.astype(np.int64), cuts), strict=True))
    return tuple(map(str, values)), by_split
