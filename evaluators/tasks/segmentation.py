"""Semantic segmentation: a class for each pixel, of pairs of picture and mask, or of shapes that are drawn here.

Source: Long et al. 2015, "Fully Convolutional Networks for Semantic Segmentation" (arXiv 1411.4038): the metric, mean
intersection over union, is that of its section 5.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mixnas.evaluators.tasks.dealing import dealt
from mixnas.evaluators.tasks.decoding import SUFFIXES, decode_many, decode_mask, header, upright_size
from mixnas.evaluators.tasks.digits import random_shift
from mixnas.evaluators.tasks.folder import SPLIT_FOLDERS, checked_size, suited
from mixnas.evaluators.tasks.options import check_flags, check_memory, check_share, check_shares, check_whole
from mixnas.evaluators.tasks.pictures import digest_of_arrays, moments, weights_of
from mixnas.evaluators.tasks.task import IGNORE, SPLITS, Accumulator, Task
from mixnas.search_space.errors import ConfigError, listed, visible
from mixnas.search_space.units import IOSpec

UNLABELLED = 255
"""Of a mask: nothing is asked here."""

SHAPES = ("background", "disc", "square", "cross")
"""What is drawn where no folder is given."""

_MASKS = (".png", ".bmp", ".gif", ".tif", ".tiff", ".pgm")  # without loss
_DRAWN = {"train": 800, "validation": 200, "test": 400}
_MOST_CLASSES = 255
_HEADS = ("sub_pixel", "lr_aspp", "offset_learning")


class Pairs:
    """Pictures and masks in memory, a byte a value.

    Args:
        pixels: (N, H, W, C) uint8.
        masks: (N, H, W) uint8; `UNLABELLED` where nothing is asked.
    """

    def __init__(self, pixels: Tensor, masks: Tensor) -> None:
        self._pixels, self._masks = pixels, masks

    def __len__(self) -> int:
        return len(self._pixels)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`; pixels from 0 to 255, (n, H, W, C), and classes, (n, H, W)."""
        masks = self._masks[indices].long()
        return self._pixels[indices].float(), masks.masked_fill_(masks == UNLABELLED, IGNORE)


