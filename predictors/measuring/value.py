"""The one value that a latency is, measured or predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of one network on one device.

    Attributes:
        ms: Milliseconds of one forward.
        low_ms: Lower end of the 90% interval; None where there is no telling: of a prediction, when something of it was
            never measured, and too little else to know how far off such a guess is.
        high_ms: Upper end, likewise.
        kind: Whether it was measured or predicted.
        outside: Of a prediction: what lies outside the measured range, in words; empty when nothing does.
    """

    ms: float
    low_ms: float | None
    high_ms: float | None
    kind: Literal["measured", "predicted"]
    outside: tuple[str, ...] = ()

    @property
    def ends(self) -> dict[str, float]:
        """The ends of the interval as metrics; empty where there is none."""
        if self.low_ms is None or self.high_ms is None:
            return {}
        return {"latency_low_ms": self.low_ms, "latency_high_ms": self.high_ms}

    @property
    def half_width(self) -> float:
        """Half of the interval on a logarithmic scale; infinite where there is none."""
        if self.low_ms is None or self.high_ms is None:
            return math.inf
        return math.log(self.high_ms / self.low_ms) / 2

    def to_plain(self) -> dict[str, Any]:
        """Plain data; `from_plain` is its inverse."""
        return {
            "ms": self.ms,
            "low_ms": self.low_ms,
            "high_ms": self.high_ms,
            "kind": self.kind,
            "outside": list(self.outside),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Latency:
        """The inverse of `to_plain`."""
        return cls(**{**plain, "outside": tuple(plain["outside"])})
