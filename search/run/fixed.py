"""What the trials of a run depend on: it may not change when a run is gone on with, nor between a study's drivers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from mixnas.search_space.errors import visible
from mixnas.search_space.files import dump_yaml

FIXED_KEYS = (
    *("task", "objectives", "constraints", "space", "search.evaluator", "train", "supernet"),
    *("latency.runtime", "latency.threads", "latency.batch_size", "search.halving"),
)
"""A resumed run may change its seed, strategy and budget, not these."""
_FREE = ("checkpoint_every", "processes")  # of the super-network: its weights are the same

_MOST_LINES, _LONGEST_LINE = 40, 160  # of a difference that is told


def fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `FIXED_KEYS` names of a resolved configuration, as far as it is there."""
    found: dict[str, Any] = {}
    for key in FIXED_KEYS:
        group, _, name = key.rpartition(".")
        place = config.get(group) if group else config
        if isinstance(place, Mapping) and name in place:
            found[key] = place[name]
    if "supernet" in found:
        found["supernet"] = {name: value for name, value in found["supernet"].items() if name not in _FREE}
    return found


def difference(before: Mapping[str, Any], now: Mapping[str, Any], names: tuple[str, str]) -> tuple[str, str]:
    """The first key whose value is another, and how it differs, as lines; both empty where none does.

    Args:
        before: What is compared with.
        now: What is asked for; it may have more keys.
        names: Of the two, in the lines.
    """
    for key, old_value in before.items():
        new_value = now.get(key)
        if key in ("train", "supernet") and isinstance(new_value, Mapping):  # a later version may have more settings
            new_value = {name: new_value[name] for name in old_value if name in new_value}
        # the order of objectives is the order of the values that are stored, and the file's text shows it
        old, new = (dump_yaml({key: plain}).splitlines() for plain in (old_value, new_value))
        if old != new:
            lines = list(difflib.unified_diff(old, new, *names, lineterm="", n=1))
            shown_lines = [line if len(line) <= _LONGEST_LINE else line[:_LONGEST_LINE] + "..." for line in lines]
            left = f"\n... ({len(lines)} lines)" if len(lines) > _MOST_LINES else ""
            return key, visible("\n".join(shown_lines[:_MOST_LINES])) + left
    return "", ""
