"""Progress of a run: a bar with the time left on a terminal, a line now and then elsewhere, nothing when quiet.

A run has several phases (profile, train the super-network, search, fine-tune, measure). A phase is a `Report`, so that
what is being watched needs to know nothing of this module:

    with make_progress("auto") as progress:
        with progress.phase("train supernet", total=steps, unit="steps") as phase:
            train(..., report=phase)      # calls report(step, steps, loss=0.3) as often as it likes
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from types import TracebackType
from typing import Any, TextIO

from mixnas.search_space.errors import ConfigError, visible

_LINE_SECONDS = 5.0
_BAR_SECONDS = 0.1
MODES = ("auto", "bar", "lines", "quiet")


def _short(value: float) -> str:
    """A number of three digits or more, none of them an exponent's: `5`, `5.01`, `5,180`."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text or abs(value) < 1 else f"{value:.0f}"


def format_seconds(seconds: float) -> str:
    """`45s`, `3m20s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Phase:
    """One phase of a run, a `search_space.reporting.Report`. Used in a `with` statement.

    Args:
        progress: What it belongs to.
        name: As shown.
        total: How much there is to do; None while that is unknown.
        unit: What is counted ("trials", "steps").
        seconds: Time limit of the phase, None for none: the time left is never more than what remains of it.
        initial: What an earlier session had done; it is no part of this session's speed.
    """

    def __init__(
        self,
        progress: Progress,
        name: str,
        total: float | None = None,
        *,
        unit: str = "",
        seconds: float | None = None,
        initial: float = 0,
    ) -> None:
        self.name, self.total, self.unit, self.limit, self.initial = name, total, unit, seconds, float(initial)
        self.done = self.initial
        self.info: dict[str, Any] = {}
        self._progress = progress
        self._started = time.monotonic()
        self._ended: float | None = None

    def __call__(self, done: float, total: float | None = None, **info: object) -> None:
        """Say how much is done in all (not since the last call), of how much, and what else is worth showing."""
        self.done = float(done)
        if total is not None:
            self.total = float(total)
        self.info.update(info)
        self._progress._changed(self)

    def phase(self, name: str, total: float | None = None, **about: Any) -> Phase:
        """A part of this phase, shown beside it."""
        return self._progress.phase(name, total, **about)

    def __enter__(self) -> Phase:
        self._progress._begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = time.monotonic()
        self._progress._end(self, finished=kind is None)

    @property
    def seconds(self) -> float:
        """Time since the phase began, or that it took."""
        return (self._ended or time.monotonic()) - self._started

    @property
    def per_minute(self) -> float | None:
        """Speed in this session; None before anything was done."""
        done = self.done - self.initial
        return done / self.seconds * 60 if done > 0 and self.seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Time left at this session's speed, within the phase's time limit; None while neither is known."""
        bounds = []
        if self.limit is not None:
            bounds.append(max(0.0, self.limit - self.seconds))
        if self.total is not None and self.per_minute:
            bounds.append(max(0.0, self.total - self.done) / self.per_minute * 60)
        return min(bounds) if bounds else None

    def describe(self) -> str:
        """`60/120 trials, 14.2/min, failed 3, hypervolume 0.712, 4m13s left`."""
        of = "" if self.total is None else f"/{_short(self.total)}"
        done = float(round(self.done)) if self.unit == "s" else self.done
        parts = [f"{_short(done)}{of} {self.unit}".rstrip()]
        if self.unit == "trials" and self.per_minute is not None:
            parts.append(f"{_short(self.per_minute)}/min")
        for name, value in self.info.items():
            if value is not None:
                parts.append(f"{name} {_short(value)}" if isinstance(value, float) else f"{name} {value}")
        if self._ended is None and self.seconds_left is not None:
            parts.append(f"{format_seconds(self.seconds_left)} left")
        return ", ".join(parts)


class Progress:
    """Watches the phases of a run and shows nothing: the quiet mode, and the base of the others."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []

    def phase(self, name: str, total: float | None = None, **about: Any) -> Phase:
        """A phase of this run, to be entered; see `Phase` for the arguments."""
        return Phase(self, name, total, **about)

    def note(self, text: str) -> None:
        """Show a line of text between the phases' lines."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def _begin(self, phase: Phase) -> None:
        self.phases.append(phase)

    def _changed(self, phase: Phase) -> None:
        pass

    def _end(self, phase: Phase, *, finished: bool) -> None:
        pass


