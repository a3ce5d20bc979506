"""Series and their targets from tables: CSV and Parquet files, a line for a series or for a moment of one."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixnas.evaluators.tasks.arrays import check_file
from mixnas.search_space.errors import ConfigError, listed, nearest, visible

_TARGETS = ("target", "label", "class")
_IDS = ("id", "series", "series_id")
_TIMES = ("time", "t", "step", "timestamp")
_DECIMAL = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_COMMA = re.compile(r"[-+]?[0-9]*,[0-9]+([eE][-+]?[0-9]+)?")
_LARGEST = float(np.finfo(np.float32).max)
EXACT = 1 << 53
"""Whole numbers below are each a number of its own."""

_MOST_CELLS = 1 << 26
_LONGEST_WORD = 1000
"""Characters: an array of words has room for the longest in each of its places."""


@dataclass(frozen=True, slots=True)
class Table:
    """Series and their targets.

    Attributes:
        series: (n, L, C) float32; NaN behind the end of a series that is shorter than the longest.
        targets: (n,) numbers or words.
        channels: Names of the channels.
        told: What is read from which column, for a summary; "" where there are none.
    """

    series: NDArray[np.float32]
    targets: NDArray[Any]
    channels: tuple[str, ...]
    told: str = ""


def read_csv(
    path: Path,
    *,
    target: str | None,
    id: str | None,
    time: str | None,
    length: int | None,
    memory_gib: float = 4.0,
) -> Table:
    """Series from a CSV file whose first line names its columns.

    With a column of ids that come again, a line is one moment of a series, in the order of the column of times, or of
    the lines; the other columns are channels, and the target is the same in all lines of a series. Without, or where
    all ids differ, a line is a series, and the other columns are its moments in order: one that is shorter has empty
    cells at its end.

    Args:
        path: The file, UTF-8; "," or ";" or tabs between the columns, and with the latter two a decimal comma too.
        target: The column of the targets; by default the one that is called target, label or class, else y, unless it
            stands with x and z.
        id: The column of ids; by default id, series or series_id, where there is one.
        time: The column of times, numbers; by default time, t, step or timestamp, where there is one.
        length: Series are cut after so many moments; None for as many as the longest has.
        memory_gib: What the series may take, all filled up to the longest; and what their targets may.

    Raises:
        ConfigError: Something is missing or no finite number, all have one moment, two columns might be the target or
            the id, or it unpacks to too much. It names the line or the columns.
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
    if delimiter != ",":
        rows = _with_points(where, rows)
    return _as_table(where, columns, rows, target=target, id=id, time=time, length=length, memory_gib=memory_gib)


def read_parquet(
    path: Path,
    *,
    target: str | None,
    id: str | None,
    time: str | None,
    length: int | None,
    memory_gib: float = 4.0,
) -> Table:
    """Series from a Parquet file; what its columns are, is told as of a CSV file.

    Args:
        path: The file; its columns are numbers or words.
        target, id, time, length, memory_gib: See `read_csv`.

    Raises:
        ConfigError: It is damaged, unpacks to too much, or has a column of something else; and see `read_csv`.
    """
    import pyarrow
    from pyarrow import compute, parquet, types

    where = visible(str(path))
    check_file(path)
    try:
        words = [field.name for field in parquet.read_schema(path) if not types.is_nested(field.type)]
        with parquet.ParquetFile(path, read_dictionary=words) as file:  # a word that comes again is unpacked once
            schema, count = file.schema_arrow, file.metadata.num_rows
            if count * max(len(schema), 1) > _MOST_CELLS:
                raise ConfigError(
                    f"{where}: has {count:,} lines of {len(schema)} columns; at most {_MOST_CELLS:,} values are read. "
                    "Give less, or an .npz file."
                )
            for field in schema:
                kind = field.type.value_type if types.is_dictionary(field.type) else field.type
                plain = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
                if not plain and not types.is_string(kind) and not types.is_large_string(kind):
                    raise ConfigError(
                        f"{where}: column {visible(field.name)} is of type {field.type}; numbers and words are read. "
                        "Bring it into one of them, or take the column out."
                    )
            table = file.read()
            for name, column in zip(table.column_names, table.columns, strict=True):
                for chunk in column.chunks:
                    own = chunk.dictionary if types.is_dictionary(chunk.type) else chunk
                    if types.is_string(own.type) or types.is_large_string(own.type):
                        _check_longest(where, name, compute.max(compute.utf8_length(own)).as_py() or 0)
            values = [column.to_pylist() for column in table.columns]
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = visible(" ".join(str(error).split()))[:150]
        raise ConfigError(f"{where}: cannot be read as Parquet ({reason}). Save it again.") from error
    rows = [["" if value is None else str(value) for value in row] for row in zip(*values, strict=True)]
    columns = [name.strip() for name in schema.names]
    return _as_table(where, columns, rows, target=target, id=id, time=time, length=length, memory_gib=memory_gib)


