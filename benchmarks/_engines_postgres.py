"""A kind of fault for `engines.py`: two drivers on one study on a PostgreSQL server, and one of them is killed.

The server is started for it (Debian's package postgresql), in a temporary folder.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
from _engines import SPACE, Sleeper

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.on_ray import _head
from mixnas.search.engines.session import Budget, Session
from mixnas.search.strategies import STRATEGIES
from mixnas.search.study.connection import Connection
from mixnas.search.study.driver import Driver
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.server import Server
from mixnas.search.study.shared_study import SharedStudy
from mixnas.search_space.space import SearchSpace

ROOT = Path(__file__).parents[1]
KIND = "postgres: driver killed"
OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})
TRIALS, SECONDS, WORKERS = 40, 0.3, 2
GRACE_S = 2.0

_DRIVER = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from _engines_postgres import drive
drive(Path({folder!r}), {url!r}, {seed})
"""


@contextlib.contextmanager
def server() -> Iterator[Any]:
    """A server, while the block lasts."""
    sys.path.append(str(ROOT))
    from tests.postgres import running, why_not

    if reason := why_not():
        raise SystemExit(f"{KIND}: {reason}")
    with running() as found:
        yield found


def drive(folder: Path, url: str, seed: int) -> Any:
    """A driver, to the end of the study; what it reports is in a file. Returns its results."""
    folder.mkdir(exist_ok=True)
    log = os.open(folder / "reported", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    connection = Connection(Server(url=url, heartbeat=0.5, grace=GRACE_S))
    strategy = STRATEGIES.read({"name": "nsga2", "population_size": 20}, "strategy")
    try:
        with (
            SharedStudy(
                folder / "study.journal",
                SearchSpace.from_dict(SPACE),
                OBJECTIVES,
                strategy=strategy,
                seed=seed,
                connection=connection,
                driver=Driver.begin(folder, folder.name),
            ) as study,
            Session(
                study,
                Budget(trials=TRIALS),
                on_trial=lambda r: os.write(log, f"{r.number} {r.id}\n".encode()),
            ) as session,
        ):
            LocalEngine(workers=WORKERS).run(session, Sleeper(folder, SECONDS))
            session.ending()
            return study.results
    finally:
        connection.close()
        os.close(log)


def _reported(folder: Path) -> set[tuple[int, str]]:
    lines = [line.split() for line in (folder / "reported").read_text().splitlines(keepends=True) if "\n" in line]
    return {(int(number), identity) for number, identity in lines}


def killed_round(
    judged: Callable[[Path, set[tuple[int, str]], Any], dict[str, Any]], url: str, folder: Path, seed: int
) -> dict[str, Any]:
    """One driver is killed in the middle of its trials, the other carries the study to its end.

    Args:
        judged: `engines._judged`.
        url: Of an empty database.
        folder: For what both leave.
        seed: Says when is killed.
    """
    killed, other = folder / "killed", folder / "other"
    code = _DRIVER.format(path=[str(Path(__file__).parent)], folder=str(killed), url=url, seed=seed)
    driver = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, start_new_session=True)
    rng = random.Random(seed)
    wanted, pause = rng.randint(1, 12), rng.random() * SECONDS
    done = threading.Event()

    def begun() -> int:
        return (killed / "begun").read_text().count("\n") if (killed / "begun").exists() else 0

    def kill() -> None:
        while begun() < wanted and driver.poll() is None:
            time.sleep(0.01)
        time.sleep(pause)
        driver.kill()
        done.set()

    until = time.monotonic() + 120
    threading.Thread(target=kill, daemon=True).start()
    while not begun():
        assert time.monotonic() < until and driver.poll() is None, "the first driver did not begin"
        time.sleep(0.02)
    live = drive(other, url, seed + 1000)
    assert done.wait(60) and driver.wait(60) == -signal.SIGKILL, "the first driver ended before it was killed"
    until = time.monotonic() + 10
    while (left := len(_head.processes_of(driver.pid))) and time.monotonic() < until:
        time.sleep(0.05)
    found = judged(other / "study.journal", _reported(killed) | _reported(other), live)
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name="search", storage=storage).trials
    storage.engine.dispose()
    ended = {(t.number, t.user_attrs["id"]) for t in trials if t.state == optuna.trial.TrialState.COMPLETE}
    copied = {(r.number, r.id) for r in live.records if r.status == "done"}
    return {
        **found,
        "by_the_killed": len(_reported(killed)),
        "given_back": sum(t.user_attrs.get("failure") == "interrupted" for t in trials),
        "evaluated": live.evaluated,
        "copies_equal": ended == copied,
        "processes_left": left,
    }