class _MeanIou:
    """Mean over classes of intersection over union, of the classes that stand in targets or answers."""

    def __init__(self, classes: int) -> None:
        self._confused = torch.zeros(classes, classes, dtype=torch.int64)  # by target and answer

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch in."""
        classes = len(self._confused)
        asked = targets != IGNORE
        pairs = targets[asked] * classes + outputs.argmax(-1)[asked]
        self._confused += torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()

    def result(self) -> float:
        """Of all pixels together."""
        both = self._confused.diagonal().double()
        either = self._confused.sum(0) + self._confused.sum(1) - self._confused.diagonal()
        there = either > 0
        return float((both[there] / either[there]).mean())


class Segmentation(Task):
    """A class for each pixel. Networks read raw pixels, 0 to 255, and standardise them themselves.

    A folder holds `images` and `masks`, or `train`, `val` and `test` with those two in each; a mask has the name of its
    picture, its extents, and the number of a class at each pixel (grey or palette), 255 where nothing is known. What of
    `val` and `test` is missing is dealt from the rest by the hash of the names. Pictures and masks are cut and brought
    to `size` alike, masks without mixing neighbours.

    Args:
        path: The folder; by default shapes of any colour are drawn on noise (`SHAPES`).
        labels: Names of the classes by number; by default their numbers.
        size: Extent of what networks read, one number or [height, width]; by default as of `folder`, 32 for drawn ones.
        stride: How many pixels of each extent a token of the last stage has, which the head makes up for.
        head: "sub_pixel", a convolution (`token` where stride is 1); "lr_aspp", light and over two scales; or
            "offset_learning", classes attend to tokens and tokens to classes, of stride 1.
        channels: 1 or 3.
        weighted: Whether a class counts the more in training the fewer pixels it has.
        flip: Whether training pictures are mirrored left to right.
        crop: Whether they are shifted, by up to an eighth of their extent.
        validation, test: Shares that are dealt, where the folder does not say.
        seed: Of that, and of what is drawn.
        label_smoothing: See `Task`.
        memory_gib: What pictures and masks may take.

    Raises:
        ConfigError: A picture has no mask or one of another size, a mask holds a number that is no class or colours, a
            class has no pixel in a split. It names the file or the class.
    """

    name, metric, direction = "segmentation", "mean_iou", "max"

    def __init__(
        self,
        *,
        path: str | None = None,
        labels: Sequence[str] | None = None,
        size: int | Sequence[int] | None = None,
        stride: int = 2,
        head: Literal["sub_pixel", "lr_aspp", "offset_learning"] = "sub_pixel",
        channels: int = 3,
        weighted: bool = False,
        flip: bool = True,
        crop: bool = True,
        validation: float = 0.2,
        test: float = 0.2,
        seed: int = 0,
        label_smoothing: float = 0.0,
        memory_gib: float = 2.0,
    ) -> None:
        where = f"task {self.name}"
        extents = checked_size(where, size)
        check_whole(where, low=1, high=16, stride=stride)
        if head not in _HEADS:
            raise ConfigError(f"{where}: head is {head!r}. Allowed: {', '.join(_HEADS)}.")
        if channels not in (1, 3) or isinstance(channels, bool):
            raise ConfigError(f"{where}: channels is {channels!r}. Allowed: 1, 3.")
        check_flags(where, weighted=weighted, flip=flip, crop=crop)
        if head == "offset_learning" and stride > 1:
            raise ConfigError(
                f"{where}: stride is {stride}. The head offset_learning answers each token: set stride to 1."
            )
        check_shares(where, validation, test, seed)
        check_share(where, label_smoothing=label_smoothing)
        check_memory(where, memory_gib)
        names = _checked_labels(where, labels)
        self.label_smoothing = label_smoothing
        if path is None:
            found = {
                name: drawn(count, extents or (32, 32), channels, [seed, at])
                for at, (name, count) in enumerate(_DRAWN.items())
            }
            names, read = SHAPES, {name: [f"{count} drawn"] for name, count in _DRAWN.items()}
        else:
            pairs, read = _paired(path, validation, test, seed)
            extents = extents or (suited(_median_extent(pairs)),) * 2
            _check_room(where, pairs, extents, channels, memory_gib)
            found = {name: _decoded(pairs[name], extents, channels, names) for name in SPLITS}
            if names is None:
                _check_numbers(found, pairs)
        self._set_up(found, names, stride, head, weighted)
        self._flip, self._shift = flip, max(1, min(self.io.size) // 8) if crop else 0
        height, width = self.io.size
        self._about = {
            "reads": {"size": [height, width], "channels": channels},
            "sha256": digest_of_arrays(*(array for name in SPLITS for array in found[name])),
            "split": read,
        }

    def _set_up(
        self,
        found: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]],
        names: tuple[str, ...] | None,
        stride: int,
        head: str,
        weighted: bool,
    ) -> None:
        counted = {name: np.bincount(masks.ravel(), minlength=256)[:UNLABELLED] for name, (_, masks) in found.items()}
        count = len(names) if names else int(max(np.flatnonzero(of).max(initial=0) for of in counted.values())) + 1
        unknown = any(bool((masks == UNLABELLED).any()) for _, masks in found.values())
        hint = f" Masks hold {UNLABELLED}, which means unknown: write 1 for the second class." if unknown else ""
        if count < 2:
            raise ConfigError(
                f"task {self.name}: all labelled pixels are of one class; there is nothing to tell apart."
                f"{hint or ' Number the classes from 0 at each pixel.'}"
            )
        self.labels = names or tuple(map(str, range(count)))
        for split, of in counted.items():
            if not of[:count].all():
                empty = self.labels[int(np.argmin(of[:count]))]
                gap = not any(each[int(np.argmin(of[:count]))] for each in counted.values())
                what = "number the classes without gaps" if gap else "deal them otherwise with seed"
                raise ConfigError(
                    f"task {self.name}: class {empty!r} has no pixel in {split}. Give more pictures of it, or {what}."
                    f"{hint if gap and count == 2 else ''}"
                )
        pixels, _ = found["train"]
        height, width, channels = pixels.shape[1:]
        if height % stride or width % stride:
            raise ConfigError(f"task {self.name}: stride is {stride}, which does not divide {height}x{width}.")
        first, second = np.sum([moments(one) for one in pixels], axis=0) / (len(pixels) * height * width)
        spread = np.sqrt(np.maximum(second - first**2, 0.25))
        ends_in = "token" if stride == 1 and head == "sub_pixel" else head
        self.io = IOSpec(
            "image", (height, width), channels, count,
            head=ends_in, head_knobs=(("scale", stride),) if ends_in in ("sub_pixel", "lr_aspp") else (),
            out_size=(height, width),
            mean=tuple(round(float(v), 4) for v in first), std=tuple(round(float(v), 4) for v in spread),
        )  # fmt: skip
        train = counted["train"][:count]
        self._weights = weights_of(train) if weighted else None
        splits = {name: Pairs(*map(torch.from_numpy, arrays)) for name, arrays in found.items()}
        self.train, self.validation, self.test = (splits[name] for name in SPLITS)
        self.shares = dict(zip(self.labels, (train / train.sum()).tolist(), strict=True))

    # -- what is told -------------------------------------------------------------------------------------------------

    def record(self) -> Mapping[str, Any]:
        """See `Task`."""
        cut = "/".join(f"{len(getattr(self, name)):,}" for name in SPLITS)
        each = ", ".join(f"{name} {share:.1%}" for name, share in list(self.shares.items())[:8])
        summary = f"{cut} pictures with masks for train/validation/test; of the training pixels {each}"
        summary += "; training is weighted" if self._weights is not None else ""
        return {
            "task": self.name,
            "summary": summary,
            "labels": list(self.labels),
            "pixel_shares": {name: round(share, 6) for name, share in self.shares.items()},
            **self._about,
        }

    # -- training -----------------------------------------------------------------------------------------------------

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task`; a mean that is weighted by class, where that is asked for."""
        if self._weights is None:
            return super().training_loss(outputs, targets)
        weights = self._weights.to(outputs)
        summed = F.cross_entropy(
            outputs.flatten(0, -2),
            targets.flatten(),
            weight=weights,
            ignore_index=IGNORE,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        total = (weights[targets.clamp(min=0)] * (targets != IGNORE)).sum()
        return summed / total.clamp(min=torch.finfo(total.dtype).tiny)  # nothing labelled: 0

    def new_metric(self) -> Accumulator:
        """Mean intersection over union, of all pixels of a split together."""
        return _MeanIou(self.io.num_outputs)

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mirror half of the pictures, and shift each; masks move along, and nothing is asked of what comes in."""
        # One picture whose last channel is the mask, both moved to where 0 is what comes in.
        mean = torch.tensor(self.io.mean, device=inputs.device)
        joint = torch.cat([inputs - mean, (targets - IGNORE).to(inputs)[..., None]], dim=-1)
        if self._flip:
            drawn = torch.rand(len(joint), generator=generator, device=joint.device) < 0.5
            joint = torch.where(drawn[:, None, None, None], joint.flip(2), joint)
        if self._shift:
            joint = random_shift(joint, self._shift, 0.0, generator)
        return joint[..., :-1] + mean, joint[..., -1].long() + IGNORE


# -- pairs in a folder --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture and its mask."""

    picture: Path
    mask: Path


def _checked_labels(where: str, labels: object) -> tuple[str, ...] | None:
    if labels is None:
        return None
    if not isinstance(labels, list | tuple) or not 2 <= len(labels) <= _MOST_CLASSES:
        raise ConfigError(f"{where}: labels is {labels!r}, it must be a list of from 2 to {_MOST_CLASSES} names.")
    if len(set(map(str, labels))) < len(labels):
        raise ConfigError(f"{where}: labels names a class twice: {labels!r}.")
    return tuple(map(str, labels))


def _paired(path: str, validation: float, test: float, seed: int) -> tuple[dict[str, list[Pair]], dict[str, list[str]]]:
    """Pairs by split, and their names below the folder."""
    root = Path(path)
    if not root.is_dir():
        raise ConfigError(f"{visible(path)}: is no folder. Give one with images/ and masks/ in it.")
    own = {
        SPLIT_FOLDERS[entry.name.lower()]: entry
        for entry in sorted(root.iterdir())
        if entry.is_dir() and entry.name.lower() in SPLIT_FOLDERS
    }
    if "train" in own:
        found = {split: _pairs_in(folder, root) for split, folder in own.items()}
    else:
        found = {"train": _pairs_in(root, root)}
    missing = [name for name in SPLITS if name not in found]
    if missing:
        shares = {"validation": validation, "test": test}
        cut = dealt(found["train"], shares["validation"], shares["test"], seed, visible(path))
        pool = found["train"]
        found |= {name: {key: pool[key] for key in cut[name]} for name in missing}
        kept = set(pool).difference(*(cut[name] for name in missing))
        found["train"] = {key: pool[key] for key in sorted(kept)}
    return (
        {name: [found[name][key] for key in sorted(found[name])] for name in SPLITS},
        {name: sorted(found[name]) for name in SPLITS},
    )


def _pairs_in(folder: Path, root: Path) -> dict[str, Pair]:
    """Pairs by the picture's path below the root, without its ending."""
    inside = root.resolve()
    files: dict[str, dict[str, Path]] = {}
    for what, suffixes in (("images", SUFFIXES), ("masks", _MASKS)):
        place = next((entry for entry in folder.iterdir() if entry.name.lower() == what), None)
        if place is None or not place.is_dir():
            raise ConfigError(
                f"{visible(str(folder))}: has no folder {what!r}. Put pictures and masks into two folders."
            )
        files[what] = {}
        for entry in sorted(place.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.suffix.lower() not in suffixes or entry.is_dir():
                raise ConfigError(
                    f"{visible(str(entry))}: cannot be one of the {what} ({', '.join(suffixes)}"
                    f"{'; JPEG would mix the numbers of classes' if what == 'masks' else ''}). Take it out."
                )
            if not Path(os.path.realpath(entry)).is_relative_to(inside):
                raise ConfigError(f"{visible(str(entry))}: is a link that leads out of the folder. Put the file there.")
            if files[what].setdefault(entry.stem, entry) != entry:
                raise ConfigError(f"{visible(str(entry))}: another of the {what} has that name. Keep one of them.")
    pictures, masks = files["images"], files["masks"]
    for name, entry in pictures.items():
        if name not in masks:
            raise ConfigError(f"{visible(str(entry))}: has no mask, a file {visible(name)}.png in masks/.")
    for name, entry in masks.items():
        if name not in pictures:
            raise ConfigError(f"{visible(str(entry))}: is the mask of no picture in images/. Take it out.")
    if not pictures:
        raise ConfigError(f"{visible(str(folder))}: has no pictures in images/.")
    below = folder.relative_to(root)
    return {(below / name).as_posix(): Pair(pictures[name], masks[name]) for name in pictures}


def _median_extent(pairs: Mapping[str, Sequence[Pair]]) -> int:
    """Of the pictures' shorter extents; every header is looked at, and compared with its mask's."""
    shorter = []
    for pair in (pair for of in pairs.values() for pair in of):
        header(pair.picture), header(pair.mask)
        size, of_mask = upright_size(pair.picture), upright_size(pair.mask)
        if size != of_mask:
            a, b = ("x".join(map(str, extents)) for extents in (of_mask, size))
            raise ConfigError(
                f"{visible(str(pair.mask))}: has {a} pixels, and its picture {b}. Give a mask of the picture's size."
            )
        shorter.append(min(size))
    return int(np.median(shorter))


def _check_room(
    where: str, pairs: Mapping[str, Sequence[Pair]], size: tuple[int, int], channels: int, memory_gib: float
) -> None:
    needed = sum(map(len, pairs.values())) * size[0] * size[1] * (channels + 1)
    if needed > memory_gib * 2**30:
        raise ConfigError(
            f"{where}: pictures and masks take {needed / 2**30:.1f} GiB at {size[0]}x{size[1]}, and memory_gib allows "
            f"{memory_gib:g}. Raise that, or lower size."
        )


def _decoded(
    pairs: Sequence[Pair], size: tuple[int, int], channels: int, names: tuple[str, ...] | None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures (n, H, W, C) and masks (n, H, W)."""
    _median_extent({"": pairs})  # each mask has its picture's size
    pixels = np.stack(list(decode_many([pair.picture for pair in pairs], size, channels)))
    masks = np.stack([decode_mask(pair.mask, size) for pair in pairs])
    allowed = len(names) if names else _MOST_CLASSES
    for pair, mask in zip(pairs, masks, strict=True):
        labelled = mask[mask != UNLABELLED]
        if labelled.size and int(labelled.max()) >= allowed:
            raise ConfigError(
                f"{visible(str(pair.mask))}: holds the number {int(labelled.max())}, and the classes are 0 to "
                f"{allowed - 1} ({listed(names or ())}); {UNLABELLED} where nothing is known."
            )
    return pixels, masks


def _check_numbers(
    found: Mapping[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]], pairs: Mapping[str, Sequence[Pair]]
) -> None:
    """Refuse a number behind a gap: without names of classes it is more likely a slip than one class more."""
    there = np.zeros(256, dtype=bool)
    for _, masks in found.values():
        there[np.unique(masks)] = True
    there[UNLABELLED] = False
    numbers = np.flatnonzero(there)
    gaps = np.flatnonzero(~there[: int(numbers[-1]) + 1]) if len(numbers) else numbers
    if not len(gaps):
        return
    odd = int(numbers[numbers > gaps[0]][0])
    pair = next(
        pair for name, (_, masks) in found.items() for pair, mask in zip(pairs[name], masks, strict=True) if odd in mask
    )
    known = f"0 to {gaps[0] - 1}" if gaps[0] else "not 0"
    raise ConfigError(
        f"{visible(str(pair.mask))}: holds the number {odd}, and no mask holds {gaps[0]}: the classes so far are "
        f"{known}. Number them from 0 without gaps, write {UNLABELLED} where nothing is known, or say "
        "task.labels."
    )


# -- shapes that are drawn ----------------------------------------------------------------------------------------


def drawn(
    count: int, size: tuple[int, int], channels: int, seed: Sequence[int]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures (n, H, W, C) of one to three shapes of any colour on noise, later ones in front, and masks (n, H, W)."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    extent = min(size)
    pixels = np.empty((count, height, width, channels), dtype=np.uint8)
    masks = np.zeros((count, height, width), dtype=np.uint8)
    for picture, mask in zip(pixels, masks, strict=True):
        colours = rng.uniform(30, 110, channels) + rng.normal(0, 14, (height, width, channels))
        for _ in range(rng.integers(1, 4)):
            kind, radius = int(rng.integers(1, len(SHAPES))), rng.uniform(0.16, 0.3) * extent
            down, across = y - rng.uniform(0.15, 0.85) * height, x - rng.uniform(0.15, 0.85) * width
            far, near = np.maximum(abs(down), abs(across)), np.minimum(abs(down), abs(across))
            inside = {
                "disc": np.hypot(down, across) <= radius,
                "square": far <= radius * 0.88,
                "cross": (far <= radius) & (near <= radius / 3),
            }[SHAPES[kind]]
            colours[inside] = rng.uniform(130, 240, channels) + rng.normal(0, 14, (int(inside.sum()), channels))
            mask[inside] = kind
        picture[:] = np.clip(colours, 0, 255)
    return pixels, masks
