"""After the search: which candidates get their final weights, how long they take, and the front that is the answer."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import moocore
import numpy as np

from mixnas.evaluators.costs import costs
from mixnas.evaluators.metrics import named
from mixnas.evaluators.other_devices import PREFIX
from mixnas.evaluators.protocol import Evaluator, Outcome, Request, attempt, standard_error
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import evaluate
from mixnas.evaluators.workers import finish_all
from mixnas.predictors.latency.source import LatencySource
from mixnas.predictors.measuring.energy import ENERGY
from mixnas.predictors.measuring.value import Latency
from mixnas.search.policies import policies_at, structure
from mixnas.search.run.front import SHARE, Front, Member
from mixnas.search.run.integrity import read_failure
from mixnas.search.study.objectives import Comparison, Objective
from mixnas.search.study.pareto import as_minimised, knee, non_dominated, non_dominated_minimised
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import StoppedEarly
from mixnas.search_space.files import stamped, write_json
from mixnas.search_space.formats.safetensors import load_network, read_extra, save_network
from mixnas.search_space.memory import PEAK_MEMORY
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.policy import prunes
from mixnas.search_space.reporting import Report


def choose_finalists(results: Results, count: int, provisional: Collection[str] = ()) -> list[TrialRecord]:
    """Members of the front that together span it: the best of each objective, then whichever adds most hypervolume.

    Where that leaves places, and bounds on provisional metrics, the places go to those that miss nothing else: of the
    ones that no other of them dominates, the nearest to these bounds.

    Args:
        results: The trials of the search.
        count: At most so many.
        provisional: Metrics that are others with final weights. Those inherited from a super-network are far lower, so
            that whoever misses a bound on them in the search may keep it in the end.
    """
    front = results.front()
    points = np.array([results.values(record) for record in front]).reshape(-1, len(results.objectives))
    chosen = [front[i] for i in _spanning(as_minimised(points, results.objectives), count)]
    return chosen + nearest_to_bounds(results, provisional, count - len(chosen))


def nearest_to_bounds(results: Results, provisional: Collection[str], count: int) -> list[TrialRecord]:
    """Trials that miss bounds on provisional metrics and nothing else; see `choose_finalists`."""
    bounds = [c for c in results.constraints if c.metric in provisional]
    if not bounds or count <= 0:
        return []
    firm = [c for c in results.constraints if c not in bounds]
    rest = [record for record in _keeping(results, firm) if not results.feasible(record)]
    points = np.array([results.values(record) for record in rest]).reshape(-1, len(results.objectives))
    near = [rest[i] for i in np.flatnonzero(non_dominated_minimised(as_minimised(points, results.objectives)))]
    near.sort(key=lambda record: _missed(record, bounds))
    return near[:count]


def _missed(record: TrialRecord, bounds: Sequence[Comparison]) -> float:
    """By how much a trial breaks the one of these that it breaks most."""
    return max((c.violation(record.metrics) for c in bounds), default=0.0)


def _keeping(results: Results, constraints: Sequence[Comparison]) -> list[TrialRecord]:
    """The finished trials that satisfy these."""
    return [r for r in results.records if r.status == "done" and all(c.holds(r.metrics) for c in constraints)]


def _spanning(points: np.ndarray, count: int) -> list[int]:
    """Which of minimised points (rows, objectives), none dominated, together span them, in order; at most `count`."""
    return _spanning_groups(points, [[i] for i in range(len(points))], count)


def _spanning_groups(points: np.ndarray, groups: Sequence[Sequence[int]], count: int) -> list[int]:
    """Which groups of minimised points (rows, objectives) together span all, in order; at most `count`."""
    if len(groups) <= count:
        return list(range(len(groups)))
    span = points.max(axis=0) - points.min(axis=0)
    points = (points - points.min(axis=0)) / np.where(span > 0, span, 1)
    reference = np.full(points.shape[1], 1.1)
    owner = {i: g for g, members in enumerate(groups) for i in members}
    chosen = list(dict.fromkeys(owner[int(i)] for i in points.argmin(axis=0)))[:count]
    while len(chosen) < count:
        have = [i for g in chosen for i in groups[g]]
        rest = [g for g in range(len(groups)) if g not in chosen]
        gains = [moocore.hypervolume(points[[*have, *groups[g]]], ref=reference) for g in rest]
        chosen.append(rest[int(np.argmax(gains))])
    return sorted(chosen)


def choose_structures(results: Results, count: int, provisional: Collection[str] = ()) -> list[TrialRecord]:
    """`choose_finalists` where each is tried under other policies afterwards: one of each structure.

    Architectures that differ in policies alone are one structure, with the points of all of them that are on the front.
    One training serves them all, and the network that stores most has lost least, of those that train all of their
    weights: of those of a structure that satisfy the constraints it is the one.

    Args:
        results, count, provisional: See `choose_finalists`.
    """
    front = results.front()
    values = np.array([results.values(record) for record in front]).reshape(-1, len(results.objectives))
    groups: dict[Architecture, list[int]] = {}
    for i, record in enumerate(front):
        groups.setdefault(structure(record.architecture), []).append(i)
    points = as_minimised(values, results.objectives)
    chosen = _spanning_groups(points, list(groups.values()), count)
    of: dict[Architecture, list[TrialRecord]] = {one: [] for one in groups}
    for record in results.records:
        if record.status == "done" and results.feasible(record):
            of.get(structure(record.architecture), []).append(record)
    each = list(of.values())

    def kept(record: TrialRecord) -> tuple[float, ...]:
        pruned = sum(prunes(policy) for policy in policies_at(record.architecture).values())
        return -pruned, record.metrics["weight_bytes"], -record.number

    found = [max(each[g], key=kept) for g in chosen]
    return found + nearest_to_bounds(results, provisional, count - len(found))


Measure = Callable[[Sequence[TrialRecord]], Sequence[Latency | str]]
"""Latency of trials' architectures, untrained: weights have no influence on time. Or why one has none."""


