from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixnas.search_space.errors import ConfigError
from mixnas.search_space.files import atomic_create, atomic_write, dump_yaml, load_yaml, parse_yaml

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(st.characters(codec="utf-8"))
)
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


@given(plain)
def test_what_is_dumped_is_read_back(obj):
    assert parse_yaml(dump_yaml(obj)) == obj


def test_scalars_are_yaml_1_2():
    text = "{a: 1e-3, b: no, c: 010, d: ~, e: yes, f: 1., g: .5, h: true, i: 2026-01-01, j: 1:30}"
    assert parse_yaml(text) == {
        "a": 0.001, "b": "no", "c": 10, "d": None, "e": "yes", "f": 1.0, "g": 0.5, "h": True, "i": "2026-01-01",
        "j": "1:30",
    }  # fmt: skip
    assert parse_yaml("1e-3") == 0.001 and parse_yaml("x") == "x" and parse_yaml("true") is True


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", "file.yaml:2: key 'a' stands twice"),
        ("a: &x 1\nb: *x", r"file.yaml:2: alias \*x"),
        ("<<: {a: 1}", "merge key"),
        ("1: 2", "key 1 is not text"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object:os.system x", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_what_is_refused(text, says, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_yaml(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read: No such file"):
        load_yaml(tmp_path / "nothing.yaml")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        atomic_create(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
