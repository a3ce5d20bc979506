"""What a search is after: objectives with a direction, constraints, and filter expressions over metrics.

Expressions are read by a small parser of their own: `metric comparison number`, joined by `and`, `or` and parentheses
in filters. Nothing of the text is ever evaluated as code.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mixnas.search_space.errors import ConfigError, exactly, listed, nearest, shown

if TYPE_CHECKING:
    import numpy as np

DIRECTIONS = ("max", "min")

Metrics = Mapping[str, float]

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_METRIC = r"[A-Za-z_]\w*(?:@\w[\w.-]*)?"  # latency_ms@DEVICE
_TOKEN = re.compile(
    rf"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))|(?P<name>{_METRIC})"
    r"|(?P<comparison><=|>=|==|!=|<|>)|(?P<bracket>[()]))"
)


ABOUT = 0.1
"""What "about" allows on either side, as a share."""

_THOUSANDS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}
_ABOUT = re.compile(rf"about\s+(?P<number>\d+\.?\d*(?:[eE][-+]?\d+)?)(?P<suffix>[kMG]?)\s+(?P<metric>{_METRIC})")


@dataclass(frozen=True, slots=True)
class Objective:
    """A metric and whether more ("max") or less ("min") of it is wanted."""

    name: str
    direction: Literal["max", "min"]

    @property
    def maximise(self) -> bool:
        """Whether more is better."""
        return self.direction == "max"

    def __str__(self) -> str:
        return f"{self.name}: {self.direction}"


MOST_OBJECTIVES = 12
"""More: the hypervolume's time doubles with each."""
MOST_CONSTRAINTS = 64


def _check_number(plain: Collection[Any], most: int, source: str) -> None:
    if len(plain) > most:
        raise ConfigError(f"{source}: {len(plain):,} of them. Allowed: up to {most}.")


