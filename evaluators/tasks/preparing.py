"""How a task prepares its inputs outside the network, as plain data: so that an export can say it, and do it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def prepare(raw: Any, divided_by: float, mean: Any, std: Any, repeated: int) -> Any:
    """What networks read of raw inputs (n, *size, channels): (raw / divided_by - mean) / std, each place repeated.

    mean and std are of each channel. `load.py` of an export holds the text of this function.
    """
    found: Any = np.asarray(raw, dtype=np.float32) / np.float32(divided_by)
    found = (found - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    for axis in range(1, found.ndim - 1):
        found = found.repeat(repeated, axis)
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What the networks of a task read, of raw features: (raw / divided_by - mean) / std, each place repeated.

    A task whose `IOSpec` has mean and std does not need it: there the network reads raw features.

    Attributes:
        what: What a raw feature is, for people: "pixels".
        low, high: Between which raw features are. `load.py` of an export refuses others.
        mean, std: Of each channel, after the division.
        divided_by: By what raw features are divided first.
        repeated: How often each place comes along each extent.

    Examples:
        >>> Prepared(what="pixels", low=0, high=255, mean=(0.5,), std=(0.25,), divided_by=255)([[[[255.0]]]]).item()
        2.0
    """

    what: str
    low: float
    high: float
    mean: Sequence[float]
    std: Sequence[float]
    divided_by: float = 1.0
    repeated: int = 1

    def __call__(self, raw: Any) -> NDArray[np.float32]:
        """Inputs (n, *size, channels) float32 as networks read them, of raw ones."""
        found: NDArray[np.float32] = prepare(raw, self.divided_by, self.mean, self.std, self.repeated)
        return found

    def raw_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Extents of raw inputs, of those that a network reads."""
        return tuple(extent // self.repeated for extent in size)

    def in_words(self) -> str:
        """The sum that is done, with its numbers, channel by channel where there are several."""
        divided = f"raw / {self.divided_by:.9g}" if self.divided_by != 1 else "raw"
        mean, std = (_numbers(values) for values in (self.mean, self.std))
        again = f", each place {self.repeated} times along each extent" if self.repeated > 1 else ""
        return f"({divided} - {mean}) / {std}{again}"

    def to_plain(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Prepared:
        """The inverse."""
        return cls(**plain)


def _numbers(values: Sequence[float]) -> str:
    text = ", ".join(f"{value:.9g}" for value in values)
    return text if len(values) == 1 else f"[{text}]"
