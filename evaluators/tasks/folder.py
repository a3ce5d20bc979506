"""A folder of pictures by class: `cats/…`, `dogs/…`, or the same below `train`, `val` and `test`."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mixnas.evaluators.tasks.decoding import SUFFIXES, decode_many, header
from mixnas.evaluators.tasks.options import PictureOptions, check_memory, check_whole, takes_picture_options
from mixnas.evaluators.tasks.pictures import (
    Decoded,
    PictureTask,
    Stored,
    cut,
    moments,
)
from mixnas.evaluators.tasks.task import SPLITS, Examples
from mixnas.search_space.errors import ConfigError, listed, visible

SIZES = (16, 24, 32, 48, 64)
"""Extents that are chosen from, where none is given: what two cores can search."""

_LARGEST = 1024
_MOST_WORKERS = 64
SPLIT_FOLDERS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_LABEL_FILES = (".csv", ".tsv", ".json", ".jsonl", ".xml", ".txt", ".parquet", ".yaml", ".yml")
_LITTER = ("thumbs.db", "desktop.ini")  # what file managers leave


@dataclass(frozen=True, slots=True)
class Listing:
    """What lies in a folder.

    Attributes:
        root: The folder.
        files: Pictures by their path below it, sorted.
        labels: Names of the classes, sorted.
        targets: (N,) class of each picture.
        splits: (N,) the split whose folder each lies in, "" where the folder has none.
        stamps: (N, 3) bytes and times of each file, of its content and of its entry: they tell that it is the same.
    """

    root: Path
    files: tuple[str, ...]
    labels: tuple[str, ...]
    targets: NDArray[np.int64]
    splits: NDArray[np.str_]
    stamps: NDArray[np.int64]

    @property
    def paths(self) -> list[Path]:
        """Of the pictures."""
        return [self.root / name for name in self.files]


def list_pictures(path: str | Path) -> Listing:
    """Find the pictures below a folder, without opening any.

    Raises:
        ConfigError: No folder, no class, a class without pictures, something in a class that is no picture, a link that
            leads out of the folder. It names the file.
    """
    root = Path(path)
    if not root.is_dir():
        raise ConfigError(f"{visible(str(root))}: is no folder. Give one with a folder of pictures for each class.")
    inside = root.resolve()
    tops = _folders(root, inside)
    named = {top.name: SPLIT_FOLDERS[top.name.lower()] for top in tops if top.name.lower() in SPLIT_FOLDERS}
    found: list[tuple[str, str, str, os.stat_result]] = []
    if "train" in named.values():
        for folder in tops:
            if folder.name not in named:
                raise ConfigError(
                    f"{visible(str(folder))}: beside {listed(named)}, where each folder is a split, it is none. Move "
                    "it into them as a class, or out of the folder."
                )
        if len(set(named.values())) < len(named):
            raise ConfigError(f"{visible(str(root))}: {listed(named)} name one split twice. Keep one of each.")
        for folder in tops:
            found += _classes(folder, inside, named[folder.name])
    else:
        found = _classes(root, inside, "")
    labels = tuple(sorted({label for _, label, _, _ in found}))
    if len(labels) < 2:
        raise ConfigError(
            f"{visible(str(root))}: has one class, {labels[0]!r}; there is nothing to tell apart. Give a folder of "
            "pictures for each of two classes or more."
        )
    found.sort(key=lambda entry: entry[0])
    number = {label: i for i, label in enumerate(labels)}
    return Listing(
        root=root,
        files=tuple(os.path.relpath(name, root).replace(os.sep, "/") for name, _, _, _ in found),
        labels=labels,
        targets=np.array([number[label] for _, label, _, _ in found], dtype=np.int64),
        splits=np.array([split for _, _, split, _ in found]),
        stamps=np.array(
            [(about.st_size, about.st_mtime_ns, about.st_ctime_ns) for _, _, _, about in found], dtype=np.int64
        ),
    )


def _folders(folder: Path, inside: Path) -> list[Path]:
    return sorted(entry for entry in _visible(folder, inside) if entry.is_dir())


def _visible(folder: Path, inside: Path) -> Iterator[Path]:
    """What lies in a folder, but hidden files; a link out of it is refused."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{visible(str(folder))}: cannot be looked into: {error.strerror}.") from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in _LITTER:
            continue
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"{visible(str(entry))}: its name is no text (UTF-8). Rename it.") from None
        if entry.is_symlink() and not _is_inside(entry, inside):
            raise ConfigError(
                f"{visible(str(entry))}: is a link that leads out of {visible(str(inside))}, or nowhere; it is not "
                "followed. Put the file itself there."
            )
        yield entry


