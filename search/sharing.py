"""What a driver has to do with the other drivers of its study: nothing (`Alone`), or what a `Team` agrees on.

A study on a server is one study of several runs, each of a driver. Its attributes say what all have to have in common:

    agreed      what trials depend on: the configuration (`run.fixed`), the device, the data; whoever has another is
                refused
    prepared    the digests of the super-network and the profile that its trials were judged with, where there are some,
                and the reference time under which latencies compare
    trials      the budget of all together, the largest that was asked for
    finishing, finished     who brings the front to its final weights, and who has: it is done once, in that one's run
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.study import StudyDirection

from mixnas.evaluators.protocol import Evaluator
from mixnas.evaluators.tasks.task import recorded
from mixnas.search.config import Config
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search.run.fixed import difference, fixed
from mixnas.search.run.origin import utc_now
from mixnas.search.study.connection import Connection, Found
from mixnas.search.study.driver import Driver
from mixnas.search.study.reading import read_records
from mixnas.search.study.results import Results
from mixnas.search.study.server import Server
from mixnas.search.study.shared_study import SharedStudy
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import ConfigError, IntegrityError, StoppedEarly
from mixnas.search_space.files import digest_of, read_bytes


class Alone:
    """The only driver of a study that lies in the run's directory.

    Args:
        run: Its directory.
        problem: What is searched.
    """

    alone = True

    def __init__(self, run: Run, problem: Problem) -> None:
        self.run, self.problem = run, problem

    @contextlib.contextmanager
    def together(self, record: Mapping[str, Any]) -> Iterator[None]:
        """Be one of the drivers in the block; `record` is what the task says of its data."""
        yield

    @contextlib.contextmanager
    def preparing(self) -> Iterator[float | None]:
        """Prepare the evaluator in the block, under a reference time where there is one."""
        yield self.run.manifest.get("reference_ms")

    def study(self, evaluator: Evaluator) -> SearchStudy:
        """The study."""
        return SearchStudy(self.run.journal, **self._options(evaluator, self.problem.config.search.seed))

    def _options(self, evaluator: Evaluator, seed: int) -> dict[str, Any]:
        problem = self.problem
        return {
            "space": problem.space,
            "objectives": problem.objectives,
            "constraints": problem.constraints,
            "strategy": problem.strategy,
            "seed": seed,
            "cheap": evaluator.cheap,
            "extremes": problem.extremes,
        }

    def left_to_another(self, study: SearchStudy) -> str:
        """Why this driver does not bring the front to its final weights; empty where it does."""
        return ""

    def finished(self, results: Results) -> None:
        """Say that it has."""


class Team(Alone):
    """One of the drivers of a study on a server.

    Args:
        run: Its directory.
        problem: What is searched.
        should_stop: Asked while others are waited for.
        note: Told, in words, of what others do.
    """

    alone = False

    def __init__(
        self, run: Run, problem: Problem, should_stop: Callable[[], bool], note: Callable[[str], None]
    ) -> None:
        super().__init__(run, problem)
        assert problem.config.storage is not None
        self._server, self._should_stop, self._note = problem.config.storage, should_stop, note
        self._connection: Connection
        self._stack = contextlib.ExitStack()
        self._driver: Driver

    @contextlib.contextmanager
    def together(self, record: Mapping[str, Any]) -> Iterator[None]:
        """See `Alone`.

        Raises:
            ConfigError: The server cannot be used, or its study was begun with something else or by another program.
            IntegrityError: The server has no such study, and this run has trials of it.
        """
        self._connection = Connection(self._server, self._should_stop)
        with self._stack:
            self._stack.callback(self._connection.close)
            self._driver = Driver.begin(self.run.path, f"{socket.gethostname()}:{self.run.path.absolute()}")
            found, directions = self._connection.look(), _directions(self.problem)
            _refuse_foreign(self._server, found, directions)
            if found is None:
                self._refuse_lost()
            self._connection.make_study(directions)
            mine = {"driver": self.driver, "began": utc_now(), **_depends_on(self.problem, record)}
            _refuse_other(self._server, self._connection.agree("agreed", mine), mine)
            wanted = self.problem.config.search.trials
            self._connection.change("trials", lambda known: max(known or 0, wanted))
            yield

    @property
    def driver(self) -> str:
        """This run, as others are told."""
        return self._driver.run

    def _refuse_lost(self) -> None:
        """Refuse to begin a study anew of which this run has trials."""
        if not os.path.lexists(self.run.journal):
            return
        records, _ = read_records(self.run.journal, self.problem.objectives)
        if gone := sum(record.evaluated for record in records):
            raise IntegrityError(
                f"{self._server}: there is no such study any more, and {gone} trials that were evaluated are only in "
                f"the copy {self.run.journal}. Restore the database from its backup, or start a new run; this one can "
                "be looked at."
            )

    @contextlib.contextmanager
    def preparing(self) -> Iterator[float | None]:
        """See `Alone`. One driver at a time.

        Raises:
            StoppedEarly: The others judge by a super-network or a profile that is not here.
        """

        def waiting() -> None:
            self._note("another driver prepares the study; waiting for it")

        with self._connection.wait_for("prepare", waiting):
            prepared = self._connection.attributes().get("prepared")
            if prepared is not None:
                self._check_prepared(prepared)
                yield prepared["reference_ms"]
                self._check_prepared(prepared)
                return
            yield self.run.manifest.get("reference_ms")
            mine = {
                "driver": self.driver,
                "reference_ms": self.run.manifest.get("reference_ms"),
                "files": self._files(),
            }
            self._connection.agree("prepared", mine)

    def _files(self) -> dict[str, str]:
        """The files that trials are judged with, and their digests."""
        if self.problem.config.search.evaluator != "supernet":
            return {}
        paths = [self.run.supernet, *sorted(self.run.latency.glob("*"))]
        return {str(path.relative_to(self.run.path)): digest_of(read_bytes(path)) for path in paths if path.is_file()}

    def _check_prepared(self, prepared: Mapping[str, Any]) -> None:
        mine = self._files()
        missing = [name for name, digest in prepared["files"].items() if mine.get(name) != digest]
        if missing:
            raise StoppedEarly(
                f"{self.run.path}: the trials of {self._server} are judged with the super-network and the profile of "
                f"{prepared['driver']}, and what is here is not that ({', '.join(missing)}). Copy these files from "
                f"there into this run's directory."
            )

    def study(self, evaluator: Evaluator) -> SearchStudy:
        """See `Alone`. Drivers that are given one seed draw other numbers each."""
        seed = zlib.crc32(f"{self.problem.config.search.seed} {self.driver}".encode())
        options = self._options(evaluator, seed)
        return SharedStudy(self.run.journal, **options, connection=self._connection, driver=self._driver)

    def left_to_another(self, study: SearchStudy) -> str:
        """See `Alone`. Who finishes has a lock until it has finished, or is gone."""
        study.refresh()
        results, asked = study.results, self.problem.config.search.trials
        evaluated = results.evaluated - results.queued
        attributes = self._connection.attributes()
        if attributes["trials"] > asked and evaluated < attributes["trials"]:
            return f"other drivers go on to {attributes['trials']} trials, and finish them"
        if evaluated < attributes["trials"] and study.elsewhere:
            return f"{study.elsewhere} trials are in flight with other drivers; the last one finishes"
        if said := self._was_finished(attributes, evaluated):
            return said
        if not self._stack.enter_context(self._connection.held("finish")):
            return f"{attributes.get('finishing', 'another driver')} brings the front to its final weights"
        attributes = self._connection.attributes()  # it may have been until just now
        if said := self._was_finished(attributes, evaluated):
            return said
        self._connection.change("finishing", lambda known: self.driver)
        return ""

    def _was_finished(self, attributes: Mapping[str, Any], evaluated: int) -> str:
        by = attributes.get("finished")
        if by is None or by["driver"] == self.driver or by["trials"] < evaluated:
            return ""
        return f"the front was brought to its final weights by {by['driver']} ({by['when']}); its run has the networks"

    def finished(self, results: Results) -> None:
        """See `Alone`."""
        mine = {"driver": self.driver, "when": utc_now(), "trials": results.evaluated - results.queued}
        self._connection.change("finished", lambda known: mine)


def drivers(run: Run, problem: Problem, should_stop: Callable[[], bool], note: Callable[[str], None]) -> Alone:
    """How a run's configuration has its study."""
    return Alone(run, problem) if problem.config.storage is None else Team(run, problem, should_stop, note)


