"""Series from CSV and .npz: what is read, what is learned, what is refused."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.tasks.choosing import task_of
from mixnas.evaluators.tasks.series import Series
from mixnas.evaluators.tasks.tables import read_csv, read_parquet
from mixnas.evaluators.tasks.task import SPLITS, Task
from mixnas.evaluators.training import is_share, judged
from mixnas.search.data import config_for
from mixnas.search_space.enumeration import check_space
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import SearchSpace
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
        (GOOD + "7,9,0\n", {}, "series '7' has more than one target"),
        (GOOD, {"target": "lable"}, "no column is called 'lable'.* Did you mean 'label'"),
        (GOOD, {"length": 5}, "the longest series has 4 moments, and length asks for 5"),
        (GOOD.replace(",0\n", ",1\n"), {}, "all labels are '1'; there is nothing to tell apart"),
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


def csv_of(path: Path, head: str, lines: list[str]) -> Path:
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def test_a_column_y_is_a_channel_beside_a_label_and_the_summary_names_the_columns(tmp_path):
    moments = [f"{i},{t},{i + t},{t},{i % 2}" for i in range(8) for t in range(3)]
    task = Series(path=str(csv_of(tmp_path / "d.csv", "id,x,y,z,label", moments)))
    assert task.io.in_features == 3 and task.io.size == (3,)
    assert task.record()["summary"].endswith("; target 'label', id 'id', channels x, y, z")
    with pytest.raises(ConfigError, match=r"which column is the target, 'label', 'class'\? Say task.target=NAME"):
        Series(path=str(csv_of(tmp_path / "two.csv", "id,class,y,z,label", moments)))
    with pytest.raises(ConfigError, match=r"which column is the target\? Its columns: id, x, y, z, w"):
        Series(path=str(csv_of(tmp_path / "place.csv", "id,x,y,z,w", moments)))
    with pytest.raises(ConfigError, match=r"which column is the id, 'id', 'series'\? Say task.id=NAME"):
        Series(path=str(csv_of(tmp_path / "ids.csv", "id,series,y,z,label", moments)))
    said = Series(path=str(csv_of(tmp_path / "y.csv", "id,a,b,c,y", moments))).record()["summary"]
    assert said.endswith("; target 'y', id 'id', channels a, b, c")


def test_a_line_is_a_series_where_all_ids_differ(tmp_path):
    lines = [f"s{i},{i},{i + 1},{i + 2},{'ab'[i % 2]}" for i in range(12)]
    task = Series(path=str(csv_of(tmp_path / "d.csv", "id,t0,t1,t2,label", lines)))
    assert task.io.size == (3,) and task.io.in_features == 1
    assert task.record()["summary"].endswith("; target 'label', id 'id', moments t0, t1, t2")
    for head in ("id,a,label", "b,a,label"):
        short = [f"{i},{i},{'ab'[i % 2]}" for i in range(12)]
        if head == "id,a,label":
            with pytest.raises(ConfigError, match="series have 1 moment, and need 2 at least"):
                Series(path=str(csv_of(tmp_path / "short.csv", head, short)))
        else:
            assert Series(path=str(csv_of(tmp_path / "short.csv", head, short))).io.size == (2,)
    np.savez(tmp_path / "d.npz", x=waves(40, 1), y=np.arange(40) % 2)
    with pytest.raises(ConfigError, match="series have 1 moment"):
        Series(path=str(tmp_path / "d.npz"))


@pytest.mark.parametrize(
    ("arrays", "options", "says"),
    [
        ({"x": waves(9).astype(np.float64) * 1e200, "y": np.arange(9) % 2}, {}, "series hold .*e.202, too large for a"),
        ({"x": waves(9), "y": np.linspace(0, 1, 9)}, {"answers": "class"}, "a word for each series"),
        ({"x": waves(9), "y": np.zeros(9, dtype=int)}, {}, "all labels are '0'"),
        ({"x": waves(9), "y": np.arange(9) // 8}, {}, "class '1' has 1 of 3 series that it needs"),
        ({"x": waves(2), "y": np.array([0.5, 1.5])}, {}, r"d\.npz: it has 2 of 3 series that it needs.*Give more\.$"),
        (
            {"x_train": waves(9), "y_train": np.linspace(0, 1e-3, 9), "x_test": waves(2), "y_test": [0.5, 1e300]},
            {},
            "standardised targets of test hold .*too large",
        ),
    ],
)
@pytest.mark.filterwarnings("error")
def test_arrays_of_series_are_refused_in_words_of_series(arrays, options, says, tmp_path):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ConfigError, match=says) as caught:
        Series(path=str(tmp_path / "d.npz"), **options)
    assert "picture" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (("9223372036854775808", "9223372036854775809"), ("9223372036854775808", "9223372036854775809")),
        (("9007199254740992", "9007199254740993"), ("9007199254740992", "9007199254740993")),
        (("inf", "-inf"), ("-inf", "inf")),
        (("1_0", "10"), ("10", "1_0")),
        (("1.0", "2.0"), ("1", "2")),
        (("-1", "+1"), ("-1", "1")),
    ],
)
def test_labels_that_look_like_numbers_stay_apart(words, labels, tmp_path):
    lines = [f"{i},{i + 1},{words[i % 2]}" for i in range(12)]
    assert Series(path=str(csv_of(tmp_path / "d.csv", "a,b,label", lines))).labels == labels


@pytest.mark.parametrize(
    ("words", "options", "says"),
    [
        (("01", "1"), {}, "targets '01' and '1' are one number, written in two ways. Write it in one"),
        (("0", "-0"), {}, "targets '0' and '-0' are one number"),
        (("2", "nan"), {}, r"targets hold NaN or infinity \('nan'\)"),
        (("2.5", "1e999"), {}, r"targets hold NaN or infinity \('1e999'\)"),
        (("2", ""), {}, "line 3: label, the target, is empty"),
        (("9223372036854775808", "1"), {"answers": "number"}, "a target is '9223372036854775808'.*are below 9,007"),
        (("1e300", "0.5"), {}, "targets are too large for a mean and a spread"),
    ],
)
def test_targets_that_are_no_clear_numbers_are_refused(words, options, says, tmp_path):
    lines = [f"{i},{i + 1},{words[i % 2]}" for i in range(12)]
    with pytest.raises(ConfigError, match=says):
        Series(path=str(csv_of(tmp_path / "d.csv", "a,b,label", lines)), **options)


def test_numbers_written_in_two_ways_are_one_where_numbers_are_learned(tmp_path):
    lines = [f"{i},{i + 1},{('1.5', '1.50', '2', '1e20')[i % 4]}" for i in range(12)]
    table = read_csv(csv_of(tmp_path / "d.csv", "a,b,label", lines), target=None, id=None, time=None, length=None)
    assert table.targets.tolist() == [1.5, 1.5, 2.0, 1e20] * 3
    with pytest.raises(ConfigError, match="line 2: a is '1_0', no finite number"):
        Series(path=str(csv_of(tmp_path / "d.csv", "a,b,label", ["1_0,2,x"])))
    with pytest.raises(ConfigError, match="line 2: b is '1e39', larger than a float32 holds"):
        Series(path=str(csv_of(tmp_path / "d.csv", "a,b,label", ["1,1e39,x"])))


def test_whole_numbers_that_int64_does_not_hold_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=waves(40), y=np.arange(40, dtype=np.uint64) % 2 + np.uint64(1 << 63))
    with pytest.raises(ConfigError, match=r"go up to 9223372036854775809; whole numbers must be below 2\^63"):
        Series(path=str(tmp_path / "d.npz"))


def test_series_of_different_lengths_can_be_cut(tmp_path):
    (tmp_path / "d.csv").write_text(GOOD + "7,9,1\n")
    task = Series(path=str(tmp_path / "d.csv"), length=3)
    assert task.io.size == (3,) and task.labels == ("0", "1")


def test_the_longest_series_of_any_split_says_to_what_all_are_filled_up(tmp_path):
    x = np.random.default_rng(0).normal(size=(12, 32, 2)).astype(np.float32)
    short = x.copy()
    short[:, 30:] = np.nan
    arrays = {"x_train": x, "x_val": x, "x_test": short} | {
        f"y_{s}": np.arange(12) % 2 for s in ("train", "val", "test")
    }
    np.savez(tmp_path / "s.npz", **arrays)
    for length in (None, 32, 31, 8):
        task = Series(path=str(tmp_path / "s.npz"), length=length)
        assert task.io.size == (length or 32,)
        test, _ = task.test.gather(torch.arange(12))
        assert torch.equal(torch.isnan(test), torch.from_numpy(np.isnan(short[:, : length or 32])))
    with pytest.raises(ConfigError, match="longest series has 32 moments, and length asks for 33"):
        Series(path=str(tmp_path / "s.npz"), length=33)


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


def test_decimal_commas_are_read_where_they_separate_nothing(tmp_path):
    lines = ["id;time;a;target", *(f"{i // 4};{i % 4};{i},5;{i // 4},25" for i in range(40))]
    (tmp_path / "comma.csv").write_text("\n".join(lines))
    (tmp_path / "point.csv").write_text("\n".join(lines).replace(",", ".").replace(";", ","))
    one, other = (
        read_csv(tmp_path / f"{n}.csv", target=None, id=None, time=None, length=None) for n in ("comma", "point")
    )
    assert np.array_equal(one.series, other.series) and np.array_equal(one.targets, other.targets)
    assert one.series[1, 0, 0] == 4.5 and one.targets[1] == 1.25
    (tmp_path / "both.csv").write_text("\n".join([*lines, "10;0;1.5;2,5"]))
    with pytest.raises(ConfigError, match=r"line 2 writes numbers with a comma, and line 42 one with a point, '1\.5'"):
        read_csv(tmp_path / "both.csv", target=None, id=None, time=None, length=None)


def test_parquet_is_read_as_the_csv_of_the_same(tmp_path):
    import pyarrow
    from pyarrow import parquet

    lines = [(i // 4, i % 4, i + 0.5, "ab"[i // 4 % 2]) for i in range(40)]
    (tmp_path / "d.csv").write_text("id,time,a,target\n" + "\n".join(",".join(map(str, line)) for line in lines))
    columns = dict(zip(("id", "time", "a", "target"), map(list, zip(*lines, strict=True)), strict=True))
    parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    options = {"target": None, "id": None, "time": None, "length": None}
    one, other = read_csv(tmp_path / "d.csv", **options), read_parquet(tmp_path / "d.parquet", **options)
    assert np.array_equal(one.series, other.series) and np.array_equal(one.targets, other.targets)
    assert task_of(tmp_path / "d.parquet") == {"name": "series", "path": str(tmp_path / "d.parquet")}
    parquet.write_table(pyarrow.table({**columns, "more": [[1]] * 40}), tmp_path / "lists.parquet")
    with pytest.raises(ConfigError, match="column more is of type list"):
        read_parquet(tmp_path / "lists.parquet", **options)
    (tmp_path / "d.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:300])
    with pytest.raises(ConfigError, match=r"d\.parquet: cannot be read as Parquet"):
        read_parquet(tmp_path / "d.parquet", **options)


def test_rare_classes_count_the_more_where_that_is_asked(tmp_path):
    x = np.random.default_rng(0).normal(size=(60, 8, 2))
    np.savez(tmp_path / "d.npz", x=x, y=np.repeat([0, 1], [15, 45]))
    task = by_name("series", path=str(tmp_path / "d.npz"), weighted=True)
    outputs = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(12) % 2
    weight = torch.tensor([2.0, 2 / 3])  # 9 and 27 of 36
    expected = torch.nn.functional.cross_entropy(outputs, targets, weight=weight, label_smoothing=0.1)
    torch.testing.assert_close(task.training_loss(outputs, targets), expected)
    np.savez(tmp_path / "n.npz", x=x, y=np.linspace(0, 1, 60))
    with pytest.raises(ConfigError, match="weighted is of classes"):
        by_name("series", path=str(tmp_path / "n.npz"), weighted=True)


def test_a_word_without_end_is_refused_before_it_is_spread_over_all_places(tmp_path):
    """An array of words has room for the longest in each place: 26 kilobytes of Parquet took 21 gigabytes."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    options = {"target": None, "id": None, "time": None, "length": None}
    for label, refused in (("x" * 1001, True), ("x" * 1000, False)):
        columns = {"target": [label] * 5 + ["b"] * 5, "c0": [1.0] * 10, "c1": [2.0] * 10}
        parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet", compression="zstd")
        lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
        (tmp_path / "d.csv").write_text("\n".join(lines) + "\n")
        for read, name in ((read_parquet, "d.parquet"), (read_csv, "d.csv")):
            if refused:
                with pytest.raises(ConfigError, match="column target has a value of 1,001 characters; at most 1,000"):
                    read(tmp_path / name, **options)
            else:
                assert read(tmp_path / name, **options).targets[0] == label


