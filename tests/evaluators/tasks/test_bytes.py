"""Byte-level language modelling: what is a split, what is asked, and what a bit is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mixnas.evaluators.tasks.choosing import task_of
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import SPLITS, Task
from mixnas.search_space.errors import ConfigError
from tests.contracts.task import TaskContract


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text(f"file {i}: " + "".join(chr(33 + (7 * i + j * j) % 90) for j in range(200)))
    return tmp_path


def whole(split: object) -> bytes:
    """All bytes that a split asks for, in order."""
    _, targets = split.gather(torch.arange(len(split)))  # type: ignore[attr-defined]
    return bytes(targets.flatten().tolist())


class TestBytes(TaskContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folder: Path) -> None:
        self.folder = str(folder)

    def make(self) -> Task:
        return by_name("bytes", path=self.folder, length=16)


def test_each_byte_is_predicted_once_from_those_before_it(folder):
    task = by_name("bytes", path=str(folder), length=16, validation_size=10**6, test_size=10**6)
    texts = {f"{i}.txt": (folder / f"{i}.txt").read_bytes() for i in range(12)}
    found: list[str] = []
    for name in SPLITS:
        split = getattr(task, name)
        inputs, targets = split.gather(torch.arange(len(split)))
        assert torch.equal(inputs[:, 1:], targets[:, :-1])  # a window's targets are its own next bytes
        assert torch.equal(inputs[1:, 0], targets[:-1, -1])  # and the next window begins where it ends
        said = whole(split)
        own = sorted(file for file, text in texts.items() if text[5:100] in said)
        joined = b"\0".join([*(texts[file] for file in own), b""])
        assert said == joined[1 : 1 + 16 * ((len(joined) - 1) // 16)], name
        found += own
    assert sorted(found) == sorted(texts)


def test_one_more_file_moves_no_other_and_the_same_content_counts_once(folder):
    before = by_name("bytes", path=str(folder), length=16)
    (folder / "copy.txt").write_bytes((folder / "3.txt").read_bytes())
    assert before.record()["sha256"] == by_name("bytes", path=str(folder), length=16).record()["sha256"]
    (folder / "3.txt").write_text("changed")
    assert before.record()["sha256"] != by_name("bytes", path=str(folder), length=16).record()["sha256"]


def test_a_uniform_answer_costs_eight_bits_and_a_certain_one_none(folder):
    task = by_name("bytes", path=str(folder), length=16)
    _, targets = task.test.gather(torch.arange(3))
    metric = task.new_metric()
    metric.update(torch.zeros(3, 16, 256), targets)
    assert metric.result() == pytest.approx(8.0, abs=1e-5)
    half = torch.full((3, 16, 256), -1e4)
    half.scatter_(2, targets[..., None], 0.0).scatter_(2, (targets[..., None] + 1) % 256, 0.0)
    metric = task.new_metric()
    metric.update(half, targets)
    assert metric.result() == pytest.approx(1.0, abs=1e-5)
    assert float(task.loss(half, targets)) == pytest.approx(math.log(2), abs=1e-5)


def test_a_single_file_is_cut_into_its_beginning_its_middle_and_its_end(folder):
    (folder / "one.txt").write_bytes(bytes(range(1, 251)) * 4)
    task = by_name("bytes", path=str(folder / "one.txt"), length=8)
    text = (folder / "one.txt").read_bytes()
    assert whole(task.train)[:100] == text[1:101] and whole(task.test) in text[901:]
    assert task_of(folder / "one.txt") == {"name": "bytes", "path": str(folder / "one.txt")}
    assert task_of(folder)["name"] == "bytes"


def test_a_split_of_one_window_is_refused_and_few_are_told(folder):
    (folder / "one.txt").write_bytes(bytes(range(1, 251)) * 4)
    with pytest.raises(ConfigError, match="validation has 101 bytes, which is 1 windows; 2 of 64 bytes need 129"):
        by_name("bytes", path=str(folder / "one.txt"), length=64)
    told = by_name("bytes", path=str(folder / "one.txt"), length=8).record()["summary"]
    assert told.endswith("windows of 8 bytes; validation and test tell little: give more text or a lower length")
    assert "tell little" not in by_name("bytes", length=64).record()["summary"]


def test_the_default_is_the_standard_library():
    task = by_name("bytes", length=64)
    assert len(task.train) > 50_000 and (len(task.validation), len(task.test)) == (512, 2048)
    assert b"self" in whole(task.validation)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 1}, "length is 1"),
        ({"length": 500}, "has .* bytes, which is 0 windows; . of 500 bytes need"),
        ({"pattern": "*.md"}, "no file that matches"),
        ({"validation": 0.9, "test": 0.2}, "some must be left to train"),
        ({"memory_gib": 0}, "Raise memory_gib"),
    ],
)
def test_what_cannot_be_is_refused(folder, options, said):
    with pytest.raises(ConfigError, match=said):
        by_name("bytes", path=str(folder), **options)


def test_a_file_that_is_no_text_is_named(folder, tmp_path_factory):
    (folder / "x.bin").write_bytes(b"abc\0def")
    with pytest.raises(ConfigError, match=r"x\.bin: is no text, byte 3 is zero"):
        by_name("bytes", path=str(folder), length=16)
    (folder / "x.bin").unlink()
    outside = tmp_path_factory.mktemp("elsewhere") / "secret.txt"
    outside.write_text("secret")
    (folder / "link.txt").symlink_to(outside)
    with pytest.raises(ConfigError, match=r"link\.txt: is a link that leads out"):
        by_name("bytes", path=str(folder), length=16)
    with pytest.raises(ConfigError, match="cannot be read"):
        by_name("bytes", path=str(folder / "missing.txt"))
