"""A driver of a shared study in a process of its own, that tests end: what it evaluates and reports is in files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget, Session
from mixnas.search.strategies.evolution import NSGA2
from mixnas.search.study.connection import Connection
from mixnas.search.study.driver import Driver
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.server import Server
from mixnas.search.study.shared_study import SharedStudy
from mixnas.search_space.space import SearchSpace
from tests.search.problems import SPACE, FromFunction, analytic

OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})
ROOT = Path(__file__).parents[3]


def server_at(url: str, **options) -> Server:
    return Server(**{"url": url, "heartbeat": 1, "grace": 3, "wait": 60, **options})


def shared_study(folder: Path, connection: Connection, plain=SPACE) -> SharedStudy:
    folder.mkdir(exist_ok=True)
    return SharedStudy(
        folder / "study.journal",
        SearchSpace.from_dict(plain),
        OBJECTIVES,
        strategy=NSGA2(population_size=6),
        connection=connection,
        driver=Driver.begin(folder, folder.name),
    )


class Evaluations:
    """The made-up metrics after a nap, and a line of a file for each that began; at one of them it hangs."""

    def __init__(self, folder: Path, seconds: float = 0.0, hangs_at: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        self._path, self._seconds, self._hangs_at = folder / "begun", seconds, hangs_at
        self._path.touch()

    @property
    def ids(self) -> list[str]:
        return self._path.read_text().split()

    def __call__(self, architecture):
        with open(self._path, "a") as file:
            file.write(f"{architecture.id}\n")
        time.sleep(3600 if len(self.ids) == self._hangs_at else self._seconds)
        return analytic(architecture)


def drive(folder: Path, url: str, trials: int, seconds: float = 0.0, hangs_at: int = 0, **options) -> None:
    """Carry a study out to its end."""
    folder.mkdir(exist_ok=True)
    reported = os.open(folder / "reported", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def told(record):
        os.write(reported, f"{record.number} {record.id}\n".encode())

    connection = Connection(server_at(url, **options))
    try:
        with (
            shared_study(folder, connection) as study,
            Session(study, Budget(trials=trials), on_trial=told) as session,
        ):
            LocalEngine().run(session, FromFunction(Evaluations(folder, seconds, hangs_at)))
            session.ending()
    finally:
        connection.close()
        os.close(reported)


def started(folder: Path, url: str, trials: int, **options) -> subprocess.Popen:
    """`drive` in a process of its own."""
    folder.mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        f"from tests.search.study.shared_driver import drive\n"
        f"drive(Path({str(folder)!r}), {url!r}, {trials}, **{options!r})"
    )
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
