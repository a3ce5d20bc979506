"""Finished networks under other quantization policies: which are worth it, and their way to final weights.

One training serves many policies. Each finished network is therefore tried under those that the search's front has for
its structure, under each policy throughout, and under mixed ones: for each objective that policies change, those of
least sensitivity within budgets. All are judged post-training. Whoever would enter the front is trained on for a short
while, has a file of its own, and is a finished network like the others. Who evaluated the search makes no difference.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import moocore
import numpy as np

from mixnas.evaluators.protocol import Evaluator, Part, Request
from mixnas.evaluators.training import steps_of
from mixnas.evaluators.varying import VaryingEvaluator, VaryingSpec, sensitivities
from mixnas.predictors.latency.source import LatencySource
from mixnas.predictors.measuring.value import Latency
from mixnas.search.config import Config
from mixnas.search.finish import RUNGS, WEIGHTS_FROM, FinalNetworks
from mixnas.search.policies import (
    Place,
    by_place,
    cheapest_loss,
    places_of,
    policies_at,
    policies_of,
    structure,
    swapped,
    with_options,
)
from mixnas.search.problem import Problem
from mixnas.search.run.integrity import read_variants
from mixnas.search.study.pareto import as_minimised, non_dominated_minimised
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import IntegrityError, NasError, StoppedEarly
from mixnas.search_space.files import stamped, write_json
from mixnas.search_space.formats.safetensors import read_extra
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.policy import with_policies
from mixnas.search_space.reporting import Report
from mixnas.search_space.settings import to_plain
from mixnas.search_space.space import SearchSpace

TRAINED, RATE = 0.2, 0.25
"""Of the steps and of the learning rate of a finished network's training, that one under other policies has."""

_BUDGETS = (0.0, 0.25, 0.5, 0.75)
"""Of mixed policies, from the least that an objective can be (0) to what the least sensitive ones take (1)."""

EXAMPLES = 64
"""Training examples by which sensitivities are found."""

_UNCHANGED = ("loss", "params", "macs")
"""Objectives, beside the task's metric, that policies leave as they are."""

Costs = Callable[[Sequence[Architecture]], Mapping[str, np.ndarray]]
"""What is known of architectures without evaluating them, by metric: an evaluator's cheap metrics."""


def recipe_of(config: Config, examples: int) -> Any:
    """How a network is trained on under other policies, where so many examples are trained on."""
    whole = config.train if config.search.evaluator == "standalone" else config.final.train
    steps = max(1, round(TRAINED * steps_of(whole, examples)))
    return replace(whole, steps=steps, lr=RATE * whole.lr)


def evaluator_of(problem: Problem, device: str) -> VaryingEvaluator:
    """Who trains a problem's finished networks on under other policies."""
    config = problem.config
    train = recipe_of(config, len(problem.task.train))
    spec = VaryingSpec(task=config.task.to_plain(), train=train, seed=problem.seed, device=device)
    return VaryingEvaluator(spec, problem.task)


def most_variants(problem: Problem) -> int:
    """How many networks are made under other policies, at most; 0 where policies make no difference."""
    final = problem.config.final
    named = [o.name for o in problem.objectives if o.name not in (problem.task.metric, *_UNCHANGED)]
    if not named or len(policies_of(problem.space)) < 2:
        return 0
    return 2 * final.candidates if final.policies is None else final.policies


def proposals(
    network: Network,
    space: SearchSpace,
    costs: Costs,
    objectives: Sequence[str],
    judge: VaryingEvaluator,
    seen: Sequence[Architecture] = (),
) -> list[Architecture]:
    """A network's architecture under other policies: each throughout, wherever the space has it, and mixed ones.

    Args:
        network: Trained.
        space: Its architecture's.
        costs: Tells what policies take.
        objectives: Of which of them budgets are made, where they are known and policies change them.
        judge: Has the task and the device.
        seen: Architectures that differ from the network's in policies alone, and were found to be good.
    """
    own = network.architecture
    places = places_of(space, own)
    policies = dict.fromkeys(op for place in places for op in place.options)
    found = [with_options(own, places, [op if op in place.options else None for place in places]) for op in policies]
    swaps = swapped(own, places)
    known = costs(swaps) if swaps else {}
    stored = by_place(places, known.get("weight_bytes", range(len(swaps))))
    idle = [name for place, row in zip(places, stored, strict=True) if len(set(row)) == 1 for name in place.branches]
    kept = {name: policy for name, policy in policies_at(own).items() if name in idle}  # nothing there is quantized
    varying = [name for name in objectives if name in known and np.ptp(known[name]) > 0]
    if varying:
        rises = by_place(places, sensitivities(network, swaps, judge.task, EXAMPLES, judge.device))
        if all(min(row) < math.inf for row in rises):
            for name in varying:
                spent = by_place(places, known[name])
                found += [with_options(own, places, ops) for ops in _mixed(places, rises, spent)]
    different = dict.fromkeys(with_policies(one, kept) for one in (*seen, *found))
    return [one for one in different if one != own]


