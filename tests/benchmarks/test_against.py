"""Today's default search against an earlier commit's: each by its own code, compared at the same times."""

from __future__ import annotations

import argparse
import subprocess

import numpy as np
import pytest

# A checkout of a few lines: its package says which it is, and its benchmark finds what `searched_by` reads.
_TREE = {
    "__init__.py": "",
    "search/__init__.py": "",
    "search/config.py": "def load_config(source, settings): return (source.read_text(), settings)",
    "configs/digits.yaml": "then",
    "benchmarks/supernet_hypervolume.py": """
import os
from types import SimpleNamespace

def _run(config, source, folder, name):
    architecture = SimpleNamespace(to_dict=lambda: {"of": config[0], "tables": os.environ["MIXNAS_TABLES"]})
    point = SimpleNamespace(seconds=2.0, architecture=architecture, metrics={"accuracy": 0.5})
    return [point], 3.0, {"settings": config[1], "folder": folder.name}
""",
}


def _write(tree):
    for name, text in _TREE.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_commit_is_unpacked_and_searches_with_its_own_code(scripts, tmp_path):
    import _against

    root = tmp_path / "root"
    _write(root)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "then"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    (root / "configs" / "digits.yaml").write_text("now")
    tree = _against.unpacked("HEAD", root, tmp_path)
    found = {
        name: _against.searched_by(path, tmp_path / name, 1, ["search.seed=4"])
        for name, path in (("old", tree), ("new", root))
    }
    assert found["old"]["seconds"] == 3.0
    assert found["old"]["phases"] == {"settings": ["search.seed=4"], "folder": "old"}
    assert [found[name]["points"][0]["architecture"]["of"] for name in ("old", "new")] == ["then", "now"]
    tables = {one["points"][0]["architecture"]["tables"] for one in found.values()}
    assert len(tables) == 2  # neither starts from the other's profile
    with pytest.raises(SystemExit, match="no such commit"):
        _against.unpacked("0000000", root, tmp_path / "new")


def test_both_are_judged_in_one_box_at_the_same_times(scripts, tmp_path, monkeypatch):
    """An earlier network counts from when it came; one that came later is worth nothing before."""
    import _against

    from mixnas.search_space.space import SearchSpace

    stages = [{"width": [8, 16, 24, 32], "block": {"mixer": "identity", "channel_mixer": "none"}}]
    space = SearchSpace.from_dict({"stem": {"name": "conv", "stride": 1}, "stages": stages})
    drawn = {a.id: a for a in (space.sample(np.random.default_rng(i)) for i in range(40))}
    first, second, third, *_ = drawn.values()

    def point(seconds, architecture, accuracy, params):
        metrics = {"accuracy": accuracy, "latency_ms": 9.0, "params": params}
        return {"seconds": seconds, "architecture": architecture.to_dict(), "metrics": metrics}

    found = {
        "then": {"seconds": 10.0, "phases": {}, "points": [point(4.0, first, 0.8, 100), point(9.0, second, 0.9, 200)]},
        "now": {"seconds": 20.0, "phases": {}, "points": [point(15.0, third, 0.9, 100)]},
    }
    order = []

    def searched_by(root, folder, threads, settings):
        order.append(folder.name)
        return found[folder.name.split("-")[0]]

    def measure(points, threads):
        for p in points:
            p.metrics["latency_ms"] = 1.0

    monkeypatch.setattr(_against, "unpacked", lambda commit, root, folder: folder / "then")
    monkeypatch.setattr(_against, "searched_by", searched_by)
    monkeypatch.setattr(_against, "measure", measure)
    args = argparse.Namespace(seeds=2, threads=1, set=[], against="abc")
    record = _against.run(args, tmp_path, lambda text: None)
    assert order == ["then-0", "now-0", "now-1", "then-1"]
    assert record["reference"] == pytest.approx([0.79, 2.0, 210.0])
    value = {kind: record["summary"][kind]["hypervolume"] for kind in ("then", "now")}
    assert value["now"]["end_of_then"]["seeds"] == [0.0, 0.0]
    # of a box of 0.11 by 1 by 110: then's two networks reach a part of it, now's one all
    assert value["then"]["end_of_then"]["mean"] == pytest.approx((0.01 * 110 + 0.1 * 10) / (0.11 * 110))
    assert value["then"]["final"] == value["then"]["end_of_then"]
    assert value["now"]["end_of_now"]["seeds"] == pytest.approx([1.0, 1.0])
    assert record["runs"][0]["points"][0]["architecture"] == first.to_dict()
