"""Every kind of stored file, cut and changed, through every reader: right or refused in a sentence, never wrong."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "_hostile.py"

pytestmark = [pytest.mark.hostile, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def hostile():
    spec = importlib.util.spec_from_file_location("_hostile_of_tests", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_no_reader_gives_a_wrong_answer(hostile, tmp_path):
    counts = hostile.campaign(tmp_path, cuts=2, flips=6, seed=20261128)
    assert counts.wrong == []
    assert counts.total["refused"] > 150 and counts.total["right"] > 5
    assert len(counts.by) >= 2 * 20  # readers, cut and flipped


def test_the_campaign_would_notice(hostile, tmp_path):
    """A reader that believes what it is given, one that falls over, and one that goes on at length."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("12345 67890 12345")

    def trusting(path: Path) -> str:
        return path.read_bytes().decode("latin1")

    def falling(path: Path) -> str:
        if path.read_bytes() != b"12345 67890 12345":
            raise ValueError("deep inside")
        return "whole"

    def talking(path: Path) -> str:
        if path.read_bytes() != b"12345 67890 12345":
            raise hostile.IntegrityError("x" * 400)
        return "whole"

    for read, says in ((trusting, "another answer"), (falling, "ValueError: deep inside"), (talking, "400 characters")):
        kind = hostile.Kind("file", path, path.parent, {"read": read})
        whole = read(path)
        for _, damaged in hostile.damages(path.read_bytes(), 2, 4, random.Random(0)):
            status, why = hostile.ask(kind, read, hostile.put(kind, damaged, tmp_path / "place"), whole)
            assert status == "wrong" and says in why
