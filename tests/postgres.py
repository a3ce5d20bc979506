"""A PostgreSQL server of our own, for a test or a benchmark: in a temporary folder, on a free port of 127.0.0.1."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PASSWORD = "corr3ct h/rse:b@ttery"
_USERS = ("postgres", "nobody")


@functools.cache
def programs() -> Path | None:
    """The folder of `initdb` and `postgres`, the newest that is installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3]))
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


def why_not() -> str:
    """Why no server can be started here; empty where one can."""
    if programs() is None:
        return "PostgreSQL is not installed (Debian's package postgresql)"
    with contextlib.suppress(ImportError):
        import psycopg  # noqa: F401

        return ""
    return "psycopg is not installed"


@dataclass
class Postgres:
    """A server. Its user `nas` has a password, and may make databases."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    _names = itertools.count()

    def url(self, database: str, password: str = PASSWORD) -> str:
        """Of a database, with the password."""
        from sqlalchemy.engine import URL

        return URL.create("postgresql+psycopg", "nas", password, "127.0.0.1", self.port, database).render_as_string(
            False
        )

    def new(self) -> str:
        """The URL of a new database."""
        name = f"nas{next(self._names)}_{os.getpid()}"
        self.execute(f"CREATE DATABASE {name}", "postgres")
        return self.url(name)

    def execute(self, query: str, database: str) -> list[tuple]:
        """Ask it something."""
        import psycopg

        where = {"host": "127.0.0.1", "port": self.port, "user": "nas", "password": PASSWORD, "dbname": database}
        with psycopg.connect(**where, autocommit=True) as connection:
            found = connection.execute(query)
            return found.fetchall() if found.description else []

    def stop(self) -> None:
        """End it at once, as a crash would."""
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(30)

    def start(self) -> None:
        """Start it again, on the same files and the same port."""
        self.process = _started(self.folder, self.port)


def _as_other() -> list[str]:
    """What a command begins with so that it is not run by root, whom the server refuses."""
    if os.getuid() != 0:
        return []
    for name in _USERS:
        with contextlib.suppress(KeyError):
            found = pwd.getpwnam(name)
            return ["setpriv", f"--reuid={found.pw_uid}", f"--regid={found.pw_gid}", "--clear-groups"]
    raise RuntimeError("no user to run PostgreSQL as")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _started(folder: Path, port: int) -> subprocess.Popen[bytes]:
    options = [
        "-c",
        "listen_addresses=127.0.0.1",
        "-c",
        f"port={port}",
        "-c",
        "unix_socket_directories=",
        "-c",
        "fsync=off",
    ]
    command = [*_as_other(), str(programs() / "postgres"), "-D", str(folder / "data"), *options]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"PostgreSQL did not start: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.05)
    until = time.monotonic() + 60
    ready = [str(programs() / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ready).returncode:  # it listens before it lets anybody in
        assert time.monotonic() < until and process.poll() is None, (folder / "log").read_text()[-2000:]
        time.sleep(0.05)
    return process


@contextlib.contextmanager
def running() -> Iterator[Postgres]:
    """A server while the block lasts."""
    with tempfile.TemporaryDirectory(prefix="nas-pg-") as name:
        folder = Path(name)
        (folder / "password").write_text(f"{PASSWORD}\n")
        if os.getuid() == 0:
            other = next(pwd.getpwnam(u) for u in _USERS if u in {p.pw_name for p in pwd.getpwall()})
            for path in (folder, folder / "password"):
                os.chown(path, other.pw_uid, other.pw_gid)
        make = ["initdb", "-D", str(folder / "data"), "-U", "nas", "--pwfile", str(folder / "password")]
        make[0] = str(programs() / "initdb")
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run([*_as_other(), *make, *options], check=True, capture_output=True, cwd=folder)
        port = _free_port()
        server = Postgres(folder, port, _started(folder, port))
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One for all tests of a session; skipped where there can be none."""
    if reason := why_not():
        pytest.skip(reason)
    with running() as server:
        yield server
