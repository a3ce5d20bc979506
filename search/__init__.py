"""The search floor. Called, it searches: `mixnas.search("mine.yaml")` is `mixnas.search.job.search`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixnas.search.run.directory import Run


class _Callable(ModuleType):
    """This package. Importing anything of it puts it in place of a function `mixnas.search`, so it is one itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Run:
        """A whole search; see `mixnas.search.job.search`."""
        from mixnas.search.job import search

        return search(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
