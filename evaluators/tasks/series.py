"""Series of numbers from a CSV or an .npz file: which class each is of, or a number for each."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixnas.evaluators.tasks.arrays import check_file, class_numbers
from mixnas.evaluators.tasks.npz import NpzFile, read_pairs
from mixnas.evaluators.tasks.options import check_memory, check_shares
from mixnas.evaluators.tasks.pictures import cut, digest_of_arrays
from mixnas.evaluators.tasks.task import SPLITS, Split, Task
from mixnas.search_space.errors import ConfigError, listed, nearest, visible
from mixnas.search_space.units import IOSpec

_TARGETS = ("target", "label", "class")
_IDS = ("id", "series", "series_id")
_TIMES = ("time", "t", "step", "timestamp")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_LARGEST = float(np.finfo(np.float32).max)
_EXACT = 1 << 53  # whole numbers below are each a number of its own
_MOST_CLASSES = 100  # so many different whole numbers are taken for classes

Answers = Literal["auto", "class", "number"]
_ANSWERS = ("auto", "class", "number")


@dataclass(frozen=True, slots=True)
class Table:
    """Series and their targets.

    Attributes:
        series: (n, L, C) float32.
        targets: (n,) numbers or words.
        channels: Names of the channels.
        told: What is read from which column, for a summary; "" where there are none.
    """

    series: NDArray[np.float32]
    targets: NDArray[Any]
    channels: tuple[str, ...]
    told: str = ""


def read_csv(path: Path, *, target: str | None, id: str | None, time: str | None, length: int | None) -> Table:
    """Series from a CSV file whose first line names its columns.

    With a column of ids that come again, a line is one moment of a series, in the order of the column of times, or of
    the lines; the other columns are channels, and the target is the same in all lines of a series. Without, or where
    all ids differ, a line is a series, and the other columns are its moments in order.

    Args:
        path: The file, UTF-8; "," or ";" or tabs between the columns.
        target: The column of the targets; by default the one that is called target, label or class, else y, unless it
            stands with x and z.
        id: The column of ids; by default id, series or series_id, where there is one.
        time: The column of times, numbers; by default time, t, step or timestamp, where there is one.
        length: Series are cut after so many moments; None where all have as many.

    Raises:
        ConfigError: Something is missing or no finite number, lengths differ or are 1, or two columns might be the
            target or the id. It names the line or the columns.
    """
    where = visible(str(path))
    check_file(path)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            delimiter = max(",;\t", key=head.count)
            columns = [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]
            rows = [row for row in csv.reader(file, delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{where}: cannot be read as CSV in UTF-8 with a line of names first ({error}).") from error
    if len(set(columns)) < len(columns) or not rows:
        problem = "has two columns of one name" if rows else "has no line behind the names of its columns"
        raise ConfigError(f"{where}: {problem}.")
    for number, row in enumerate(rows, 2):
        if len(row) != len(columns):
            raise ConfigError(f"{where}, line {number}: has {len(row)} values for {len(columns)} columns.")
    found = {
        "target": _column(where, columns, "target", target, _TARGETS),
        "id": _column(where, columns, "id", id, _IDS),
        "time": _column(where, columns, "time", time, _TIMES, first=True),
    }
    if found["target"] is None and not {"x", "z"} <= {name.lower() for name in columns}:  # else it is a place
        found["target"] = _column(where, columns, "target", None, ("y",))
    if found["target"] is None:
        raise ConfigError(
            f"{where}: which column is the target? Its columns: {visible(listed(columns))}. Say task.target=NAME."
        )
    ids = [] if found["id"] is None else [row[columns.index(found["id"])].strip() for row in rows]
    wide = len(set(ids)) == len(ids)  # or there are none
    if wide:
        found["time"] = None if time is None else found["time"]
    taken = {name for name in found.values() if name is not None}
    channels = [name for name in columns if name not in taken]
    if not channels:
        raise ConfigError(f"{where}: has no column of values beside {listed(taken)}.")
    values = _numbers(where, rows, [columns.index(name) for name in channels], channels)
    words = [row[columns.index(found["target"])].strip() for row in rows]
    if "" in words:
        raise ConfigError(
            f"{where}, line {words.index('') + 2}: {visible(found['target'])}, the target, is empty. Fill it in, or "
            "leave the series out."
        )
    parts = [
        f"target {visible(found['target'])!r}",
        *(f"{n} {visible(c)!r}" for n in ("id", "time") if (c := found[n])),
    ]
    told = f"{', '.join(parts)}, {'moments' if wide else 'channels'} {visible(listed(channels))}"
    if wide:
        series, names = values[..., None], ("value",)
        return Table(_cut_to(where, list(series), length), _as_targets(where, words), names, told)
    order = range(len(rows))
    if found["time"] is not None:
        times = _numbers(where, rows, [columns.index(found["time"])], [found["time"]])[:, 0]
        order = np.argsort(times, kind="stable").tolist()
    lines: dict[str, list[int]] = {identity: [] for identity in ids}
    for i in order:
        lines[ids[i]].append(i)
    for identity, own in lines.items():
        if len({words[i] for i in own}) > 1:
            raise ConfigError(f"{where}: series {visible(identity)!r} has more than one target.")
    series = _cut_to(where, [values[own] for own in lines.values()], length)
    return Table(series, _as_targets(where, [words[own[0]] for own in lines.values()]), tuple(channels), told)


def _column(
    where: str, columns: Sequence[str], what: str, asked: str | None, known: Sequence[str], first: bool = False
) -> str | None:
    """The column that is asked for, or the one of a known name, of several the `first` known; None where none is."""
    if asked is not None:
        if asked not in columns:
            raise ConfigError(
                f"{where}: no column is called {asked!r}, asked for as {what}.{nearest(asked, columns)} Its columns: "
                f"{listed(columns)}."
            )
        return asked
    there = [name for one in known for name in columns if name.lower() == one]
    if len(there) > 1 and not first:
        raise ConfigError(f"{where}: which column is the {what}, {listed(map(repr, there))}? Say task.{what}=NAME.")
    return there[0] if there else None


def _numbers(
    where: str, rows: Sequence[Sequence[str]], columns: Sequence[int], names: Sequence[str]
) -> NDArray[np.float32]:
    """(rows, columns) finite numbers."""
    found = np.empty((len(rows), len(columns)), dtype=np.float64)
    for number, row in enumerate(rows):
        for at, column in enumerate(columns):
            try:
                found[number, at] = math.nan if "_" in row[column] else float(row[column])
            except ValueError:
                found[number, at] = math.nan
            if not abs(found[number, at]) <= _LARGEST:
                raise ConfigError(
                    f"{where}, line {number + 2}: {names[at]} is {row[column][:50]!r}, no finite number. Fill it in, "
                    "or leave the series out."
                )
    return found.astype(np.float32)


def _cut_to(where: str, series: Sequence[NDArray[np.float32]], length: int | None) -> NDArray[np.float32]:
    """(n, L, C) of series that have one length, or are cut to one."""
    lengths = [len(one) for one in series]
    if length is None and min(lengths) != max(lengths):
        raise ConfigError(
            f"{where}: series have from {min(lengths)} to {max(lengths)} moments, and networks read one length: no "
            f"operator passes padding over. Say task.length={min(lengths)} to take the first {min(lengths)} of each, "
            "or bring them to one length."
        )
    wanted = length or lengths[0]
    if wanted < 2:
        raise ConfigError(
            f"{where}: series have 1 moment, and need 2 at least. Give a line for each moment, with the id of its "
            "series, or a line for a series with a column for each moment; of an .npz file x is (n, length, channels)."
        )
    if min(lengths) < wanted:
        raise ConfigError(f"{where}: a series has {min(lengths)} moments, and length asks for {wanted}.")
    return np.stack([one[:wanted] for one in series])


def _as_targets(where: str, words: Sequence[str]) -> NDArray[Any]:
    """Numbers where all are written as numbers, else words.

    Raises:
        ConfigError: Numbers stand beside NaN or infinity, or a whole number is written in two ways.
    """
    texts = dict.fromkeys(words)
    decimal = [text for text in texts if _DECIMAL.fullmatch(text)]
    odd = next((text for text in texts if _is_odd(text)), None)
    if decimal and odd is not None:
        raise ConfigError(
            f"{where}: targets hold NaN or infinity ({odd[:50]!r}) among numbers. Fill them in, or leave "
            "the series out."
        )
    if len(decimal) < len(texts):
        return np.array(words)
    numbers = {text: float(text) for text in texts}
    whole = all(number.is_integer() for number in numbers.values())
    if not all(abs(number) < _EXACT for number in numbers.values()):
        if all(map(_WHOLE.fullmatch, texts)):
            return np.array(words)  # names of classes that are digits: as numbers, some would be the same
        whole = False
    if whole and len(set(numbers.values())) < len(numbers):
        known: dict[float, str] = {}
        one, other = next((b, a) for a, n in numbers.items() if (b := known.setdefault(n, a)) != a)
        raise ConfigError(
            f"{where}: targets {one[:50]!r} and {other[:50]!r} are one number, written in two ways. Write it in one, "
            "or write words where they are two classes."
        )
    return np.array([numbers[word] for word in words], dtype=np.int64 if whole else np.float64)


def _is_odd(text: str) -> bool:
    """Whether it is written as a number that is not finite."""
    try:
        return not math.isfinite(float(text))
    except ValueError:
        return False


def _read(
    path: str, length: int | None, columns: Mapping[str, str | None], memory_gib: float
) -> tuple[dict[str, Table], list[str] | None]:
    """Tables by split, all under "train" where the file has none, and the names of classes that it gives."""
    if not path.lower().endswith(".npz"):
        return {"train": read_csv(Path(path), length=length, **columns)}, None
    file = NpzFile(path, memory_gib)
    found = {}
    for split, (x, y) in read_pairs(file).items():
        where = f"{file.where}: {split}"
        if x.ndim not in (2, 3) or x.dtype.kind not in "iuf" or 0 in x.shape:
            raise ConfigError(f"{where}: series have shape {x.shape} and type {x.dtype}; it is (n, length, channels).")
        series = x.astype(np.float32).reshape(*x.shape[:2], -1)
        if not np.isfinite(series).all():
            raise ConfigError(f"{where}: series hold NaN or infinity. Fill them in, or leave the series out.")
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iufbUS":
            raise ConfigError(f"{where}: targets have shape {y.shape} and type {y.dtype}; one for each of {len(x)}.")
        series = _cut_to(where, list(series), length)
        found[split] = Table(series, y, tuple(f"channel {i}" for i in range(series.shape[-1])))
    return found, file.labels()


class Series(Task):
    """Series in a file. Networks read raw numbers, and standardise them themselves.

    A number that is to be answered is learned as (number - mean) / std of the training targets; the metric, the mean
    absolute error, is in the numbers' own unit, and `load.py` of an export answers in it.

    Args:
        path: A .csv (see `read_csv`) or .npz file (x (n, length) or (n, length, channels) and y (n,), see `npz`).
        answers: "class", "number", or "auto": classes where targets are words, or at most 100 different whole numbers.
        kind: "sequence", or "causal" where no position may see later ones.
        length: Series are cut after so many moments; none where all have as many.
        target, id, time: Names of columns, see `read_csv`.
        validation, test: Shares, where the file has no such split.
        seed: Of that.
        label_smoothing: See `Task`.
        memory_gib: What an .npz file may unpack to.
    """

    name = "series"

    def __init__(
        self,
        *,
        path: str,
        answers: Answers = "auto",
        kind: str = "sequence",
        length: int | None = None,
        target: str | None = None,
        id: str | None = None,
        time: str | None = None,
        validation: float = 0.2,
        test: float = 0.2,
        seed: int = 0,
        label_smoothing: float = Task.label_smoothing,
        memory_gib: float = 4.0,
    ) -> None:
        where = visible(str(path))
        check_shares(f"task {self.name}", validation, test, seed)
        check_memory(f"task {self.name}", memory_gib)
        if answers not in _ANSWERS or kind not in ("sequence", "causal"):
            raise ConfigError(
                f"task {self.name}: answers is {answers!r} and kind {kind!r}. Allowed: {', '.join(_ANSWERS)}; "
                "sequence, causal."
            )
        if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 2):
            raise ConfigError(f"task {self.name}: length is {length!r}, it must be a whole number from 2.")
        tables, names = _read(str(path), length, {"target": target, "id": id, "time": time}, memory_gib)
        shapes = {table.series.shape[1:] for table in tables.values()}
        if len(shapes) > 1:
            raise ConfigError(f"{where}: series of its splits have different shapes: {sorted(shapes)}.")
        self.label_smoothing, self._of_classes = label_smoothing, _are_classes(where, tables, answers)
        targets = {name: np.asarray(table.targets) for name, table in tables.items()}
        strata = np.zeros(len(targets["train"]), dtype=np.int64)
        classes: tuple[str, ...] = ("series",)
        self.metric, self.direction, self._mean, self._std = "accuracy", "max", 0.0, 1.0
        if self._of_classes:
            classes, numbered = class_numbers(where, targets, names)
            self.labels, strata = classes, numbered["train"]
            answered = {name: torch.from_numpy(of) for name, of in numbered.items()}
        shares = {"validation": validation, "test": test}
        asked = {"train": 1.0, **{name: share for name, share in shares.items() if name not in tables}}
        parts = cut(strata, asked, seed, classes, where)
        if not self._of_classes:
            self.metric, self.direction = "mae", "min"
            known = targets["train"][parts["train"]].astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):
                self._mean, self._std = float(known.mean()), float(known.std()) or 1.0
            if not math.isfinite(self._mean) or not math.isfinite(self._std):
                raise ConfigError(
                    f"{where}: targets are too large for a mean and a spread. Give them in a larger unit."
                )
            answered = {
                name: torch.from_numpy(((of.astype(np.float64) - self._mean) / self._std).astype(np.float32))
                for name, of in targets.items()
            }

        def split(name: str) -> Split:
            pool = "train" if name in parts else name
            chosen = torch.from_numpy(parts[name]) if name in parts else torch.arange(len(answered[name]))
            return Split(torch.from_numpy(tables[pool].series)[chosen], answered[pool][chosen])

        self.train, self.validation, self.test = (split(name) for name in SPLITS)
        steps, channels = next(iter(shapes))
        seen = self.train.inputs.double()
        mean, std = seen.mean((0, 1)), seen.std((0, 1), correction=0)
        std[std < 1e-12] = 1.0
        self.io = IOSpec(
            kind, (int(steps),), int(channels), len(classes) if self._of_classes else 1,
            mean=tuple(float(f"{v:.6g}") for v in mean.tolist()), std=tuple(float(f"{v:.6g}") for v in std.tolist()),
        )  # fmt: skip
        if self._of_classes:
            for name in SPLITS:
                there = torch.bincount(getattr(self, name).targets, minlength=len(classes))
                if not bool(there.all()):
                    raise ConfigError(f"{where}: class {classes[int(there.argmin())]!r} has no series in {name}.")
        arrays = [array for table in tables.values() for array in (table.series, table.targets)]
        self._told = tables["train"].told
        self._about = {
            "channels": list(tables["train"].channels),
            "sha256": digest_of_arrays(*arrays),
            "split": {name: parts[name].tolist() if name in parts else "its own" for name in SPLITS},
        }

    def record(self) -> Mapping[str, Any]:
        """See `Task`."""
        count = "/".join(str(len(getattr(self, name))) for name in SPLITS)
        io = self.io
        what = f"of {len(self.labels)} classes" if self.labels else "with a number each"
        summary = f"{sum(len(getattr(self, name)) for name in SPLITS):,} series {what}, {io.size[0]} moments of "
        summary += f"{io.in_features} channel{'s' * (io.in_features > 1)}; {count} for train/validation/test"
        summary += f"; {self._told}" if self._told else ""
        target = {} if self._of_classes else {"target": {"mean": self._mean, "std": self._std}}
        return {"task": self.name, "summary": summary, "labels": list(self.labels), **target, **self._about}

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """See `Task`; of numbers the mean squared error, of standardised ones."""
        if self._of_classes:
            return super().loss(outputs, targets, label_smoothing)
        return (outputs.squeeze(-1) - targets).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> float | Tensor:
        """See `Task`; of numbers the mean absolute error, in their own unit."""
        if self._of_classes:
            return super().score(outputs, targets)
        return (outputs.squeeze(-1) - targets).double().abs().mean() * self._std


def _are_classes(where: str, tables: Mapping[str, Table], answers: str) -> bool:
    together = np.concatenate([np.asarray(table.targets) for table in tables.values()])
    words = together.dtype.kind in "US"
    if answers == "number" and words:
        raise ConfigError(
            f"{where}: answers is 'number', and a target is {str(together[0])[:50]!r}: numbers are written as 12 or "
            f"-0.5 or 1e-3, whole ones are below {_EXACT:,}. Write them so, or say task.answers=class."
        )
    if together.dtype.kind == "f" and not np.isfinite(together.astype(np.float64)).all():
        raise ConfigError(f"{where}: targets hold NaN or infinity. Fill them in, or leave the series out.")
    if answers != "auto":
        return answers == "class"
    whole = all(np.asarray(table.targets).dtype.kind in "iub" for table in tables.values())
    return words or (whole and len(np.unique(together)) <= _MOST_CLASSES)
