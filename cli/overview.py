"""What a run has found so far, and how long its search will take: the numbers of `nas status`. Prints nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixnas.search.run.directory import Run, RunStatus
    from mixnas.search.study.results import Results, TrialRecord


@dataclass(frozen=True, slots=True)
class Overview:
    """A run at a glance, with its results so far.

    Attributes:
        status: Its state and its trials.
        best: The best value of each objective on the front; empty while the front is.
        errors: The standard error of each of these, where it is known.
        hypervolume: Of the front; None until its box is fixed.
        seconds_left: Of the search, at the speed of the trials so far; None unless it is running.
    """

    status: RunStatus
    best: dict[str, float]
    errors: dict[str, float]
    hypervolume: float | None
    seconds_left: float | None


def overview(run: Run) -> Overview:
    """Look at a run; for one that is running, too."""
    from mixnas.evaluators.protocol import standard_error
    from mixnas.search.study.objectives import parse_constraints, parse_objectives
    from mixnas.search.study.study import read_results

    status, fixed = run.status(), run.manifest["fixed"]
    objectives, constraints = parse_objectives(fixed["objectives"]), parse_constraints(fixed.get("constraints", []))
    results = read_results(run.journal, objectives, constraints)
    best = _best(results)
    values = {name: member.metrics[name] for name, member in best.items()}
    errors = {
        name: member.metrics[standard_error(name)]
        for name, member in best.items()
        if standard_error(name) in member.metrics
    }
    return Overview(status, values, errors, results.hypervolume(), _seconds_left(status, results))


def _best(results: Results) -> dict[str, TrialRecord]:
    """The trial of the front that is best by each objective."""
    members = results.front()
    if not members:
        return {}
    found = {}
    for objective in results.objectives:
        values = [member.metrics[objective.name] for member in members]
        found[objective.name] = members[values.index((max if objective.maximise else min)(values))]
    return found


def _seconds_left(status: RunStatus, results: Results) -> float | None:
    seconds = [record.seconds for record in results.records if record.status == "done"]
    if status.state != "running" or not seconds or not status.trials or status.done >= status.trials:
        return None
    return (status.trials - status.done) * sum(seconds) / len(seconds)
