"""Stopping a run where a test wants it stopped. Not a test module."""

from __future__ import annotations

from typing import Any

from mixnas.search.run.progress import Progress
from mixnas.search.run.stopping import StopSignal


class StopIn(Progress):
    """Asks for a stop when a phase is entered, as Ctrl-C then would."""

    def __init__(self, name: str, stop: StopSignal) -> None:
        super().__init__()
        self.wanted, self.stop = name, stop

    def _begin(self, phase: Any) -> None:
        super()._begin(phase)
        if phase.name == self.wanted:
            self.stop.request()