def choose_measured(
    results: Results,
    count: int,
    measure: Measure,
    *,
    known: Mapping[str, Latency] | None = None,
    tried: int = 60,
    provisional: Collection[str] = (),
) -> list[TrialRecord]:
    """`choose_finalists` where latency was predicted, has a constraint, and can be measured: those that keep it so.

    A search finds what its predictor flatters. Whoever would be a finalist is therefore measured before anything is
    trained; by what was found the predictions of the others are corrected (their mean ratio), the choice is made
    again, and so on until all that are chosen were measured.

    Args:
        results: The trials of the search, `latency_ms` among their metrics being predicted.
        count: At most so many.
        measure: See `Measure`.
        known: Latencies that were measured before, by id.
        tried: Architectures that are measured, at most.
        provisional: See `choose_finalists`; bounds on these count as long as anything keeps them.

    Returns:
        Trials whose measured interval keeps the constraints on latency; where there are none, those that come nearest.
    """
    on_latency = [c for c in results.constraints if c.metric == "latency_ms"]
    others = [c for c in results.constraints if c.metric != "latency_ms"]
    bounds = [c for c in others if c.metric in provisional]
    records = _keeping(results, others)
    if not records:
        records = _keeping(results, [c for c in others if c not in bounds])
    else:
        bounds = []  # they are kept
    predicted = np.array([r.metrics["latency_ms"] for r in records])
    measured: dict[str, Latency | str] = dict(known or {})

    def broken(record: TrialRecord, ms: float) -> float:
        """By how much constraints on latency are broken, 0 where they are kept; a measured interval as a whole."""
        found = measured.get(record.id)
        if isinstance(found, str):
            return math.inf
        ends = (ms,) if found is None else (found.low_ms or ms, found.high_ms or ms)
        missed = [c.violation({"latency_ms": end}) for c in on_latency for end in ends]
        return max(0.0, *missed) if all(c.holds({"latency_ms": e}) for c in on_latency for e in ends) else max(missed)

    while True:
        pairs = [(measured[r.id], p) for r, p in zip(records, predicted, strict=True) if r.id in measured]
        ratios = [math.log(latency.ms / p) for latency, p in pairs if isinstance(latency, Latency)]
        believed = predicted * (math.exp(float(np.mean(ratios))) if ratios else 1.0)
        for i, record in enumerate(records):
            latency = measured.get(record.id)
            if isinstance(latency, Latency):
                believed[i] = latency.ms
        missed = np.array([broken(r, float(ms)) for r, ms in zip(records, believed, strict=True)])
        keeping = np.flatnonzero(missed <= 0)
        values = np.array([results.values(r) for r in records]).reshape(-1, len(results.objectives))
        for column, objective in enumerate(results.objectives):
            if objective.name == "latency_ms":
                values[:, column] = believed
        points = as_minimised(values, results.objectives)
        front = keeping[non_dominated_minimised(points[keeping])]
        chosen = [int(front[i]) for i in _spanning(points[front], count)]
        if bounds:
            chosen = sorted(map(int, front), key=lambda i: _missed(records[i], bounds))[:count]
        if not chosen:
            chosen = [int(i) for i in np.argsort(missed, kind="stable")[:count] if math.isfinite(missed[i])]
        new = [i for i in chosen if records[i].id not in measured]
        if not new or len(measured) >= tried:
            return [records[i] for i in chosen if records[i].id in measured or len(measured) >= tried]
        for i, taken in zip(new, measure([records[i] for i in new]), strict=True):
            measured[records[i].id] = taken


