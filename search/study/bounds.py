"""Constraints looked at by themselves: whether any numbers at all keep all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixnas.search.study.objectives import Comparison, parse_constraints
from mixnas.search_space.errors import ConfigError, exactly, shown

_LOWER, _UPPER = (">", ">=", "=="), ("<", "<=", "==")


def check_contradictions(texts: Sequence[str], source: str = "constraints") -> None:
    """Refuse constraints of which two leave no value of a metric.

    Args:
        texts: As they were written; each can be read.
        source: Name for messages.

    Raises:
        ConfigError: Names both, and what they ask for.
    """
    least: dict[str, tuple[Comparison, int]] = {}  # the tightest bound of each metric, and where it was written
    most: dict[str, tuple[Comparison, int]] = {}
    for i, text in enumerate(texts):
        for one in parse_constraints([text], source=f"{source}[{i}]"):
            if one.comparison in _LOWER:
                tightest = least.get(one.metric, (one, i))
                least[one.metric] = max(tightest, (one, i), key=lambda at: (at[0].bound, at[0].comparison == ">"))
            if one.comparison in _UPPER:
                tightest = most.get(one.metric, (one, i))
                most[one.metric] = min(tightest, (one, i), key=lambda at: (at[0].bound, at[0].comparison != "<"))
    for metric in [name for name in least if name in most]:
        (low, i), (high, j) = least[metric], most[metric]
        strict = low.comparison == ">" or high.comparison == "<"
        if low.bound > high.bound or (low.bound == high.bound and strict):
            first, second = sorted((i, j))
            both = f"{shown(texts[first])} and {shown(texts[second])}"
            raise ConfigError(
                f"{source}[{first}] and {source}[{second}]: {both} cannot both be kept: {metric} would have to be "
                f"{_words(low, low=True)} and {_words(high, low=False)}. Change one of them."
            )


def _words(one: Comparison, *, low: bool) -> str:
    if one.comparison == "==":
        return f"exactly {exactly(one.bound)}"
    strictly, other = ("above", "at least") if low else ("below", "at most")
    return f"{other if '=' in one.comparison else strictly} {exactly(one.bound)}"


@dataclass(frozen=True, slots=True)
class Range:
    """The values that a metric can have.

    Attributes:
        low: The least.
        high: The greatest.
        words: What it is, for messages.
        has_low: Whether it can be as little as `low`.
    """

    low: float
    high: float
    words: str
    has_low: bool = True

    def allows(self, constraint: Comparison) -> bool:
        """Whether any of the values keeps a constraint."""
        bound = constraint.bound
        above = self.low < bound or (self.low == bound and self.has_low and constraint.comparison != "<")
        below = bound < self.high or (bound == self.high and constraint.comparison != ">")
        if constraint.comparison == "==":
            return above and below
        return above if constraint.comparison in _UPPER else below


SHARE = Range(0.0, 1.0, "a share, from 0 to 1")
POSITIVE = Range(0.0, float("inf"), "measured, and above 0", has_low=False)
