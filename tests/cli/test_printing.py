from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from mixnas.cli import printing
from mixnas.search_space.architecture import Architecture

from .command import ok

PLAIN = Namespace(no_color=True)


def test_a_narrow_table_wraps_texts_and_headers_and_cuts_neither_names_nor_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    text = "layer:conv(kernel_size=3,stride=2)>8[attention(heads=2)+mlp(expansion=2)]"
    columns, row = ["id", "latency in milliseconds", "architecture"], ["54820b57dc37 *", "0.389 to 0.396", text]
    printing.print_table(PLAIN, columns, [row])
    wide = capsys.readouterr().out
    assert all(part in line for line in [wide.splitlines()[3]] for part in row)
    monkeypatch.setattr(printing, "_PIPE_WIDTH", 60)
    printing.print_table(PLAIN, columns, [row])
    narrow = capsys.readouterr().out
    lines = narrow.splitlines()
    assert max(map(len, lines)) <= 60
    assert any("54820b57dc37 *" in line and "0.389 to 0.396" in line for line in lines) and "…" not in narrow
    assert text in "".join(line[-25:].strip() for line in lines)


def test_numbers():
    assert [printing.number(v) for v in (7, 12345, 12345.0, 0.123456, 3.0)] == ["7", "12,345", "12,345", "0.1235", "3"]


def test_a_front_on_a_narrow_terminal_has_its_architectures_below(searched: Path, monkeypatch: pytest.MonkeyPatch):
    asked = ("front", "first", "--runs", searched / "runs")
    members = json.loads(ok(*asked, "--json"))["front"]
    names = [f"{m['id']}  {Architecture.from_dict(m['architecture'])}" for m in members]
    assert not set(names) & set(ok(*asked).splitlines())
    monkeypatch.setattr(printing, "_PIPE_WIDTH", 80)
    narrow = ok(*asked)
    assert narrow.splitlines()[-len(names) :] == names and "…" not in narrow