def nearest_to(members: Sequence[Member], constraints: Sequence[Comparison]) -> str:
    """What to say of those that do not satisfy the constraints: which of them comes nearest; empty of none."""
    usable = [m for m in members if all(c.metric in m.metrics for c in constraints)]
    if not usable:
        return ""
    nearest = min(usable, key=lambda m: max(c.violation(m.metrics) for c in constraints))
    values = ", ".join(f"{c.metric} {nearest.metrics[c.metric]:.4g}" for c in constraints)
    return f"; nearest is {nearest.id} with {values}"


RUNGS = "rungs"
"""In a network's file: what it was found to be after each part of its training (`search.rungs`)."""


WEIGHTS_FROM = "weights_from"
"""In a network's file: the id of the finished one whose weights it began with (`search.variants`)."""


class FinalNetworks:
    """Finalists with their final weights, each a file with its metrics on the validation and the test split.

    Args:
        folder: Where the files are; a trial's network may lie there already, without metrics.
        task: Judges them. The test split is looked at here and nowhere else.
        task_plain: The task as in the configuration, kept in the files.
        recipe: How they are finished, as plain data, kept likewise: what was finished otherwise is finished anew.
        finish: Who does it; see `finish_all`.
    """

    def __init__(
        self,
        folder: Path,
        task: Task,
        task_plain: Any,
        recipe: Any = None,
        finish: Callable[..., Iterable[tuple[int, Outcome]]] = finish_all,
    ) -> None:
        self._folder, self._task, self._task_plain, self._finish = folder, task, task_plain, finish
        self._recipe = json.loads(json.dumps(recipe))

    @property
    def recipe(self) -> Any:
        """How they are finished, as it stands in the files."""
        return self._recipe

    def path(self, identity: str) -> Path:
        """The file of an architecture."""
        return self._folder / f"{identity}.safetensors"

    def _failure(self, identity: str) -> Path:
        """Says why an architecture could not be finished, where it could not: it is not tried again."""
        return self._folder / f"{identity}.failed.json"

    def _recipe_of(self, identity: str) -> Any:
        """How an architecture is finished."""
        return self._recipe

    def _why_not(self, identity: str) -> str:
        """Why an architecture could not be finished by this recipe; empty where that is not known."""
        path = self._failure(identity)
        if not os.path.lexists(path):
            return ""
        said = read_failure(path)
        return str(said["failure"]) if said.get("recipe", ...) == self._recipe_of(identity) else ""

    def _known(self, identity: str) -> Network | str | None:
        """What was finished before, or why it could not be; None where neither was."""
        if reason := self._why_not(identity):
            return reason
        return load_network(self.path(identity)) if self.is_finished(identity) else None

    def is_finished(self, identity: str) -> bool:
        """Whether its network has its final weights, by this recipe, and was judged on the test split."""
        path, recipe = self.path(identity), self._recipe_of(identity)
        extra = read_extra(path) if path.exists() else {}
        return "test" in extra and extra.get("recipe", recipe) == recipe

    def finished_before(
        self, results: Results, chosen: Sequence[TrialRecord]
    ) -> list[tuple[TrialRecord, Network | str]]:
        """The trials that are not chosen and whose networks are finished all the same, and these."""
        ids = {record.id for record in chosen}
        others = [record for record in results.records if record.status == "done" and record.id not in ids]
        return [(r, load_network(self.path(r.id))) for r in others if self.is_finished(r.id)]

    def _kept(self, identity: str) -> bool:
        """Whether a trial kept the network as it ended: it only has to be judged."""
        path = self.path(identity)
        return path.exists() and not {"test", RUNGS} & set(read_extra(path))

    def finish(
        self, records: Sequence[TrialRecord], evaluator: Evaluator, report: Report, should_stop: Callable[[], bool]
    ) -> list[Network | str]:
        """Bring finalists to their final weights, those that are not.

        Args:
            records: Their trials.
            evaluator: Finishes them.
            report: Told of it, as a phase, where there is something to do.
            should_stop: Asked before each and while one is trained.

        Returns:
            The network of each; where its training or judgement failed, the reason in its place.

        Raises:
            StoppedEarly: `should_stop` said so; those that were finished are kept.
        """
        found = [self._known(record.id) for record in records]
        left = [i for i, one in enumerate(found) if one is None]
        if not left:
            return [one for one in found if one is not None]
        total = len(records)
        with report.phase(evaluator.finishing, total, unit="networks", initial=total - len(left)) as phase:
            for i in [i for i in left if self._kept(records[i].id)]:
                if should_stop():
                    raise StoppedEarly(f"stopped after {total - len(left)} of {total} candidates.")
                found[i] = self._judged(records[i], Outcome(network=load_network(self.path(records[i].id))))
                left.remove(i)
                phase(total - len(left))
            requests = [self._request(records[i]) for i in left]
            for number, outcome in self._finish(evaluator, requests, total, phase, should_stop):
                found[left[number]] = self._judged(records[left[number]], outcome)
        return [one for one in found if one is not None]

    def _request(self, record: TrialRecord) -> Request:
        """What the evaluator is asked for."""
        return Request(record.architecture)

    def _judged(self, record: TrialRecord, outcome: Outcome) -> Network | str:
        """Judge what was finished, and keep it; or keep why it could not be."""
        judged: dict[str, Any] = {}

        def judge(request: Request) -> Outcome:
            if outcome.network is not None:
                judged.update(self._judge(outcome.network))
            return outcome

        ended = attempt(judge, Request(record.architecture))
        if ended.network is None:
            recipe = self._recipe_of(record.id)
            write_json(self._failure(record.id), stamped({"failure": ended.failure, "recipe": recipe}))
            return ended.failure
        save_network(self.path(record.id), ended.network, judged)
        self._failure(record.id).unlink(missing_ok=True)
        return load_network(self.path(record.id))

    def _judge(self, network: Network, splits: Sequence[str] = ("validation", "test")) -> dict[str, Any]:
        extra: dict[str, Any] = {"task": self._task_plain, "recipe": self._recipe_of(network.architecture.id)}
        for split in splits:
            extra[split] = evaluate(network, self._task, split).named(self._task.metric)
        return extra

    def member(
        self,
        record: TrialRecord,
        latency: Latency | str,
        predicted: Latency | None,
        energy: Mapping[str, float] | None = None,
    ) -> Member:
        """A finished network as a member of the front; with the reason why it is none in its latency's place."""
        found = replace(searched_member(record), predicted=predicted, searched=record.metrics)
        extra = {} if self._why_not(record.id) else read_extra(self.path(record.id))
        if "test" not in extra:
            return replace(found, metrics=costs(record.architecture, self._task.io), reason=str(latency))
        metrics = {
            **extra["validation"],
            **{f"test_{name}": value for name, value in extra["test"].items()},
            **costs(record.architecture, self._task.io),
            **{n: value for n, value in record.metrics.items() if n.startswith(PREFIX) or n == PEAK_MEMORY},
            **(energy or {}),
        }
        if RUNGS in extra:
            metrics[SHARE] = extra[RUNGS][-1]["share"]
        elif record.stretches:  # of a search in rungs: whoever is final was trained to the end
            metrics[SHARE] = 1.0
        found = replace(found, metrics=metrics, weights_from=extra.get(WEIGHTS_FROM, ""))
        if isinstance(latency, str):
            return replace(found, reason=latency)
        return replace(found, metrics={**metrics, "latency_ms": latency.ms}, latency=latency)


