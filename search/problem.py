"""A configuration, checked against its task and space before any work is started; and the evaluators it may name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixnas.evaluators.costs import SpaceCosts
from mixnas.evaluators.other_devices import PREFIX, OtherDevices, devices_in
from mixnas.evaluators.protocol import Evaluator
from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec
from mixnas.evaluators.starting import Taken, check_fits
from mixnas.evaluators.supernet.evaluator import SupernetEvaluator, SupernetSpec
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import is_share, steps_of
from mixnas.predictors.latency.enough import too_small
from mixnas.predictors.latency.lookup import check_tables
from mixnas.predictors.latency.source import LatencySource
from mixnas.predictors.measuring.energy import ENERGY
from mixnas.search.config import Config
from mixnas.search.strategies import Cheap, Strategy
from mixnas.search.strategies.auto import Auto
from mixnas.search.study.bounds import POSITIVE, SHARE
from mixnas.search.study.feasibility import UNCERTAIN, Corners, check_costs, check_latency, corners, quickest
from mixnas.search.study.meeting import nearest as nearest_to_keeping
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.enumeration import Corner, check_single, check_space
from mixnas.search_space.errors import ConfigError, InfeasibleError, exactly, nearest
from mixnas.search_space.memory import PEAK_MEMORY
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import Report
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

_BYTES_OF_A_PARAMETER = 16  # its value, its gradient and AdamW's two moments


class Problem:
    """What a configuration asks for.

    Attributes:
        config: The configuration.
        seed: Of trainings and measurements.
        task: Its task.
        space: Its search space.
        io: What networks read and answer.
        device: What latency is of.
        latency_tag: Through which runtime and with which batch size, as in the names of files.
        metrics: What objectives and constraints may name, from the evaluator.
        objectives: In order.
        constraints: What a result has to satisfy.
        corners: The cheapest and dearest architecture by each cost.
        doubt: A warning, where it is not known whether anything meets the constraints on costs; else empty.
        taken: What networks of the space can take of the earlier network (`init`); None without one.

    Args:
        config: As resolved.
        source: Where it is from, for messages.
        seed: Of trainings and measurements; the search's if not given. A run that goes on with another seed of its
            search keeps that of its trainings: its trials compare.

    Raises:
        ConfigError: The task, the space, the device, an objective or a constraint is wrong.
        InfeasibleError: No architecture can meet a constraint on costs.
    """

    def __init__(self, config: Config, source: str = "configuration", seed: int | None = None) -> None:
        self.config = config
        self.seed = config.search.seed if seed is None else seed
        self.task: Task = by_name(config.task.to_plain())
        self.space = SearchSpace.from_dict(config.space, f"{source}: space")
        self.io: IOSpec = self.task.io
        self.strategy.check()
        check_space(self.space, self.io)
        self._check_batches()
        self._check_halving()
        latency = self.latency()
        self.device, self.latency_tag = latency.device, latency.tag
        self.metrics = self.evaluator(latency).metrics
        if self.metrics["latency_ms"].cheap:  # it will be looked up
            check_tables(self.space, self.io)
        latency.check(self.space)
        if self.energy:
            latency.check_energy()
        names = {*self.metrics, PEAK_MEMORY, ENERGY}  # which are there where they are asked for
        self.objectives = config.parsed_objectives(names)
        self.constraints = config.parsed_constraints(names)
        self.corners: Corners = corners(self.space, self.io)
        self._quickest: list[Architecture] = []  # or slowest, by each latency that has a bound; once checked
        self._check_memory(source, latency.torch_device)
        start = getattr(self.task, "start", None)  # a task need not be one of `Task`
        self.taken: Taken | None = None if start is None else check_fits(start, self.space, self.io)
        self._check_ranges()
        known = SpaceCosts(self.space, self.io, memory=self.memory).of
        self.doubt = check_costs(self.space, self.io, self.constraints, known, self.corners)

    def _check_ranges(self) -> None:
        """Refuse bounds beyond what a metric can be: times, energies, and scores that are shares."""
        for constraint in self.constraints:
            name, bound = constraint.metric, constraint.bound
            share = name == self.task.metric and is_share(self.task)
            if not share and name != ENERGY and name.partition("@")[0] != "latency_ms":
                continue
            can_be = SHARE if share else POSITIVE
            if can_be.allows(constraint):
                continue
            advice = "Change the bound."
            if share and 1 < bound <= 100:
                given = f"{name} {constraint.comparison} {exactly(bound / 100)}"
                advice = f"For {exactly(bound)}% write {given}."
            raise InfeasibleError(f"no architecture meets {constraint}: {name} is {can_be.words}. {advice}")

    def _check_batches(self) -> None:
        """Refuse what cannot be trained on one example at a time, where a batch has but one."""
        config = self.config
        sizes = {"final.train.batch_size": config.final.train.batch_size}
        if config.search.evaluator == "standalone":
            sizes = {"train.batch_size": config.train.batch_size}
        elif config.search.evaluator == "supernet":
            sizes["supernet.batch_size"] = config.supernet.batch_size // config.supernet.processes
        if len(self.task.train) == 1:
            sizes = {"task: train has one example": 1}
        for where, size in sizes.items():
            if size == 1:
                check_single(self.space, self.io, where)

    def _check_halving(self) -> None:
        """Refuse rungs of a search in which nothing is trained, or whose trainings end before they are over."""
        config = self.config
        if not config.search.halving.on:
            return
        if config.search.evaluator != "standalone":
            raise ConfigError(
                f"search.halving: with search.evaluator: {config.search.evaluator} a search trains no network. Use "
                "evaluator: standalone, or final.halving for the finalists of a super-network."
            )
        if config.train.stop_at is not None:
            raise ConfigError(
                f"search.halving: train.stop_at is {config.train.stop_at:g}; a training that ends early is no rung. "
                "Leave one of them out."
            )
        if config.storage is not None:
            raise ConfigError(
                f"search.halving: the study lies on {config.storage}; trainings that are left off lie in a driver's "
                "own directory. Search in rungs without storage, on one driver with as many workers as there are."
            )
        _ = self.shares

    @property
    def shares(self) -> tuple[float, ...] | None:
        """The share of a whole training after each rung of the search; None where each is trained to its end at once.

        Raises:
            ConfigError: See `Asynchronous.shares`.
        """
        halving, train, examples = self.config.search.halving, self.config.train, len(self.task.train)
        if not halving.on:
            return None
        return halving.shares(steps_of(train, examples), examples // min(train.batch_size, examples))

    def _check_memory(self, source: str, device: str) -> None:
        """Refuse a space whose largest network cannot be trained in this machine's memory; a GPU's is its own."""
        if device != "cpu" or self.config.search.evaluator not in ("supernet", "standalone"):
            return
        params = int(self.corners["params"]["largest"].value)
        needed, there = params * _BYTES_OF_A_PARAMETER, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > there:
            raise ConfigError(
                f"{source}: space: its largest architecture has {params:.3g} parameters, and training them takes "
                f"{needed / 2**30:,.0f} GiB; this machine has {there / 2**30:,.0f} GiB. Make it narrower or shallower."
            )

    def told(self, record: Mapping[str, Any]) -> list[str]:
        """Which trained networks trainings go by, what of an earlier one is taken, and what else is to be known.

        Args:
            record: What `recorded` gives of the task.
        """
        lines = []
        if teacher := record.get("teacher"):
            lines.append(
                f"teacher: {teacher['file']} ({teacher['sha256'][:12]}), a program of tensor operations alone, "
                f"temperature {teacher['temperature']:g}, {teacher['weight']:.0%} of the loss"
            )
        if self.taken is not None:
            each = "" if self.config.search.evaluator == "supernet" else "each network begins with what it has of "
            lines.append(f"init: {record['init']['from']}: {each}{self.taken}")
        if self.config.search.evaluator == "supernet" and not self.metrics["latency_ms"].cheap:
            lines.append(f"profile: none, each network is measured: {too_small(self.space, self.io)}")
        if self.doubt:
            lines.append(f"warning: {self.doubt}")
        return lines

    @property
    def provisional(self) -> tuple[str, ...]:
        """Metrics that finishing changes: all that a super-network's sub-networks are judged by."""
        if self.config.search.evaluator != "supernet":
            return ()
        measured = (ENERGY, "latency_ms")
        return tuple(name for name, metric in self.metrics.items() if not metric.cheap and name not in measured)

    @property
    def named(self) -> list[str]:
        """The metrics that objectives and constraints name."""
        objectives, constraints = self.config.parsed_objectives(), self.config.parsed_constraints()
        return [*(o.name for o in objectives), *(c.metric for c in constraints)]

    @property
    def other_devices(self) -> tuple[str, ...]:
        """Other devices, on which objectives and constraints name the latency."""
        return devices_in(self.named)

    @property
    def memory(self) -> bool:
        """Whether objectives or constraints name the peak memory."""
        return PEAK_MEMORY in self.named

    @property
    def energy(self) -> bool:
        """Whether objectives or constraints name the energy."""
        return ENERGY in self.named

    @property
    def in_rungs(self) -> bool:
        """Whether more finalists are begun than are trained to the end (`search.rungs`)."""
        return self.config.search.evaluator == "supernet" and self.config.final.halving.rungs > 1

    @property
    def strategy(self) -> Strategy:
        """What proposes; `auto` by what evaluates, and how often."""
        search = self.config.search
        if isinstance(search.strategy, Auto):
            quick = search.evaluator == "supernet" and not self.energy
            return search.strategy.resolve(quick=quick, trials=search.trials)
        return search.strategy

    def untrained(self, architecture: Architecture) -> Network:
        """A network to measure; its weights are arbitrary."""
        generator = torch.Generator().manual_seed(self.config.search.seed)
        return Network(architecture, self.io, generator=generator).eval()

    @property
    def extremes(self) -> tuple[Architecture, ...]:
        """Architectures that a search for what keeps the constraints begins with: corners, the quickest and slowest."""
        ends = (corner.architecture for pair in self.corners.values() for corner in pair.values())
        return tuple(dict.fromkeys([*ends, *self._quickest]))

    def check_latency(
        self,
        latency: LatencySource,
        report: Report,
        should_stop: Callable[[], bool],
        cheap: Cheap | None = None,
    ) -> None:
        """Refuse a bound on latency that nothing can keep, before anything is trained.

        By the quickest architecture, of a lower bound by the slowest: as predicted, after the profile that a search
        needs in any case. Where latency is measured in the search, the one with the fewest multiply-accumulates is
        measured, and lower bounds are left to the search: the one with the most need not be the slowest.

        Args:
            latency: Predicts, or measures.
            report: Told of a profile.
            should_stop: Asked during one.
            cheap: Of the evaluator: constraints on all that is known before evaluating are looked at together too, as
                the search looks for what keeps them. None leaves that out.

        Raises:
            InfeasibleError: Names the constraint, and the quickest architecture (or slowest) with its latency; or the
                constraints, and the architecture that comes nearest.
            StoppedEarly: `should_stop` said so.
        """
        self._quickest = []
        self._check_other_devices(latency)
        self._check_energy(latency)
        for slowest in self._sides("latency_ms"):
            self._check_side(latency, report, should_stop, slowest=slowest)
        if cheap is not None and self._quickest:
            if self.metrics["latency_ms"].cheap:
                self._prepare(latency, report, should_stop)
            names = cheap(self.space.encode_many([]))
            known = [c for c in self.constraints if c.metric in names]
            nearby = nearest_to_keeping(self.space, cheap, known, self.space.encode_many(self.extremes))
            if not nearby.kept:
                raise InfeasibleError(nearby.told(self.space, known))

    def _check_side(
        self, latency: LatencySource, report: Report, should_stop: Callable[[], bool], *, slowest: bool
    ) -> None:
        """`check_latency` of upper bounds on this device, or of lower ones."""
        if self.metrics["latency_ms"].cheap:
            self._prepare(latency, report, should_stop)
            corner = self._extreme(lambda rows: latency.predict_many(rows, self.space, self.io), slowest=slowest)
            found = latency.predict(corner.architecture, self.io)
        elif slowest:
            return
        else:
            architecture = self.corners["macs"]["smallest"].architecture
            (found,) = latency.measure([self.untrained(architecture)])
            corner = Corner(architecture, found.ms)
        check_latency(self.constraints, corner, found, slowest=slowest)

    def _prepare(self, latency: LatencySource, report: Report, should_stop: Callable[[], bool]) -> None:
        written = {"task": self.config.task.to_plain(), "space": self.config.space}
        latency.prepare(self.space, self.io, plain=written, report=report, should_stop=should_stop)

    def _extreme(self, predict: Callable[[np.ndarray], np.ndarray], *, slowest: bool) -> Corner:
        """The quickest architecture by what is predicted, or the slowest; it is kept for `extremes`."""
        sign = -1.0 if slowest else 1.0
        vector = quickest(self.space, lambda rows: sign * predict(rows))
        found = Corner(self.space.decode(vector), float(predict(vector[None])[0]))
        self._quickest.append(found.architecture)
        return found

    def _sides(self, metric: str) -> list[bool]:
        """Whether a metric has upper bounds, as False, and lower ones, as True."""
        given = {c.comparison[0] == ">" for c in self.constraints if c.metric == metric and c.comparison != "=="}
        return sorted(given)

    def _check_other_devices(self, latency: LatencySource) -> None:
        """`check_latency` of bounds on other devices, as predicted."""
        for device in self.other_devices:
            metric = f"{PREFIX}{device}"
            for slowest in self._sides(metric):
                there = OtherDevices([device], latency.spec, self.space, self.io)
                corner = self._extreme(partial(there.of_one_device, metric), slowest=slowest)
                found = there.predict(metric, corner.architecture)
                check_latency(self.constraints, corner, found, metric, slowest=slowest)

    def _check_energy(self, latency: LatencySource) -> None:
        """`check_latency` of bounds on energy: of the network with the fewest multiply-accumulates, measured."""
        bounds = [c for c in self.constraints if c.metric == ENERGY and c.comparison in ("<", "<=")]
        if not bounds:
            return
        architecture = self.corners["macs"]["smallest"].architecture
        (found,) = latency.measure_energy([self.untrained(architecture)])
        if isinstance(found, str):
            raise ConfigError(found)
        for bound in bounds:
            if not bound.holds({ENERGY: found.mj / UNCERTAIN}):
                raise InfeasibleError(
                    f"no architecture of the space meets {bound}: the one with the fewest multiply-accumulates takes "
                    f"{found.mj:.3g} mJ (measured): {architecture}. Give the bound in millijoules, relax it, or widen "
                    "the space."
                )

    def latency(self, directory: Path | None = None, reference_ms: float | None = None) -> LatencySource:
        """Where latency comes from.

        Args:
            directory: Where a profile of this machine is kept; None for the user's profiles.
            reference_ms: The sentinel's reference time, where an earlier session fixed it.
        """
        config = self.config
        spec = config.latency.spec(config.device, self.seed, directory, reference_ms)
        return config.search.engine.latency(spec)

    def evaluator(self, latency: LatencySource, checkpoint: Path | None = None) -> Evaluator:
        """The evaluator that the configuration names; nothing is prepared yet.

        Args:
            latency: Where latency comes from.
            checkpoint: File of the super-network, where there is one; None keeps it in memory only.

        Raises:
            ConfigError: No evaluator of that name, or it cannot do what is asked.
        """
        name = self.config.search.evaluator
        if name not in EVALUATORS:
            raise ConfigError(
                f"search.evaluator: no evaluator is called {name!r}.{nearest(name, EVALUATORS)} "
                f"Allowed: {', '.join(EVALUATORS)}."
            )
        return EVALUATORS[name](self, latency, checkpoint)