def test_what_a_float32_does_not_hold_is_called_that(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"target": ["a", "b"] * 5, "c0": [1.0] * 10, "c1": [1e300] * 10}
    parquet.write_table(pyarrow.table(columns), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"line 2: c1 is '1e\+300', larger than a float32 holds"):
        read_parquet(tmp_path / "d.parquet", target=None, id=None, time=None, length=None)
    parquet.write_table(pyarrow.table({**columns, "c1": [[1.0]] * 10}), tmp_path / "d.parquet")
    with pytest.raises(ConfigError, match=r"column c1 is of type list<.*>; numbers and words are read") as caught:
        read_parquet(tmp_path / "d.parquet", target=None, id=None, time=None, length=None)
    assert "cannot be read as Parquet" not in str(caught.value)


def test_series_of_different_lengths_are_filled_up(tmp_path):
    """The same ones from each format: lines, cells, and arrays."""
    rng, lengths = np.random.default_rng(0), [3, 6, 1, 4] * 6
    series = [np.round(rng.normal(size=n), 3).astype(np.float32) for n in lengths]
    words = ["walk", "run"] * 12
    of_moments = [
        f"s{i},{v!r},{w}" for i, (one, w) in enumerate(zip(series, words, strict=True)) for v in map(float, one)
    ]
    of_series = [
        ",".join([*map(repr, map(float, one)), *[""] * (6 - len(one)), w]) for one, w in zip(series, words, strict=True)
    ]
    x = np.full((24, 6), np.nan, dtype=np.float32)
    for row, one in zip(x, series, strict=True):
        row[: len(one)] = one
    np.savez(tmp_path / "d.npz", x=x, y=np.array(words))
    csv_of(tmp_path / "moments.csv", "id,value,label", of_moments)
    csv_of(tmp_path / "series.csv", "a,b,c,d,e,f,label", of_series)
    tasks = [
        by_name({"name": "series", "path": str(tmp_path / name)}) for name in ("d.npz", "moments.csv", "series.csv")
    ]
    assert "1 to 6 moments" in tasks[0].record()["summary"]
    for task in tasks:
        assert task.io.padded and task.io.size == (6,) and task.io == tasks[0].io
        for name in SPLITS:
            found, first = getattr(task, name).inputs, getattr(tasks[0], name).inputs
            assert torch.equal(found.nan_to_num(-99), first.nan_to_num(-99))
    known = np.concatenate([x[i][~np.isnan(x[i])] for i in tasks[0].record()["split"]["train"]]).astype(np.float64)
    assert tasks[0].io.mean[0] == pytest.approx(known.mean(), rel=1e-4)
    assert tasks[0].io.std[0] == pytest.approx(known.std(), rel=1e-4)


