"""Arrays from .npz files, NumPy's own archives: read without pickles, and never more than they say."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from mixnas.evaluators.tasks.arrays import ArrayPictures, check_file
from mixnas.evaluators.tasks.options import PictureOptions, check_memory, takes_picture_options
from mixnas.search_space.errors import ConfigError, listed, visible

_DAMAGE = (OSError, ValueError, zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, SyntaxError)
_MOST_ARRAYS = 1000
_INPUTS = ("x", "images", "inputs", "data", "series")
_TARGETS = ("y", "labels", "targets", "target", "label")
_SPLITS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation",
    "test": "test",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Header:
    """What an array's header says.

    Attributes:
        shape: Its extents.
        dtype: Its type.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


class NpzFile:
    """An archive whose headers were looked at.

    Args:
        path: The file.
        memory_gib: What its arrays may take, unpacked.

    Attributes:
        headers: By the arrays' names.

    Raises:
        ConfigError: It is no such archive, is damaged, holds Python objects, or unpacks to more than it may.
    """

    def __init__(self, path: str | Path, memory_gib: float) -> None:
        self.path, self.where = Path(path), visible(str(path))
        self.headers: dict[str, Header] = {}
        total = 0
        check_file(self.path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                entries = archive.infolist()
                if len(entries) > _MOST_ARRAYS:
                    raise ConfigError(f"{self.where}: holds {len(entries):,} files; at most {_MOST_ARRAYS:,} are read.")
                for entry in entries:
                    name = entry.filename.removesuffix(".npy")
                    with archive.open(entry) as file:
                        header = _header(file)
                    needed = int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
                    if header.dtype.hasobject:
                        raise ConfigError(f"{self.where}: {name} holds Python objects, which are not read.")
                    if header.dtype.itemsize == 0:
                        raise ConfigError(
                            f"{self.where}: {name} is of type {header.dtype}, whose values have no bytes: there is "
                            "nothing to read, whatever its shape. Save it with values."
                        )
                    if not needed <= entry.file_size <= needed + (1 << 16):
                        raise ConfigError(
                            f"{self.where}: {name} says {needed:,} bytes and has {entry.file_size:,}: it is "
                            "damaged. Save it again."
                        )
                    total += needed
                    self.headers[name] = header
        except ConfigError:
            raise
        except _DAMAGE as error:
            raise ConfigError(f"{self.where}: is no .npz file to be read ({_said(error)}). Save it again.") from error
        if total > memory_gib * 2**30:
            raise ConfigError(
                f"{self.where}: unpacks to {total / 2**30:,.1f} GiB, and memory_gib allows {memory_gib:g}. Raise that, "
                "or give less: bytes (uint8) take a quarter of float32, which takes half of float64."
            )

    def read(self, name: str) -> NDArray[Any]:
        """One array.

        Raises:
            ConfigError: It is damaged.
        """
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                found: NDArray[Any] = archive[name]
        except _DAMAGE as error:
            raise ConfigError(f"{self.where}: {name} is damaged ({_said(error)}). Save it again.") from error
        return found

    def pairs(self) -> dict[str, tuple[str, str]]:
        """Names of inputs and targets by split; all under "train" where the names say none.

        Raises:
            ConfigError: No names of inputs and targets are there.
        """
        found: dict[str, dict[str, str]] = {}
        for name in self.headers:
            words = name.lower().split("_")
            split = next((_SPLITS[word] for word in words if word in _SPLITS), "train")
            rest = "_".join(word for word in words if word not in _SPLITS)
            for what, known in (("inputs", _INPUTS), ("targets", _TARGETS)):
                if rest in known:
                    other = found.setdefault(split, {}).setdefault(what, name)
                    if other != name:
                        raise ConfigError(f"{self.where}: both {other!r} and {name!r} are {what} of {split}. Keep one.")
        for split, parts in found.items():
            for what, known in (("inputs", _INPUTS), ("targets", _TARGETS)):
                if what not in parts:
                    raise ConfigError(f"{self.where}: has no {what} of {split}. Call them one of {', '.join(known)}.")
        if "train" not in found:
            raise ConfigError(
                f"{self.where}: its arrays are {listed(self.headers) or 'none'}. Call them x and y, or x_train, "
                "y_train, x_val, y_val, x_test, y_test."
            )
        return {split: (parts["inputs"], parts["targets"]) for split, parts in found.items()}

    def inputs(self) -> Header:
        """Header of the training inputs."""
        return self.headers[self.pairs()["train"][0]]

    def labels(self) -> list[str] | None:
        """Names of the classes from an array `class_names` of words; None without."""
        for name in ("class_names", "label_names"):
            if name in self.headers and self.headers[name].dtype.kind == "U" and len(self.headers[name].shape) == 1:
                return [str(word) for word in self.read(name)]
        return None


def _header(file: Any) -> Header:
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"version {version} of the format of arrays")
    shape, _, dtype = read(file)
    return Header(shape, dtype)


def _said(error: BaseException) -> str:
    return visible(" ".join(str(error).split()))[:150] or type(error).__name__


def holds_pictures(header: Header) -> bool:
    """Whether inputs are pictures: (n, H, W, C), or bytes of (n, H, W)."""
    return len(header.shape) == 4 or (len(header.shape) == 3 and header.dtype == np.uint8)


@takes_picture_options(flip=False)
class Npz(ArrayPictures):
    """Pictures and labels in an .npz file: x and y, or x_train, y_train, x_val and so on (or images and labels).

    Args:
        path: The file.
        memory_gib: What the arrays may take.
        options: See `PictureOptions`; flip is off: whether a mirrored picture is one of the same class is not known.
    """

    name = "npz"

    def __init__(
        self,
        *,
        path: str,
        options: PictureOptions,
        memory_gib: float = 4.0,
    ) -> None:
        check_memory(f"task {self.name}", memory_gib)
        file = NpzFile(path, memory_gib)
        found = read_pairs(file)
        self.hold(
            file.where,
            found,
            file.labels(),
            options=options,
        )


def read_pairs(file: NpzFile) -> Mapping[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Inputs and targets by split."""
    return {split: (file.read(inputs), file.read(targets)) for split, (inputs, targets) in file.pairs().items()}