def measure_finalists(
    finished: Sequence[Network | str], latency: LatencySource, passes: int, known: Front | None, report: Report
) -> Sequence[Latency | str]:
    """Latency of final networks: measured, where the device is this machine, else predicted; or why there is none.

    Args:
        finished: Together: latencies that are compared are measured in the same passes. What could not be finished, by
            its reason, has no latency for that reason.
        latency: Measures or predicts.
        passes: Over all networks.
        known: A front whose networks were measured before, in this run; where it has all of them, nothing is measured.
        report: Told of the measuring, as a phase.
    """
    networks = [one for one in finished if not isinstance(one, str)]
    found = iter(_measured(networks, latency, passes, known, report))
    return [one if isinstance(one, str) else next(found) for one in finished]


def _measured(
    networks: Sequence[Network], latency: LatencySource, passes: int, known: Front | None, report: Report
) -> Sequence[Latency | str]:
    if not latency.here:
        return [latency.predict(network.architecture, network.io) for network in networks]
    before = measured_before(known)
    found = [before.get(network.architecture.id) for network in networks]
    if all(found):
        return [one for one in found if one is not None]  # also of none
    with report.phase("measure", len(networks), unit="networks") as phase:
        measured = latency.measure_each(networks, passes)
        phase(len(networks))
    return measured


