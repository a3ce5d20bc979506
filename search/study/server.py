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
_SECRET = ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
_PARAMETERS = frozenset(
    (
        *_SECRET,
        *("application_name", "channel_binding", "client_encoding", "connect_timeout", "dbname", "gssdelegation"),
        *("fallback_application_name", "gssencmode", "gsslib", "host", "hostaddr", "keepalives", "keepalives_count"),
        *("keepalives_idle", "keepalives_interval", "krbsrvname", "load_balance_hosts", "max_protocol_version"),
        *("min_protocol_version", "oauth_client_id", "oauth_issuer", "oauth_scope", "options", "passfile", "port"),
        *("require_auth", "requirepeer", "requiressl", "service", "servicefile", "ssl_max_protocol_version"),
        *("ssl_min_protocol_version", "sslcert", "sslcertmode", "sslcompression", "sslcrl", "sslcrldir", "sslkey"),
        *("sslkeylogfile", "sslmode", "sslnegotiation", "sslrootcert", "sslsni", "target_session_attrs"),
        *("tcp_user_timeout", "user"),
    )
)
"""What libpq knows, to PostgreSQL 18. Another is refused: it may be `password`, misspelt."""
_WHOLE = re.compile(r"([A-Za-z][A-Za-z0-9.+-]*)://(.*)", re.DOTALL)
_UNESCAPED = re.compile(r"[@/?#]")
_PLACE = re.compile(r"([\w.%-]*|\[[0-9A-Fa-f:.%\w]+\])(:\d*)?(/[^/?#@:\s]*)?(\?[^?#@\s]*)?")
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
        ConfigError: It is none of a PostgreSQL server, or one that readers of URLs take apart in several ways. The
            message has nothing of it but its scheme: in what cannot be taken apart, anything could be the password.
    """
    from sqlalchemy.engine import URL, make_url
    from sqlalchemy.exc import ArgumentError

    example = f"for example {SCHEME}://ann@db.example.org/nas"
    whole = _WHOLE.fullmatch(url)
    if whole is None:
        raise ConfigError(f"is not the URL of a database (it is not shown: it may have a password); {example}.")
    scheme, rest = whole.groups()
    if scheme not in _MAY_BE_CALLED:
        raise ConfigError(
            f"{scheme}:// is not allowed: a study is shared on PostgreSQL only; {example}. Without "
            "a storage it lies in the run's directory, for one process."
        )
    who, _, where = rest.rpartition("@")
    if _UNESCAPED.search(who):
        raise ConfigError(
            f"{scheme}://...: '@', '/', '?' or '#' stands in the name or the password, or '@' behind the host: "
            "percent-encode it (@ is %40, / is %2F, ? is %3F, # is %23)."
        )
    try:
        found = make_url(url)
    except (ArgumentError, ValueError):
        found = None
    if found is None or not _PLACE.fullmatch(where):
        raise ConfigError(
            f"{scheme}://...: what follows is no host, port and database (it is not shown: it may have a password); "
            f"{example}."
        )
    if not found.database:
        raise ConfigError(f"names no database; {example}, after 'createdb nas'.")
    kept, secrets = dict[str, str | tuple[str, ...]](), dict[str, str]()
    for name, value in found.query.items():
        if name not in _PARAMETERS:
            known = [one for one in _PARAMETERS if one == name.casefold()]
            meant = f" Did you mean {known[0]!r}?" if known else ""
            raise ConfigError(
                f"{scheme}://...: what follows '?' has a parameter that is none of libpq's (sslmode, for example)."
                f"{meant} Take it out."
            )
        if isinstance(value, str):
            (secrets if name in _SECRET else kept)[name] = value
        elif name in ("host", "port"):  # of several servers
            kept[name] = value
        else:
            raise ConfigError(f"{scheme}://...: the parameter {name} stands there twice.")
    if found.password:
        secrets["password"] = str(found.password)
    plain = URL.create(SCHEME, found.username, None, found.host, found.port, found.database, kept)
    return plain.render_as_string(hide_password=False), secrets
