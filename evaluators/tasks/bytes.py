"""Byte-level language modelling of any text files: which byte comes next?

By default the text is the Python standard library's own sources: megabytes that lie on every machine, with long names
that come again, nesting and indentation.
"""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mixnas.evaluators.tasks.arrays import check_file
from mixnas.evaluators.tasks.dealing import dealt
from mixnas.evaluators.tasks.options import check_memory, check_shares, check_whole
from mixnas.evaluators.tasks.task import SPLITS, Task
from mixnas.search_space.errors import ConfigError, visible
from mixnas.search_space.units import IOSpec

_BYTES = 256
_LEFT_OUT = ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__")  # of the standard library


_LEAST = 2
"""Windows of a split that networks are judged on: of one there is no telling by how much its score is off."""
_FEW = 32
"""Fewer are used, and told."""


class Windows:
    """Neighbouring windows of a text that do not overlap: each byte is asked for once.

    Args:
        text: (n,) bytes.
        length: Of a window.
        starts: (N,) where each begins; it needs `length` + 1 bytes from there.
    """

    def __init__(self, text: NDArray[np.uint8], length: int, starts: Tensor) -> None:
        self._text, self._length, self._starts = torch.from_numpy(text), length, starts

    def __len__(self) -> int:
        return len(self._starts)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes (n, length) and those that follow each, (n, length), int64."""
        places = self._starts[indices][:, None] + torch.arange(self._length + 1)
        found = self._text[places].long()
        return found[:, :-1], found[:, 1:]


class Bytes(Task):
    """Causal prediction of the next byte, in bits per byte: log2 of the reciprocal of its probability, on average.

    Files are dealt to the splits whole, by the hash of their name, so that one more file moves no other; of fewer than
    three each is cut into its beginning, its middle and its end. Files of the same content count once.

    Args:
        path: A file or a folder of text files; by default the sources of the standard library of this Python.
        pattern: Which files of a folder, as `Path.match` reads it: "*.txt". Hidden ones are left out.
        length: Bytes that a network reads at once. The first of a window is predicted from one byte, the last from all.
        validation, test: Shares of the files.
        validation_size, test_size: Windows of those splits, evenly spread; fewer where the text is shorter.
        seed: Of which file goes where.
        label_smoothing: See `Task`; it is of no use to a metric that is the loss.
        memory_gib: What all files may take together.

    Raises:
        ConfigError: A file is missing, is no text (it holds a zero byte), or the text is too short or too long. It
            names the file.
    """

    name, metric, direction = "bytes", "bits_per_byte", "min"

    def __init__(
        self,
        *,
        path: str | None = None,
        pattern: str = "*",
        length: int = 128,
        validation: float = 0.1,
        test: float = 0.1,
        validation_size: int = 512,
        test_size: int = 2048,
        seed: int = 0,
        label_smoothing: float = 0.0,
        memory_gib: float = 2.0,
    ) -> None:
        task = f"task {self.name}"
        check_shares(task, validation, test, seed)
        check_whole(task, low=2, high=1 << 20, length=length)
        check_whole(task, validation_size=validation_size, test_size=test_size)
        check_memory(task, memory_gib)
        if not isinstance(pattern, str) or not pattern:
            raise ConfigError(f"{task}: pattern is {pattern!r}, it must be like '*.txt'.")
        self.label_smoothing = label_smoothing
        root, files = _listed(path, pattern)
        where = visible(str(path)) if path is not None else "the standard library"
        texts = _read(root, files, memory_gib, where)
        by_split = _split(texts, validation, test, seed)
        sizes = {"train": None, "validation": validation_size, "test": test_size}
        splits = {name: _windows(by_split[name], length, sizes[name], f"{where}: {name}") for name in SPLITS}
        few = [name for name in SPLITS[1:] if len(splits[name]) < _FEW]
        self.train, self.validation, self.test = (splits[name] for name in SPLITS)
        self.io = IOSpec("causal", (length,), _BYTES, _BYTES, head="token", tokens=True)
        total = hashlib.sha256()
        for name, text in sorted(texts.items()):
            total.update(name.encode(errors="surrogateescape") + b"\0" + hashlib.sha256(text).digest())
        cut = "/".join(f"{len(by_split[name]):,}" for name in SPLITS)
        windows = "/".join(f"{len(splits[name]):,}" for name in SPLITS)
        self._about = {
            "summary": f"{len(texts):,} files of {where}; {cut} bytes for train/validation/test, {windows} windows of "
            f"{length} bytes" + (f"; {' and '.join(few)} tell little: give more text or a lower length" if few else ""),
            "files": len(texts),
            "sha256": total.hexdigest(),
        }

    def record(self) -> Mapping[str, Any]:
        """See `Task`."""
        return {"task": self.name, **self._about}

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Bits per byte: the cross-entropy in base 2."""
        losses = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
        return losses.double().mean() / math.log(2)


