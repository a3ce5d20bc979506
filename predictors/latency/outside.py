"""How far a prediction can be off for what was never measured: found by leaving out whole operators.

An interval that is calibrated on networks of measured operators says nothing of another operator. So one group of units
after another is left out of the fit of the unit model and predicted by it: all units with one operator or policy, or
all with the smallest or largest value of a number. What a new operator does is taken to scatter as these groups do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from mixnas.predictors.latency.model import MIN_UNITS, Columns, FitConfig, UnitModel

MAX_GROUPS = 40
"""Groups that are left out, at most; each takes a small fit."""
_TREES = 20  # of these fits, at most: more of them, and the width stays the same


def half_width_outside(works: Columns, settings: Columns, latency_ms: np.ndarray, config: FitConfig) -> float | None:
    """Half of the interval's width, a logarithm, of a unit of which something was never measured.

    The quantile over groups of units that a fit has not seen, each group with the same weight, and one more group that
    is infinitely far off for the one to come (Dunn, Wasserman, Ramdas 2018, arXiv 1809.07441, section 2: exchangeable
    groups).

    Args:
        works: Counts of each measured unit.
        settings: Settings of each.
        latency_ms: (units,).
        config: Coverage, and the model that is fitted.

    Returns:
        None where there are too few groups to tell.
    """
    errors = list(_errors(works, settings, latency_ms, config))
    values = np.concatenate(errors) if errors else np.empty(0)
    weights = np.concatenate([np.full(len(e), 1 / len(e)) for e in errors]) if errors else np.empty(0)
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / (len(errors) + 1)
    at = int(np.searchsorted(reached, config.coverage - 1e-9))
    return float(values[order[at]]) if at < len(values) else None


def groups_of(settings: Columns) -> list[np.ndarray]:
    """(units,) masks of units that belong together, without the groups whose others would be too few for a fit."""
    found: dict[bytes, np.ndarray] = {}
    for name, column in zip(settings.names, settings.values.T, strict=True):
        if name.startswith("role="):  # every network has every role
            continue
        if "=" in name:
            masks = [column > 0]
        else:
            there = column[column != 0]  # a knob is zero where its operator is not
            ends = (there.min(), there.max()) if len(there) else ()
            masks = [column == end for end in dict.fromkeys(ends)] if len(set(there)) > 1 else []
        for mask in masks:
            if mask.any() and (~mask).sum() >= MIN_UNITS:
                found.setdefault(mask.tobytes(), mask)
    return list(found.values())


def _errors(works: Columns, settings: Columns, latency_ms: np.ndarray, config: FitConfig) -> Iterator[np.ndarray]:
    """Of each group, the absolute logarithms of predicted over measured, predicted by what the others tell."""
    groups: Sequence[np.ndarray] = groups_of(settings)
    if len(groups) > MAX_GROUPS:
        chosen = np.random.default_rng(config.seed).permutation(len(groups))[:MAX_GROUPS]
        groups = [groups[i] for i in chosen]
    quick = replace(config, num_trees=min(config.num_trees, _TREES))
    for group in groups:
        seen = ~group
        model = UnitModel.fit(_rows(works, seen), _rows(settings, seen), latency_ms[seen], quick, spread=False)
        predicted = model.predict(_rows(works, group), _rows(settings, group))
        yield np.abs(np.log(predicted / latency_ms[group]))


def _rows(columns: Columns, rows: np.ndarray) -> Columns:
    """Some rows, with the columns that say something there."""
    values = columns.values[rows]
    used = (values != 0).any(axis=0)
    return Columns(tuple(name for name, use in zip(columns.names, used, strict=True) if use), values[:, used])