class LineProgress(Progress):
    """Plain lines, at most one in `interval` seconds, and one at the end of each phase."""

    def __init__(self, stream: TextIO, *, interval: float = _LINE_SECONDS) -> None:
        super().__init__()
        self._stream, self._interval = stream, interval
        self._last = 0.0

    def note(self, text: str) -> None:
        """Write the line."""
        print(text, file=self._stream, flush=True)

    def _begin(self, phase: Phase) -> None:
        super()._begin(phase)
        self._last = time.monotonic()

    def _changed(self, phase: Phase) -> None:
        if time.monotonic() - self._last >= self._interval:
            self._last = time.monotonic()
            self.note(f"{phase.name}: {phase.describe()}")

    def _end(self, phase: Phase, *, finished: bool) -> None:
        end = "done in" if finished else "stopped after"
        self.note(f"{phase.name}: {phase.describe()}, {end} {format_seconds(phase.seconds)}")


class _Terminal(io.TextIOBase):
    """A terminal that may go away: what can no longer be drawn is not, and nothing else comes of it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See `TextIOBase`."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """See `TextIOBase`."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Of the stream."""
        with contextlib.suppress(OSError, ValueError):
            return self._stream.isatty()
        return False

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return getattr(self._stream, "encoding", None) or "utf-8"


class BarProgress(Progress):
    """A bar per phase on a terminal (rich); finished ones stay above as a line."""

    def __init__(self, stream: TextIO, *, color: bool = True) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as RichProgress

        raw: Any = _Terminal(getattr(stream, "raw", stream))
        self._console = Console(file=raw, no_color=not color, highlight=False)
        self._rich = RichProgress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            console=self._console,
            refresh_per_second=4,
        )
        self._tasks: dict[int, Any] = {}
        self._last = 0.0

    def __enter__(self) -> BarProgress:
        self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._rich.stop()

    def note(self, text: str) -> None:
        """Write the line above the bars."""
        self._console.print(visible(text), markup=False)

    def _begin(self, phase: Phase) -> None:
        super()._begin(phase)
        self._tasks[id(phase)] = self._rich.add_task(phase.name, total=phase.total, text="")
        self._last = 0.0

    def _changed(self, phase: Phase) -> None:
        now = time.monotonic()
        if now - self._last >= _BAR_SECONDS:
            self._last = now
            self._show(phase)

    def _show(self, phase: Phase) -> None:
        task, total, done = self._tasks[id(phase)], phase.total, phase.done
        if (
            phase.limit is not None
            and phase._ended is None
            and (total is None or phase.seconds * total > phase.limit * done)
        ):
            done, total = phase.seconds, phase.limit  # the time will be up before the work is done
        self._rich.update(task, completed=done, total=total, text=phase.describe())

    def _end(self, phase: Phase, *, finished: bool) -> None:
        task = self._tasks.pop(id(phase))
        text = f"{phase.describe()}, {format_seconds(phase.seconds)}" + ("" if finished else " (stopped)")
        total = phase.total or 1.0
        self._rich.update(task, total=total, completed=total if finished else min(phase.done, total), text=text)
        if not finished:
            self._rich.stop_task(task)


def make_progress(mode: str = "auto", stream: TextIO | None = None, *, color: bool = True) -> Progress:
    """The progress display for a stream.

    Args:
        mode: "bar", "lines", "quiet", or "auto": a bar on a terminal, else lines.
        stream: Where to, by default stderr.
        color: Whether a bar may have colours.

    Raises:
        ConfigError: No such mode.
    """
    stream = stream or sys.stderr
    if mode not in MODES:
        raise ConfigError(f"progress mode {mode!r} is not allowed. Allowed: {', '.join(MODES)}.")
    if mode == "quiet":
        return Progress()
    if mode == "bar" or (mode == "auto" and stream.isatty()):
        return BarProgress(stream, color=color)
    return LineProgress(stream)
