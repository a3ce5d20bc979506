"""The errors a caller may want to tell apart; every message says what, where, what was given, what is allowed."""

from __future__ import annotations

import difflib
import errno
import re
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


class MachineError(StoppedEarly):
    """The machine, not an architecture, is at fault: a full disk, no memory, no permission. Exit status 4."""


class IntegrityError(NasError):
    """A file is damaged, truncated or not what it says it is. Exit status 5."""

    exit_status = 5


_MACHINE = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOMEM, errno.EFBIG),
        *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EAGAIN),
    }
)
_ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "Make it writable"),
    **dict.fromkeys((errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE), "End other programs"),
}
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|can't allocate memory|[Cc]annot allocate memory|std::bad_alloc|insufficient shared memory"
)
_NO_ROOM = re.compile(r"No space left on device|Disk quota exceeded|Too many open files|Read-only file system")


def machine_fault(error: BaseException) -> str:
    """What is wrong with this machine and what to do, where an error is its fault; empty where it is not.

    Disk, memory of the host, permissions and open files are the machine's. A GPU's memory is not: that an architecture
    does not fit there is a property of the architecture. What an error was raised from counts too.
    """
    seen: list[BaseException] = []
    reasons: list[BaseException | None] = [error]
    while reasons:
        one = reasons.pop()
        if one is None or one in seen:
            continue
        if fault := _fault(one):
            return fault
        seen.append(one)
        reasons += [one.__cause__, *(one.exceptions if isinstance(one, BaseExceptionGroup) else ())]
    return ""


def _fault(error: BaseException) -> str:
    """Of one error, whatever it was raised from."""
    if isinstance(error, NasError):
        return ""  # said on purpose; what it was raised from is looked at by itself
    text = str(error) if isinstance(error, RuntimeError | OSError) else ""
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return "this machine's memory is used up. Free some, or make batches or the space smaller"
    if isinstance(error, OSError) and error.errno in _MACHINE:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}. {_ADVICE.get(error.errno, 'Make room')}"
    if found := _NO_ROOM.search(text):  # as a library's own C++ says it
        return f"{found[0]}. {'End other programs' if 'open files' in found[0] else 'Make room'}"
    return ""


_LONGEST_SHOWN = 60
_LONGEST_LIST = 110


_PASSWORD = re.compile(
    r"([\w.+%-]*):(?!//)[^\s:]\S*@"  # name:password@, whatever stands before it
    r"|(?i:((?:password|_secret|scram_\w+_key)['\"]?\s*=\s*)(?:'[^']*'|\"[^\"]*\"|[^&\s'\"]*))"
)


def without_password(text: str) -> str:
    """Text in which the passwords of URLs and of libpq's connection strings are not.

    >>> without_password("--set storage=postgresql://ann:s3cret@host/db")
    '--set storage=postgresql://ann:***@host/db'
    >>> without_password("host=db Password=s3cret, or ann:s3c@ret@host/db")
    'host=db Password=*** or ann:***@host/db'
    """
    return _PASSWORD.sub(lambda found: f"{found[2]}***" if found[2] is not None else f"{found[1]}:***@", text)


def shown(value: object) -> str:
    """A value as messages show it: its `repr`, cut where it is long, without a password."""
    try:
        text = without_password(repr(value))
    except (ValueError, RecursionError):  # a whole number of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}... ({len(text)} characters)"


def exactly(value: float) -> str:
    """A number in all the digits that a float is sure of, where `g` alone would leave out some.

    >>> exactly(200_001), exactly(20e3 * 1.1), exactly(1e-6)
    ('200001', '22000', '1e-06')
    """
    return str(value) if isinstance(value, int) else f"{value:.15g}"


def counted(number: int, one: str, more: str = "") -> str:
    """How many of something there are, in words.

    >>> counted(1, "core"), counted(1200, "thread"), counted(2, "class", "classes")
    ('1 core', '1,200 threads', '2 classes')
    """
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def listed(names: Iterable[object]) -> str:
    """Names as messages list them, separated by commas; a long list is cut and its length told."""
    texts = [str(name) for name in names]
    whole = ", ".join(texts)
    if len(whole) <= _LONGEST_LIST:
        return whole
    kept = whole[:_LONGEST_LIST].rpartition(", ")[0] or whole[:_LONGEST_LIST]
    return f"{kept}, ... ({len(texts)} in all)"


def visible(text: str) -> str:
    """Text in which nothing can move a terminal's cursor, colour it or hide: control characters are spelled out."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )


_LEAST_BEGINNING = 3  # letters with which a longer name may begin


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest allowed name, or an empty string."""
    given, known = str(name)[:_LONGEST_SHOWN], list(allowed)
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    if not close and len(given) >= _LEAST_BEGINNING:
        close = [one for one in known if one.startswith(given)]
    return f" Did you mean {shown(close[0])}?" if close else ""
