"""Tasks: what a network is trained and judged on. What a task of one's own needs is importable from here."""

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import IGNORE, Split, Task

__all__ = ["IGNORE", "Split", "Task", "by_name"]
