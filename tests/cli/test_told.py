"""What is said when something is asked for that is not there: the option is named, once, and before any progress."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mixnas.search.run.directory import Run
from mixnas.search.run.progress import Phase, Progress
from mixnas.search_space.formats import format as formats

from .command import nas


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("export", "first", "--pick", "zzzz"), "nas: --pick: 'zzzz' is none of the final networks."),
        (("export", "first", "--format", "onx"), "nas: --format: no format is called 'onx'. Did you mean 'onnx'?"),
        (("search", "--engine", "dask"), "nas: --engine: no engine is called 'dask'. Allowed: local, ray."),
        (("search", "--name", "first", "--log", "tensorbord"), "Did you mean 'tensorboard'?"),
        (("resume", "first", "--trials", "2"), "--trials (search.trials) is 2, in all, and 6 trials are done already"),
    ],
)
def test_the_option_is_named_before_anything_is_begun(searched: Path, words: tuple[str, ...], says: str):
    done = nas(*words, "--runs", searched / "runs")
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1


def test_a_verb_that_is_near_to_none_has_no_suggestion():
    assert "Did you mean" not in nas("nosuch").stderr and "Did you mean 'search'?" in nas("serch").stderr


def test_a_format_that_lacks_packages_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=r'pip install "\.\[onnx\]"'):
        formats.require(formats.get("onnx"))


def test_a_run_without_a_front_has_no_latencies_and_says_so(searched: Path, tmp_path: Path):
    shutil.copytree(searched / "runs" / "first", tmp_path / "first")
    run = Run.open("first", tmp_path)
    run.write_tables("", replace(run.front(), members=(), knee=None))
    done = nas("latency", "query", "first", "--runs", tmp_path)
    assert (done.returncode, done.stdout) == (3, "") and "first: no network is on the front" in done.stderr


@pytest.mark.parametrize(
    ("done", "total", "unit", "says"),
    [(5.01006, 45, "s", "5/45 s"), (29.0, 29, "trials", "29/29 trials"), (1234567, None, "steps", "1,234,567 steps")],
)
def test_progress_has_no_more_digits_than_are_read(done: float, total: float | None, unit: str, says: str):
    phase = Phase(Progress(), "p", total, unit=unit)
    phase._started -= 1.0
    phase(done, loss=5180.4)
    text = phase.describe()
    assert text.startswith(says) and "e+" not in text and "loss 5,180" in text


def test_a_run_is_asked_about_an_architecture_of_its_space(searched: Path, tmp_path: Path):
    """A stand-alone run, which predicts nothing: it says so, and does not answer with its front instead."""
    (tmp_path / "a.yaml").write_text("stem: conv\n")
    asked = ("latency", "query", "first", "--arch", tmp_path / "a.yaml", "--runs", searched / "runs")
    done = nas(*asked, "--tables", tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "profile" in done.stderr
    refused = nas("latency", "query", "first", "--sample", "3")
    assert refused.returncode == 2 and "--arch also beside it" in refused.stderr
