"""Modules of a user's own that register operators, policies, strategies, engines or formats.

They are named on the command line (`nas VERB --import mine`) or in the environment (`MIXNAS_IMPORT=mine,other`), never
in a file: whoever sends a configuration or a run does not decide what is run here. The environment reaches the
processes that a search starts too.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable

from mixnas.search_space.errors import ConfigError, NasError

VARIABLE = "MIXNAS_IMPORT"

HINT = " If a module of your own registers it, name that module: nas ... --import MODULE."

_begun: set[str] = set()


def name_extensions(modules: Iterable[str]) -> None:
    """Have these modules imported when a name is first looked up, here and in processes that are started."""
    known = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*known, *modules]))


def import_extensions() -> None:
    """Import what was named, each once.

    Raises:
        ConfigError: A module is not found, or importing it fails.
    """
    for name in os.environ.get(VARIABLE, "").split(","):
        if not name or name in _begun:
            continue
        _begun.add(name)  # before it is imported: it may look names up itself
        if os.getcwd() not in sys.path and "" not in sys.path:  # beside the configuration more often than installed
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:
            _begun.discard(name)
            if isinstance(error, NasError):
                raise
            missing = isinstance(error, ModuleNotFoundError) and error.name == name
            advice = " Run from the directory that it lies in, or put that on PYTHONPATH." if missing else ""
            raise ConfigError(f"--import {name}: {type(error).__name__}: {error}.{advice}") from error
