"""Whether a space can meet its constraints at all, from exact corners: before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mixnas.predictors.measuring.value import Latency
from mixnas.search.study.objectives import Comparison
from mixnas.search_space.cost import METRICS
from mixnas.search_space.enumeration import Corner, cost_corner
from mixnas.search_space.errors import InfeasibleError
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
    constraints: Sequence[Comparison], corner: Corner, latency: Latency, metric: str = "latency_ms"
) -> None:
    """Refuse an upper bound on latency that nothing can keep.

    What is predicted counts as it is, and not as it may turn out within its interval: a search accepts proposals by
    the prediction, so that none would be accepted for a bound below that of the quickest.

    Args:
        constraints: Those on other metrics are not looked at.
        corner: The quickest architecture that is known, or predicted, with its milliseconds as a search has them.
        latency: Of that, for the message.
        metric: What the latency is called.

    Raises:
        InfeasibleError: The prediction is over the bound; of one that was measured, and is only nearly the quickest,
            even half of it.
    """
    measured = latency.kind == "measured"
    for constraint in constraints:
        if constraint.metric != metric or constraint.comparison not in ("<", "<="):
            continue
        if not constraint.holds({metric: corner.value / UNCERTAIN if measured else corner.value}):
            interval = "" if latency.low_ms is None else f", {latency.low_ms:.3g} to {latency.high_ms:.3g}"
            goes_by = "" if measured else "; a search goes by the prediction"
            raise InfeasibleError(
                f"no architecture that was found meets {constraint}: the quickest takes {latency.ms:.3g} ms "
                f"({latency.kind}{interval}{goes_by}): {corner.architecture}. Give the bound in milliseconds, relax "
                "it to what that takes, or widen the space."
            )
