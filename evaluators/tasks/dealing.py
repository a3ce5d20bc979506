"""Dealing named things, files as a rule, to the splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from mixnas.evaluators.tasks.task import SPLITS
from mixnas.search_space.errors import ConfigError


def dealt(names: Iterable[str], validation: float, test: float, seed: int, where: str) -> dict[str, list[str]]:
    """Names by split, sorted in each: in the order of a hash of seed and name, so that it depends on no order of files.

    Args:
        names: Of three things at least.
        validation, test: Their shares; each split has one at least.
        seed: Of the hash.
        where: The data, for messages.

    Raises:
        ConfigError: There are fewer than three.
    """
    order = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode(errors="surrogateescape")).digest())
    if len(order) < len(SPLITS):
        raise ConfigError(f"{where}: has {len(order)} files of {len(SPLITS)} needed at least, one for each split.")
    counts = [max(1, round(share * len(order))) for share in (test, validation)]
    while sum(counts) >= len(order):  # at least one is left to train
        counts[counts.index(max(counts))] -= 1
    cuts = {"test": order[: counts[0]], "validation": order[counts[0] : sum(counts)], "train": order[sum(counts) :]}
    return {name: sorted(cuts[name]) for name in SPLITS}
