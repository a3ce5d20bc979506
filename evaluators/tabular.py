"""Published tables: architectures that others trained and measured, as a search space and an evaluator.

`NAME.csv` has an architecture in each line; `NAME.yaml` beside it says which columns are its choices (`knobs`) and
which were measured (`metrics`, with the direction that is better), and whatever else people want to know of it. An
empty cell of a knob is a choice that this architecture does not have; of a metric, an evaluation that failed. Lines
whose cells are all empty are none.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mixnas.evaluators.protocol import Metric, Outcome, Request, attempt
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.errors import ConfigError, NasError, listed, nearest, shown, visible
from mixnas.search_space.files import load_yaml, read_bytes
from mixnas.search_space.registry import Value
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.space import INACTIVE, SearchSpace, Variable

NUMERIC = "numeric"
"""Written for a knob's values where they are whatever numbers stand in the column."""

_ABSENT = "-"  # of a knob that no other knob switches: being absent is a value of its own; see `_absent_mark`
_LARGEST_COSTS = 32_000_000  # numbers, 128 MB; of a larger table a nearest row is found without them
_AT_ONCE = 256  # vectors whose nearest rows are found together


class TableSpace(SearchSpace):
    """The architectures of a table, and no others: what would lead out of the table goes to its nearest row.

    A knob whose presence another knob decides depends on it, as in any space.

    Args:
        names: Of the knobs.
        cells: (rows, knobs) values; None where a row does not have the knob. No row stands twice.
        source: For messages.
    """

    def __init__(self, names: Sequence[str], cells: Sequence[Sequence[Value | None]], source: str) -> None:
        self.source = source
        columns = {name: [row[i] for row in cells] for i, name in enumerate(names)}
        variables, marked = _variables(columns)
        self._set_variables(tuple(variables))
        self._positions_of = [{value: i for i, value in enumerate(v.values)} for v in self.variables]
        self.rows = np.full((len(cells), len(self.variables)), INACTIVE, dtype=np.int64)
        for i, variable in enumerate(self.variables):
            positions = self._positions_of[i]
            self.rows[:, i] = [INACTIVE if cell is None else positions[cell] for cell in columns[variable.name]]
        self._row_of = {row.tobytes(): i for i, row in enumerate(self.rows)}
        # positions up to which a knob is not there
        self._absent = np.array([0 if v.name in marked else INACTIVE for v in self.variables])
        first = self._absent + 1
        ordered = [_is_numeric(v.values[f:]) for v, f in zip(self.variables, first, strict=True)]
        self._step = np.where(ordered, 1 / np.maximum(self._counts - first - 1, 1), 1.0)
        self._free = all(v.parent < 0 for v in self.variables)
        self._full = len(cells) == self._combinations()
        self._choices = [[(v.name, value) for value in v.values] for v in self.variables]
        self._by_name = sorted(range(len(self.variables)), key=lambda i: self.variables[i].name)
        self._made: dict[int, Architecture] = {}  # by row
        self._made_rows: dict[int, tuple[Architecture, int]] = {}  # by identity

    def _combinations(self) -> int:
        """Rows that a table of every combination would have; knobs that depend on others are not counted out."""
        return math.prod(int(c) for c in self._counts) if self._free else -1

    def size(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def row(self, vector: np.ndarray) -> int:
        """The row of an integer vector, or of the architecture nearest to it."""
        return int(self._rows_of(np.asarray(vector, dtype=np.int64)[None])[0])

    def _rows_of(self, vectors: np.ndarray) -> np.ndarray:
        """`row` of integer vectors (count, num_variables)."""
        found = np.array([self._row_of.get(vector.tobytes(), -1) for vector in vectors], dtype=np.intp)
        missing = np.flatnonzero(found < 0)
        for start in range(0, len(missing), _AT_ONCE):
            part = missing[start : start + _AT_ONCE]
            found[part] = self._nearest(vectors[part])
        return found

    def _nearest(self, vectors: np.ndarray) -> list[int]:
        """The first of the rows that are nearest: those that may be by rounded sums, and of these the exact ones."""
        if self._costs is None:
            return [int(np.argmin(self._distances(vector))) for vector in vectors]
        at = self._starts + np.clip(vectors, INACTIVE, self._counts - 1)
        if len(vectors) == 1:
            rough = self._costs[at[0]].sum(axis=0)[None]
        else:
            chosen = np.zeros((len(vectors), len(self._costs)), dtype=np.float32)
            np.put_along_axis(chosen, at, 1.0, axis=1)
            rough = chosen @ self._costs
        # n costs of at most 1 add up to at most n, and each addition in single precision loses at most 2^-24 of that
        lost = 2 * (len(self.variables) + 1) ** 2 * 2.0**-24
        close = rough <= rough.min(axis=1, keepdims=True) + lost
        found = []
        for vector, here in zip(vectors, close, strict=True):
            candidates = np.flatnonzero(here)
            best = np.argmin(self._distances(vector, self.rows[candidates])) if len(candidates) > 1 else 0
            found.append(int(candidates[best]))
        return found

    @cached_property
    def _costs(self) -> np.ndarray | None:
        """How far each position of each variable, -1 first, is from every row (all positions, rows)."""
        if int(self._starts[-1] + self._counts[-1]) * len(self.rows) > _LARGEST_COSTS:
            return None
        found = []
        for i, count in enumerate(self._counts):
            positions = np.arange(INACTIVE, count)[:, None]
            found.append(_apart(self.rows[:, i], positions, self._step[i], self._absent[i]).astype(np.float32))
        return np.concatenate(found)

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where the position 0 of each variable stands in `_costs` (num_variables,)."""
        sizes = self._counts + 1
        return np.cumsum(sizes) - sizes + 1

    def _distances(self, vector: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        apart = _apart(self.rows if rows is None else rows, vector, self._step, self._absent)
        return np.asarray(apart.sum(axis=1))

    # -- what a space does ---------------------------------------------------------------------------------------------

    def _walk(self, pick: Callable[[str, tuple[Value, ...]], int]) -> Architecture:
        vector = np.full(len(self.variables), INACTIVE, dtype=np.int64)
        for i, variable in enumerate(self.variables):
            if variable.parent < 0 or int(vector[variable.parent]) in variable.parent_options:
                vector[i] = pick(variable.name, variable.values)
        return self._architecture(self.row(vector))

    def _architecture(self, row: int) -> Architecture:
        """Of a row; made once."""
        made = self._made.get(row)
        if made is None:
            positions = self.rows[row].tolist()
            here = tuple(self._choices[i][positions[i]] for i in self._by_name if positions[i] >= 0)
            made = self._made[row] = Architecture(Op("row", here), Op("none"), ())
            self._made_rows[id(made)] = made, row
        return made

    def decode(self, vector: Sequence[int] | np.ndarray) -> Architecture:
        """As every space; what is not in the table becomes its nearest row."""
        if isinstance(vector, np.ndarray) and vector.dtype == np.int64 and vector.shape == (len(self.variables),):
            found = self._row_of.get(vector.tobytes())
            if found is not None:
                return self._architecture(found)
        return super().decode(vector)

    def encode(self, architecture: Architecture) -> np.ndarray:
        """As every space."""
        made, row = self._made_rows.get(id(architecture), (None, 0))
        return self.rows[row].copy() if made is architecture else super().encode(architecture)

    def active(self, matrix: np.ndarray) -> np.ndarray:
        """As every space."""
        return np.ones(np.shape(matrix), dtype=bool) if self._free else super().active(matrix)

    def _positions(self, architecture: Architecture) -> Iterator[tuple[str, int]]:
        knobs = architecture.stem.options
        for i, variable in enumerate(self.variables):
            if variable.name in knobs:
                value = knobs[variable.name]
                if value not in self._positions_of[i]:
                    allowed = ", ".join(map(str, variable.values))
                    raise ConfigError(f"{self.source}: {variable.name} is {value!r}. Allowed: {allowed}.")
                yield variable.name, self._positions_of[i][value]

    def sample_many(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random rows."""
        return self.rows[rng.integers(0, len(self.rows), size=count)]

    def complete(self, matrix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """As every space; what is not in the table becomes its nearest row."""
        filled = super().complete(matrix, rng)
        if self._full:
            return filled
        flat = np.atleast_2d(filled)
        return np.asarray(self.rows[self._rows_of(flat)].reshape(filled.shape))

    def neighbour_vectors(self, vector: np.ndarray) -> np.ndarray:
        """Rows that differ by one choice; of a table with gaps as many as that would be, the nearest, and one more.

        The one more is the next of the table, so that neighbours of neighbours are the whole of it.
        """
        if self._full:
            return super().neighbour_vectors(vector)
        distances = self._distances(vector)
        count = min(int(np.maximum(self._counts - 1, 0).sum()) + 1, len(self.rows))
        nearest_rows = np.argpartition(distances, count - 1)[:count]
        nearest_rows = nearest_rows[np.argsort(distances[nearest_rows], kind="stable")]
        following = (self.row(vector) + 1) % len(self.rows)
        chosen = [*nearest_rows[distances[nearest_rows] > 0], following]
        return self.rows[list(dict.fromkeys(chosen))]


def _apart(rows: np.ndarray, vector: np.ndarray, step: Any, absent: Any) -> np.ndarray:
    """How far positions are from each other, from 0 to 1; as far as can be where one of them is not there."""
    graded = np.minimum(np.abs(rows - vector) * step, 1.0)
    one_absent = (rows <= absent) != (vector <= absent)
    return np.where(one_absent | ((rows != vector) & (step == 1.0)), 1.0, graded)


def _is_numeric(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _variables(columns: dict[str, list[Value | None]]) -> tuple[list[Variable], set[str]]:
    """The knobs with two values or more; one that is absent in places stands behind the one that decides it.

    Where none does, being absent is a value of its own, the first, which is written into its column.

    Returns:
        The variables, and the names of those that have such a value.
    """
    values = {name: _sorted({cell for cell in cells if cell is not None}) for name, cells in columns.items()}
    absent = [name for name, cells in columns.items() if None in cells]
    made = [Variable(n, v) for n, v in values.items() if n not in absent and len(v) > 1]
    marked: set[str] = set()
    while absent:
        found = None
        for name in absent:
            for p, parent in enumerate(made):
                options = _switch(columns[parent.name], columns[name], parent.values)
                if options is not None:
                    found = Variable(name, values[name], p, options)
                    break
            if found is not None:
                break
        if found is None:
            name = absent[0]
            mark = _absent_mark(values[name])
            columns[name] = [mark if cell is None else cell for cell in columns[name]]
            found = Variable(name, (mark, *values[name]))
            marked.add(name)
        absent.remove(found.name)
        if len(found.values) > 1:
            made.append(found)
    return made, marked


def _absent_mark(values: Sequence[Value]) -> str:
    """A text that is none of a column's own values."""
    mark = _ABSENT
    while mark in values:
        mark += _ABSENT
    return mark


def _sorted(values: set[Value]) -> tuple[Value, ...]:
    numbers = _is_numeric(list(values))
    return tuple(sorted(values, key=(lambda v: float(v)) if numbers else str))


def _switch(parent: Sequence[Any], child: Sequence[Any], values: Sequence[Any]) -> frozenset[int] | None:
    """Positions of the parent's values at which the child is there; None where they do not decide it."""
    there: dict[Any, bool] = {}
    for deciding, cell in zip(parent, child, strict=True):
        if there.setdefault(deciding, cell is not None) != (cell is not None):
            return None
    if there.get(None, False):
        return None
    return frozenset(i for i, value in enumerate(values) if there.get(value, False))


@dataclass(frozen=True)
class Table:
    """A table, read.

    Attributes:
        name: As its file says.
        space: Its architectures.
        metrics: What was measured, none of it cheap.
        values: Each metric (rows,) in the order of `space.rows`; NaN where it is empty.
        lines: How many lines of the file those rows are the means of; 0 where it is not known.
    """

    name: str
    space: TableSpace
    metrics: Mapping[str, Metric]
    values: Mapping[str, np.ndarray]
    lines: int = 0

    @classmethod
    def load(cls, path: str | Path) -> Table:
        """Read `NAME.csv` with `NAME.yaml`; either may be given, or the name without an ending.

        Rows that say the same architecture are one, with the mean of what was measured.

        Raises:
            ConfigError: A file is missing or wrong: which, where, and what is allowed.
        """
        csv_path, about_path = _files(Path(path))
        knobs, directions, name = _read_about(about_path)
        lines = _read_lines(csv_path)
        if len(lines) < 2:
            raise ConfigError(f"{csv_path}: a table needs a line of names and lines of values; it has {len(lines)}.")
        _, header = lines[0]
        for column in (*knobs, *directions):
            if header.count(column) != 1:
                raise ConfigError(
                    f"{csv_path}: column {shown(column)} of {about_path.name} stands {header.count(column)} times in "
                    f"the first line.{nearest(column, header)} It has: {visible(listed(header))}."
                )
        cells: dict[tuple[Value | None, ...], list[list[float]]] = {}
        for line, row in lines[1:]:
            where = f"{csv_path}: line {line}"
            if len(row) != len(header):
                raise ConfigError(f"{where} has {len(row)} cells; the first line has {len(header)}.")
            here = dict(zip(header, row, strict=True))
            key = tuple(_knob(here[k], allowed, f"{where}: {visible(k)[:60]}") for k, allowed in knobs.items())
            cells.setdefault(key, []).append(
                [_number(here[m], f"{where}: {visible(m)[:60]}", empty=True) for m in directions]
            )
        space = TableSpace(list(knobs), list(cells), str(csv_path))
        if not space.variables:
            raise ConfigError(f"{csv_path}: every knob has the same value in all rows; there is nothing to choose.")
        means = np.array([_means(np.array(found)) for found in cells.values()])
        return cls(
            name,
            space,
            {m: Metric(m, "max" if direction == "max" else "min") for m, direction in directions.items()},
            {m: means[:, i] for i, m in enumerate(directions)},
            len(lines) - 1,
        )


def _files(path: Path) -> tuple[Path, Path]:
    """The table and what is said of it, by the name of either or of both."""
    ending = path.suffix.lower()
    base = path.with_suffix("") if ending in (".csv", ".yaml", ".yml") else path
    if base.name in ("", ".."):
        raise ConfigError(f"{path}: is a folder. Give NAME.csv, with NAME.yaml beside it.")

    def beside(*endings: str) -> Path:
        possible = [base.with_name(f"{base.name}{ending}") for ending in endings]
        return next((one for one in possible if one.exists()), possible[0])

    return (
        path if ending == ".csv" else beside(".csv", ".CSV"),
        path if ending in (".yaml", ".yml") else beside(".yaml", ".yml"),
    )


def _read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Cells of the lines that have any, each with the number of the line on which they begin."""
    try:
        text = read_bytes(path).decode("utf-8-sig")  # with the mark that spreadsheets put first, or without
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read: not UTF-8 text.") from error
    reader = csv.reader(io.StringIO(text, newline=""))
    found, read = [], 0
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                found.append((read + 1, row))
            read = reader.line_num
    except csv.Error as error:
        raise ConfigError(f"{path}: is no table: line {read + 1}: {visible(str(error))[:100]}.") from error
    return found


def _means(found: np.ndarray) -> np.ndarray:
    """Of what was measured of one architecture (lines, metrics), each metric's mean; NaN where no line has it."""
    known = np.isfinite(found)
    there = np.where(known, found, 0.0)
    count = known.sum(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        means = there.sum(axis=0) / count
        return np.where(np.isinf(means), (there / np.maximum(count, 1)).sum(axis=0), means)


def _read_about(path: Path) -> tuple[dict[str, list[str] | None], dict[str, str], str]:
    """Knobs with what they allow (None: numbers), metrics with their direction, and the table's name."""
    plain = load_yaml(path)
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{path}: expected a mapping with knobs and metrics; got {type(plain).__name__}.")
    knobs, metrics = plain.get("knobs"), plain.get("metrics")
    if not isinstance(knobs, Mapping) or not knobs:
        raise ConfigError(f"{path}: knobs: expected a mapping of columns to lists of values; got {shown(knobs)}.")
    if not isinstance(metrics, Mapping) or not metrics:
        raise ConfigError(f"{path}: metrics: expected a mapping of columns to max or min; got {shown(metrics)}.")
    for name, direction in metrics.items():
        if direction not in ("max", "min"):
            raise ConfigError(
                f"{path}: metrics.{visible(str(name))[:60]}: {shown(direction)} is not a direction. Allowed: max, min."
            )
        if name in knobs:
            raise ConfigError(f"{path}: {shown(name)} is a knob and a metric. Keep one.")
    read: dict[str, list[str] | None] = {}
    for name, values in knobs.items():
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise ConfigError(
                f"{path}: knobs.{visible(str(name))[:60]}: expected a list of values, or [{NUMERIC}]; got "
                f"{shown(values)}."
            )
        read[str(name)] = None if list(values) == [NUMERIC] else [_text(value) for value in values]
    return read, {str(m): str(d) for m, d in metrics.items()}, str(plain.get("name", path.stem))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _knob(cell: str, allowed: list[str] | None, where: str) -> Value | None:
    cell = cell.strip()
    if not cell:
        return None
    if allowed is None:
        number = _number(cell, where)
        return int(number) if number.is_integer() and abs(number) < 2**53 else number
    text = cell.lower() if cell.lower() in ("true", "false") else cell
    found = text if text in allowed else next((value for value in allowed if _same_number(value, text)), None)
    if found is None:
        raise ConfigError(
            f"{where} is {shown(cell)}.{nearest(cell, allowed)} Allowed: {visible(listed(allowed))}, or empty."
        )
    return found


def _same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def _number(cell: str, where: str, *, empty: bool = False) -> float:
    cell = cell.strip()
    if not cell and empty:
        return math.nan
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where} is {shown(cell)}. Allowed: a finite number{', or empty' if empty else ''}.")
    return number


class TabularEvaluator:
    """Looks architectures up in a table; an `Evaluator`, and its own spec.

    Args:
        path: Of the table; see `Table.load`.
        names: The metrics that an evaluation gives, and fails without; None for all of the table.
        cheap: Those of them that count as known without evaluating.
        table: The table, where it was read already.

    Raises:
        ConfigError: See `Table.load`; or a cheap metric is not one of the table's.
    """

    finishing = "look up"

    def __init__(
        self,
        path: str | Path,
        names: Sequence[str] | None = None,
        cheap: Sequence[str] = (),
        table: Table | None = None,
    ) -> None:
        self.path, self.table = path, table or Table.load(path)
        self._names, self._cheap = tuple(names if names is not None else self.table.metrics), tuple(cheap)
        for name in (*self._names, *self._cheap):
            if name not in self.table.metrics:
                known = ", ".join(self.table.metrics)
                raise ConfigError(
                    f"{path}: no metric is called {shown(name)}.{nearest(name, self.table.metrics)} It has: {known}."
                )
        for name in self._cheap:
            if name not in self._names:
                raise ConfigError(f"{path}: {name} is cheap, but none of {', '.join(self._names)}. Add it or leave it.")
            if not np.isfinite(self.table.values[name]).all():
                raise ConfigError(f"{path}: {name} is empty in some rows, so that it is not known without evaluating.")
        self.space = self.table.space

    def __reduce__(self) -> tuple[Any, ...]:
        return TabularEvaluator, (self.path, self._names, self._cheap)

    @property
    def spec(self) -> TabularEvaluator:
        """See `Evaluator`."""
        return self

    def open(self) -> TabularEvaluator:
        """See `EvaluatorSpec`."""
        return self

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See `Evaluator`."""
        known = self.table.metrics
        return {name: Metric(name, known[name].direction, name in self._cheap) for name in self._names}

    def prepare(self, report: Report = SILENT, should_stop: Callable[[], bool] | None = None) -> None:
        """Nothing has to be."""

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """See `Evaluator`."""
        rows = np.array([self.space.row(vector) for vector in np.asarray(matrix)], dtype=np.intp)
        return {name: self.table.values[name][rows] for name in self._cheap}

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """See `Evaluator`."""
        return [attempt(self._evaluate, request) for request in requests]

    def _evaluate(self, request: Request) -> Outcome:
        row = self.space.row(self.space.encode(request.architecture))
        metrics = {name: float(self.table.values[name][row]) for name in self._names}
        empty = [name for name, value in metrics.items() if math.isnan(value)]
        return Outcome({}, f"the table has no {', '.join(empty)}") if empty else Outcome(metrics)

    def finish(
        self, architecture: Architecture, report: Report = SILENT, should_stop: Callable[[], bool] | None = None
    ) -> Any:
        """See `Evaluator`.

        Raises:
            NasError: Always: a table holds numbers, not networks.
        """
        raise NasError(f"{self.path}: a table holds numbers, not networks; there is none to finish.")