@pytest.mark.parametrize("place", [(0, 1, 0), (3, slice(None), 0), (2, slice(None), slice(None))])
def test_an_npz_with_a_hole_is_refused_and_says_which_series(place, tmp_path):
    x = waves(20)
    x[place] = np.nan
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(20) % 2)
    with pytest.raises(ConfigError, match=rf"d\.npz: train: series hold NaN or infinity, series {place[0]} first"):
        Series(path=str(tmp_path / "d.npz"))


def test_the_space_for_them_has_no_mixer_that_cannot_be_told(tmp_path):
    x = waves(40)
    x[::2, 7:] = np.nan
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(40) % 2)
    kept = {}
    for kind in ("sequence", "causal"):
        config = config_for(tmp_path / "d.npz", settings=[f"task.kind={kind}"])
        task = by_name(config.task.to_plain())
        check_space(SearchSpace.from_dict(config.space), task.io)
        (stage,) = config.space["stages"]
        kept[kind] = {op if isinstance(op, str) else op["name"] for op in stage["block"]["mixer"]}
    assert kept["causal"] - kept["sequence"] == {"ssm"} and "attention" in kept["sequence"]
    plain = {**config.space, "stages": [{**stage, "block": {"mixer": "ssm", "channel_mixer": "mlp"}}]}
    io = by_name({"name": "series", "path": str(tmp_path / "d.npz")}).io
    with pytest.raises(ConfigError, match="mixer 'ssm' cannot be told where a series ends"):
        check_space(SearchSpace.from_dict(plain), io)


