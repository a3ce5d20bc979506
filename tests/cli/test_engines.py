"""Which engine a search is carried out by, as it is said on the command line."""

from __future__ import annotations

import argparse
import json
import re
import shutil

import pytest

from mixnas.cli.verbs import engine_settings

from .command import nas, ok


@pytest.mark.parametrize(
    ("words", "before", "after"),
    [
        ({}, {"name": "ray"}, None),
        ({"engine": "ray"}, None, {"name": "ray"}),
        ({"workers": 3}, None, {"name": "local", "workers": 3}),
        ({"address": "auto"}, None, {"name": "ray", "address": "auto"}),
        ({"workers": 3}, {"name": "ray", "gpus": 0.5}, {"name": "ray", "gpus": 0.5, "workers": 3}),
        ({"workers": 3}, "ray", {"name": "ray", "workers": 3}),
        ({"engine": "ray"}, {"name": "local", "batch": 4}, {"name": "ray"}),
        ({"engine": "local", "workers": 2}, {"name": "ray", "gpus": 1}, {"name": "local", "workers": 2}),
    ],
)
def test_an_engine_that_stays_keeps_its_options(words, before, after):
    args = argparse.Namespace(**words)
    found = engine_settings(args, {"search": {"engine": before}} if before else {"task": "digits"})
    assert [json.loads(one.partition("=")[2]) for one in found] == ([after] if after else [])


def test_a_dry_run_says_by_which_engine(searched):
    config = searched / "config.yaml"
    said = ok("search", "-c", config, "--dry-run", "--engine", "ray", "--address", "auto", "--workers", "3")
    assert "engine        ray, address auto, workers 3" in said
    assert "engine        local\n" in ok("search", "-c", config, "--dry-run")
    wrong = nas("search", "-c", config, "--dry-run", "--engine", "rai")
    assert wrong.returncode == 2 and "Did you mean 'ray'?" in wrong.stderr


def test_a_run_is_gone_on_with_by_other_engines(searched, tmp_path):
    """From this process to two of its own, to Ray: the same study."""
    pytest.importorskip("ray")
    runs = tmp_path / "runs"
    shutil.copytree(searched / "runs" / "first", runs / "first")
    common = ("--runs", runs, "-v")
    two = nas("resume", "first", "--trials", "9", "--engine", "local", "--workers", "2", *common)
    assert two.returncode == 0, two.stderr
    ray = nas("resume", "first", "--trials", "11", "--engine", "ray", "--workers", "1", *common)
    assert ray.returncode == 0, ray.stderr
    assert len(re.findall(r"^trial \d+ done", ray.stderr, flags=re.M)) == 2
    assert ray.stdout.startswith("first: Pareto front")  # and nothing of Ray's
    status = json.loads(ok("status", "first", "--json", "--runs", runs))
    assert (status["done"], status["running"], status["state"]) == (11, 0, "finished")
    front = json.loads(ok("front", "first", "--json", "--runs", runs))
    assert front["latency"] == "measured" and all(m["latency"]["ms"] > 0 for m in front["front"])