def parse_objectives(
    plain: Any, *, known: Iterable[str] | None = None, source: str = "objectives"
) -> tuple[Objective, ...]:
    """Read `{accuracy: max, latency_ms: min}`.

    Args:
        plain: The mapping of a configuration file, in the order in which the values are stored.
        known: The metrics that the evaluator gives; None to leave that unchecked.
        source: Name for messages.

    Raises:
        ConfigError: Not a mapping, empty, a direction other than max or min, or an unknown metric.
    """
    if not isinstance(plain, Mapping) or not plain:
        raise ConfigError(
            f"{source}: expected a mapping such as {{accuracy: max, latency_ms: min}}; got {shown(plain)}."
        )
    _check_number(plain, MOST_OBJECTIVES, source)
    objectives = []
    for name, direction in plain.items():
        _check_metric(name, known, source)
        if direction not in DIRECTIONS:
            raise ConfigError(
                f"{source}.{name}: {shown(direction)} is not a direction.{nearest(str(direction), DIRECTIONS)} "
                "Allowed: max, min."
            )
        objectives.append(Objective(name, direction))
    return tuple(objectives)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`metric comparison bound`, for example `latency_ms < 2`."""

    metric: str
    comparison: str
    bound: float

    def holds(self, metrics: Metrics) -> bool:
        """Whether it is true of these metrics; false when the metric is missing."""
        return self.metric in metrics and _COMPARISONS[self.comparison](metrics[self.metric], self.bound)

    def violation(self, metrics: Metrics) -> float:
        """How far the metric is on the wrong side, as a share of the bound: above 0 violated, at most 0 satisfied.

        Relative, so that the violations of several constraints may be added up (Optuna's samplers do). A strict
        comparison that is missed by nothing at all is violated by the smallest positive number.
        """
        scale = abs(self.bound) or 1.0
        excess = (metrics[self.metric] - self.bound) / scale
        if self.comparison in (">", ">="):
            excess = -excess
        elif self.comparison == "==":
            excess = abs(excess)
        if self.comparison in ("<", ">") and excess == 0:
            return math.ulp(0.0)
        return excess

    def violations(self, values: np.ndarray) -> np.ndarray:
        """`violation` of many values of the metric at once, (rows,) each; of a strict one the sign alone is exact."""
        excess = (values - self.bound) / (abs(self.bound) or 1.0)
        if self.comparison == "==":
            return abs(excess)
        return -excess if self.comparison in (">", ">=") else excess

    def hold(self, values: np.ndarray) -> np.ndarray:
        """`holds` of many values of the metric at once, (rows,) boolean."""
        found: np.ndarray = _COMPARISONS[self.comparison](values, self.bound)  # type: ignore[arg-type,assignment]
        return found

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {exactly(self.bound)}"


@dataclass(frozen=True, slots=True)
class Filter:
    """An expression over metrics: comparisons joined by `and`, `or`, in disjunctive normal form.

    Attributes:
        text: As it was written.
        alternatives: It holds when all comparisons of one alternative hold.
    """

    text: str
    alternatives: tuple[tuple[Comparison, ...], ...]

    def holds(self, metrics: Metrics) -> bool:
        """Whether the expression is true of these metrics; a comparison of a missing metric is false."""
        return any(all(part.holds(metrics) for part in alternative) for alternative in self.alternatives)

    def __str__(self) -> str:
        return self.text


def parse_constraint(text: Any, *, known: Iterable[str] | None = None, source: str = "constraints") -> Comparison:
    """Read one constraint such as `"params <= 2e5"`.

    Raises:
        ConfigError: Not `metric comparison number`, `!=` (it leaves nothing to steer by), or an unknown metric.
    """
    if not isinstance(text, str):
        raise ConfigError(f'{source}: expected text such as "params <= 2e5"; got {shown(text)}.')
    parsed = _Parser(text, known, source).whole()
    if len(parsed.alternatives) != 1 or len(parsed.alternatives[0]) != 1:
        raise ConfigError(f"{source}: {shown(text)} joins several comparisons. Write each as a constraint of its own.")
    constraint = parsed.alternatives[0][0]
    if constraint.comparison == "!=":
        raise ConfigError(f"{source}: {shown(text)}: != is not a constraint. Allowed: <, <=, >, >=, ==.")
    return constraint


def parse_constraints(
    plain: Any, *, known: Iterable[str] | None = None, source: str = "constraints"
) -> tuple[Comparison, ...]:
    """Read a list of constraints; see `parse_constraint`.

    "about 1M parameters" is two of them: within a tenth of it on either side (`ABOUT`).
    """
    if isinstance(plain, str) or not isinstance(plain, Sequence):
        raise ConfigError(f'{source}: expected a list such as ["params <= 2e5"]; got {shown(plain)}.')
    _check_number(plain, MOST_CONSTRAINTS, source)
    constraints: tuple[Comparison, ...] = ()
    for i, text in enumerate(plain):
        where = f"{source}[{i}]"
        both = _about(text, known, where) if isinstance(text, str) else None
        for constraint in both or (parse_constraint(text, known=known, source=where),):
            if constraint in constraints:
                raise ConfigError(f"{where}: {shown(str(constraint))} stands twice. Keep one.")
            constraints += (constraint,)
    return constraints


def _about(text: str, known: Iterable[str] | None, source: str) -> tuple[Comparison, Comparison] | None:
    """Both sides of "about 1M parameters"; None of a text that does not begin with "about"."""
    if text.split()[:1] != ["about"]:
        return None
    match = _ABOUT.fullmatch(text.strip())
    if match is None or not 0 < float(match["number"]) < math.inf:
        raise ConfigError(
            f"{source}: {shown(text)} cannot be read. Write about, a number above 0, with k, M or G where it is large, "
            'and a metric: "about 1M parameters".'
        )
    metric = "params" if match["metric"] == "parameters" else match["metric"]
    _check_metric(metric, known, source)
    bound = float(match["number"]) * _THOUSANDS[match["suffix"]]
    return Comparison(metric, ">=", bound * (1 - ABOUT)), Comparison(metric, "<=", bound * (1 + ABOUT))


def parse_filter(text: str, *, known: Iterable[str] | None = None, source: str = "--where") -> Filter:
    """Read a filter such as `latency_ms < 2 and (params < 1e4 or accuracy >= 0.97)`.

    Raises:
        ConfigError: A syntax error (with its place) or an unknown metric (with the nearest and all known).
    """
    return _Parser(text, known, source).whole()


def _check_metric(name: str, known: Iterable[str] | None, source: str) -> None:
    if known is None:
        return
    names = sorted(known)
    if name not in names:
        raise ConfigError(f"{source}: unknown metric {shown(name)}.{nearest(name, names)} Known: {listed(names)}.")


_Alternatives = tuple[tuple[Comparison, ...], ...]


class _Parser:
    """Recursive descent: or_ := and_ ("or" and_)*; and_ := term ("and" term)*; term := "(" or_ ")" | comparison."""

    _MAX_ALTERNATIVES = 1000  # brackets multiply out; nobody writes more by hand

    def __init__(self, text: str, known: Iterable[str] | None, source: str) -> None:
        self.text, self.source = text, source
        self.known = None if known is None else sorted(known)
        self.tokens: list[tuple[str, str, int]] = []
        position = 0
        while text[position:].strip():
            match = _TOKEN.match(text, position)
            if match is None:
                raise self._error("cannot be read", position)
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind)))
            position = match.end()
        self.at = 0

    def whole(self) -> Filter:
        alternatives = self._or(0)
        if self.at < len(self.tokens):
            raise self._expected("'and', 'or' or the end")
        return Filter(self.text, alternatives)

    def _error(self, what: str, position: int) -> ConfigError:
        rest = self.text[position:].strip() or "the end"
        return ConfigError(
            f"{self.source}: {shown(self.text)}: {what} at {shown(rest)}. "
            "Write for example: latency_ms < 2 and params <= 1e4."
        )

    def _expected(self, what: str) -> ConfigError:
        return self._error(
            f"expected {what}", self.tokens[self.at][2] if self.at < len(self.tokens) else len(self.text)
        )

    def _take(self, kind: str, *values: str) -> str | None:
        if self.at < len(self.tokens):
            token_kind, value, _ = self.tokens[self.at]
            if token_kind == kind and (not values or value in values):
                self.at += 1
                return value
        return None

    def _or(self, level: int) -> _Alternatives:
        alternatives = self._and(level)
        while self._take("name", "or"):
            alternatives += self._and(level)
        return alternatives

    def _and(self, level: int) -> _Alternatives:
        alternatives = self._term(level)
        while self._take("name", "and"):
            right = self._term(level)
            alternatives = tuple(a + b for a in alternatives for b in right)
            if len(alternatives) > self._MAX_ALTERNATIVES:
                raise ConfigError(f"{self.source}: the expression has too many combinations of and/or. Simplify it.")
        return alternatives

    def _term(self, level: int) -> _Alternatives:
        if level < 50 and self._take("bracket", "("):
            inner = self._or(level + 1)
            if not self._take("bracket", ")"):
                raise self._expected("')'")
            return inner
        if self.at < len(self.tokens) and self.tokens[self.at][1] in ("and", "or"):
            raise self._expected("a metric")
        name = self._take("name")
        if name is None:
            raise self._expected("a metric")
        _check_metric(name, self.known, self.source)
        comparison = self._take("comparison")
        if comparison is None:
            raise self._expected("one of <, <=, >, >=, ==, !=")
        number = self._take("number")
        if number is None or not math.isfinite(float(number)):
            self.at -= number is not None
            raise self._expected("a number")
        return ((Comparison(name, comparison, float(number)),),)