def _supernet(problem: Problem, latency: LatencySource, checkpoint: Path | None) -> Evaluator:
    config = problem.config
    spec = SupernetSpec(
        task=config.task.to_plain(),
        space=config.space,
        supernet=config.supernet,
        final=config.final.train,
        inherit=config.final.weights == "inherited",
        seed=problem.seed,
        latency=latency.spec,
        checkpoint=checkpoint,
        other_devices=problem.other_devices,
        memory=problem.memory,
        energy=problem.energy,
    )
    together = config.search.engine.together()
    return SupernetEvaluator(spec, task=problem.task, space=problem.space, latency=latency, together=together)


def _standalone(problem: Problem, latency: LatencySource, checkpoint: Path | None) -> Evaluator:
    config = problem.config
    spec = StandaloneSpec(
        task=config.task.to_plain(),
        space=config.space,
        train=config.train,
        seed=problem.seed,
        latency=latency.spec,
        other_devices=problem.other_devices,
        memory=problem.memory,
        energy=problem.energy,
    )
    return StandaloneEvaluator(spec, task=problem.task, space=problem.space, latency=latency)


EVALUATORS: Mapping[str, Callable[[Problem, LatencySource, Path | None], Evaluator]] = {
    "supernet": _supernet,
    "standalone": _standalone,
}
"""What `search.evaluator` may name, and how it is made."""
