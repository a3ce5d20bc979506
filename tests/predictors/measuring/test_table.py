"""Measurement tables: rows survive, a torn line is cut off, damage is refused."""

import csv
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixnas.predictors.measuring.device import INTERPRETER
from mixnas.predictors.measuring.measure import Window
from mixnas.predictors.measuring.table import COLUMNS, MeasurementTable, outdated, profile_command, subject
from mixnas.search_space.errors import ConfigError, IntegrityError

DEVICE = "cpu-test-1t"


def windows(rng, scale, count=3):
    return [Window(0, i, scale * 1e6 * rng.uniform(1, 1.02, 12), 2e5, 2.01e5) for i in range(count)]


@pytest.fixture
def filled(tmp_path):
    rng = np.random.default_rng(0)
    table = MeasurementTable.create_or_open(tmp_path, DEVICE, "eager", 1, 0.2)
    first = table.add_provenance({"time": "then"})
    for i in range(3):
        what = subject("unit", {"number": i}, {"matmul.calls": 2.0}, 1)
        table.append([(what, w) for w in windows(rng, i + 1)], first)
    return tmp_path, table


def test_what_is_written_is_read(filled):
    path, table = filled
    again = MeasurementTable.load(path, DEVICE, "eager")
    assert again.subjects == table.subjects and again.threads == 1 and again.reference_ms == 0.2
    ours, theirs = table.measurements("unit"), again.measurements("unit")
    for identity in ours:
        assert theirs[identity].latency.ms == pytest.approx(ours[identity].latency.ms, rel=1e-4)
    assert again.measurements("network") == {}
    with open(table.csv_path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and list(rows[0]) == list(COLUMNS) == list(again.header["columns"])
    assert rows[0]["config"] and not rows[1]["config"]


def test_appending_goes_on_after_a_torn_line(filled):
    path, table = filled
    with open(table.csv_path, "a") as file:
        file.write('abc,unit,"{""half')
    again = MeasurementTable.create_or_open(path, DEVICE, "eager", 1, 0.9)
    assert again.reference_ms == 0.2, "the first profile's reference time holds for good"
    what = subject("unit", {"number": 7}, {}, 1)
    again.append([(what, w) for w in windows(np.random.default_rng(1), 1)], again.add_provenance({}))
    assert len(MeasurementTable.load(path, DEVICE, "eager").subjects) == 4


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("subject,kind", "subject,kin"),
        ('""number"":1', '""number"":9'),
        ("samples_us,crc\n", "samples_us,crc\nx"),
        ("samples_us,crc\n", "samples_us\n"),
        ("0.2,", "-1,"),
    ],
)
def test_damage_is_refused(filled, old, new):
    path, table = filled
    text = table.csv_path.read_text()
    assert old in text
    table.csv_path.write_text(text.replace(old, new))
    with pytest.raises(IntegrityError):
        MeasurementTable.load(path, DEVICE, "eager")