def _mixed(places: Sequence[Place], rises: list[list[float]], spent: list[list[float]]) -> list[list[Any]]:
    """Policies for all places, by `_BUDGETS`."""

    def taken(picked: Sequence[int]) -> float:
        return sum(row[i] for row, i in zip(spent, picked, strict=True))

    allowed = [
        [c for c, r in zip(costs, row, strict=True) if r < math.inf] for costs, row in zip(spent, rises, strict=True)
    ]
    least, most = sum(map(min, allowed)), taken(cheapest_loss(rises, spent, math.inf))
    slack = 1e-9 * sum(max(map(abs, row)) for row in spent)  # sums are rounded
    found = [cheapest_loss(rises, spent, least + share * (most - least) + slack) for share in _BUDGETS]
    return [[place.options[i] for place, i in zip(places, picked, strict=True)] for picked in found]


def entering(front: np.ndarray, points: np.ndarray, most: int) -> list[int]:
    """Which of some points would enter a front: at most so many, one after the other whichever adds most hypervolume.

    Args:
        front: (rows, objectives), minimised.
        points: Likewise.
        most: At most so many.
    """
    everything = np.concatenate([front, points])
    if not len(points):
        return []
    low, span = everything.min(axis=0), np.ptp(everything, axis=0)
    scaled = (everything - low) / np.where(span > 0, span, 1)
    reference, have = np.full(points.shape[1], 1.1), scaled[: len(front)]
    stays = non_dominated_minimised(scaled)
    left = [i for i in range(len(points)) if stays[len(front) + i]]
    chosen: list[int] = []
    while left and len(chosen) < most:
        before = moocore.hypervolume(have, ref=reference) if len(have) else 0.0
        gains = [moocore.hypervolume(np.vstack([have, scaled[len(front) + i]]), ref=reference) - before for i in left]
        best = int(np.argmax(gains))
        if gains[best] <= 1e-12:  # of equal ones one is enough
            break
        chosen.append(left.pop(best))
        have = np.vstack([have, scaled[len(front) + chosen[-1]]])
    return chosen


