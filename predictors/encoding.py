"""Encoded architectures as real vectors, for models of their metrics."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from mixnas.search_space.errors import ConfigError


class MaskedEncoding:
    """Integer vectors to real ones: a column per category, one per numeric choice, all zero where inactive.

    Two different categories are at squared distance 1, the ends of a numeric choice likewise.

    Attributes:
        group: Of each column, its variable.
        levels: Per variable, the column's value for each option of a numeric choice; None for categories.
    """

    def __init__(self, values: Sequence[Sequence[Any]]) -> None:
        """Args: values: per variable, what may be chosen; numbers are ordered, anything else is a category."""
        self.group: list[int] = []
        self.levels: list[np.ndarray | None] = []
        for v, options in enumerate(values):
            numeric = len(options) > 2 and all(isinstance(o, int | float) and not isinstance(o, bool) for o in options)
            if numeric:
                # Ordered by size, evenly spaced: expansions of 1, 2 and 4 are steps of one.
                rank = np.argsort(np.argsort(np.array(options, dtype=float)))
                self.levels.append(rank / (len(options) - 1) - 0.5)
                self.group.append(v)
            else:
                self.levels.append(None)
                self.group += [v] * len(options)
        self._counts = [len(options) for options in values]

    def __call__(self, encoded: np.ndarray) -> np.ndarray:
        """(rows, variables) integers, -1 inactive, to (rows, columns)."""
        encoded = np.asarray(encoded)
        if encoded.ndim != 2 or encoded.shape[1] != len(self._counts):
            raise ConfigError(f"vectors of shape {encoded.shape}; expected (rows, {len(self._counts)}).")
        columns = []
        for v, (count, levels) in enumerate(zip(self._counts, self.levels, strict=True)):
            chosen = encoded[:, v]
            if ((chosen < -1) | (chosen >= count)).any():
                raise ConfigError(f"variable {v}: a value outside -1 to {count - 1}.")
            if levels is not None:
                columns.append(np.where(chosen >= 0, levels[np.maximum(chosen, 0)], 0.0)[:, None])
            else:
                columns.append((chosen[:, None] == np.arange(count)) * math.sqrt(0.5))
        return np.hstack(columns) if columns else np.zeros((len(encoded), 0))


class ChoiceEncoding:
    """What a model is told of an architecture: its choices, which of them exist, and how often each value is chosen.

    `choices` are the columns of `MaskedEncoding`, with a further one for each choice that may be inactive: to be there
    is as far from not being there as one value from another. `counts` are, for choices of one kind, the share of them
    that stands at each value: two architectures of the same operators in another order have the same counts. Of
    numbers with more values than there are choices of the kind it is their mean level: shares would be noughts and
    ones, and tell no more than the choices do. A kind's counts of two random architectures are at squared distance 1
    on average.

    Attributes:
        variables: How many there are.
        group: Of each column of `choices`, its variable.
        count_group: Of each column of `counts`, its kind.
    """

    def __init__(
        self,
        values: Sequence[Sequence[Any]],
        optional: Sequence[bool] | None = None,
        kinds: Sequence[Hashable] | None = None,
    ) -> None:
        """Args:
        values: Per variable, what may be chosen; see `MaskedEncoding`.
        optional: Per variable, whether it may be inactive; not told of any where it is not given.
        kinds: Per variable, its kind; those of one kind have the same values. By the values where it is not given.
        """
        masked = self._masked = MaskedEncoding(values)
        self.variables = len(values)
        there = np.flatnonzero(optional if optional is not None else [False] * len(values))
        self.group = np.array([*masked.group, *there.tolist()], dtype=np.intp)
        # What each column is for each position of its variable, the first for -1: one look-up encodes all.
        positions = np.arange(-1, max(map(len, values), default=0))[:, None]
        every = masked(np.minimum(positions, [len(options) - 1 for options in values]))
        presence = np.repeat((positions >= 0) * math.sqrt(0.5), len(there), axis=1)
        self._table = np.ascontiguousarray(np.hstack([every, presence]).T)
        members: dict[Hashable, list[int]] = {}
        for v, options in enumerate(values):
            members.setdefault((tuple(options), None if kinds is None else kinds[v]), []).append(v)
        self._kinds = [
            (np.array(m), len(values[m[0]]), masked.levels[m[0]] if len(values[m[0]]) > len(m) else None)
            for m in members.values()
            if len(m) > 1
        ]
        sizes = [count if levels is None else 1 for _, count, levels in self._kinds]
        self.count_group = np.repeat(np.arange(len(sizes)), sizes)

    def check(self, encoded: np.ndarray) -> None:
        """Refuse vectors of another space with a `ConfigError`."""
        self._masked(encoded)

    def choices(self, encoded: np.ndarray) -> np.ndarray:
        """(rows, variables) integers, -1 inactive, to (rows, columns)."""
        encoded = np.asarray(encoded)
        columns: np.ndarray = self._table[np.arange(len(self.group)), encoded[:, self.group] + 1]
        return columns

    def counts(self, encoded: np.ndarray) -> np.ndarray:
        """(rows, variables) integers, -1 inactive, to (rows, columns)."""
        encoded = np.asarray(encoded)
        found = []
        for members, count, levels in self._kinds:
            chosen = encoded[:, members]
            if levels is not None:
                mean = np.where(chosen >= 0, levels[np.maximum(chosen, 0)], 0.0).mean(axis=1, keepdims=True)
                found.append(mean / (math.sqrt(2 / len(members)) * levels.std()))
                continue
            share = np.stack([(chosen == position).sum(axis=1) for position in range(count)], axis=1) / len(members)
            found.append(share / math.sqrt(2 * (1 - 1 / count) / len(members)))
        return np.hstack(found) if found else np.zeros((len(encoded), 0))