def _is_inside(entry: Path, inside: Path) -> bool:
    """Whether a link leads to a file inside; one to a folder might lead round in a circle."""
    target = Path(os.path.realpath(entry))
    return target.is_file() and target.is_relative_to(inside)


def _classes(folder: Path, inside: Path, split: str) -> list[tuple[str, str, str, os.stat_result]]:
    """Path, class, split and state of all pictures of a folder of classes."""
    classes = _folders(folder, inside)
    loose = [entry for entry in _visible(folder, inside) if entry.suffix.lower() in SUFFIXES and not entry.is_dir()]
    if not classes:
        labels = [entry for entry in _visible(folder, inside) if entry.suffix.lower() in _LABEL_FILES]
        why = f" Labels are not read from {visible(labels[0].name)}." if labels else ""
        raise ConfigError(
            f"{visible(str(folder))}: has no folder of a class.{why} Put the pictures of each class into a folder of "
            f"its name: {visible(folder.name)}/cats/1.jpg, {visible(folder.name)}/dogs/1.jpg."
        )
    if loose:
        raise ConfigError(f"{visible(str(loose[0]))}: lies in no class. Move it into the folder of one, or out.")
    found = []
    for place in classes:
        pictures = list(_pictures(place, inside))
        if not pictures:
            raise ConfigError(
                f"{visible(str(place))}: has no pictures ({', '.join(SUFFIXES)}). Give some, or remove it."
            )
        found += [(str(path), place.name, split, path.stat()) for path in pictures]
    return found


def _pictures(folder: Path, inside: Path) -> Iterator[Path]:
    for entry in _visible(folder, inside):
        if entry.is_dir():
            yield from _pictures(entry, inside)
        elif entry.suffix.lower() in SUFFIXES:
            yield entry
        else:
            raise ConfigError(
                f"{visible(str(entry))}: is no picture ({', '.join(SUFFIXES)}); labels are the names of the folders, "
                "and no other file is read. Take it out of the folder."
            )


@functools.lru_cache(maxsize=2)
def _headers(root: Path, files: tuple[str, ...], stamps: bytes) -> tuple[int, bool]:
    """Median of the shorter extents, and whether all are grey; kept while the files are the same."""
    looked = [header(root / name) for name in files]
    return int(np.median([min(width, height) for width, height, _ in looked])), all(grey for _, _, grey in looked)


