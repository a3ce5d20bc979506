from __future__ import annotations

import errno
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mixnas.search_space.errors import ConfigError, IntegrityError, machine_fault
from mixnas.search_space.files import (
    atomic_create,
    atomic_write,
    dump_yaml,
    load_yaml,
    parse_json,
    parse_yaml,
    remove_unfinished,
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8")),
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
        ("<<: {a: 1}", "merge key"),
        ("1: 2", "key 1 is not text"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object:os.system x", "tag 'tag:yaml.org,2002:python/object:os.system' is not allowed"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_what_is_refused(text, says, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        load_yaml(path)


def test_an_alias_is_what_it_stands_for_within_a_bound():
    """So that what `yaml.safe_dump` wrote is read: it writes an alias for whatever it meets twice."""
    shared = {"mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}]}
    plain = {"stages": [{"block": shared}, {"block": shared}]}
    text = yaml.safe_dump(plain)
    assert "*id001" in text and parse_yaml(text) == plain
    bomb = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise("abcdefghi")
    )
    with pytest.raises(ConfigError, match=r"more than 20,000 values, aliases written out"):
        parse_yaml(bomb)
    with pytest.raises(ConfigError, match="alias of itself"):
        parse_yaml("a: &a [1, *a]")


REFUSED = {
    "NUL": "a: \0",
    "escape": "a: \x1b[31m",
    "bool": "a: !!bool maybe",
    "timestamp": "a: !!timestamp xx",
    "date": "a: !!timestamp 2001-01-01",
    "float": 'a: !!float ""',
    "int": "a: !!int twelve",
    "binary": "a: !!binary xx",
    "set": "a: !!set {b}",
    "digits": "a: " + "9" * 400,
    "negative digits": "a: -" + "9" * 5000,
    "scalar": "a: " + "x" * 5000,
    "scalar of megabytes": "a: " + "x" * 10_000_000,
    "key of megabytes": "x" * 10_000_000 + ": 1",
    "deep": "[" * 100_000,
    "deep mapping": "{a: " * 5000 + "1" + "}" * 5000,
    "tag": "!" + "x" * 3000 + " 1",
    "anchor": "a: *" + "x" * 3000,
    "directive": "%YAML 9.9\n---\n1",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_configuration_holds_is_refused_in_a_few_words(name: str, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(REFUSED[name])
    with pytest.raises(ConfigError) as refused:
        load_yaml(path)
    said = str(refused.value).removeprefix(str(tmp_path))
    assert said.startswith("/file.yaml") and len(said) <= 300 and said.isprintable()


def test_what_is_no_text_or_no_file_is_refused_at_once(tmp_path):
    (tmp_path / "utf16").write_bytes("a: 1".encode("utf-16"))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, says in {"utf16": "not UTF-8", "pipe": "it is a pipe", "folder": "it is a folder"}.items():
        with pytest.raises(ConfigError, match=says):
            load_yaml(tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_yaml(f"{tmp_path}/{'x' * 300}")
    with pytest.raises(ConfigError, match="null byte"):
        load_yaml("a\0b")


@pytest.mark.parametrize(
    "text", ["{", "", "[NaN]", "[Infinity]", "[" * 100_000, "\0", '{"a": 1} x', "[1e999999", '"\x1b"', "9" * 10_000]
)
def test_json_that_is_damaged_is_one_sentence(text: str):
    with pytest.raises(IntegrityError, match=r"^f: damaged: ") as refused:
        parse_json(text, "f")
    assert len(str(refused.value)) <= 300


def test_a_pipe_that_the_user_named_is_read():
    read, write = os.pipe()
    os.write(write, b"a: 1")
    os.close(write)
    try:
        assert load_yaml(f"/dev/fd/{read}") == {"a": 1}
    finally:
        os.close(read)


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


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A write has no path of its own to tell: `nas export` and `nas report` said "No space left on device" alone."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left") as caught:
        atomic_write(tmp_path / "a" / "report.html", "text")
    assert machine_fault(caught.value) == f"{tmp_path}/a/report.html: No space left on device. Make room"
    assert list((tmp_path / "a").iterdir()) == []


def test_a_device_or_a_pipe_is_not_replaced_by_a_file(tmp_path):
    """`-o /dev/full` put a file there."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ConfigError, match="it is no file, and nothing is put into its place"):
            atomic_write(tmp_path / name, "text")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode) and sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_what_killed_writes_have_left_is_removed(tmp_path):
    (tmp_path / "file").write_text("whole")
    (tmp_path / ".lock").touch()
    (tmp_path / ".file.a1b2c3_9").write_text("ha")
    (tmp_path / ".link.a1b2c3_9").symlink_to(tmp_path / "file")
    (tmp_path / ".folder.a1b2c3_9").mkdir()
    remove_unfinished(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".folder.a1b2c3_9", ".link.a1b2c3_9", ".lock", "file"]
