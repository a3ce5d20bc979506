"""What all tasks on pictures by class have in common, wherever the pictures come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from mixnas.evaluators.tasks.augmenting import erased, jittered, mirrored, mixed
from mixnas.evaluators.tasks.decoding import decode_many
from mixnas.evaluators.tasks.digits import random_shift
from mixnas.evaluators.tasks.options import PictureOptions
from mixnas.evaluators.tasks.randaugment import rand_augmented
from mixnas.evaluators.tasks.task import SPLITS, Examples, Task
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.units import IOSpec

_COLOURS = {1: "grey", 3: "colour"}
_UNEVEN = 2.0  # so many times the rarest class the commonest may be before weights are spoken of


class Stored:
    """Pictures in memory, a byte a value.

    Args:
        pixels: (N, H, W, C) of all splits.
        targets: (N,).
        indices: Which of them are this split's.
    """

    def __init__(self, pixels: Tensor, targets: Tensor, indices: Tensor) -> None:
        self._pixels, self.targets = pixels[indices], targets[indices]

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`; pixels from 0 to 255."""
        return self._pixels[indices].float(), self.targets[indices]


class Decoded:
    """Pictures in files, decoded each time that they are asked for; some are kept decoded.

    Args:
        files: Of all splits.
        targets: (N,).
        indices: Which of them are this split's.
        size: (height, width).
        channels: 1 or 3.
        kept: (K, H, W, C) uint8, decoded pictures of all splits.
        rows: (N,) where in `kept` each picture is, -1 where it is not.
        workers: Processes that decode ahead of a training (see `evaluators.reading`).
    """

    def __init__(
        self,
        files: Sequence[Path],
        targets: Tensor,
        indices: Tensor,
        size: tuple[int, int],
        channels: int,
        kept: Tensor,
        rows: Tensor,
        workers: int = 0,
    ) -> None:
        self._files = [files[i] for i in indices.tolist()]
        self.targets, self._size, self._channels = targets[indices], size, channels
        self._kept, self._rows, self.workers = kept, rows[indices], workers

    def __len__(self) -> int:
        return len(self.targets)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`; pixels from 0 to 255."""
        pixels = torch.empty(len(indices), *self._size, self._channels)
        rows = self._rows[indices]
        there, missing = (rows >= 0).nonzero()[:, 0], (rows < 0).nonzero()[:, 0]
        pixels[there] = self._kept[rows[there]].float()
        files = [self._files[i] for i in indices[missing].tolist()]
        threads = 4 if get_worker_info() is None else 1  # as many processes as there are cores have no use for threads
        decoded = decode_many(files, self._size, self._channels, threads=threads)
        for at, picture in zip(missing.tolist(), decoded, strict=True):
            pixels[at] = torch.from_numpy(picture)
        return pixels, self.targets[indices]


def moments(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(2, C): sum and sum of squares of each channel of one picture or of several, (..., C)."""
    flat = pixels.reshape(-1, pixels.shape[-1])
    return np.stack([flat.sum(0, dtype=np.float64), np.square(flat, dtype=np.float64).sum(0)])


class PictureTask(Task):
    """A classification of pictures. Networks read raw pixels, 0 to 255, and standardise them themselves.

    Attributes:
        labels: The classes' names, in the order of the outputs.
        counts: Pictures of each class, by split.
    """

    def set_up(
        self,
        splits: Mapping[str, Examples],
        targets: Mapping[str, Tensor],
        labels: Sequence[str],
        size: tuple[int, int],
        sums: NDArray[np.float64],
        options: PictureOptions,
        about: Mapping[str, Any],
    ) -> None:
        """What a task's `__init__` ends with.

        Args:
            splits: By name.
            targets: Of each split, (n,).
            labels: Names of the classes.
            size: (height, width).
            sums: (2, C), `moments` of all training pictures.
            options: What the task was told.
            about: More for `record`.

        Raises:
            ConfigError: A class has no picture in one of the splits.
        """
        self.labels = tuple(labels)
        self.label_smoothing = options.label_smoothing
        self.train, self.validation, self.test = (splits[name] for name in SPLITS)
        counted = {name: np.bincount(targets[name].numpy(), minlength=len(labels)) for name in SPLITS}
        for name, counts in counted.items():
            if not counts.all():
                empty = self.labels[int(np.argmin(counts))]
                raise ConfigError(
                    f"task {self.name}: class {empty!r} has no picture in {name}. Each needs one at least."
                )
        self.counts = {name: counts.tolist() for name, counts in counted.items()}
        values = sum(self.counts["train"]) * size[0] * size[1]
        mean = sums[0] / values
        spread = np.sqrt(np.maximum(sums[1] / values - mean**2, 0.0))
        spread[spread < 0.5] = 1.0  # all of one colour: there is nothing to divide by
        kept = [[round(float(v), 4) for v in numbers] for numbers in (mean, spread)]
        self.io = IOSpec("image", size, len(mean), len(labels), mean=tuple(kept[0]), std=tuple(kept[1]))
        self._options, self._shift = options, max(1, min(size) // 8) if options.crop else 0
        self._weights = None
        if options.weighted:
            self._weights = weights_of(counted["train"])
        self._about = dict(about)

    # -- what is told -------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What a run writes down of its data: classes, how many pictures of each, what networks read, the split."""
        assert self.io.mean is not None and self.io.std is not None
        return {
            "task": self.name,
            "summary": self.summary(),
            "labels": list(self.labels),
            "counts": self.counts,
            "pictures": {
                "size": list(self.io.size),
                "channels": self.io.in_features,
                "mean": list(self.io.mean),
                "std": list(self.io.std),
            },
            **self._about,
        }

    def summary(self) -> str:
        """The data in one line or two."""
        of_each = np.sum([self.counts[name] for name in SPLITS], axis=0)
        cut = "/".join(str(sum(self.counts[name])) for name in SPLITS)
        size, colours = "x".join(map(str, self.io.size)), _COLOURS.get(self.io.in_features, "of several channels")
        low, high = int(of_each.min()), int(of_each.max())
        each = f"{low:,} of each" if low == high else f"{low:,} to {high:,} of each"
        text = (
            f"{int(of_each.sum()):,} pictures of {len(self.labels)} classes, {each}; {cut} for train/validation/test; "
            f"read as {size} {colours}"
        )
        if high > _UNEVEN * low:
            rare, common = self.labels[int(of_each.argmin())], self.labels[int(of_each.argmax())]
            text += f". Uneven: {rare!r} has {low:,}, {common!r} {high:,}"
            text += "; training is weighted" if self._weights is not None else "; weighted: true makes up for it"
        return text

    # -- training -----------------------------------------------------------------------------------------------------

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task`; weighted by class, where that is asked for; of shares of classes, where pictures are mixed."""
        if targets.ndim == 1:
            if self._weights is None:
                return super().training_loss(outputs, targets)
            weights = self._weights.to(outputs)
            return F.cross_entropy(outputs, targets, weight=weights, label_smoothing=self.label_smoothing)
        smoothing = self.label_smoothing
        shares = targets.to(outputs)
        smoothed = shares * (1 - smoothing) + smoothing / outputs.shape[-1]
        losses = -smoothed * outputs.log_softmax(-1)
        if self._weights is None:
            return losses.sum() / len(outputs)
        weights = self._weights.to(outputs)
        return (losses * weights).sum() / (shares * weights).sum()

    def distillation(self, outputs: Tensor, teacher: Tensor, targets: Tensor) -> Tensor | None:
        """See `Task`; of mixed pictures too."""
        labelled = targets if targets.ndim == 1 else targets.argmax(-1)  # all are: which class is of no concern
        return super().distillation(outputs, teacher, labelled)

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What the options say, in their order; what comes in or is erased has the mean colour."""
        assert self.io.mean is not None
        options, fill = self._options, sum(self.io.mean) / len(self.io.mean)
        if options.flip:
            inputs = mirrored(inputs, generator)
        if self._shift:
            inputs = random_shift(inputs, self._shift, fill, generator)
        if options.jitter:
            inputs = jittered(inputs, options.jitter, generator)
        if options.randaugment:
            inputs = rand_augmented(inputs, options.randaugment, options.magnitude, fill, generator)
        if options.erase:
            inputs = erased(inputs, options.erase, fill, generator)
        if options.mixup or options.cutmix:
            return mixed(inputs, targets, self.io.num_outputs, options.mixup, options.cutmix, generator)
        return inputs, targets


