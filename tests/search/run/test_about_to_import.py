"""What is said before a run's own program is imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixnas.search.run.trust import about_to_import, mark


def test_the_file_is_named_before_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "of_my_own.py").write_text("raise SystemExit('this was run')\n")
    task, created = {"name": "of_my_own:Mine", "size": 3}, "2026-11-28T12:00:00+00:00"
    mine = {"fixed": {"task": task}, "created": created, "mark": mark(task, created)}
    said = f"importing 'of_my_own:Mine' from {tmp_path / 'of_my_own.py'}"
    assert about_to_import(mine) == said
    of_others = {**mine, "mark": "0" * 64}
    assert about_to_import(of_others) == "" and about_to_import(of_others, trust=True) == said
    assert about_to_import({**mine, "fixed": {"task": "digits"}}) == ""
    hostile = {**mine, "fixed": {"task": "of_my_own:\x1b[2J"}}
    assert "\x1b" not in about_to_import(hostile, trust=True)