def check_storage(problem: Problem) -> None:
    """Refuse a server that cannot be used, or a study there that was begun with something else, before work is started.

    Args:
        problem: What is to be searched.

    Raises:
        ConfigError: See `Team.together`.
    """
    server = problem.config.storage
    if server is None:
        return
    connection = Connection(server)
    try:
        found = connection.look()
    finally:
        connection.close()
    _refuse_foreign(server, found, _directions(problem))
    if found is not None and "agreed" in found.attributes:
        _refuse_other(server, found.attributes["agreed"], _depends_on(problem, recorded(problem.task)))


def check_same(before: Mapping[str, Any], config: Config, path: Path) -> None:
    """Refuse to go on with a run on another study than it was begun on; the server may have moved.

    Args:
        before: The configuration that the run has, as plain data.
        config: Under which it is gone on with.
        path: Of the run, for the message.

    Raises:
        ConfigError: One lies on a server and the other does not, or it is another one there.
    """
    was, now = before.get("storage"), config.storage
    had = "its own directory" if was is None else f"{was['url']} (study {was['study']})"
    if (was is None) != (now is None) or (was is not None and now is not None and was["study"] != now.study):
        asked = "its own directory" if now is None else now
        raise ConfigError(
            f"{path}: storage: the study of this run lies in {had}; in {asked}, which is asked for, its trials are "
            "not. Start a new run for that."
        )