def weights_of(counts: NDArray[np.integer]) -> Tensor:
    """(K,) float32: how much an example of each class counts, all examples together as many as there are."""
    return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32)


# -- splits --------------------------------------------------------------------------------------------------------


def cut(
    labels: NDArray[np.integer],
    shares: Mapping[str, float],
    seed: int,
    names: Sequence[str],
    where: str,
    examples: str = "pictures",
) -> dict[str, NDArray[np.intp]]:
    """Sorted indices of disjoint splits that together hold everything: each class in the given shares, at least one.

    Args:
        labels: (N,).
        shares: By split, the first taking what the others leave.
        seed: Of the order; RandomState's stream is frozen by NumPy's compatibility policy.
        names: Of the classes, for messages.
        where: The data, for messages.
        examples: What they call what is cut.

    Raises:
        ConfigError: A class has fewer examples than there are splits.
    """
    rng = np.random.RandomState(seed)
    parts: dict[str, list[NDArray[np.intp]]] = {split: [] for split in shares}
    first, *others = shares
    for label, name in enumerate(names):
        indices = rng.permutation(np.flatnonzero(labels == label))
        if len(indices) < len(shares):
            of, out = (f"class {name!r}", ", or take the class out") if len(names) > 1 else ("it", "")
            raise ConfigError(
                f"{where}: {of} has {len(indices)} of {len(shares)} {examples} that it needs at least, one for "
                f"each of {', '.join(shares)}. Give more{out}."
            )
        counts = [max(1, round(shares[split] * len(indices))) for split in others]
        while sum(counts) >= len(indices):  # at least one is left to the first
            counts[int(np.argmax(counts))] -= 1
        for split, chunk in zip([*others, first], np.split(indices, np.cumsum(counts)), strict=True):
            parts[split].append(chunk)
    return {split: np.sort(np.concatenate(chunks)) for split, chunks in parts.items()}


def digest_of_arrays(*arrays: NDArray[Any]) -> str:
    """SHA-256 of arrays, their types and shapes: what tells a run that its data has changed."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype} {array.shape};".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()