@dataclass(frozen=True, slots=True)
class Made:
    """Networks of finished ones under other policies.

    Attributes:
        records: As of trials: with an id and an architecture of their own, the number of the finished network's trial,
            and the metrics that they were chosen by.
        networks: With final weights, in the same order.
    """

    records: tuple[TrialRecord, ...] = ()
    networks: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Tried:
    """An architecture with another's weights.

    Attributes:
        weights_from: Id of that other; empty of a finished network itself.
        architecture: With policies of its own.
        metrics: As it was judged on the validation split, with what is known without evaluating it.
    """

    weights_from: str
    architecture: Architecture
    metrics: dict[str, float]

    def to_plain(self) -> dict[str, Any]:
        return {
            "weights_from": self.weights_from,
            "architecture": self.architecture.to_dict(),
            "metrics": self.metrics,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Tried:
        architecture = Architecture.from_canonical(plain["architecture"])
        return cls(plain["weights_from"], architecture, dict(plain["metrics"]))


def worth(problem: Problem, finished: Sequence[Tried], tried: Sequence[Tried]) -> list[Tried]:
    """Who would enter the front of the finished networks, in the order in which they were tried.

    Of objectives and constraints count those that are known of all: energy is measured of who is chosen.

    Args:
        problem: Has objectives, constraints, and how many there may be.
        finished: As they are.
        tried: Of whom some are chosen.
    """
    objectives = [o for o in problem.objectives if all(o.name in one.metrics for one in (*finished, *tried))]

    def kept(one: Tried) -> bool:
        if math.isnan(one.metrics.get("latency_ms", 0.0)):  # the runtime does not compute it
            return False
        return all(c.holds(one.metrics) for c in problem.constraints if c.metric in one.metrics)

    def points(of: Sequence[Tried]) -> np.ndarray:
        values = np.array([[one.metrics[o.name] for o in objectives] for one in of])
        return as_minimised(values.reshape(-1, len(objectives)), objectives)

    keeping = [one for one in tried if kept(one)]
    chosen = entering(points([one for one in finished if kept(one)]), points(keeping), most_variants(problem))
    return [keeping[i] for i in sorted(chosen)]


class Variants(FinalNetworks):
    """See the module; what is made of finished networks, each a file beside theirs.

    Args:
        path: A file in which stands what was tried and chosen, so that a run that was killed goes on with that.
        folder, task_plain, finish: See `FinalNetworks`.
        recipe: How those were finished.
        problem: What the run asks for.
    """

    def __init__(
        self, path: Path, folder: Path, task_plain: Any, recipe: Any, finish: Callable[..., Any], problem: Problem
    ) -> None:
        train = recipe_of(problem.config, len(problem.task.train))
        recipe = {"finished": recipe, "policies": to_plain(train)}
        super().__init__(folder, problem.task, task_plain, recipe, finish)
        self._path, self._problem = path, problem
        self._parents: dict[str, Network] = {}  # by the id of who has its weights

    def made(
        self,
        records: Sequence[TrialRecord],
        finished: Sequence[Network | str],
        results: Results,
        evaluator: Evaluator,
        latency: LatencySource,
        report: Report,
        should_stop: Callable[[], bool],
    ) -> Made:
        """Networks of the finished ones under other policies, and records of them as of trials.

        Args:
            records: Of the finalists.
            finished: Their networks, or why there is none.
            results: Of the search: whose front says what to try.
            evaluator: Of the search: tells costs.
            latency: Measures, where the evaluator predicts none.
            report: Told of the phases.
            should_stop: Asked between networks and steps.

        Returns:
            What could be trained.

        Raises:
            StoppedEarly: `should_stop` said so; what was tried and trained until then is kept.
        """
        pairs = zip(records, finished, strict=True)
        own = {record.id: (record, network) for record, network in pairs if isinstance(network, Network)}
        if not most_variants(self._problem) or not own:
            return Made()
        judge = evaluator_of(self._problem, evaluator.device)
        taken = {record.id for record in records}  # whoever failed among them did so for a reason
        chosen = self._chosen(own, taken, results, evaluator, judge, latency, report, should_stop)
        wanted = []
        for one in chosen:
            record, network = own[one.weights_from]
            text, identity = one.architecture.to_json(), one.architecture.id
            wanted.append(replace(record, id=identity, architecture_json=text, metrics=one.metrics))
            self._parents[identity] = network
        found = self.finish(wanted, judge, report, should_stop)
        made = [(r, n) for r, n in zip(wanted, found, strict=True) if not isinstance(n, str)]
        return Made(tuple(record for record, _ in made), tuple(network for _, network in made))

    # -- which --------------------------------------------------------------------------------------------------------

    def _chosen(
        self,
        own: Mapping[str, tuple[TrialRecord, Network]],
        taken: Collection[str],
        results: Results,
        evaluator: Evaluator,
        judge: VaryingEvaluator,
        latency: LatencySource,
        report: Report,
        should_stop: Callable[[], bool],
    ) -> list[Tried]:
        known = self._read(own)
        asked = {"networks": sorted(own), "most": most_variants(self._problem)}
        asked_before = known.get("asked", {"networks": []})
        earlier = [Tried.from_plain(plain) for plain in known.get("earlier", [])]
        chosen = [Tried.from_plain(plain) for plain in known.get("chosen", [])]
        if {**asked_before, "networks": sorted(asked_before["networks"])} == asked:
            return [*chosen, *self._finished_of(earlier, own, {*taken, *(one.architecture.id for one in chosen)})]
        earlier += chosen  # of a run that is extended
        kept = [one.to_plain() for one in earlier]
        space, names = self._problem.space, [o.name for o in self._problem.objectives]

        def costs(architectures: Sequence[Architecture]) -> dict[str, np.ndarray]:
            return evaluator.cheap(space.encode_many(architectures))

        alike: dict[Architecture, list[Architecture]] = {}
        for record in results.front():
            alike.setdefault(structure(record.architecture), []).append(record.architecture)
        tried: dict[str, list[Any]] = known["tried"]
        with report.phase("try other policies", len(own), unit="networks") as phase:
            for number, (identity, (_, network)) in enumerate(own.items()):
                if should_stop():
                    raise StoppedEarly(f"stopped after other policies of {number} of {len(own)} networks were tried.")
                if identity not in tried:
                    seen = alike.get(structure(network.architecture), ())
                    architectures = proposals(network, space, costs, names, judge, seen)
                    requests = [Request(one, part=Part(0, 1, network)) for one in architectures]
                    found = zip(architectures, judge.evaluate(requests), strict=True)
                    each = [Tried(identity, a, dict(o.metrics)).to_plain() for a, o in found if not o.failure]
                    tried[identity] = each
                    self._write(tried, earlier=kept)
                phase(number + 1)
        every = self._distinct([Tried.from_plain(plain) for identity in own for plain in tried[identity]], taken)
        before = [
            Tried("", network.architecture, dict(read_extra(self.path(identity))["validation"]))
            for identity, (_, network) in own.items()
        ]
        both = self._with_costs([*before, *every], costs, latency, report)
        chosen = worth(self._problem, both[: len(before)], both[len(before) :])
        self._write(tried, asked=asked, chosen=[one.to_plain() for one in chosen], earlier=kept)
        return [*chosen, *self._finished_of(earlier, own, {*taken, *(one.architecture.id for one in chosen)})]

    def _finished_of(
        self, earlier: Sequence[Tried], own: Mapping[str, tuple[TrialRecord, Network]], without: Collection[str]
    ) -> list[Tried]:
        """Who was chosen before the run was extended and has a network: each once, as it was chosen last."""
        last = {one.architecture.id: one for one in earlier if one.weights_from in own}
        found = [one for identity, one in last.items() if identity not in without]
        for one in found:
            self._parents[one.architecture.id] = own[one.weights_from][1]
        return [one for one in found if self.is_finished(one.architecture.id)]

    def _distinct(self, tried: Sequence[Tried], taken: Collection[str]) -> list[Tried]:
        """Each architecture that is no finalist, once: with the weights that serve it best."""
        task, best = self._problem.task, dict[str, Tried]()
        sign = 1 if task.direction == "max" else -1
        for one in tried:
            known = best.get(one.architecture.id)
            if known is None or sign * one.metrics[task.metric] > sign * known.metrics[task.metric]:
                best[one.architecture.id] = one
        return [one for identity, one in best.items() if identity not in taken]

    def _with_costs(
        self,
        tried: Sequence[Tried],
        costs: Costs,
        latency: LatencySource,
        report: Report,
    ) -> list[Tried]:
        """With what is known of each without evaluating it, and latency, measured together where none is predicted."""
        known = {name: values.tolist() for name, values in costs([one.architecture for one in tried]).items()}
        if "latency_ms" not in known and "latency_ms" in self._problem.named:
            with report.phase("measure other policies", len(tried), unit="networks") as phase:
                networks = [self._problem.untrained(one.architecture) for one in tried]
                found = latency.measure_each(networks)
                phase(len(tried))
            known["latency_ms"] = [one.ms if isinstance(one, Latency) else math.nan for one in found]
        return [
            replace(one, metrics=one.metrics | {name: values[i] for name, values in known.items()})
            for i, one in enumerate(tried)
        ]

    def _read(self, own: Mapping[str, tuple[TrialRecord, Network]]) -> dict[str, Any]:
        """What was tried and chosen before, of networks that were finished likewise.

        Raises:
            IntegrityError: It is not what was written, or not of these networks.
        """
        known = read_variants(self._path) if os.path.lexists(self._path) else {}
        if known.get("recipe") != self._recipe:
            return {"tried": {}}
        try:
            chosen = known.get("chosen", [])  # there are none while others are still tried
            if len(chosen) > known.get("asked", {"most": 0})["most"]:
                raise ValueError("too many were chosen")
            for plain in (
                *chosen,
                *known.get("earlier", []),
                *(one for identity in own for one in known["tried"].get(identity, ())),
            ):
                self._check(Tried.from_plain(plain), own)
        except (NasError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(
                f"{self._path}: damaged: not what was tried of these networks. Delete it; a resume tries the policies "
                "again."
            ) from error
        return known

    def _check(self, one: Tried, own: Mapping[str, tuple[TrialRecord, Network]]) -> None:
        """That an architecture is one of the space, that of a finished network but for policies, with its metrics."""
        if one.weights_from not in own:
            return  # of networks that were finished before a run was extended
        parent = own[one.weights_from][0].architecture
        if structure(one.architecture) != structure(parent) or not self._problem.space.contains(one.architecture):
            raise ValueError(f"{one.architecture.id} is not {one.weights_from} under other policies")
        if not all(isinstance(value, int | float) for value in one.metrics.values()):
            raise ValueError(f"a metric of {one.architecture.id} is no number")

    def _write(self, tried: Mapping[str, Any], **more: Any) -> None:
        write_json(self._path, stamped({"recipe": self._recipe, "tried": dict(tried), **more}))

    # -- how `FinalNetworks` brings them to their final weights -------------------------------------------------------

    def _recipe_of(self, identity: str) -> Any:
        return {**self._recipe, WEIGHTS_FROM: self._parents[identity].architecture.id}

    def _kept(self, identity: str) -> bool:
        return False

    def _request(self, record: TrialRecord) -> Request:
        return Request(record.architecture, part=Part(0, 1, self._parents[record.id]))

    def _judge(self, network: Network, splits: Sequence[str] = ("validation", "test")) -> dict[str, Any]:
        parent = self._parents[network.architecture.id].architecture.id
        found = {**super()._judge(network, splits), WEIGHTS_FROM: parent}
        extra = read_extra(self.path(parent))
        return found | {RUNGS: extra[RUNGS]} if RUNGS in extra else found