def _depends_on(problem: Problem, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the trials of a study depend on, with its digest."""
    plain = {
        **fixed(problem.config.to_plain()),
        "device": problem.device,
        "latency": problem.latency_tag,
        "data": {name: value for name, value in record.items() if name not in ("summary", "prepared")},
    }
    plain = json.loads(json.dumps(plain))
    return {"digest": hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12], "plain": plain}


def _directions(problem: Problem) -> list[StudyDirection]:
    return [StudyDirection.MAXIMIZE if o.maximise else StudyDirection.MINIMIZE for o in problem.objectives]


def _refuse_foreign(server: Server, found: Found | None, directions: Sequence[StudyDirection]) -> None:
    """Refuse a study of another program; one that is as good as new may be of a driver that is just beginning."""
    if found is None:
        return
    agreed = found.attributes.get("agreed")
    if isinstance(agreed, Mapping) and {"driver", "began", "digest", "plain"} <= agreed.keys():
        return
    if found.trials or found.attributes or list(found.directions) != list(directions):
        raise ConfigError(
            f"storage: {server} is a study of another program: it has {found.trials} trials and "
            f"{len(found.directions)} objectives, and not what the drivers of a search agree on. Nothing was written "
            "to it. Take another name (storage.study)."
        )


def _refuse_other(server: Server, agreed: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    if agreed["digest"] == mine["digest"]:
        return
    key, lines = difference(
        agreed["plain"], mine["plain"], (f"of the study, {agreed['digest']}", f"here, {mine['digest']}")
    )
    if key:  # else a later version has more settings, as by default
        raise ConfigError(
            f"storage: {server} was begun by {agreed['driver']} ({agreed['began']}) with the configuration "
            f"{agreed['digest']}, and this one is {mine['digest']}: {key} is another, so trials would not compare. "
            f"Take that configuration, or another study (storage.study):\n{lines}"
        )
