"""Single-image super-resolution: a photograph two, three or four times as fine as it was given.

The protocol is that of the field: luma of ITU-R BT.601 alone, made small by bicubic interpolation with antialiasing and
rounded to bytes; the peak signal-to-noise ratio of what networks make of it, beside that of bicubic interpolation.

Source: Shi et al. 2016, "Real-Time Single Image and Video Super-Resolution Using an Efficient Sub-Pixel Convolutional
Neural Network" (arXiv 1609.05158), sections 3 and 4; the residual is that of Kim et al. 2016, VDSR (arXiv 1511.04587),
section 3.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mixnas.evaluators.tasks.dealing import dealt
from mixnas.evaluators.tasks.decoding import SUFFIXES, decode_whole, header
from mixnas.evaluators.tasks.options import check_flags, check_memory, check_shares, check_whole
from mixnas.evaluators.tasks.task import SPLITS, Accumulator, Task
from mixnas.search_space.errors import ConfigError, listed, visible
from mixnas.search_space.units import IOSpec

SCALES = (2, 3, 4)
_PEAK = 255.0
_FLOOR = 1e-8  # of a mean squared error in luma: no error at all is 128 dB
_BICUBIC = Image.Resampling.BICUBIC


@dataclass(frozen=True, slots=True, eq=False)
class Luma:
    """One photograph, as it is learned from.

    Attributes:
        low: (h, w) bytes, what a network reads.
        high: (h * scale, w * scale) float32, what it was; 16 to 235.
        bicubic: The same shape: `low`, enlarged by bicubic interpolation.
    """

    low: NDArray[np.uint8]
    high: NDArray[np.float32]
    bicubic: NDArray[np.float32]


def luma(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(H, W) from 16 to 235 of (H, W, 3) pixels. Source: ITU-R BT.601-7, section 2.5, in 8 bits."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return (16 + pixels.astype(np.float64) @ weights).astype(np.float32)


def reduced(high: NDArray[np.float32], scale: int) -> Luma:
    """A photograph and its small version; rows and columns that `scale` does not divide are cut off."""
    height, width = (extent // scale for extent in high.shape)
    high = np.ascontiguousarray(high[: height * scale, : width * scale])
    small = np.asarray(Image.fromarray(high).resize((width, height), _BICUBIC))
    low = np.clip(np.rint(small), 0, 255).astype(np.uint8)
    large = Image.fromarray(low.astype(np.float32)).resize((width * scale, height * scale), _BICUBIC)
    return Luma(low, high, np.clip(np.asarray(large), 0, 255))


class Patches:
    """Square patches of photographs. Each pixel of the rectangle that they tile is scored once, or wherever it stands.

    Args:
        pictures: By number.
        places: (N, 3): which picture, and the patch's first row and column there.
        scored: (N, 4): first and last row, first and last column of the patch that count, the last ones not included.
        patch: Extent.
        scale: How much finer the targets are.
        answer: (mean, std, residual): the targets are (target - mean) / std, of what bicubic interpolation lacks where
            `residual`, else of luma.
    """

    def __init__(
        self,
        pictures: Sequence[Luma],
        places: NDArray[np.int64],
        scored: NDArray[np.int64],
        patch: int,
        scale: int,
        answer: tuple[float, float, bool],
    ) -> None:
        self._pictures, self._places, self._scored = pictures, places, scored
        self._patch, self._scale, self._answer = patch, scale, answer

    def __len__(self) -> int:
        return len(self._places)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Luma (n, p, p, 1) from 0 to 255; (n, p * scale, p * scale, 2): what is wanted, and 1 where it is scored."""
        p, s = self._patch, self._scale
        mean, std, residual = self._answer
        inputs = np.empty((len(indices), p, p, 1), dtype=np.float32)
        targets = np.zeros((len(indices), p * s, p * s, 2), dtype=np.float32)
        for at, index in enumerate(indices.tolist()):
            which, row, column = self._places[index]
            picture = self._pictures[which]
            inputs[at, ..., 0] = picture.low[row : row + p, column : column + p]
            top, bottom, left, right = self._scored[index] * s
            rows, columns = slice(row * s + top, row * s + bottom), slice(column * s + left, column * s + right)
            own = picture.high[rows, columns]
            own = own - picture.bicubic[rows, columns] if residual else own
            targets[at, top:bottom, left:right, 0] = (own - mean) / std
            targets[at, top:bottom, left:right, 1] = 1
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def bicubic_error(self) -> float:
        """Mean squared error of bicubic interpolation over what is scored, in luma."""
        total, count = 0.0, 0
        for (which, row, column), scored in zip(self._places, self._scored, strict=True):
            picture, (top, bottom, left, right) = self._pictures[which], scored * self._scale
            row, column = row * self._scale, column * self._scale
            part = slice(row + top, row + bottom), slice(column + left, column + right)
            error = picture.high[part].astype(np.float64) - picture.bicubic[part]
            total, count = total + float(np.square(error).sum()), count + error.size
        return total / count


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error of luma, whose peak is 255."""
    return 10 * math.log10(_PEAK**2 / max(squared_error, _FLOOR))


class _Psnr:
    def __init__(self, std: float) -> None:
        self._std, self._total, self._count = std, 0.0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take a batch in."""
        error, scored = _errors(outputs, targets)
        self._total += float(error.double().square().sum()) * self._std**2
        self._count += int(scored)

    def result(self) -> float:
        """Of all pixels together."""
        return psnr(self._total / self._count) if self._count else math.nan


