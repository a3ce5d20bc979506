"""Optuna's dashboard looks at a run while a search writes it."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from tests.contracts.engine import carry_out, study_at
from tests.search.engines.troubles import Troubled

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("optuna_dashboard") is None,
    reason="needs optuna-dashboard: pip install 'mixnas[dashboard]'",
)


def test_it_shows_the_trials_as_they_end_while_workers_search(tmp_path):
    """The program itself, on the journal's path, as the README says; and it disturbs nobody."""
    journal = tmp_path / "study.journal"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen: list[dict] = []
    ended: list[int] = []
    server: subprocess.Popen | None = None

    def get(place: str) -> dict:
        until = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{place}", timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.URLError:  # it is starting
                assert server is not None and server.poll() is None and time.monotonic() < until
                time.sleep(0.1)

    def look(record):
        nonlocal server
        ended.append(record.number)
        if len(ended) == 3:
            code = "import sys; from optuna_dashboard._cli import main; main()"
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            command = [sys.executable, "-P", "-c", code, str(journal), "--port", str(port)]
            server = subprocess.Popen(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path("/")
            )
        if len(ended) in (5, 25):
            (study,) = get("/api/studies")["study_summaries"]
            seen.append(trials := get(f"/api/studies/{study['study_id']}?after=0"))
            until = time.monotonic() + 120  # it reads the file again after some seconds
            while len(trials["trials"]) < len(ended) and time.monotonic() < until:
                time.sleep(0.5)
                seen[-1] = trials = get(f"/api/studies/{study['study_id']}?after=0")

    try:
        with study_at(journal) as study:
            evaluator = Troubled(tmp_path / "begun", seconds=0.05)
            carry_out(LocalEngine(workers=2), study, evaluator, Budget(trials=40), on_trial=look)
            assert study.results.counts == {"done": 40}
    finally:
        if server is not None:
            server.kill()
            server.wait()
    first, second = seen
    assert first["objective_names"] == ["accuracy", "latency_ms", "params"]
    for found in seen:
        states = [trial["state"] for trial in found["trials"]]
        assert states.count("Complete") >= 5 and "Running" in states  # a worker has one
    assert len(second["trials"]) >= 25 > len(first["trials"])
