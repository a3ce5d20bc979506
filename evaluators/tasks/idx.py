"""MNIST and the sets that are written like it: IDX files, plain or gzipped."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixnas.evaluators.tasks.arrays import ArrayPictures, check_file
from mixnas.evaluators.tasks.options import PictureOptions, takes_picture_options
from mixnas.search_space.errors import ConfigError, listed, visible

_BYTES = 0x08  # the code of unsigned bytes
_MOST = 1 << 31
_NAME = re.compile(r"(?P<set>.*?)(?P<split>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(?P<gz>\.gz)?")


@dataclass(frozen=True, slots=True)
class IdxFile:
    """A file by its name.

    Attributes:
        path: Where it is.
        set: What stands before the split in its name, "emnist-letters-".
        split: "train" or "test".
        what: "images" or "labels".
    """

    path: Path
    set: str
    split: str
    what: str


def files_in(path: Path) -> list[IdxFile]:
    """The IDX files of a folder, or those that belong to one file."""
    folder = path if path.is_dir() else path.parent
    found = []
    for entry in sorted(folder.iterdir()):
        match = _NAME.fullmatch(entry.name)
        if match is not None:
            split = "train" if match["split"] == "train" else "test"
            found.append(IdxFile(entry, match["set"], split, match["what"]))
    if path.is_dir():
        return found
    chosen = {file.set for file in found if file.path.name == path.name}
    return [file for file in found if file.set in chosen]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes from an IDX file, plain or gzipped.

    Raises:
        ConfigError: It is truncated, too long, of another type, or no such file.

    Source: the format's description at the MNIST database (LeCun, Cortes and Burges).
    """
    where = visible(str(path))
    check_file(path)
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != _BYTES or not 1 <= head[3] <= 4:
                raise ConfigError(f"{where}: is no IDX file of bytes (it begins with {head.hex() or 'nothing'}).")
            extents = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
            count = int(np.prod(extents, dtype=object))
            if count > _MOST:
                raise ConfigError(f"{where}: says that it holds {count:,} bytes; at most {_MOST:,} are read.")
            content = file.read(count + 1)  # no more, whatever it unpacks to
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise ConfigError(f"{where}: cannot be read ({error}): truncated or damaged. Download it again.") from error
    if len(content) != count:
        more = "more" if len(content) > count else f"{len(content):,}"
        raise ConfigError(f"{where}: has {more} of the {count:,} bytes that it says. Download it again.")
    return np.frombuffer(content, np.uint8).reshape(extents)


@takes_picture_options(validation=0.1, test=0.1, flip=False)
class Idx(ArrayPictures):
    """Pictures and labels in IDX files: train-images-idx3-ubyte and so on, with .gz or without.

    Args:
        path: Their folder; one of the files, where there are several sets in it.
        options: See `PictureOptions`; validation and test are 0.1, and flip is off: a mirrored digit is none.
    """

    name = "idx"

    def __init__(
        self,
        *,
        path: str,
        options: PictureOptions,
    ) -> None:
        where = visible(str(path))
        place = Path(path)
        files = files_in(place) if place.exists() else []
        sets = sorted({file.set for file in files})
        if len(sets) > 1:
            raise ConfigError(
                f"{where}: holds {len(sets)} sets ({listed(sets)}). Give a file of the one that is meant."
            )
        found: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {}
        for split in ("train", "test"):
            parts: dict[str, Path] = {}
            for file in files:
                if file.split == split and parts.setdefault(file.what, file.path) != file.path:
                    both = f"{visible(parts[file.what].name)} and {visible(file.path.name)}"
                    raise ConfigError(
                        f"{where}: {both} are both the {file.what} of {split}. Keep one of them there: which is meant "
                        "cannot be told."
                    )
            if not parts and split == "test":
                continue
            for what in ("images", "labels"):
                if what not in parts:
                    raise ConfigError(f"{where}: has no {split}-{what} file ({split}-{what}-idx*-ubyte, or with .gz).")
            found[split] = read_idx(parts["images"]), read_idx(parts["labels"])
        self.hold(
            where,
            found,
            options=options,
        )