def _listed(path: str | None, pattern: str) -> tuple[Path, list[Path]]:
    """The folder that names are told below, and the files, sorted."""
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        return root, [f for f in sorted(root.rglob("*.py")) if not set(_LEFT_OUT) & set(f.relative_to(root).parts[:-1])]
    place = Path(path)
    if not place.is_dir():
        check_file(place)
        return place.parent, [place]
    files = sorted(_below(place, place.resolve(), pattern))
    if not files:
        raise ConfigError(f"{visible(path)}: has no file that matches {pattern!r}. Say task.pattern, as in '*.txt'.")
    return place, files


def _below(folder: Path, inside: Path, pattern: str) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.name == "__pycache__":
            continue
        if entry.is_symlink() and not Path(os.path.realpath(entry)).is_relative_to(inside):
            raise ConfigError(f"{visible(str(entry))}: is a link that leads out of the folder. Put the file there.")
        if entry.is_dir():
            if not entry.is_symlink():  # one to a folder inside might lead round in a circle
                yield from _below(entry, inside, pattern)
        elif entry.match(pattern):
            yield entry


def _read(root: Path, files: Sequence[Path], memory_gib: float, where: str) -> dict[str, bytes]:
    """Texts by name below the folder, each content once."""
    allowed, total = memory_gib * 2**30, 0
    texts: dict[str, bytes] = {}
    seen: set[bytes] = set()
    for file in files:
        check_file(file)
        total += file.stat().st_size
        if total > allowed:
            raise ConfigError(f"{where}: has more than {memory_gib:g} GiB. Raise memory_gib, or give less.")
        try:
            text = file.read_bytes()
        except OSError as error:
            raise ConfigError(f"{visible(str(file))}: cannot be read: {error.strerror}.") from error
        if (at := text.find(b"\0")) >= 0:
            raise ConfigError(
                f"{visible(str(file))}: is no text, byte {at:,} is zero. Take it out of the folder, or say which files "
                "are meant with task.pattern, as in '*.txt'."
            )
        digest = hashlib.sha256(text).digest()
        if text and digest not in seen:
            seen.add(digest)
            texts[file.relative_to(root).as_posix()] = text
    if not texts:
        raise ConfigError(f"{where}: holds no text, every file is empty.")
    return texts


def _split(texts: Mapping[str, bytes], validation: float, test: float, seed: int) -> dict[str, NDArray[np.uint8]]:
    """The text of each split; files stand in the order of their names, a zero byte behind each."""
    parts: dict[str, list[bytes]] = {name: [] for name in SPLITS}
    if len(texts) < len(SPLITS):
        for _, text in sorted(texts.items()):
            cuts = [0, round((1 - validation - test) * len(text)), round((1 - test) * len(text)), len(text)]
            for name, low, high in zip(SPLITS, cuts, cuts[1:], strict=False):
                parts[name].append(text[low:high])
    else:
        for name, files in dealt(texts, validation, test, seed, "").items():
            parts[name] = [texts[file] for file in files]
    return {name: np.frombuffer(bytearray(b"\0".join([*of, b""])), np.uint8) for name, of in parts.items()}


def _windows(text: NDArray[np.uint8], length: int, most: int | None, where: str) -> Windows:
    count = (len(text) - 1) // length
    needed = 1 if most is None else _LEAST
    if count < needed:
        raise ConfigError(
            f"{where} has {len(text):,} bytes, which is {count} windows; {needed} of {length} bytes need "
            f"{needed * length + 1:,}. Give more text, lower length, or raise the share of that split."
        )
    chosen = np.arange(count) if most is None else np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
    return Windows(text, length, torch.from_numpy(chosen * length))
