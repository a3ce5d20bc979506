"""Searches that are killed, interrupted and resumed, in real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixnas.search.study.reading import read_results

pytestmark = pytest.mark.chaos
NSGA2 = {"name": "nsga2", "population_size": 8}


class Searches:
    """Starts searches through `search_process.py`."""

    def __init__(self):
        command = [sys.executable, "-m", "tests.search.search_process"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )

    def start(self, journal, reported, *, trials, seconds=0.002, strategy=NSGA2):
        arguments = {"journal": str(journal), "reported": str(reported), "trials": trials}
        print(json.dumps({**arguments, "seconds": seconds, "strategy": strategy}), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self):
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def searches():
    searches = Searches()
    yield searches
    searches.process.stdin.close()
    searches.process.wait(timeout=600)
    searches.process.stdout.close()


def reported_in(path):
    """Number, id and status of the trials in a report; its last line may be torn."""
    text = path.read_text() if path.exists() else ""
    lines = [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [(int(fields[0]), fields[1], fields[2]) for fields in lines if len(fields) == 3]


def started(path):
    return path.exists() and path.read_text().startswith("started\n")


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


@pytest.mark.parametrize("strategy", [NSGA2, "random"], ids=["nsga2", "random"])
def test_ten_times_killed_nothing_reported_is_lost_nothing_evaluated_twice(
    tmp_path, searches, strategy, objectives, constraints
):
    journal, rng = tmp_path / "study.journal", random.Random(7)
    reports, trials = [], 500  # more than ten rounds come to, on a machine that is late with its kills, too
    for round_ in range(10):
        reports.append(tmp_path / f"reported-{round_}")
        child = searches.start(journal, reports[-1], trials=trials, strategy=strategy, seconds=0.005)
        few = rng.choice([0, 0, 1, 5, 20])
        wait_for(lambda: started(reports[-1]) and len(reported_in(reports[-1])) >= few)  # noqa: B023 - called at once
        time.sleep(rng.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        searches.wait()
        if rng.random() < 0.5:  # what a power cut adds to a kill
            with open(journal, "ab") as file:
                file.write(b'{"op_code":6,"worker_id":"' + b"\0" * rng.randrange(40))
    reports.append(tmp_path / "reported-last")
    searches.start(journal, reports[-1], trials=trials, strategy=strategy)
    assert searches.wait() == 0

    results = read_results(journal, objectives, constraints)
    kept = {r.number: (r.number, r.id, r.status) for r in results.records}
    reported = [trial for report in reports for trial in reported_in(report)]
    assert len(reported) == len(set(reported)) and set(reported) <= set(kept.values())
    evaluated = [r.id for r in results.records if r.evaluated]
    assert len(evaluated) == len(set(evaluated)) == results.evaluated == trials
    assert results.counts["failed"] > 0 and results.counts["running"] == 0
    assert sum(1 for r in reports[:-1] if reported_in(r)) >= 3, "killed too early to show anything"


def test_ctrl_c_finishes_the_trial_and_a_second_aborts(tmp_path, searches, objectives, constraints):
    journal, report = tmp_path / "study.journal", tmp_path / "reported"
    child = searches.start(journal, report, trials=1000, seconds=0.05)
    wait_for(lambda: len(reported_in(report)) >= 2)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(searches.wait()) == 4
    results = read_results(journal, objectives, constraints)
    assert set(results.counts) <= {"done", "failed"}
    assert {r.number for r in results.records} == {number for number, _, _ in reported_in(report)}

    again = tmp_path / "again"
    child = searches.start(journal, again, trials=1000, seconds=60)
    wait_for(lambda: again.exists() and read_results(journal, objectives).counts["running"])
    os.kill(child, signal.SIGINT)
    time.sleep(2)  # signals are not queued: one that comes before the first is delivered is lost
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(searches.wait()) == 130
    assert read_results(journal, objectives, constraints).counts["interrupted"] == 1
