"""What a benchmark keeps: a record that was computed is written, whatever a summary in it cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def sayable(value: Any) -> Any:
    """Plain data as JSON can say it: a number that is none (a mean of nothing, a share of no ceiling) becomes null."""
    if isinstance(value, Mapping):
        return {key: sayable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [sayable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
