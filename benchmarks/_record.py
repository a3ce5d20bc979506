"""What a benchmark keeps: a record that was computed is written, whatever a summary in it cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
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


def said(arguments: Sequence[str]) -> str:
    """Arguments of a command as a record keeps them: of a place on this machine, its name alone."""
    return " ".join(Path(one).name if Path(one).is_absolute() else one for one in arguments)
