"""Series of numbers from a CSV, a Parquet or an .npz file: which class each is of, or a number for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mixnas.evaluators.tasks.arrays import as_float32, class_numbers
from mixnas.evaluators.tasks.npz import NpzFile, read_pairs
from mixnas.evaluators.tasks.options import check_flags, check_memory, check_shares
from mixnas.evaluators.tasks.pictures import cut, digest_of_arrays, weights_of
from mixnas.evaluators.tasks.tables import EXACT, Table, cut_to, read_csv, read_parquet
from mixnas.evaluators.tasks.task import SPLITS, Split, Task
from mixnas.search_space.errors import ConfigError, visible
from mixnas.search_space.units import IOSpec

_MOST_CLASSES = 100  # so many different whole numbers are taken for classes

Answers = Literal["auto", "class", "number"]
_ANSWERS = ("auto", "class", "number")


def _read(
    path: str, length: int | None, columns: Mapping[str, str | None], memory_gib: float
) -> tuple[dict[str, Table], list[str] | None]:
    """Tables by split, all under "train" where the file has none, and the names of classes that it gives."""
    if not path.lower().endswith(".npz"):
        read_file = read_parquet if path.lower().endswith(".parquet") else read_csv
        return {"train": read_file(Path(path), length=length, memory_gib=memory_gib, **columns)}, None
    file = NpzFile(path, memory_gib)
    read: dict[str, tuple[list[NDArray[np.float32]], NDArray[Any]]] = {}
    for split, (x, y) in read_pairs(file).items():
        where = f"{file.where}: {split}"
        if x.ndim not in (2, 3) or x.dtype.kind not in "iuf" or 0 in x.shape:
            raise ConfigError(f"{where}: series have shape {x.shape} and type {x.dtype}; it is (n, length, channels).")
        series = as_float32(f"{where}: series", x).reshape(*x.shape[:2], -1)
        lengths = _lengths(where, series)
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        if y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iufbUS":
            raise ConfigError(f"{where}: targets have shape {y.shape} and type {y.dtype}; one for each of {len(x)}.")
        read[split] = [one[:n] for one, n in zip(series, lengths, strict=True)], y
    longest = max(len(one) for uneven, _ in read.values() for one in uneven)
    found = {}
    for split, (uneven, y) in read.items():
        cut = cut_to(f"{file.where}: {split}", uneven, length, memory_gib, longest)
        found[split] = Table(cut, y, tuple(f"channel {i}" for i in range(cut.shape[-1])))
    return found, file.labels()


def _lengths(where: str, series: NDArray[np.float32]) -> NDArray[np.int64]:
    """(n,) moments of each series, whose end is where all that follows is NaN in every channel."""
    there: NDArray[np.bool_] = np.any(~np.isnan(series), axis=2)
    lengths = np.where(np.any(there, axis=1), there.shape[1] - np.argmax(there[:, ::-1], axis=1), 0)
    before = np.arange(series.shape[1])[None, :, None] < lengths[:, None, None]
    if not (np.isfinite(series) | ~before).all() or not lengths.all():
        first = int(np.flatnonzero(~(np.isfinite(series) | ~before).all((1, 2)) | (lengths == 0))[0])
        raise ConfigError(
            f"{where}: series hold NaN or infinity, series {first} first. Fill them in, or leave the series out; of "
            "one that is shorter than others, all moments behind its end are NaN in each channel."
        )
    return lengths


class Series(Task):
    """Series in a file. Networks read raw numbers, and standardise them themselves.

    Series of different lengths are filled up with NaN to the longest. Networks are then of operators that can be told
    where a series ends (`IOSpec.padded`), or, with kind "causal", of any that see no later moment.

    A number that is to be answered is learned as (number - mean) / std of the training targets; the metric, the mean
    absolute error, is in the numbers' own unit, and `load.py` of an export answers in it.

    Args:
        path: A .csv or .parquet file, see `read_csv`; or .npz, x (n, length) or (n, length, channels) and y (n,), see
            `npz`.
        answers: "class", "number", or "auto": classes where targets are words, or at most 100 different whole numbers.
        kind: "sequence", or "causal" where no position may see later ones.
        length: Series are cut after so many moments; none for as many as the longest has.
        target, id, time: Names of columns, see `read_csv`.
        validation, test: Shares, where the file has no such split.
        seed: Of that.
        weighted: Whether a class counts the more in training the rarer it is.
        label_smoothing: See `Task`.
        memory_gib: What the file may unpack to, its series filled up to the longest.
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
        weighted: bool = False,
        label_smoothing: float = Task.label_smoothing,
        memory_gib: float = 4.0,
    ) -> None:
        where = visible(str(path))
        check_shares(f"task {self.name}", validation, test, seed)
        check_memory(f"task {self.name}", memory_gib)
        check_flags(f"task {self.name}", weighted=weighted)
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
        self.is_share = self._of_classes and type(self).score is Series.score
        self.metric, self.direction, self._mean, self._std = "accuracy", "max", 0.0, 1.0
        if self._of_classes:
            classes, numbered = class_numbers(where, targets, names, "series")
            self.labels, strata = classes, numbered["train"]
            answered = {name: torch.from_numpy(of) for name, of in numbered.items()}
        shares = {"validation": validation, "test": test}
        asked = {"train": 1.0, **{name: share for name, share in shares.items() if name not in tables}}
        parts = cut(strata, asked, seed, classes, where, "series")
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
                name: torch.from_numpy(
                    as_float32(
                        f"{where}: standardised targets of {name}", (of.astype(np.float64) - self._mean) / self._std
                    )
                )
                for name, of in targets.items()
            }

        def split(name: str) -> Split:
            pool = "train" if name in parts else name
            chosen = torch.from_numpy(parts[name]) if name in parts else torch.arange(len(answered[name]))
            return Split(torch.from_numpy(tables[pool].series)[chosen], answered[pool][chosen])

        self.train, self.validation, self.test = (split(name) for name in SPLITS)
        steps, channels = next(iter(shapes))
        seen = self.train.inputs.double()
        padded = any(bool(getattr(self, name).inputs.isnan().any()) for name in SPLITS)
        mean = seen.nanmean((0, 1))
        std = (seen - mean).square().nanmean((0, 1)).sqrt()
        std[std < 1e-12] = 1.0
        self.io = IOSpec(
            kind, (int(steps),), int(channels), len(classes) if self._of_classes else 1, padded=padded,
            mean=tuple(float(f"{v:.6g}") for v in mean.tolist()), std=tuple(float(f"{v:.6g}") for v in std.tolist()),
        )  # fmt: skip
        self._weights: Tensor | None = None
        if weighted and not self._of_classes:
            raise ConfigError(f"{where}: weighted is of classes, and its targets are numbers. Leave it out.")
        if self._of_classes:
            for name in SPLITS:
                there = torch.bincount(getattr(self, name).targets, minlength=len(classes))
                if not bool(there.all()):
                    raise ConfigError(f"{where}: class {classes[int(there.argmin())]!r} has no series in {name}.")
                if weighted and name == "train":
                    self._weights = weights_of(there.numpy())
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
        shortest = min(int((~getattr(self, name).inputs[..., 0].isnan()).sum(1).min()) for name in SPLITS)
        moments = f"{shortest} to {io.size[0]}" if io.padded else str(io.size[0])
        summary = f"{sum(len(getattr(self, name)) for name in SPLITS):,} series {what}, {moments} moments of "
        summary += f"{io.in_features} channel{'s' * (io.in_features > 1)}; {count} for train/validation/test"
        summary += f"; {self._told}" if self._told else ""
        target = {} if self._of_classes else {"target": {"mean": self._mean, "std": self._std}}
        return {"task": self.name, "summary": summary, "labels": list(self.labels), **target, **self._about}

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """See `Task`; of numbers the mean squared error, of standardised ones."""
        if self._of_classes:
            return super().loss(outputs, targets, label_smoothing)
        return (outputs.squeeze(-1) - targets).square().mean()

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """See `Task`; a mean that is weighted by class, where that is asked for."""
        if self._weights is None:
            return super().training_loss(outputs, targets)
        weights = self._weights.to(outputs)
        return F.cross_entropy(outputs, targets, weight=weights, label_smoothing=self.label_smoothing)

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
            f"-0.5 or 1e-3, whole ones are below {EXACT:,}. Write them so, or say task.answers=class."
        )
    if together.dtype.kind == "f" and not np.isfinite(together.astype(np.float64)).all():
        raise ConfigError(f"{where}: targets hold NaN or infinity. Fill them in, or leave the series out.")
    if answers != "auto":
        return answers == "class"
    whole = all(np.asarray(table.targets).dtype.kind in "iub" for table in tables.values())
    return words or (whole and len(np.unique(together)) <= _MOST_CLASSES)