def _with_points(where: str, rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Lines whose numbers are written with a point, where the file writes all with a comma."""
    lines = [number for number, row in enumerate(rows, 2) if any(_COMMA.fullmatch(cell.strip()) for cell in row)]
    if not lines:
        return [list(row) for row in rows]
    for number, row in enumerate(rows, 2):
        for cell in row:
            if "." in cell and _DECIMAL.fullmatch(cell.strip()):
                raise ConfigError(
                    f"{where}: line {lines[0]} writes numbers with a comma, and line {number} one with a point, "
                    f"{cell.strip()[:50]!r}. Write all of them with a point."
                )
    return [[cell.replace(",", ".") if _COMMA.fullmatch(cell.strip()) else cell for cell in row] for row in rows]


def _check_longest(where: str, column: str, characters: int) -> None:
    if characters > _LONGEST_WORD:
        raise ConfigError(
            f"{where}: column {visible(column)[:100]} has a value of {characters:,} characters; at most "
            f"{_LONGEST_WORD:,} are read. Shorten it, or take the column out."
        )


def _as_table(
    where: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    target: str | None,
    id: str | None,
    time: str | None,
    length: int | None,
    memory_gib: float,
) -> Table:
    """What `read_csv` says, of lines that were read."""
    if len(set(columns)) < len(columns) or not rows:
        problem = "has two columns of one name" if rows else "has no line behind the names of its columns"
        raise ConfigError(f"{where}: {problem}.")
    for number, row in enumerate(rows, 2):
        if len(row) != len(columns):
            raise ConfigError(f"{where}, line {number}: has {len(row)} values for {len(columns)} columns.")
        longest = max(map(len, row))  # for each row of many: what is said of it is made where it is refused
        if longest > _LONGEST_WORD:
            column = columns[[len(cell) for cell in row].index(longest)]
            _check_longest(f"{where}, line {number}", column, longest)
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
    values = _numbers(where, rows, [columns.index(name) for name in channels], channels, open_end=wide)
    words = [row[columns.index(found["target"])].strip() for row in rows]
    _check_words(where, found["target"], words, memory_gib)
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
        ended = [one[: int(there.sum())] for one, there in zip(series, ~np.isnan(values), strict=True)]
        return Table(cut_to(where, ended, length, memory_gib), _as_targets(where, words), names, told)
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
    series = cut_to(where, [values[own] for own in lines.values()], length, memory_gib)
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
    where: str, rows: Sequence[Sequence[str]], columns: Sequence[int], names: Sequence[str], *, open_end: bool = False
) -> NDArray[np.float32]:
    """(rows, columns) finite numbers; with an open end, NaN for the empty cells behind a row's last number."""
    found = np.full((len(rows), len(columns)), math.nan)
    for number, row in enumerate(rows):
        count = len(columns)
        while open_end and count > 1 and not row[columns[count - 1]].strip():
            count -= 1
        for at, column in enumerate(columns[:count]):
            try:
                found[number, at] = math.nan if "_" in row[column] else float(row[column])
            except ValueError:
                found[number, at] = math.nan
            if not abs(found[number, at]) <= _LARGEST:
                large = math.isfinite(found[number, at])
                what = f"larger than a float32 holds ({_LARGEST:.2g})" if large else "no finite number"
                raise ConfigError(
                    f"{where}, line {number + 2}: {names[at]} is {row[column][:50]!r}, {what}. Fill it in, "
                    "or leave the series out."
                )
    return found.astype(np.float32)


def _check_words(where: str, column: str, words: Sequence[str], memory_gib: float) -> None:
    """Refuse targets that take too much: an array has room for the longest in each place, 4 bytes a character."""
    longest = max(map(len, words))
    needed = 4 * longest * len(words)
    if needed > memory_gib * 2**30:
        raise ConfigError(
            f"{where}: {visible(column)[:100]}, the target, unpacks to {needed / 2**30:,.3g} GiB: {len(words):,} "
            f"values, the longest of {longest:,} characters; memory_gib allows {memory_gib:g}. Raise that, or shorten "
            "the longest."
        )


def cut_to(
    where: str,
    series: Sequence[NDArray[np.float32]],
    length: int | None,
    memory_gib: float,
    longest: int | None = None,
) -> NDArray[np.float32]:
    """(n, L, C) of series that are cut to a length, or to that of the longest; NaN behind the end of shorter ones.

    Args:
        where: The file, for messages.
        series: (moments, C) each.
        length: To be cut to; None for `longest`.
        memory_gib: What they may take.
        longest: Moments of the longest series that there is, here or in another split; None where these are all.

    Raises:
        ConfigError: Series have one moment, or fewer than are asked for, or take more than memory_gib allows.
    """
    longest = longest or max(map(len, series))
    wanted = length or longest
    if wanted < 2:
        raise ConfigError(
            f"{where}: series have 1 moment, and need 2 at least. Give a line for each moment, with the id of its "
            "series, or a line for a series with a column for each moment; of an .npz file x is (n, length, channels)."
        )
    if longest < wanted:
        raise ConfigError(f"{where}: the longest series has {longest} moments, and length asks for {wanted}.")
    needed = len(series) * wanted * series[0].shape[-1] * np.dtype(np.float32).itemsize
    if needed > memory_gib * 2**30:
        middle = sorted(map(len, series))[len(series) // 2]
        raise ConfigError(
            f"{where}: unpacks to {needed / 2**30:,.3g} GiB, and memory_gib allows {memory_gib:g}: its {len(series):,} "
            f"series are filled up to {wanted:,} moments, and half have at most {middle:,}. Raise that, or cut them "
            "with length."
        )
    found = np.full((len(series), wanted, series[0].shape[-1]), np.nan, dtype=np.float32)
    for row, one in zip(found, series, strict=True):
        row[: len(one)] = one[:wanted]
    return found


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
    if not all(abs(number) < EXACT for number in numbers.values()):
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