@functools.lru_cache(maxsize=2)
def _digest(root: Path, files: tuple[str, ...], stamps: bytes) -> str:
    """SHA-256 of the pictures' names below the folder, which say their classes, and of all that is in them; kept while
    the files are the same."""
    total = hashlib.sha256()
    for name in files:
        try:
            with open(root / name, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise ConfigError(
                f"{visible(str(root / name))}: cannot be read: {error.strerror}. Restore it, or take it out of the "
                "folder."
            ) from error
        total.update(name.encode() + b"\0" + content)
    return total.hexdigest()


@functools.lru_cache(maxsize=2)
def _decoded(
    root: Path, files: tuple[str, ...], stamps: bytes, size: tuple[int, int], channels: int, room: int
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.float64]]:
    """Pictures (K, H, W, C) that are kept, evenly spread over all, as many as there is room for in bytes; which of them
    each is, (N,), -1 for none; and the moments of all, (N, 2, C).

    Each is decoded once, so that one that cannot be shows now. Kept while the files are the same: a search makes its
    task more than once.
    """
    count = min(len(files), room // (size[0] * size[1] * channels))
    rows = torch.full((len(files),), -1, dtype=torch.int64)
    rows[torch.arange(count) * len(files) // max(count, 1)] = torch.arange(count)
    pixels = torch.empty(count, *size, channels, dtype=torch.uint8)
    sums = np.empty((len(files), 2, channels))
    for at, picture in enumerate(decode_many([root / name for name in files], size, channels)):
        sums[at] = moments(picture)
        if rows[at] >= 0:
            pixels[rows[at]] = torch.from_numpy(picture)
    return pixels, rows, sums


@takes_picture_options()
class Folder(PictureTask):
    """Pictures by class in a folder.

    A folder with `train` below it is split by its own folders: what of `val` and `test` is missing is cut from `train`.
    Else all of it is split by seed, each class in the given shares.

    Args:
        path: The folder.
        size: Extent of what networks read, one number or [height, width]; by default the nearest of `SIZES` to the
            median of the pictures' shorter extents.
        channels: 1 or 3; by default 3, or 1 where all pictures are grey.
        memory_gib: What decoded pictures may take of memory; those for which it is not enough are decoded at each step.
        workers: Processes that decode them, ahead of the training; by default one for each core but one, 8 at most.
        options: See `PictureOptions`.
    """

    name = "folder"

    def __init__(
        self,
        *,
        path: str,
        size: int | Sequence[int] | None = None,
        channels: int | None = None,
        memory_gib: float = 1.0,
        workers: int | None = None,
        options: PictureOptions,
    ) -> None:
        where = f"task {self.name}"
        if not isinstance(path, str) or not path:
            raise ConfigError(f"{where}: path is {path!r}, it must be the path of a folder.")
        extents = checked_size(where, size)
        if channels not in (None, 1, 3) or isinstance(channels, bool):
            raise ConfigError(f"{where}: channels is {channels!r}. Allowed: 1, 3.")
        options.check(where)
        check_memory(where, memory_gib)
        check_whole(where, low=0, high=_MOST_WORKERS, workers=_workers() if workers is None else workers)
        listing = list_pictures(path)
        parts = split_pictures(listing, {"validation": options.validation, "test": options.test}, options.seed)
        key = (listing.root, listing.files, listing.stamps.tobytes())
        extent, grey = _headers(*key)
        extents = extents or (suited(extent),) * 2
        channels = channels or (1 if grey else 3)
        needed = len(listing.files) * extents[0] * extents[1] * channels
        pixels, rows, sums = _decoded(*key, extents, channels, min(int(memory_gib * 2**30), needed))
        whole = len(pixels) == len(listing.files)
        targets = torch.from_numpy(listing.targets)
        paths = listing.paths

        def examples(indices: NDArray[np.intp]) -> Examples:
            chosen = torch.from_numpy(indices)
            if whole:
                return Stored(pixels, targets, chosen)
            readers = _workers() if workers is None else workers
            return Decoded(paths, targets, chosen, extents, channels, pixels, rows, readers)

        self.set_up(
            {name: examples(parts[name]) for name in SPLITS},
            {name: targets[parts[name]] for name in SPLITS},
            listing.labels,
            extents,
            sums[parts["train"]].sum(0),
            options,
            about={
                "in_memory": whole,
                "bytes_decoded": needed,
                "median_extent": extent,
                "sha256": _digest(*key),
                "split": {name: [listing.files[i] for i in parts[name]] for name in SPLITS},
            },
        )


def _workers() -> int:
    """Processes that this one may have beside it."""
    return max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) - 1)


def split_pictures(listing: Listing, shares: dict[str, float], seed: int) -> dict[str, NDArray[np.intp]]:
    """Indices of each split: of the folder's own, the rest cut by seed.

    Raises:
        ConfigError: A class has too few pictures, or a split's folder lacks one.
    """
    own: dict[str, Any] = {name: np.flatnonzero(listing.splits == name) for name in SPLITS if name in listing.splits}
    if not own:
        asked = {"train": 1.0, **shares}
        return cut(listing.targets, asked, seed, listing.labels, visible(str(listing.root)))
    for split, indices in own.items():
        there = set(listing.targets[indices].tolist())
        for label, name in enumerate(listing.labels):
            if label not in there:
                raise ConfigError(f"{visible(str(listing.root))}: class {name!r} has no picture in {split}. Give some.")
    asked = {"train": 1.0, **{name: share for name, share in shares.items() if name not in own}}
    train = own["train"]
    parts = cut(listing.targets[train], asked, seed, listing.labels, visible(str(listing.root)))
    return {**own, **{split: train[indices] for split, indices in parts.items()}}


def suited(extent: int) -> int:
    """The extent of `SIZES` that is nearest to that of the pictures, by ratio."""
    return min(SIZES, key=lambda size: abs(np.log(size / max(extent, 1))))


def checked_size(where: str, size: object) -> tuple[int, int] | None:
    """A size as it may be given; None for none.

    Raises:
        ConfigError: Something else.
    """
    if size is None:
        return None
    both: list[Any] = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(both) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and 4 <= n <= _LARGEST for n in both):
        raise ConfigError(f"{where}: size is {size!r}, it must be a whole number from 4 to {_LARGEST}, or two.")
    return int(both[0]), int(both[1])
