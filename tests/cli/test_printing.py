from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from mixnas.cli import printing
from mixnas.cli.main import main
from mixnas.search_space.architecture import Architecture

from .command import ok

PLAIN = Namespace(no_color=True)


def _narrow(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(printing, "terminal_width", lambda: width)


def test_a_narrow_table_wraps_texts_and_headers_and_cuts_neither_names_nor_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = "layer:conv(kernel_size=3,stride=2)>8[attention(heads=2)+mlp(expansion=2)]"
    columns, row = ["id", "latency in milliseconds", "architecture"], ["54820b57dc37 *", "0.389 to 0.396", text]
    printing.print_table(PLAIN, columns, [row])
    wide = capsys.readouterr().out
    assert all(part in line for line in [wide.splitlines()[3]] for part in row)
    _narrow(monkeypatch, 60)
    printing.print_table(PLAIN, columns, [row])
    narrow = capsys.readouterr().out
    lines = narrow.splitlines()
    assert max(map(len, lines)) <= 60
    assert any("54820b57dc37 *" in line and "0.389 to 0.396" in line for line in lines) and "…" not in narrow
    assert text in "".join(line[-25:].strip() for line in lines)


def test_one_line_a_row_where_a_column_may_be_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    text = "layer: conv(kernel_size=3, stride=2) > " + "8[attention(heads=2)+mlp(expansion=2)], " * 9
    columns = ["id", "accuracy", "macs", "architecture"]
    rows = [["54820b57dc37", "0.9861 ±0.0062", "1,234", text], ["9c7f5de37f75", "0.5000 ±0.0263", "7", "short"]]

    def printed() -> list[str]:
        printing.print_table(PLAIN, columns, rows, cut="architecture", spare=["macs"])
        return capsys.readouterr().out.splitlines()

    assert [line for line in printed() if text.strip() in line]  # a pipe gets all of it
    _narrow(monkeypatch, 70)
    lines = [line for line in printed() if line.strip()]
    assert max(map(len, lines)) <= 70 and len(lines) == 4  # header, rule, two rows
    assert lines[2].split()[:3] == ["54820b57dc37", "0.9861", "±0.0062"] and lines[2].rstrip().endswith("…")
    assert "macs" in lines[0] and lines[3].rstrip().endswith("short")
    _narrow(monkeypatch, 48)
    lines = [line for line in printed() if line.strip()]
    assert max(map(len, lines)) <= 48 and "macs" not in lines[0] and "0.9861 ±0.0062" in lines[2]


def test_numbers():
    assert [printing.number(v) for v in (7, 12345, 12345.0, 0.123456, 3.0)] == ["7", "12,345", "12,345", "0.1235", "3"]


def test_a_front_has_a_line_for_each_network_and_all_of_it_on_request(searched: Path, monkeypatch: pytest.MonkeyPatch):
    asked = ("front", "first", "--runs", searched / "runs")
    members = json.loads(ok(*asked, "--json"))["front"]
    names = [str(Architecture.from_dict(m["architecture"])) for m in members]
    assert all(name in ok(*asked) for name in names)  # a pipe gets all of it
    _narrow(monkeypatch, 80)
    narrow = ok(*asked)
    assert max(map(len, narrow.splitlines())) <= 80 and "…" in narrow
    for member in members:
        (line,) = [line for line in narrow.splitlines() if member["id"] in line]
        metrics = member["metrics"]
        assert f"{metrics['accuracy']:.4f} ±{metrics['accuracy_se']:.4f}" in line
    whole = ok(*asked, "--full").splitlines()
    assert whole[-len(names) :] == [f"{m['id']}  {name}" for m, name in zip(members, names, strict=True)]


def test_a_reader_that_has_seen_enough_of_a_table_ends_the_verb_with_status_0(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["ops"]) == 0  # a table, as `nas space show FILE | head -3` prints
    assert capfd.readouterr().err == ""
