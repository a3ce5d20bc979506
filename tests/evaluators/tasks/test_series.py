"""Series from CSV and .npz: what is read, what is learned, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.tasks.choosing import task_of
from mixnas.evaluators.tasks.series import Series, read_csv
from mixnas.evaluators.tasks.task import SPLITS, Task
from mixnas.search_space.errors import ConfigError
from tests.contracts.task import TaskContract


def waves(n: int, length: int = 12, channels: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, length, channels)) * 3 + 100).astype(np.float32)


class TestOfClasses(TaskContract):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.path = tmp_path / "d.npz"
        np.savez(self.path, x=waves(40), y=np.arange(40) % 2)

    def make(self) -> Task:
        return Series(path=str(self.path))


class TestOfNumbers(TaskContract):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.path = tmp_path / "d.npz"
        np.savez(self.path, x=waves(40), y=np.linspace(-5.5, 900, 40))

    def make(self) -> Task:
        return Series(path=str(self.path), kind="causal")

    def perfect(self, task: Task, targets: torch.Tensor) -> torch.Tensor:
        return targets[:, None]


def test_numbers_are_learned_standardised_and_judged_in_their_own_unit(tmp_path):
    y = np.linspace(1000, 5000, 30)
    np.savez(tmp_path / "d.npz", x=waves(30), y=y)
    task = by_name(task_of(tmp_path / "d.npz"))
    assert (task.name, task.metric, task.direction, task.io.num_outputs) == ("series", "mae", "min", 1)
    record = task.record()
    train = y[record["split"]["train"]]
    assert record["target"]["mean"] == pytest.approx(train.mean()) and record["target"]["std"] == pytest.approx(
        train.std()
    )
    x, targets = task.train.gather(torch.arange(len(task.train)))
    assert abs(float(targets.mean())) < 1e-5 and float(targets.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert float(task.score(torch.zeros(len(targets), 1), targets)) == pytest.approx(
        np.abs(train - train.mean()).mean()
    )
    assert torch.allclose(torch.tensor(task.io.mean), x.mean((0, 1)), atol=1e-3) and x.mean() > 90  # raw


def test_a_csv_with_a_line_for_a_series_is_its_npz(tmp_path):
    x = waves(20, 6, 1)
    words = np.array(["run", "walk"])[np.arange(20) % 2]
    lines = ["kind;" + ";".join(f"t{i}" for i in range(6)), *(f"{w};" + ";".join(map(repr, map(float, row[:, 0])))
                                                             for w, row in zip(words, x, strict=True))]  # fmt: skip
    (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"which column is the target\? Its columns: kind, t0"):
        Series(path=str(tmp_path / "d.csv"))
    np.savez(tmp_path / "d.npz", x=x, y=words)
    of_csv, of_npz = Series(path=str(tmp_path / "d.csv"), target="kind"), Series(path=str(tmp_path / "d.npz"))
    assert of_csv.labels == of_npz.labels == ("run", "walk") and of_csv.io == of_npz.io
    for name in SPLITS:
        both = [getattr(task, name).gather(torch.arange(len(getattr(task, name)))) for task in (of_csv, of_npz)]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_a_csv_with_a_line_for_a_moment_is_put_in_order(tmp_path):
    x, order = waves(8, 5, 2), np.random.default_rng(1).permutation(40)
    rows = [f"s{i},{t},{x[i, t, 0]!r},{x[i, t, 1]!r},{i % 2}" for i in range(8) for t in range(5)]
    text = "\n".join(["id,time,ax,ay,label", *(rows[i].replace("np.float32(", "").replace(")", "") for i in order)])
    (tmp_path / "d.csv").write_text(text)
    table = read_csv(tmp_path / "d.csv", target=None, id=None, time=None, length=None)
    assert table.channels == ("ax", "ay") and table.series.shape == (8, 5, 2)
    names = list(dict.fromkeys(line.partition(",")[0] for line in text.splitlines()[1:]))
    by_time = {f"s{i}": x[i] for i in range(8)}
    for name, series, target in zip(names, table.series, table.targets, strict=True):
        assert np.array_equal(series, by_time[name]) and target == int(name[1:]) % 2


GOOD = "id,value,label\n" + "".join(f"{i},{t},{i % 2}\n" for i in range(8) for t in range(4))


@pytest.mark.parametrize(
    ("text", "options", "says"),
    [
        ("", {}, "has no line behind the names"),
        ("a,label\n", {}, "has no line behind the names"),
        ("a,a,label\n1,2,x\n", {}, "two columns of one name"),
        ("a,label\n1,x\n1\n", {}, "line 3: has 1 values for 2 columns"),
        ("a,label\n1,x\nten,y\n", {}, "line 3: a is 'ten', no finite number"),
        ("a,label\n1,x\nnan,y\n", {}, "line 3: a is 'nan'"),
        ("a,label\n1,x\n,y\n", {}, "line 3: a is ''"),
        ("label\nx\n", {}, "no column of values"),
        (GOOD + "7,9,1\n", {}, "series have from 4 to 5 moments.*task.length=4"),
        (GOOD + "7,9,0\n", {}, "series '7' has more than one target"),
        (GOOD, {"target": "lable"}, "no column is called 'lable'.* Did you mean 'label'"),
        (GOOD, {"length": 5}, "a series has 4 moments, and length asks for 5"),
        (GOOD.replace(",0\n", ",1\n"), {}, "labels have 1 different values"),
        (GOOD, {"answers": "words"}, "answers is 'words'"),
        ("a,b,label\n1,2,x\n", {"answers": "number"}, "answers is 'number', and a target is 'x'"),
        ("a,b,label\n1,2,0.5\n1,2,inf\n", {}, "targets hold NaN or infinity"),
        ("a,b,label\n1,2,x\n1,2,y\n", {}, "class 'x' has 1 of 3"),
    ],
)
def test_a_csv_that_is_wrong_is_refused_with_its_line(text, options, says, tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        by_name({"name": "series", "path": str(path), **options})


def test_series_of_different_lengths_can_be_cut(tmp_path):
    (tmp_path / "d.csv").write_text(GOOD + "7,9,1\n")
    task = Series(path=str(tmp_path / "d.csv"), length=3)
    assert task.io.size == (3,) and task.labels == ("0", "1")


def test_an_npz_of_series_keeps_its_splits(tmp_path):
    parts = {
        f"{w}_{s}": a for s, n in (("train", 30), ("test", 8)) for w, a in (("x", waves(n)), ("y", np.arange(n) % 2))
    }
    np.savez(tmp_path / "d.npz", **parts)
    assert task_of(tmp_path / "d.npz")["name"] == "series"
    assert [len(getattr(Series(path=str(tmp_path / "d.npz")), name)) for name in SPLITS] == [24, 6, 8]
    np.savez(tmp_path / "bad.npz", x=np.where(waves(30) > 95, waves(30), np.nan), y=np.arange(30) % 2)
    with pytest.raises(ConfigError, match="series hold NaN or infinity"):
        Series(path=str(tmp_path / "bad.npz"))
