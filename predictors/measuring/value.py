"""The one value that a latency is, measured or predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of one network on one device.

    Attributes:
        ms: Milliseconds of one forward.
        low_ms: Lower end of the 90% interval.
        high_ms: Upper end.
        kind: Whether it was measured or predicted.
        outside: Of a prediction: what lies outside the measured range, in words; empty when nothing does.
    """

    ms: float
    low_ms: float
    high_ms: float
    kind: Literal["measured", "predicted"]
    outside: tuple[str, ...] = ()

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
