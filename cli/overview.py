"""What a run has found so far, and how long its search will take: the numbers of `nas status`. Prints nothing."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixnas.search.run.directory import Run, RunStatus


@dataclass(frozen=True, slots=True)
class Overview:
    """A run at a glance, with its results so far.

    Attributes:
        status: Its state and its trials.
        best: The best value of each objective on the front; empty while the front is.
        errors: The standard error of each of these, where it is known.
        final: Whether that is the front of networks trained to the end, which `nas front` prints; else the search's.
        hypervolume: Of the search's front; None until its box is fixed.
        shares: What share of a whole training each network of that front had, where it was trained in rungs.
        seconds_left: Of the search, at the speed of the trials so far; None unless it is running.
        phase: Which it is in; None unless it is running.
        beside: Trials beside the budget, of one quantization policy throughout, as the final front counts them.
    """

    status: RunStatus
    best: dict[str, float]
    errors: dict[str, float]
    final: bool
    hypervolume: float | None
    seconds_left: float | None
    shares: tuple[float, ...] = ()
    phase: str | None = None
    beside: int = 0


def overview(run: Run) -> Overview:
    """Look at a run; for one that is running, too."""
    from mixnas.search.run.front import BESIDE, SHARE
    from mixnas.search.study.objectives import parse_constraints, parse_objectives
    from mixnas.search.study.reading import best_of, summary_of
    from mixnas.search_space.errors import NasError

    status, fixed = run.status(), run.manifest["fixed"]
    objectives, constraints = parse_objectives(fixed["objectives"]), parse_constraints(fixed.get("constraints", []))
    found = summary_of(run.journal, objectives, constraints)
    best, errors, final = dict(found.best), dict(found.errors), False
    shares: tuple[float, ...] = ()
    beside = 0
    if status.state != "running":
        with contextlib.suppress(NasError):  # there is none yet, or it is damaged, which `problems` tells
            front = run.front()
            beside = front.trials.get(BESIDE, 0)
            if front.final and front.members:
                (best, errors), final = best_of([member.metrics for member in front.members], objectives), True
                shares = tuple(m.metrics[SHARE] for m in front.members if SHARE in m.metrics)
    phase = run.manifest.get("phase") if status.state == "running" else None  # what was killed left it there
    seconds_left = _seconds_left(status, found.seconds)
    return Overview(status, best, errors, final, found.hypervolume, seconds_left, shares, phase, beside)


def _seconds_left(status: RunStatus, seconds: float) -> float | None:
    if status.state != "running" or not status.done or not status.trials or status.done >= status.trials:
        return None
    return (status.trials - status.done) * seconds / status.done
