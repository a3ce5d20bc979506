"""Whether a space can meet its constraints at all, from exact corners: before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
