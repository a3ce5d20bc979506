"""Whether the program that a run's task is may be run: a run from elsewhere names code that nobody here has looked at.

A run that is started here is marked with a key that lies in the user's directory and nowhere else. The mark is of its
task, so that neither another's run nor one whose task was changed has it. A task of the package needs no trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixnas.evaluators.tasks.loading import is_built_in, source_of
from mixnas.search.run.typed import typed
from mixnas.search_space.errors import ConfigError, shown, visible
from mixnas.search_space.files import read_bytes

_KEY_BYTES = 32


def _key_file() -> Path:
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "mixnas" / "key"


def _key(*, make: bool) -> bytes:
    """This user's key; empty where there is none. Without a home, runs of tasks of one's own ask for --trust."""
    try:
        path = _key_file()
    except RuntimeError:
        return b""
    damaged = False
    try:
        text = read_bytes(path, at_most=1000)
        key = bytes.fromhex(text.decode("ascii").strip())
        damaged = len(key) != _KEY_BYTES
    except ConfigError:
        key = b""
    except ValueError:
        key, damaged = b"", True
    if key and not damaged:
        return key
    return _new_key(path, replace=damaged) if make else b""


def _new_key(path: Path, *, replace: bool) -> bytes:
    """Make the user's key, whole or not at all; what a damaged one marked asks for --trust from now on."""
    key = secrets.token_bytes(_KEY_BYTES)
    temporary = path.with_name(f".key.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(handle, "w", encoding="ascii") as file:
                file.write(key.hex() + "\n")
            (os.replace if replace else os.link)(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    except FileExistsError:
        return _key(make=False)  # another process was first
    except (OSError, ValueError):
        return b""
    return key


def mark(task: Any, created: str, *, make: bool = True) -> str:
    """The mark of a run that is started here: of its task, the file it is found in, and when the run was created.

    Empty where it needs none. Of the file, so that a module of that name in another folder is not taken for it.
    """
    if is_built_in(task):
        return ""
    key, file = _key(make=make), source_of(_module(task))
    text = json.dumps([task, created, None if file is None else os.path.realpath(file)], sort_keys=True, default=str)
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest() if key else ""


def _module(task: Any) -> str:
    name = task.get("name") if isinstance(task, Mapping) else task
    return str(name).partition(":")[0]


def is_trusted(manifest: Mapping[str, Any]) -> bool:
    """Whether a run's task is of the package, or the run was started here with this very task."""
    task = manifest["fixed"].get("task")
    if is_built_in(task):
        return True
    own = mark(task, str(manifest.get("created")), make=False)
    return bool(own) and hmac.compare_digest(own, str(manifest.get("mark", "")))


def about_to_import(manifest: Mapping[str, Any], trust: bool = False) -> str:
    """Which file is going to be imported for a run's task, in words; empty where none of the user's is, or may be."""
    task = manifest["fixed"].get("task")
    if is_built_in(task) or not (trust or is_trusted(manifest)):
        return ""
    name = task.get("name") if isinstance(task, Mapping) else task
    return f"importing {visible(shown(name))} from {source_of(_module(task)) or 'nowhere that is found'}"


def require_own(manifest: Mapping[str, Any], run: Path) -> None:
    """Refuse to import a run's task where a run is only looked at, unless the run was started here.

    Raises:
        ConfigError: It was not.
    """
    if not is_trusted(manifest):
        raise ConfigError(
            f"{run}: what is asked only its task knows, a program, and the run was not started here with it. "
            "Looking at a run runs nothing of it: ask with a configuration (-c) instead."
        )


def require_trust(manifest: Mapping[str, Any], run: Path, verb: str, trust: bool) -> None:
    """Refuse to import a run's task, unless it may be run.

    Args:
        manifest: Of the run.
        run: Its directory.
        verb: What is asked for.
        trust: Whether the user said that it may.

    Raises:
        ConfigError: It may not; the message names module and file.
    """
    if trust or is_trusted(manifest):
        return
    task = manifest["fixed"].get("task")
    name = task.get("name") if isinstance(task, Mapping) else task
    file = source_of(_module(task))
    raise ConfigError(
        f"{run}: its task is {visible(shown(name))}, a program ({file or 'its file is not found'}), and this run was "
        f"not started here with it. Read it; if it may run: nas {verb} {typed(run)} --trust"
    )
