"""Ctrl-C in two steps: the first asks for a clean stop, the second aborts."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """While it is entered, the first SIGINT, SIGTERM or SIGHUP sets `requested`; the next raises `KeyboardInterrupt`.

    An instance is callable and returns `requested`, so that it serves as the `should_stop` of a training loop. Outside
    the main thread, where Python delivers no signals, `request` is the only way to stop.

    Args:
        on_request: Called once, at the first signal (to say that it was heard).
    """

    def __init__(self, on_request: Callable[[], None] | None = None) -> None:
        self.requested = False
        self._on_request = on_request
        self._shields = 0
        self._abort = False
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.requested

    def request(self) -> None:
        """Ask for a clean stop, as the first signal does."""
        if not self.requested:
            self.requested = True
            if self._on_request is not None:
                self._on_request()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            # what is ignored, as SIGHUP is under nohup, stays so
            heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.request()
        elif self._shields:
            self._abort = True
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def shield(self) -> Iterator[None]:
        """Hold an abort back until the end of a short piece of work that must not be cut in two (writing a trial)."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self._abort and not self._shields:
            self._abort = False
            raise KeyboardInterrupt
