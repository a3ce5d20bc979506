"""A check of each tensor beside the digest of a weights file: where the digest is wrong, which tensor is. No torch.

The digest (SHA-256, of all) says whether a file is what was written; the checks (CRC-32, of one tensor each) only say
where it is not, and cost next to nothing.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping

from mixnas.search_space.errors import visible
from mixnas.search_space.units import is_unit

CHECKS = "checks"
"""Under which they stand in a file's metadata: JSON, name to check."""

_NAMED = 3


def check_of(content: bytes | memoryview) -> str:
    """Of a tensor's bytes."""
    return f"{zlib.crc32(content):08x}"


def written(tensors: Mapping[str, bytes]) -> str:
    """The checks of tensors, as metadata."""
    return json.dumps({name: check_of(tensors[name]) for name in sorted(tensors)})


def changed(tensors: Mapping[str, bytes | memoryview], metadata: Mapping[str, str]) -> str:
    """Which tensors of a damaged file are not those that were written, and of which units, in words."""
    try:
        checks = dict(json.loads(metadata[CHECKS]))
    except (KeyError, ValueError, TypeError, RecursionError):
        return "which tensor it is cannot be told: the file has no check of each by itself"
    other = [name for name, content in tensors.items() if checks.get(name) != check_of(content)]
    gone = [str(name) for name in checks if name not in tensors]
    if not other and not gone:
        return "its tensors are those that were written, and what is said beside them is not"
    parts = [f"{_listed(other)} {'is' if len(other) == 1 else 'are'} not what was written"] if other else []
    missing = f"{len(gone)} more" if other else _listed(gone)
    parts += [f"{missing} {'is' if len(gone) == 1 else 'are'} missing"] if gone else []
    return ", and ".join(parts)


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(f"{visible(name)}{_of_unit(name)}" for name in names[:_NAMED]) + more


def _of_unit(name: str) -> str:
    """Whose it is, where the name says so."""
    parts = name.split(".")
    unit = next((unit for n in range(1, len(parts)) if is_unit(unit := ".".join(parts[:n]))), "")
    return f" (unit {visible(unit)})" if unit else ""