def _errors(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Differences, 0 where nothing is scored, and how many pixels are."""
    wanted, scored = targets[..., :1], targets[..., 1:]
    return (outputs - wanted) * scored, scored.sum()


class SuperResolution(Task):
    """Luma of photographs, `scale` times as fine; networks end in the head `sub_pixel`.

    A network reads patches, raw luma from 0 to 255, and answers on the finer grid with what bicubic interpolation lacks
    (or with the luma itself), as (answer - mean) / std; `load.py` of an export gives it in luma. The photographs of
    validation and test are tiled by patches that overlap, and of each tile its middle is scored: the figure is that of
    whole photographs for all networks that look no further than `rim` pixels.

    Args:
        path: A folder of pictures, or scikit-learn's two photographs: one to train on, the last fifth of it to validate
            on, and one to test on. Two pictures of a folder are taken likewise in the order of their names, more are
            dealt to the splits whole.
        scale: 2, 3 or 4.
        patch: Extent of what a network reads.
        rim: Pixels about the middle of a tile.
        residual: Whether networks answer with what bicubic interpolation lacks; zeros are then that picture.
        validation, test: Shares of the pictures, of a folder of three or more.
        seed: Of which picture goes where.
        memory_gib: What all pictures may take.

    Raises:
        ConfigError: A picture is missing, damaged, or smaller than a patch. It names the file.
    """

    name, metric, direction = "super_resolution", "psnr", "max"

    def __init__(
        self,
        *,
        path: str | None = None,
        scale: int = 3,
        patch: int = 24,
        rim: int = 4,
        residual: bool = True,
        validation: float = 0.1,
        test: float = 0.1,
        seed: int = 0,
        memory_gib: float = 2.0,
    ) -> None:
        where = f"task {self.name}"
        if scale not in SCALES or isinstance(scale, bool):
            raise ConfigError(f"{where}: scale is {scale!r}. Allowed: {', '.join(map(str, SCALES))}.")
        check_whole(where, low=4, high=256, patch=patch)
        check_whole(where, low=0, high=(patch - 1) // 2, rim=rim)
        check_flags(where, residual=residual)
        check_shares(where, validation, test, seed)
        check_memory(where, memory_gib)
        files = _bundled() if path is None else _listed(path)
        pictures, digest = _read(files, scale, patch, memory_gib)
        areas = _areas(list(files), pictures, validation, test, seed)
        lows, wanted = [], []  # of what is trained on alone
        for file, (top, bottom), (left, right) in areas["train"]:
            one, fine = pictures[file], np.s_[top * scale : bottom * scale, left * scale : right * scale]
            lows.append(one.low[top:bottom, left:right].ravel())
            wanted.append((one.high[fine] - one.bicubic[fine] if residual else one.high[fine]).ravel())
        pixels, answers = np.concatenate(lows).astype(np.float64), np.concatenate(wanted).astype(np.float64)
        answer = float(answers.mean()), float(answers.std()) or 1.0, residual
        splits = {}
        for name in SPLITS:
            tiles = [_tiles(area, patch, patch // 4 if name == "train" else None, rim) for area in areas[name]]
            which = [np.full((len(places), 1), n) for n, (places, _) in enumerate(tiles)]
            places = np.concatenate([np.hstack([n, at]) for n, (at, _) in zip(which, tiles, strict=True)])
            scored = np.concatenate([of for _, of in tiles])
            own = [pictures[file] for file, _, _ in areas[name]]
            splits[name] = Patches(own, places, scored, patch, scale, answer)
        self.train, self.validation, self.test = (splits[name] for name in SPLITS)
        self._std = answer[1]
        self.bicubic = {name: psnr(splits[name].bicubic_error()) for name in ("validation", "test")}
        self.io = IOSpec(
            "image", (patch, patch), 1, 1, head="sub_pixel", head_knobs=(("scale", scale),),
            out_size=(patch * scale, patch * scale),
            mean=(round(float(pixels.mean()), 4),), std=(round(float(pixels.std()) or 1.0, 4),),
        )  # fmt: skip
        counts = "/".join(f"{len(splits[name]):,}" for name in SPLITS)
        self._about = {
            "summary": f"{len(files)} photographs at 1/{scale}; {counts} patches of {patch}x{patch} for "
            f"train/validation/test; bicubic interpolation has {self.bicubic['test']:.2f} dB on test",
            "target": {"mean": answer[0], "std": answer[1]},
            "answers": "what bicubic interpolation lacks, in luma" if residual else "luma",
            "bicubic_psnr": {name: round(value, 4) for name, value in self.bicubic.items()},
            "sha256": digest,
            "split": {name: [file for file, _, _ in areas[name]] for name in SPLITS},
        }

    def record(self) -> Mapping[str, Any]:
        """See `Task`."""
        return {"task": self.name, **self._about}

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error over what is scored, of standardised answers; there are no labels."""
        error, scored = _errors(outputs, targets)
        return error.square().sum() / scored.clamp(min=1)

    def new_metric(self) -> Accumulator:
        """PSNR in dB of all that is scored together: of one photograph, its own."""
        return _Psnr(self._std)

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One of the eight turns and mirrorings of a square each; targets move along."""
        drawn = torch.rand(3, len(inputs), generator=generator, device=inputs.device) < 0.5
        moves = (lambda x: x.flip(1), lambda x: x.flip(2), lambda x: x.transpose(1, 2))
        for chosen, move in zip(drawn, moves, strict=True):
            which = chosen[:, None, None, None]
            inputs, targets = (torch.where(which, move(x), x) for x in (inputs, targets))
        return inputs, targets


def _bundled() -> dict[str, Path | None]:
    return {"china.jpg": None, "flower.jpg": None}


def _listed(path: str) -> dict[str, Path | None]:
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{visible(path)}: is no folder. Give one with pictures in it.")
    inside = folder.resolve()
    found: dict[str, Path | None] = {}
    for entry in sorted(folder.iterdir()):
        if entry.suffix.lower() in SUFFIXES and not entry.name.startswith("."):
            if not entry.resolve().is_relative_to(inside):
                raise ConfigError(f"{visible(str(entry))}: is a link that leads out of the folder. Put the file there.")
            found[entry.name] = entry
    if len(found) < 2:
        names = listed(found) or "none"
        raise ConfigError(
            f"{visible(path)}: two pictures at least are needed, one to train and one to test on; there: {names}."
        )
    return found


def _read(files: Mapping[str, Path | None], scale: int, patch: int, memory_gib: float) -> tuple[dict[str, Luma], str]:
    """The photographs by name, and the SHA-256 of names and luma."""
    sizes = {name: header(path)[:2] for name, path in files.items() if path is not None}
    needed = sum(width * height for width, height in sizes.values()) * 9  # two numbers and a byte a pixel
    if needed > memory_gib * 2**30:
        raise ConfigError(
            f"task super_resolution: {len(sizes)} pictures take {needed / 2**30:.1f} GiB, and memory_gib allows "
            f"{memory_gib:g}. Raise that, or give fewer."
        )
    found, total = {}, hashlib.sha256()
    for name, path in files.items():
        high = luma(_photograph(name) if path is None else decode_whole(path))
        picture = reduced(high, scale)
        if min(picture.low.shape) < patch:
            shown = "x".join(map(str, high.shape[::-1]))
            raise ConfigError(
                f"{visible(str(path or name))}: has {shown} pixels, and a patch needs {patch * scale}x{patch * scale} "
                f"at scale {scale}. Take it out of the folder, or lower patch."
            )
        found[name] = picture
        total.update(name.encode(errors="surrogateescape") + b"\0" + high.tobytes())
    return found, total.hexdigest()


def _photograph(name: str) -> NDArray[np.uint8]:
    from sklearn.datasets import load_sample_image

    pixels: NDArray[np.uint8] = load_sample_image(name)
    return pixels


_Area = tuple[str, tuple[int, int], tuple[int, int]]
"""A picture's name, and first and last row and column (not included) of its small version."""


def _areas(
    names: Sequence[str], pictures: Mapping[str, Luma], validation: float, test: float, seed: int
) -> dict[str, list[_Area]]:
    def whole(name: str) -> _Area:
        height, width = pictures[name].low.shape
        return name, (0, height), (0, width)

    if len(names) > 2:
        return {
            split: [whole(name) for name in own]
            for split, own in dealt(names, validation, test, seed, "task super_resolution").items()
        }
    first, second = names
    height, width = pictures[first].low.shape
    edge = round(0.8 * width)
    return {
        "train": [(first, (0, height), (0, edge))],
        "validation": [(first, (0, height), (edge, width))],
        "test": [whole(second)],
    }


def _tiles(area: _Area, patch: int, step: int | None, rim: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places (N, 2) of patches in an area, and what of each is scored (N, 4), see `Patches`.

    Args:
        area: Where.
        patch: Extent.
        step: From one to the next, all of each being scored; None to score each pixel of the area once, those at a
            patch's edge only where it is the area's.
        rim: Of a patch, in that case.
    """
    name, *extents = area
    along = []
    for low, high in extents:
        if high - low < patch:
            raise ConfigError(
                f"{visible(name)}: a part of {high - low} pixels, at the small size, is to be used by itself, and a "
                f"patch has {patch}. Give larger pictures, or lower patch."
            )
        starts = [*range(low, high - patch, step or max(1, patch - 2 * rim)), high - patch]
        cuts = [low, *(start + patch - rim for start in starts[:-1]), high]
        owned = [(0, patch)] * len(starts)
        if step is None:
            owned = [(a - start, b - start) for start, (a, b) in zip(starts, pairwise(cuts), strict=True)]
        along.append([(start, *of) for start, of in zip(starts, owned, strict=True)])
    places = [(row[0], column[0]) for row in along[0] for column in along[1]]
    scored = [(*row[1:], *column[1:]) for row in along[0] for column in along[1]]
    return np.array(places, dtype=np.int64), np.array(scored, dtype=np.int64)