def test_series_that_filled_up_take_too_much_are_refused_before_they_are(tmp_path):
    """1,000 series of a moment or two, and one of 10,000: 38 MiB, of a file of 100 kB."""
    lines = [f"{i},0.5,{i % 2}" for i in range(1000) for _ in range(1 + i % 2)] + ["long,1,0"] * 10_000
    path = csv_of(tmp_path / "d.csv", "id,value,label", lines)
    tracemalloc.start()
    with pytest.raises(ConfigError, match=r"d\.csv: unpacks to 0\.0373 GiB, and .* allows 0\.01: .* to 10,000 mom"):
        by_name("series", path=str(path), memory_gib=0.01)
    assert tracemalloc.get_traced_memory()[1] < 30 << 20
    tracemalloc.stop()
    assert by_name("series", path=str(path), memory_gib=0.01, length=2, validation=0.1, test=0.1).io.size == (2,)
    words = csv_of(tmp_path / "w.csv", "a,b,label", [f"1,2,{'w' * 900 if i == 0 else i % 2}" for i in range(400)])
    with pytest.raises(ConfigError, match=r"w\.csv: label, the target, unpacks to"):
        by_name("series", path=str(words), memory_gib=0.001)


def test_a_faultless_series_of_classes_has_an_error_and_one_of_numbers_has_none_of_a_share(tmp_path):
    """Of a share of 1: half of Wilson's interval, 1 / 2 (n + 1)."""
    np.savez(tmp_path / "d.npz", x=waves(180), y=np.arange(180) % 2)
    task = Series(path=str(tmp_path / "d.npz"))
    targets = task.validation.targets
    found = judged(task, [(torch.nn.functional.one_hot(targets).float(), targets)], "the validation")
    assert len(targets) == 36 and found.score == 1 and found.error == pytest.approx(1 / 74)
    np.savez(tmp_path / "n.npz", x=waves(40), y=np.linspace(-5.5, 900, 40))
    assert is_share(task) and not is_share(Series(path=str(tmp_path / "n.npz")))
