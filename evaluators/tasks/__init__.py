"""Tasks: what a network is trained and judged on. What a task of one's own needs is importable from here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "IGNORE": "mixnas.evaluators.tasks.task",
    "Prepared": "mixnas.evaluators.tasks.preparing",
    "Split": "mixnas.evaluators.tasks.task",
    "Task": "mixnas.evaluators.tasks.task",
    "by_name": "mixnas.evaluators.tasks.loading",
}

__all__ = ["IGNORE", "Prepared", "Split", "Task", "by_name"]

if TYPE_CHECKING:
    from mixnas.evaluators.tasks.loading import by_name as by_name
    from mixnas.evaluators.tasks.preparing import Prepared as Prepared
    from mixnas.evaluators.tasks.task import IGNORE as IGNORE
    from mixnas.evaluators.tasks.task import Split as Split
    from mixnas.evaluators.tasks.task import Task as Task


def __getattr__(name: str) -> Any:
    # Only when asked for: who lists the names of tasks needs no torch.
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
