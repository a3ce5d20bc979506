"""A driver's connection to the server of a team's study: transactions that are tried again, locks, heartbeats.

Everything that several drivers must not do at once is done under an advisory lock of PostgreSQL, which a driver that
dies gives back with its connection. A connection that is lost is tried again for `Server.wait` seconds; then the search
stops (status 4).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import optuna
from optuna.storages import RDBStorage
from optuna.study import StudyDirection

from mixnas.search.study.server import EXTRA, Server
from mixnas.search_space.errors import ConfigError, IntegrityError, MachineError, StoppedEarly, without_password

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_CONNECT_S = 10
_HELD_S = 900  # a driver that stands still for longer with the lock in its hand loses it
_KEEPALIVE = {"keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
_PAUSE_S = 0.5
_NO_PARENT = "23503"  # PostgreSQL's foreign_key_violation


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Found:
    """A study as it is on a server.

    Attributes:
        directions: Of its objectives.
        attributes: That were set on it.
        trials: How many it has, whatever became of them.
    """

    directions: Sequence[StudyDirection]
    attributes: dict[str, Any]
    trials: int


class Connection:
    """See the module. Used from one thread, beside its own that sends heartbeats.

    Args:
        server: Which.
        should_stop: Asked while it waits for a server that does not answer, or for another driver.

    Raises:
        ConfigError: The server cannot be reached, lets nobody in, or has tables of another version or another program;
            or a package is missing. What it says has no password.
    """

    def __init__(self, server: Server, should_stop: Callable[[], bool] = _never) -> None:
        if importlib.util.find_spec("psycopg") is None:
            raise ConfigError(f"storage: a study on a server needs the package psycopg: {EXTRA}.")
        from sqlalchemy import create_engine
        from sqlalchemy.exc import SQLAlchemyError
        from sqlalchemy.orm import sessionmaker

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.server, self.should_stop = server, should_stop
        self.study_id: int | None = None  # once the study was found or made: another of its name is not taken for it
        kept = " ".join(f"-c tcp_{name}={value}" for name, value in _KEEPALIVE.items())
        # one time zone for all drivers: heartbeats are compared; and who is cut off gives its locks back
        options = f"-c TimeZone=UTC -c idle_in_transaction_session_timeout={_HELD_S}s {kept}"
        arguments = {"connect_timeout": _CONNECT_S, "options": options, **_KEEPALIVE, **server.secrets}
        settings: dict[str, Any] = {"connect_args": arguments, "pool_pre_ping": True, "pool_size": 4}
        self._gone = False  # it was given up: whoever still asks need not wait as long again
        self._alive: frozenset[int] = frozenset()
        self._ended = threading.Event()
        self._beats: threading.Thread | None = None
        self._engine = create_engine(server.url, **settings)
        self.rdb: RDBStorage
        try:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                try:
                    self._make_tables(connection, settings)
                finally:
                    connection.invalidate()  # with its lock
        except ConfigError:
            self.close()
            raise
        except SQLAlchemyError as error:
            self.close()
            raise ConfigError(f"storage: {server.url} cannot be used: {_said(error)} {_advice(error)}") from None
        except optuna.exceptions.StorageInternalError as error:
            self.close()
            raise ConfigError(f"storage: {server.url} cannot be used: {_said(error.__cause__ or error)}") from None
        except RuntimeError as error:  # Optuna names both versions
            self.close()
            raise ConfigError(f"storage: {server.url} was made by another version of Optuna. {error}") from None
        self._sessions = sessionmaker(self._engine)

    def _make_tables(self, connection: Any, settings: dict[str, Any]) -> None:
        """Make Optuna's tables, where they are not there; one driver at a time, or they were in each other's way."""
        from optuna.storages._rdb import models
        from sqlalchemy import text

        query = text("SELECT pg_advisory_lock(hashtextextended('mixnas:tables', 0))")
        connection.execute(query)
        self._refuse_foreign_tables(connection)
        with self._engine.begin() as making:  # all or none
            models.BaseModel.metadata.create_all(making)
        url = self.server.url.replace("{", "{{").replace("}", "}}")
        self.rdb = RDBStorage(url, settings, skip_compatibility_check=True, skip_table_creation=True)
        self.rdb._version_manager.check_table_schema_compatibility()  # by itself: it could not be closed otherwise

    def _refuse_foreign_tables(self, connection: Any) -> None:
        """Refuse a database in which another program has what Optuna would call its own."""
        from optuna.storages._rdb import models
        from sqlalchemy import inspect, text

        inspector = inspect(connection)
        views = {*inspector.get_view_names(), *inspector.get_materialized_view_names()}
        there = {*inspector.get_table_names(), *views}

        def foreign(name: str, columns: set[str]) -> bool:
            return name in views or not columns <= {one["name"] for one in inspector.get_columns(name)}

        tables = models.BaseModel.metadata.tables.values()
        known = {table.name: {column.name for column in table.columns} for table in tables}
        version, migrations = models.VersionInfoModel.__tablename__, "alembic_version"

        def filled(name: str) -> bool:
            return connection.execute(text(f"SELECT 1 FROM {name}")).first() is not None

        if version in there and not foreign(version, known[version]) and filled(version):
            return  # all of Optuna's were made, by whichever version
        found = [name for name, columns in known.items() if name in there and foreign(name, columns)]
        if migrations in there and (foreign(migrations, {"version_num"}) or filled(migrations)):
            found.append(migrations)
        if found:
            raise ConfigError(
                f"storage: {self.server.url}: the database has tables or views of another program, with names that "
                f"Optuna's have: {', '.join(found)}. Nothing was written. Take a database of its own: createdb nas."
            )

    def close(self) -> None:
        """End heartbeats and connections."""
        self._ended.set()
        if self._beats is not None:
            self._beats.join()
        if hasattr(self, "rdb"):
            self.rdb.remove_session()
            self.rdb.engine.dispose()
        self._engine.dispose()

    # -- transactions -----------------------------------------------------------------------------------------------

    def transact(self, work: Callable[[Session], _T]) -> _T:
        """Do something in one transaction; where the connection is lost, all of it again.

        Raises:
            MachineError: The server does not answer for too long, or a stop was asked for meanwhile.
            IntegrityError: The study, or a trial of it, was deleted.
        """

        def once() -> _T:
            with self._sessions() as session, session.begin():
                return work(session)

        return self.patiently(once)

    def patiently(self, work: Callable[[], _T]) -> _T:
        """Do something that may be done twice; see `transact`."""
        from optuna.storages._rdb.models import NOT_FOUND_MSG
        from sqlalchemy.exc import DBAPIError

        until: float | None = None
        while True:
            try:
                found = work()
                self._gone = False
                return found
            except (DBAPIError, optuna.exceptions.StorageInternalError) as error:
                cause = error if isinstance(error, DBAPIError) else error.__cause__
                if not isinstance(cause, DBAPIError):
                    raise
                if getattr(cause.orig, "sqlstate", None) == _NO_PARENT:
                    raise self._deleted() from None
                said = f"{self.server.url}: {_said(cause)}"
                if not _may_pass(cause):
                    raise MachineError(f"{said} Mend that on the server, then resume.") from None
                now = time.monotonic()
                if until is None:
                    until = now if self._gone else now + self.server.wait
                    _logger.warning("%s Trying again for %g s.", said, self.server.wait)
                if now >= until or self.should_stop():
                    self._gone = True
                    waited = f" It was tried again for {self.server.wait:g} s." if now >= until else ""
                    raise MachineError(f"{said}{waited} What ended before is there; resume the run then.") from None
            except KeyError as error:
                if error.args != (NOT_FOUND_MSG,):
                    raise
                raise self._deleted() from None
            time.sleep(_PAUSE_S)

    def _deleted(self) -> IntegrityError:
        return IntegrityError(
            f"{self.server}: the study, or a trial of it, was deleted on the server while it was searched. Restore the "
            "database from its backup, then resume; or start a new run. What this run has heard of can be looked at."
        )

    # -- locks ------------------------------------------------------------------------------------------------------

    def _key(self, name: str) -> str:
        return f"mixnas:{self.server.study}:{name}"

    def lock(self, session: Session) -> None:
        """Be the only driver that proposes or agrees on something, to the end of a transaction."""
        from sqlalchemy import text

        query = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")
        session.execute(query, {"name": self._key("proposals")})

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[bool]:
        """Whether this driver has a lock of this name now; then it has it to the end of the block, or to its own."""
        from sqlalchemy import text

        def tried() -> Any:
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            try:
                query = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
                got = connection.execute(query, {"name": self._key(name)}).scalar()
            except BaseException:
                connection.close()
                raise
            return connection, bool(got)

        connection, got = self.patiently(tried)
        try:
            yield got
        finally:
            connection.invalidate()  # it ends, and its lock with it: a connection that went back to the pool keeps it
            connection.close()

    @contextlib.contextmanager
    def wait_for(self, name: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold a lock of this name in the block, after whoever has it.

        Args:
            name: Of the lock.
            waiting: Called once where somebody has it.

        Raises:
            StoppedEarly: A stop was asked for meanwhile.
        """
        told = False
        while True:
            with self.held(name) as got:
                if got:
                    yield
                    return
            if not told:
                waiting()
                told = True
            if self.should_stop():
                raise StoppedEarly("stopped while another driver was waited for.")
            time.sleep(_PAUSE_S)

    # -- what drivers agree on --------------------------------------------------------------------------------------

    def look(self) -> Found | None:
        """The study as it is; None where there is none of its name. Nothing is written."""

        def seen() -> Found | None:
            try:
                study = self.rdb.get_study_id_from_name(self.server.study)
            except KeyError:
                return None
            attributes, directions = self.rdb.get_study_user_attrs(study), self.rdb.get_study_directions(study)
            return Found(directions, attributes, self.rdb.get_n_trials(study))

        return self.patiently(seen)

    def make_study(self, directions: Sequence[StudyDirection]) -> None:
        """Make the study, where it is not there."""

        def made() -> None:
            with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
                self.rdb.create_new_study(directions, self.server.study)
            self.study_id = self.rdb.get_study_id_from_name(self.server.study)

        self.patiently(made)

    def attributes(self) -> dict[str, Any]:
        """Of the study, once it was found or made."""
        study = self.study_id
        assert study is not None
        return self.patiently(lambda: self.rdb.get_study_user_attrs(study))

    def agree(self, key: str, value: Any) -> Any:
        """An attribute of the study: what another driver set it to before, else this, which it then is for all."""
        return self.change(key, lambda known: value if known is None else known)

    def change(self, key: str, changed: Callable[[Any], Any]) -> Any:
        """Set an attribute of the study to what a function makes of it (of None where it is not there)."""
        from optuna.storages._rdb import models

        def work(session: Session) -> Any:
            self.lock(session)
            assert self.study_id is not None
            study = models.StudyModel.find_or_raise_by_id(self.study_id, session)
            found = models.StudyUserAttributeModel.find_by_study_and_key(study, key, session)
            before = None if found is None else json.loads(str(found.value_json))
            text = json.dumps(changed(before))
            if found is None:
                session.add(models.StudyUserAttributeModel(study_id=study.study_id, key=key, value_json=text))
            else:
                found.value_json = text
            return json.loads(text)

        return self.transact(work)

    # -- heartbeats -------------------------------------------------------------------------------------------------

    def keep_alive(self, trial_ids: Sequence[int]) -> None:
        """Say from now on that these trials are carried out, and no others."""
        self._alive = frozenset(trial_ids)
        if self._alive and self._beats is None:
            self._beats = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
            self._beats.start()

    def _beat(self) -> None:
        from sqlalchemy import text
        from sqlalchemy.exc import SQLAlchemyError

        query = text(f"UPDATE trial_heartbeats SET heartbeat = {NOW} WHERE trial_id = ANY(:ids)")
        while not self._ended.wait(self.server.heartbeat):
            alive = list(self._alive)
            try:
                if alive:
                    with self._engine.begin() as connection:
                        connection.execute(query, {"ids": alive})
            except SQLAlchemyError as error:  # whoever writes a trial says it
                _logger.debug("no heartbeat: %s", _said(error))


NOW = "timezone('UTC', clock_timestamp())"
"""The server's time as Optuna's tables have it under the time zone that is set here; not that of a transaction's
beginning, which may have waited for a lock."""


def _said(error: BaseException) -> str:
    """What a server or its driver said, in a line; never what was sent there."""
    original = getattr(error, "orig", None) or error
    lines = [line.strip() for line in str(original).splitlines() if line.strip()]
    text = without_password(lines[0] if lines else type(original).__name__)
    return text if text.endswith(".") else f"{text}."


def _advice(error: BaseException) -> str:
    text = str(getattr(error, "orig", error))
    if "password" in text or "authentication" in text:
        return "Set PGPASSWORD, or write ~/.pgpass (see libpq), or give --storage a URL with the password."
    if "does not exist" in text:
        return "Make it on the server: createuser, createdb."
    if "permission denied" in text:
        return "Whoever connects must be allowed to make tables in the database."
    return "See that it runs, and that its host, port and name are right."


def _may_pass(error: Any) -> bool:
    """Whether a failed transaction may succeed when it is tried again."""
    from sqlalchemy.exc import InterfaceError, OperationalError

    return bool(error.connection_invalidated) or isinstance(error, OperationalError | InterfaceError)
