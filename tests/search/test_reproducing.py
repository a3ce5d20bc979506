"""What is compared before an exported network is trained again. Training itself: `tests/cli/test_networks.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Split, Task
from mixnas.search.card import CARD, MANIFEST
from mixnas.search.export import digest_of_test
from mixnas.search.reproducing import check_data, reproduce
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.files import digest_of, stamped, write_json


@pytest.fixture(scope="module")
def task() -> Task:
    return by_name("digits")


def test_what_the_card_says_of_the_data_is_compared(task: Task, monkeypatch: pytest.MonkeyPatch):
    digest = digest_of_test(task)
    record = {"labels": ["a", "b\x1b"], "counts": {"test": [1, 2]}, "sha256": "s", "teacher": {"sha256": "t"}}
    monkeypatch.setattr(task, "record", lambda: record, raising=False)
    card = {"labels": ["a", "b\x1b"], "counts": {"test": [1, 2]}, "data_sha256": "s", "data": {"sha256": digest}}
    check_data(card, task, "folder")
    check_data(card | {"teacher": {"sha256": "t"}, "summary": "in other words"}, task, "folder")
    check_data({}, task, "folder")  # of a former version, or exported without the task
    for change, says in (
        ({"labels": ["b", "a"]}, r"labels \['b', 'a'\], now \['a', 'b\\x1b'\]"),
        ({"counts": {"test": [2, 1]}}, "counts"),
        ({"data_sha256": "z"}, "data_sha256"),
        ({"teacher": {"sha256": "u"}}, "teacher"),
        ({"data": {"sha256": "0"}}, "test split"),
    ):
        with pytest.raises(ConfigError, match=rf"^folder: the data is not what .* exported with \({says}\)"):
            check_data(card | change, task, "folder")


def test_one_target_makes_another_test_split(task: Task, monkeypatch: pytest.MonkeyPatch):
    x, y = task.test.gather(torch.arange(len(task.test)))
    digest = digest_of_test(task)
    monkeypatch.setattr(task, "test", Split(x, y))
    check_data({"data": {"sha256": digest}}, task, "folder")
    monkeypatch.setattr(task, "test", Split(x, y.index_fill(0, torch.tensor([7]), (int(y[7]) + 1) % 10)))
    with pytest.raises(ConfigError, match="test split"):
        check_data({"data": {"sha256": digest}}, task, "folder")


def test_other_data_is_refused_before_anything_is_trained(tmp_path: Path):
    block = {"mixer": "identity", "channel_mixer": "mlp"}
    config = {
        "task": "digits",
        "search": {"evaluator": "standalone", "trials": 1, "strategy": "random"},
        "space": {"stem": "conv", "stages": [{"width": 8, "blocks": [block]}]},
    }
    write_json(tmp_path / CARD, {"format": 3, "config": config, "metrics": {}, "data": {"sha256": "0" * 64}})
    files = {path.name: {"sha256": digest_of(path.read_bytes())} for path in tmp_path.iterdir()}
    write_json(tmp_path / MANIFEST, stamped({"format": 3, "files": files}))
    # There is no architecture beside it: had it gone on, that would be what is said.
    with pytest.raises(ConfigError, match=r"the data is not what the network was exported with \(test split\)"):
        reproduce(tmp_path)