def test_every_digit_is_guarded(filled):
    path, table = filled
    for file in (table.csv_path, table.json_path):
        whole = file.read_bytes()
        places = [i for i, byte in enumerate(whole) if chr(byte).isdigit()]
        for place in places[:: max(1, len(places) // 30)]:
            file.write_bytes(whole[:place] + (b"7" if whole[place : place + 1] != b"7" else b"3") + whole[place + 1 :])
            with pytest.raises(IntegrityError):
                MeasurementTable.load(path, DEVICE, "eager")
        file.write_bytes(whole)
    text = table.csv_path.read_bytes()
    table.csv_path.write_bytes(text[:-20])  # within a number
    with pytest.raises(IntegrityError, match="the file ends within a row"):
        MeasurementTable.load(path, DEVICE, "eager")
    lines = text.splitlines(keepends=True)
    table.csv_path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(IntegrityError, match="not the row that was written"):
        MeasurementTable.load(path, DEVICE, "eager")


@pytest.mark.parametrize("wrong", ["-0.2", "nan", "inf", "0", ""])
def test_a_table_of_before_is_read_and_its_times_are_checked(filled, wrong):
    """Those had neither a chain nor a digest; they stay without one."""
    path, table = filled
    lines = [line.rpartition(",")[0] + "\n" for line in table.csv_path.read_text().splitlines()]
    table.csv_path.write_text("".join(lines))
    former = MeasurementTable.load(path, DEVICE, "eager")
    assert former.windows.keys() == table.windows.keys()
    again = MeasurementTable.create_or_open(path, DEVICE, "eager", 1, 0.2)
    what = next(iter(again.subjects.values()))
    again.append([(what, again.windows[what.id][0])], 0)
    assert len(MeasurementTable.load(path, DEVICE, "eager").windows[what.id]) == len(former.windows[what.id]) + 1
    cells = lines[-1].rstrip().rsplit(",", 1)
    table.csv_path.write_text("".join(lines[:-1]) + f"{cells[0]},{wrong}\n")
    with pytest.raises(IntegrityError, match="without usable times"):
        MeasurementTable.load(path, DEVICE, "eager")


def test_foreign_and_missing_tables(filled):
    path, table = filled
    table.json_path.rename(path / "cpu-other-1t.eager.json")
    table.csv_path.rename(path / "cpu-other-1t.eager.csv")
    with pytest.raises(IntegrityError, match="expected cpu-other-1t"):
        MeasurementTable.load(path, "cpu-other-1t", "eager")
    with pytest.raises(ConfigError, match="nas latency profile"):
        MeasurementTable.load(path, DEVICE, "eager")
    with pytest.raises(ConfigError, match="Did you mean 'eager'"):
        MeasurementTable.create_or_open(path, DEVICE, "eagre", 1, 0.2)


def test_another_thread_count_is_another_table(filled):
    path, _ = filled
    with pytest.raises(ConfigError, match="1 thread, asked for 2"):
        MeasurementTable.create_or_open(path, DEVICE, "eager", 2, 0.2)


def test_the_interpreters_timings_are_no_devices(tmp_path):
    with pytest.raises(ConfigError, match="no device's"):
        MeasurementTable.create_or_open(tmp_path, INTERPRETER, "eager", 1, 0.2).require_device()


OLD = sorted((Path(__file__).parents[2] / "data" / "v1").glob("*/latency/*.csv"))


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.parents[1].name)
def test_a_table_of_whole_blocks_is_refused_in_one_sentence(path):
    device, _, runtime = path.stem.rpartition(".")
    sentence = (
        rf"table of measurements of an earlier version \(schema 2\), in which whole blocks .*--device {device}`\.$"
    )
    with pytest.raises(IntegrityError, match=sentence) as error:
        MeasurementTable.load(path.parent, device, runtime)
    assert str(error.value).count(". ") == 0 and path.name in str(error.value)
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match=sentence):
        MeasurementTable.create_or_open(path.parent, device, runtime, 1, 0.2)
    assert path.read_bytes() == before


def test_the_command_names_the_runtime():
    text = outdated(Path("cpu-x-1t.onnxruntime-b8.csv"), "a table", "schema 1")
    assert text.endswith("delete cpu-x-1t.onnxruntime-b8.* there and measure again with `nas latency profile --device "
                         "cpu-x-1t --runtime onnxruntime --set latency.batch_size=8`.")  # fmt: skip
    assert profile_command("cpu-x-1t", "eager") == "nas latency profile"
    assert profile_command("cpu-x-2t", "eager-b4") == (
        "nas latency profile --set latency.threads=2 --set latency.batch_size=4"
    )
    assert profile_command("nvidia-h100", "graph") == "nas latency profile --runtime graph"


def test_there_are_old_tables_to_refuse():
    assert len(OLD) == 2


def test_two_processes_do_not_measure_into_one_table(tmp_path):
    """Their rows would be mixed, and each chain of checksums broken by the other's."""
    table = MeasurementTable.create_or_open(tmp_path, DEVICE, "eager", 1, 0.2)
    MeasurementTable.create_or_open(tmp_path, DEVICE, "eager", 1, 0.2)  # this process may
    code = (
        "import sys; from pathlib import Path; from mixnas.predictors.measuring.table import MeasurementTable\n"
        "MeasurementTable.create_or_open(Path(sys.argv[1]), sys.argv[2], 'eager', 1, 0.2); print('opened')"
    )

    def other() -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, tmp_path, DEVICE], capture_output=True, text=True)

    csv_path = tmp_path / f"{DEVICE}.eager.csv"
    with open(csv_path, "a") as file:
        file.write("half a row")  # it is being written: nobody else may cut it off
    refused = other()
    assert "another process is measuring into this table" in refused.stderr and not refused.stdout
    assert csv_path.read_text().endswith("half a row")
    del table
    gc.collect()
    assert other().stdout == "opened\n" and not csv_path.read_text().endswith("half a row")
