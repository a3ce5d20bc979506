from __future__ import annotations

import io

import pytest

from mixnas.search.run.progress import BarProgress, LineProgress, Progress, format_seconds, make_progress
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.reporting import Report


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_phases(progress):
    with progress:
        with progress.phase("train supernet", 50, unit="steps") as train:
            for step in range(1, 51):
                train(step, loss=1 / step)
        progress.note("a note [with brackets]")
        with progress.phase("search", 120, unit="trials", initial=60, seconds=300) as search:
            search(60, failed=0, hypervolume=None)
            search(90, 120, failed=3, hypervolume=0.5)
            assert search.per_minute > 0 and 0 < search.seconds_left <= 300
        with pytest.raises(ValueError, match="broken"), progress.phase("measure") as measure:
            measure(1)
            raise ValueError("broken")
    return progress


@pytest.mark.parametrize("kind", [Progress, lambda: LineProgress(io.StringIO()), lambda: BarProgress(Terminal())])
def test_phases_in_every_mode(kind):
    progress = run_phases(kind())
    assert [(phase.name, phase.done, phase.total) for phase in progress.phases] == [
        ("train supernet", 50, 50), ("search", 90, 120), ("measure", 1, None),
    ]  # fmt: skip
    assert all(phase.seconds >= 0 for phase in progress.phases)


def test_a_phase_is_a_report_and_has_parts():
    stream = io.StringIO()
    with LineProgress(stream, interval=0) as progress, progress.phase("prepare") as report:
        part: Report = report
        with part.phase("profile", 45, unit="s", seconds=45) as inner:
            inner(12, units=3)
    assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == ["profile", "profile", "prepare"]
    assert "12/45 s, units 3" in stream.getvalue()


def test_lines():
    stream = io.StringIO()
    run_phases(LineProgress(stream, interval=0))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("train supernet: 1/50 steps, loss 1")
    assert "a note [with brackets]" in lines
    search = [line for line in lines if line.startswith("search: 90/120 trials")]
    assert "/min, failed 3, hypervolume 0.5" in search[0] and search[0].endswith("left")
    assert "done in" in search[-1] and "left" not in search[-1]
    assert lines[-1].startswith("measure: 1, stopped after")
    assert "\x1b" not in stream.getvalue()


def test_a_line_only_now_and_then():
    stream = io.StringIO()
    with LineProgress(stream, interval=60) as progress, progress.phase("search", 1000) as phase:
        for done in range(1000):
            phase(done)
    assert len(stream.getvalue().splitlines()) == 1


def test_bars_show_what_lines_say():
    stream = Terminal()
    run_phases(BarProgress(stream, color=False))
    assert "train supernet" in stream.getvalue() and "a note [with brackets]" in stream.getvalue()


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
def test_a_terminal_that_goes_away_ends_nothing(error):
    """It ended a search that was done with status 4, and one that was not."""

    class Gone(Terminal):
        left = 3

        def write(self, text):
            self.left -= 1
            if self.left < 0:
                raise error
            return super().write(text)

        def flush(self):
            if self.left < 0:
                raise error

    stream = Gone()
    progress = run_phases(BarProgress(stream))
    assert stream.left < 0 and len(progress.phases) == 3


def test_the_mode_follows_the_stream():
    assert type(make_progress("auto", io.StringIO())) is LineProgress
    assert type(make_progress("auto", Terminal())) is BarProgress
    quiet = io.StringIO()
    run_phases(make_progress("quiet", quiet))
    assert quiet.getvalue() == ""
    with pytest.raises(ConfigError, match="auto, bar, lines, quiet"):
        make_progress("loud")


def test_format_seconds():
    assert [format_seconds(s) for s in (0.2, 59.4, 59.6, 200, 3599.6, 7500)] == [
        "0s",
        "59s",
        "1m00s",
        "3m20s",
        "1h00m",
        "2h05m",
    ]
