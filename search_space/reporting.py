"""How work tells of its progress: one protocol, on every floor.

Work that takes time has a `report` argument. It calls `report(done, total, name=value, ...)` as often as it likes, and
`report.phase(...)` where it has parts with names of their own. Who shows it (a bar, lines, nothing) is not its concern.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Report(Protocol):
    """What long work is given, and tells of its progress."""

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        """Say how much is done in all (not since the last call), of how much, and what else is worth showing.

        Args:
            done: In the phase's unit.
            total: None where it has not changed or is unknown.
            **info: Numbers and words by name, for example `loss=0.31`; None is not shown.
        """

    def phase(
        self,
        name: str,
        total: float | None = None,
        *,
        unit: str = "",
        seconds: float | None = None,
        initial: float = 0,
    ) -> AbstractContextManager[Report]:
        """A part of the work with a name of its own, to be entered.

        Args:
            name: As shown.
            total: How much there is to do, None while that is unknown.
            unit: What is counted: "trials", "steps", "networks", "s".
            seconds: Time limit of the phase; None for none.
            initial: What an earlier session had done of it.
        """


class SilentReport:
    """Reports to nobody; a report that needs only one of the two is derived from it."""

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        """Say nothing."""

    @contextmanager
    def phase(self, name: str, total: float | None = None, **about: Any) -> Iterator[Report]:
        """Say nothing of a part."""
        yield self


SILENT: Report = SilentReport()
"""Reports to nobody."""
