"""Where a team's study lies: a PostgreSQL server, as a configuration names it. Nothing here connects.

    storage: postgresql+psycopg://ann@db.example.org/nas
    storage: {url: postgresql+psycopg://ann@db.example.org/nas, study: pictures, heartbeat: 15s, grace: 60s, wait: 5m}

A password that the URL has is kept in memory, and is in nothing that is written: it is no part of `url`. Without one,
libpq looks where it always does: PGPASSWORD, PGPASSFILE, ~/.pgpass.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mixnas.search_space.errors import ConfigError, shown
from mixnas.search_space.schema import Schema, schema_of
from mixnas.search_space.settings import Seconds, build, to_plain

SCHEME = "postgresql+psycopg"
EXTRA = 'pip install "mixnas[postgres]"'
_MAY_BE_CALLED = ("postgresql", "postgres", SCHEME)
_SECRET = ("password", "sslpassword")
_STUDY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """See the module.

    Attributes:
        url: Of the database, without a password.
        study: Which of its studies: drivers that name the same one share it.
        heartbeat: How often a driver says that it lives.
        grace: A driver that was not heard from for so long is gone, and its trials are given back.
        wait: For how long is tried again when the server does not answer in the middle of a search.
        secrets: What of the URL is not written anywhere.
    """

    url: str
    study: str = "search"
    heartbeat: Seconds = 15.0
    grace: Seconds = 60.0
    wait: Seconds = 300.0
    secrets: Mapping[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        url, secrets = _taken_apart(self.url)
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "secrets", secrets)
        if not _STUDY.fullmatch(self.study):
            raise ConfigError(f"study: {shown(self.study)} is no name. Allowed: letters, digits, '.', '_', '-'.")
        if self.grace < 2 * self.heartbeat:
            raise ConfigError(
                f"grace: {self.grace:g} s is less than two heartbeats of {self.heartbeat:g} s: a driver that is well "
                "would be held to be gone. Make it longer, or the heartbeat shorter."
            )

    @classmethod
    def from_plain(cls, plain: Any, where: str) -> Server:
        """Read a URL, or `{url: ..., option: value}`."""
        if isinstance(plain, cls):
            return plain
        if isinstance(plain, str):
            plain = {"url": plain}
        return build(cls, plain, where)

    def to_plain(self) -> str | dict[str, Any]:
        """The inverse, but for a password: every option written out."""
        return {f.name: to_plain(getattr(self, f.name)) for f in fields(self) if f.init}

    @classmethod
    def schema(cls) -> Schema:
        """What `from_plain` reads, as a JSON Schema."""
        return {"anyOf": [{"type": "string"}, schema_of(cls)]}

    def __str__(self) -> str:
        return f"{self.url} (study {self.study})"


def _taken_apart(url: str) -> tuple[str, dict[str, str]]:
    """A URL without its secrets, and those.

    Raises:
        ConfigError: It is none of a PostgreSQL server. The message has no part of it that could be a password.
    """
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError

    example = f"for example {SCHEME}://ann@db.example.org/nas"
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(f"is not the URL of a database; {example}.") from None
    if found.drivername not in _MAY_BE_CALLED:
        raise ConfigError(
            f"{found.drivername}:// is not allowed: a study is shared on PostgreSQL only; {example}. Without "
            "a storage it lies in the run's directory, for one process."
        )
    if not found.database:
        raise ConfigError(f"names no database; {example}, after 'createdb nas'.")
    secrets = {name: str(found.query[name]) for name in _SECRET if name in found.query}
    if found.password:
        secrets["password"] = str(found.password)
    kept = {name: value for name, value in found.query.items() if name not in _SECRET}
    plain = URL.create(SCHEME, found.username, None, found.host, found.port, found.database, kept)
    return plain.render_as_string(hide_password=False), secrets
