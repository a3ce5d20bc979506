"""The errors a caller may want to tell apart; every message says what, where, what was given, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NasError(Exception):
    """Root of everything that mixnas raises on purpose. Exit status 1 of the command line.

    Examples:
        >>> import mixnas
        >>> try:
        ...     mixnas.SearchSpace.from_dict({"stem": "konv", "stages": [{"width": 8, "block": {}}]})
        ... except mixnas.NasError as error:
        ...     print("Did you mean 'conv'?" in str(error))
        True
    """

    exit_status = 1


class ConfigError(NasError, ValueError):
    """A file, option or argument is wrong; nothing was started. Exit status 2."""

    exit_status = 2


class InfeasibleError(NasError):
    """No architecture satisfies the constraints. Exit status 3."""

    exit_status = 3


class StoppedEarly(NasError):  # noqa: N818 - not a failure: the run can be resumed
    """The run was stopped before its budget was spent and can be resumed. Exit status 4."""

    exit_status = 4


class IntegrityError(NasError):
    """A file is damaged, truncated or not what it says it is. Exit status 5."""

    exit_status = 5


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
