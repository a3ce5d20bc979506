"""Whether a space can meet its constraints at all, from exact corners and counts: before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mixnas.predictors.measuring.value import Latency
from mixnas.search.study.meeting import Known, Nearest, nearest, ruled_out
from mixnas.search.study.objectives import Comparison
from mixnas.search_space.cost import METRICS
from mixnas.search_space.enumeration import Corner, cost_corner
from mixnas.search_space.errors import InfeasibleError
from mixnas.search_space.memory import PEAK_MEMORY
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

Corners = Mapping[str, Mapping[str, Corner]]


def corners(space: SearchSpace, io: IOSpec) -> Corners:
    """For each cost the cheapest and the dearest architecture: {"params": {"smallest": ..., "largest": ...}, ...}."""
    return {
        metric: {
            "smallest": cost_corner(space, io, metric, largest=False),
            "largest": cost_corner(space, io, metric, largest=True),
        }
        for metric in METRICS
    }


def check_constraints(constraints: Sequence[Comparison], found: Corners) -> None:
    """Refuse constraints on costs that no architecture can meet.

    Raises:
        InfeasibleError: Names the constraint and how near the space comes to it.
    """
    for constraint in constraints:
        if constraint.metric not in found:
            continue
        ends = found[constraint.metric]
        low, high = ends["smallest"], ends["largest"]
        wants_less, wants_more = constraint.comparison in ("<", "<="), constraint.comparison in (">", ">=")
        nearest_end = low if wants_less else high
        outside = not low.value <= constraint.bound <= high.value
        if (wants_less or wants_more) and constraint.holds({constraint.metric: nearest_end.value}):
            continue
        if not (wants_less or wants_more or outside):
            continue  # `==` somewhere inside the range: only a search can tell
        raise InfeasibleError(
            f"no architecture of the space meets {constraint}: {constraint.metric} goes from {low.value:,.0f} "
            f"({low.architecture}) to {high.value:,.0f}. Change the bound, or widen the space."
        )


def check_costs(space: SearchSpace, io: IOSpec, constraints: Sequence[Comparison], known: Known, found: Corners) -> str:
    """Refuse constraints on costs that no architecture can meet, each by itself or all together.

    Args:
        space: The space.
        io: What its networks read and answer.
        constraints: Those on other metrics are not looked at.
        known: Costs of encoded architectures, peak memory among them where it has a constraint.
        found: The space's corners.

    Returns:
        A warning, where none was found that meets them and it is not certain that there is none; else empty.

    Raises:
        InfeasibleError: Names the constraints, and the nearest architecture with its costs.
    """
    check_constraints(constraints, found)
    wanted = [c for c in constraints if c.metric in (*METRICS, PEAK_MEMORY)]
    if not wanted:
        return ""
    ends = [corner.architecture for pair in found.values() for corner in pair.values()]
    first = space.encode_many(ends)
    for asked in (*([c] for c in wanted if c.metric == PEAK_MEMORY), wanted):
        nearby = nearest(space, known, asked, first)
        if nearby.kept:
            continue
        if not (nearby.every or ruled_out(space, io, asked) or _far(asked, nearby)):
            return nearby.told(space, asked)
        names = ", ".join(map(str, asked)) + (" together" if len(asked) > 1 else "")
        looked_at = f"of all {nearby.looked_at:,} " if nearby.every else ""
        raise InfeasibleError(f"no architecture of the space meets {names}: {looked_at}{nearby.words(space, asked)}")
    return ""


def _far(asked: Sequence[Comparison], nearby: Nearest) -> bool:
    """Whether what was found is so far from a bound on peak memory that nothing meets it: that has no exact corners."""
    if [c.metric for c in asked] != [PEAK_MEMORY]:
        return False
    value = nearby.values[PEAK_MEMORY]
    return value * UNCERTAIN < asked[0].bound or value > UNCERTAIN * asked[0].bound


_DRAWN = 4096
_STARTS = 8
UNCERTAIN = 2.0
"""A corner that is measured is only nearly the quickest: how many times quicker another might be."""


def quickest(space: SearchSpace, predict: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The encoded architecture (num_variables,) with the least predicted latency, as near as a descent comes to it.

    From the best of many random ones, to the best neighbour, until there is none.

    Args:
        space: Where it is looked for.
        predict: Milliseconds (rows,) of encoded architectures.
    """
    rows = space.sample_many(_DRAWN, np.random.default_rng(0))
    order = np.argsort(predict(rows), kind="stable")
    best, least = rows[order[0]], np.inf
    for start in rows[order[:_STARTS]]:
        here, ms = start, float(predict(start[None])[0])
        while len(near := space.neighbour_vectors(here)):
            found = predict(near)
            i = int(np.argmin(found))
            if found[i] >= ms:
                break
            here, ms = near[i], float(found[i])
        if ms < least:
            best, least = here, ms
    return best


def check_latency(
    constraints: Sequence[Comparison],
    corner: Corner,
    latency: Latency,
    metric: str = "latency_ms",
    *,
    slowest: bool = False,
) -> None:
    """Refuse an upper bound on latency that nothing can keep, or a lower one.

    What is predicted counts as it is, and not as it may turn out within its interval: a search accepts proposals by
    the prediction, so that none would be accepted for a bound below that of the quickest.

    Args:
        constraints: Those on other metrics, or in the other direction, are not looked at.
        corner: The quickest architecture that is known, or predicted, with its milliseconds as a search has them.
        latency: Of that, for the message.
        metric: What the latency is called.
        slowest: Whether the corner is the slowest instead, and lower bounds are looked at.

    Raises:
        InfeasibleError: The prediction is beyond the bound; of one that was measured, and is only nearly the quickest,
            even half of it (or twice).
    """
    measured = latency.kind == "measured"
    extreme = corner.value * (1.0 if not measured else UNCERTAIN if slowest else 1 / UNCERTAIN)
    for constraint in constraints:
        if constraint.metric != metric or constraint.comparison not in ((">", ">=") if slowest else ("<", "<=")):
            continue
        if not constraint.holds({metric: extreme}):
            interval = "" if latency.low_ms is None else f", {latency.low_ms:.3g} to {latency.high_ms:.3g}"
            goes_by = "" if measured else "; a search goes by the prediction"
            raise InfeasibleError(
                f"no architecture that was found meets {constraint}: the {'slowest' if slowest else 'quickest'} takes "
                f"{latency.ms:.3g} ms ({latency.kind}{interval}{goes_by}): {corner.architecture}. Give the bound in "
                "milliseconds, change it to what that takes, or widen the space."
            )
