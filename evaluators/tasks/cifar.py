"""CIFAR-10 and CIFAR-100 from their published archives on disk: the binary version, and the Python version, whose
pickles are read without running anything that is in them (`pickles`)."""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixnas.evaluators.tasks.arrays import ArrayPictures, check_file
from mixnas.evaluators.tasks.options import PictureOptions, takes_picture_options
from mixnas.evaluators.tasks.pickles import as_text, unpickled
from mixnas.search_space.errors import ConfigError, visible
from mixnas.search_space.files import read_bytes

SIDE = 32
_PICTURE = 3 * SIDE * SIDE
_MOST_FILES = 100
_MOST = 1 << 28  # bytes of one file; CIFAR-100's training set has 148 MiB
_MOST_OF_HEADER = 1 << 16  # bytes of a long name or of a header's extension

Read = Callable[[str], bytes | None]
"""The bytes of a file of the archive by its name; None where there is none."""


@takes_picture_options(without=("test",), validation=0.1, test=0.1)
class Cifar(ArrayPictures):
    """CIFAR-10 or CIFAR-100; which, and in which version, is told by the files. The published test set is the test set.

    Args:
        path: The folder that the archive unpacks to, or the archive itself (.tar.gz).
        labels: Of CIFAR-100, "fine" (100 classes) or "coarse" (20).
        options: See `PictureOptions`; validation is 0.1 unless it is given.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009, chapter 3.
    """

    name = "cifar"

    def __init__(
        self,
        *,
        path: str,
        labels: str = "fine",
        options: PictureOptions,
    ) -> None:
        if labels not in ("fine", "coarse"):
            raise ConfigError(f"task cifar: labels is {labels!r}. Allowed: fine, coarse.")
        where = visible(str(path))
        with contextlib.ExitStack() as held:
            read = _opened(Path(path), held)
            found, names = _read_all(read, where, labels)
        self.hold(
            f"{where}: CIFAR",
            found,
            names,
            options=options,
        )


class _Entry(tarfile.TarInfo):
    """A header of an archive; those that have more behind them, which is read whole, are bounded first."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> Self:
        """See `tarfile.TarInfo`."""
        entry = super().frombuf(buf, encoding or tarfile.ENCODING, errors)
        if entry.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.TarError("it has a file with holes, none of CIFAR's")
        if entry.type not in (*tarfile.REGULAR_TYPES, *_WITHOUT) and entry.size > _MOST_OF_HEADER:
            raise tarfile.TarError(f"a name or header says {entry.size:,} bytes; at most {_MOST_OF_HEADER:,} are read")
        return entry

    def _proc_gnusparse_10(self, *_: Any) -> None:
        """The other kind of file with holes, whose list of holes has no bound."""
        raise tarfile.TarError("it has a file with holes, none of CIFAR's")


_WITHOUT = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)


def _opened(path: Path, held: contextlib.ExitStack) -> Read:
    if path.is_dir():

        def read(name: str) -> bytes | None:
            file = path / name
            return read_bytes(file, at_most=_MOST) if file.exists() else None

        return read
    check_file(path)
    members: dict[str, tarfile.TarInfo] = {}
    try:
        archive = held.enter_context(tarfile.open(path, "r:*", tarinfo=_Entry))  # noqa: SIM115 - the stack closes it
        for number, entry in enumerate(archive):
            if number >= _MOST_FILES:
                raise tarfile.TarError(f"it holds more than {_MOST_FILES} files and folders")
            if entry.size > _MOST:
                raise tarfile.TarError(f"{visible(entry.name)[:50]} of {entry.size:,} bytes is none of CIFAR's files")
            if entry.isfile():
                members[Path(entry.name).name] = entry
    except Exception as error:  # an archive goes wrong in any way, headers that nest too deeply among them
        reason = visible(" ".join(str(error).split()))[:150] or type(error).__name__
        raise ConfigError(f"{visible(str(path))}: is no archive of CIFAR ({reason}). Download it again.") from error

    def member(name: str) -> bytes | None:
        if name not in members:
            return None
        try:
            file = archive.extractfile(members[name])
            return None if file is None else file.read(_MOST)
        except Exception as error:
            reason = visible(" ".join(str(error).split()))[:150] or type(error).__name__
            raise ConfigError(f"{visible(str(path))}: {name} is damaged ({reason}). Download it again.") from error

    return member


_Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def _read_all(read: Read, where: str, labels: str) -> tuple[dict[str, _Arrays], list[str] | None]:
    """Pixels and labels of both published sets, and the names of the classes."""
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    for train, test, meta, parse in (
        ([f"{name}.bin" for name in batches], "test_batch.bin", "batches.meta.txt", _binary(1, 0)),
        (["train.bin"], "test.bin", f"{labels}_label_names.txt", _binary(2, int(labels == "fine"))),
        (batches, "test_batch", "batches.meta", _pickled("labels")),
        (["train"], "test", "meta", _pickled(f"{labels}_labels")),
    ):
        if (first := read(train[0])) is None:
            continue
        of_train = [parse(f"{where}/{train[0]}", first)]
        of_train += [parse(f"{where}/{name}", _needed(read, name, where)) for name in train[1:]]
        found = {
            "train": (np.concatenate([x for x, _ in of_train]), np.concatenate([y for _, y in of_train])),
            "test": parse(f"{where}/{test}", _needed(read, test, where)),
        }
        return found, _names(f"{where}/{meta}", read(meta), labels)
    raise ConfigError(
        f"{where}: has none of CIFAR's files (data_batch_1.bin, train.bin, data_batch_1, train). Give the folder that "
        "holds them, or the archive."
    )


def _needed(read: Read, name: str, where: str) -> bytes:
    content = read(name)
    if content is None:
        raise ConfigError(f"{where}/{name}: is missing. Unpack the archive again.")
    return content


Parse = Callable[[str, bytes], _Arrays]


def _binary(labels: int, which: int) -> Parse:
    """Reads records of `labels` bytes, of which `which` is the label, and a picture, plane by plane."""
    length = labels + _PICTURE

    def parse(where: str, content: bytes) -> _Arrays:
        if not content or len(content) % length:
            raise ConfigError(
                f"{where}: has {len(content):,} bytes, no multiple of {length:,}, the length of a record: it is "
                "truncated. Download it again."
            )
        records = np.frombuffer(content, np.uint8).reshape(-1, length)
        return _upright(records[:, labels:]), records[:, which].astype(np.int64)

    return parse


def _upright(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(planes.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _pickled(key: str) -> Parse:
    def parse(where: str, content: bytes) -> _Arrays:
        plain = unpickled(where, content)
        data, labels = plain.get("data"), plain.get(key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PICTURE:
            raise ConfigError(f"{where}: its data is no array of bytes of shape (n, {_PICTURE}). Download it again.")
        if not isinstance(labels, list) or not all(isinstance(n, int) for n in labels) or len(labels) != len(data):
            raise ConfigError(f"{where}: has no {key!r} for each of its {len(data)} pictures. Download it again.")
        return _upright(data), np.array(labels, dtype=np.int64)

    return parse


def _names(where: str, content: bytes | None, labels: str) -> list[str] | None:
    """Names of the classes; None where the file is not there."""
    if content is None:
        return None
    if where.endswith(".txt"):
        return [line.strip() for line in content.decode("utf-8", errors="replace").splitlines() if line.strip()]
    plain = unpickled(where, content)
    for key in ("label_names", f"{labels}_label_names"):
        if isinstance(plain.get(key), list):
            return [as_text(name) for name in plain[key]]
    return None