def measure_energies(
    finished: Sequence[Network | str], latency: LatencySource, passes: int, known: Front | None, report: Report
) -> Sequence[Mapping[str, float]]:
    """Energy of final networks as metrics, measured together; empty of those that could not be finished or run.

    Args:
        finished, passes, known, report: See `measure_finalists`.
        latency: Measures.
    """
    networks = [one for one in finished if not isinstance(one, str)]
    members = [*known.members, *known.others] if known is not None and known.final else []
    names = (ENERGY, standard_error(ENERGY))
    before = {m.id: {n: m.metrics[n] for n in names if n in m.metrics} for m in members if ENERGY in m.metrics}
    if not all(network.architecture.id in before for network in networks):
        with report.phase("measure energy", len(networks), unit="networks") as phase:
            found = latency.measure_energy(networks, passes)
            phase(len(networks))
        before = {
            network.architecture.id: {} if isinstance(one, str) else named(one)
            for network, one in zip(networks, found, strict=True)
        }
    return [{} if isinstance(one, str) else before[one.architecture.id] for one in finished]


def measured_before(known: Front | None) -> dict[str, Latency]:
    """Latencies by id that a run's earlier final front has measured; none of another front."""
    if known is None or not known.final:
        return {}
    members = (*known.members, *known.others)
    return {m.id: m.latency for m in members if m.latency is not None and m.latency.kind == "measured"}


def searched_member(record: TrialRecord) -> Member:
    """A trial as a member of the front by what the search went by."""
    return Member(
        id=record.id,
        trial=record.number,
        architecture=json.loads(record.architecture_json),
        metrics={**record.metrics, SHARE: record.share} if record.stretches else record.metrics,
        seconds=record.seconds,
    )


def final_front(
    finalists: Sequence[Member], objectives: Sequence[Objective], constraints: Sequence[Comparison]
) -> tuple[tuple[Member, ...], tuple[Member, ...], str | None]:
    """The feasible finalists that no other dominates, and the rest with the reason.

    Args:
        finalists: Those with a reason already are among the rest.
        objectives: In order.
        constraints: A member satisfies all.

    Returns:
        The front (best of the first objective first), the others, and the id of the knee.
    """
    others = [finalist for finalist in finalists if finalist.reason]
    finalists = [finalist for finalist in finalists if not finalist.reason]
    values = np.array([[f.metrics[o.name] for o in objectives] for f in finalists]).reshape(-1, len(objectives))
    broken = {i: [c for c in constraints if not c.holds(f.metrics)] for i, f in enumerate(finalists)}
    feasible = [i for i in range(len(finalists)) if not broken[i]]
    front = [feasible[i] for i in np.flatnonzero(non_dominated(values[feasible], objectives))] if feasible else []
    front.sort(key=lambda i: tuple(as_minimised(values[i], objectives)[0]))
    for i, finalist in enumerate(finalists):
        if i not in front:
            reason = f"violates {', '.join(map(str, broken[i]))}" if broken[i] else "dominated"
            others.append(replace(finalist, reason=reason))
    members = tuple(finalists[i] for i in front)
    return members, tuple(others), members[knee(values[front], objectives)].id if front else None


_LEAST_COMPARED = 5
_BY_CHANCE = 0.1


def agreement(finalists: Sequence[Member], metric: str) -> str:
    """How far the search's order of the candidates was that of their final weights, in words; empty of fewer than five.

    Args:
        finalists: With `searched`, and metrics where they could be finished. Those that have another's weights were not
            found by the search, and do not count.
        metric: The task's.
    """
    from scipy.stats import kendalltau  # takes a second

    own = [m for m in finalists if not m.weights_from]
    pairs = [(m.searched[metric], m.metrics[metric]) for m in own if metric in m.metrics and metric in m.searched]
    if len(pairs) < _LEAST_COMPARED or all(before == after for before, after in pairs):
        return ""
    searched, final = zip(*pairs, strict=True)
    said = (
        f"{metric} of the candidates: {min(searched):.3g} to {max(searched):.3g} in the search, {min(final):.3g} to "
        f"{max(final):.3g} with their final weights; "
    )
    for values, when in ((searched, "in the search"), (final, "with their final weights")):
        if len(set(values)) == 1:
            return f"{said}{when} all alike: no order to tell"
    found = kendalltau(searched, final)
    said += f"Kendall's tau between the two orders {found.statistic:.2f}"
    if not (found.statistic > 0 and found.pvalue < _BY_CHANCE):
        said += ", as by chance: train the super-network for longer (supernet.seconds), or take more final.candidates"
    return said
