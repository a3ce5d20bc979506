"""stdout and stderr as a command line needs them: nothing of a file reaches the terminal as a command to it.

A reader of stderr that went away (`2>&1 | head -1`), or a terminal that was closed, stops no search. stdout is the
answer: that it could not be written is said, once.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from mixnas.search_space.errors import visible


class Stream(io.TextIOBase):
    """Text to a stream, control characters spelled out.

    Attributes:
        raw: The stream itself, for what draws (rich); what it is given is made visible before.
        failed: The first error of writing; later text goes nowhere.

    Args:
        raw: Where to; None where it is closed.
        quiet: Whether errors are kept to itself instead of raised.
    """

    def __init__(self, raw: TextIO | None, *, quiet: bool) -> None:
        self.raw: Any = self if raw is None else raw
        self._target, self._quiet = raw, quiet
        self.failed: OSError | None = None if raw is not None else OSError("it is closed")

    def write(self, text: str) -> int:
        """See `TextIOBase`."""
        self._try(lambda target: target.write(visible(text)))
        return len(text)

    def flush(self) -> None:
        """See `TextIOBase`."""
        self._try(lambda target: target.flush())

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._target is not None and self._target.isatty()

    def writable(self) -> bool:
        """It is."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return getattr(self._target, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        """Of the stream."""
        if self._target is None:
            raise OSError("closed")
        return self._target.fileno()

    def _try(self, act: Any) -> None:
        if self.failed is not None or self._target is None:
            return
        try:
            act(self._target)
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError) as error:
            self.failed = error if isinstance(error, OSError) else OSError(str(error))
            if not self._quiet:
                raise self.failed from error


@contextlib.contextmanager
def guarded() -> Iterator[tuple[Stream, Stream]]:
    """stdout and stderr of a verb, in the place of Python's own."""
    before = sys.stdout, sys.stderr
    out, err = Stream(before[0], quiet=False), Stream(before[1], quiet=True)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    try:
        yield out, err
    finally:
        sys.stdout, sys.stderr = before
        for stream in (out, err):
            if stream.failed is not None:
                _discard(stream)


def _discard(stream: Stream) -> None:
    """What is still in a broken stream's buffer goes nowhere, so that Python's end does not stumble over it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
