"""What a report says, as plain data: read from a run's files, without importing its task."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixnas.search.card import budget
from mixnas.search.picking import within_one_error
from mixnas.search.policies import remarks
from mixnas.search.report.breakdown import UnitRow, breakdown, io_of, predictor_of
from mixnas.search.run.directory import Run
from mixnas.search.run.front import Front
from mixnas.search.run.typed import typed
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.reading import read_results
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import NasError
from mixnas.search_space.files import dump_yaml

log = logging.getLogger(__name__)

_DRAWN = 24  # networks of a front that are drawn unit by unit
_EFFECTS = 14  # choices whose effects are shown
_LEAST = 3  # trials that a mean is of, at least


@dataclass(frozen=True, slots=True)
class Effect:
    """What a choice does, over all finished trials.

    Attributes:
        knob: The choice: a place in the architecture.
        shares: By metric, the share of its variance that the choice explains (eta squared).
        values: For each value: the value, number of trials, mean of each metric.
    """

    knob: str
    shares: Mapping[str, float]
    values: tuple[tuple[str, int, Mapping[str, float]], ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """See the module.

    Attributes:
        front: The answer, or the front so far.
        results: All trials.
        budgets: Lines on the constraints, of the network that is exported without asking.
        progress: Rows (evaluations, seconds of evaluating, hypervolume) at which the hypervolume grew.
        effects: The choices that matter most first.
        mixers: Rows (place of the block, mixer, networks of the front that have it there).
        by_latency: Rows (from ms, to ms, mixer, share of the blocks of the front's networks there).
        drawn: Units of networks of the front, by id.
        failures: Reasons with how often.
        architectures: Short text of each network of the front, by id.
        config: The configuration as YAML.
        manifest: The run's manifest.
        policies: What is to be said of the quantization policies, in sentences.
        typed: The run as it is typed in a command where the page was written.
    """

    front: Front
    results: Results
    budgets: tuple[str, ...]
    progress: tuple[tuple[int, float, float], ...]
    effects: tuple[Effect, ...]
    mixers: tuple[tuple[str, str, int], ...]
    by_latency: tuple[tuple[float, float, str, float], ...]
    drawn: Mapping[str, Sequence[UnitRow]]
    failures: tuple[tuple[str, int], ...]
    architectures: Mapping[str, str]
    config: str
    manifest: Mapping[str, Any]
    policies: tuple[str, ...] = ()
    typed: str = ""


def contents(run: Run) -> Contents:
    """Read a run; one that is still searched, too.

    Raises:
        NasError: No front has been written yet.
    """
    front, fixed = run.front(), run.manifest["fixed"]
    objectives = parse_objectives(fixed["objectives"])
    results = read_results(run.journal, objectives, parse_constraints(fixed.get("constraints", [])))
    done = [record for record in results.records if record.status == "done"]
    settings = [_settings(json.loads(record.architecture_json)) for record in done]
    names = [front.metric, "latency_ms"]
    texts = {m.id: str(Architecture.from_canonical(m.architecture)) for m in (*front.members, *front.others)}
    return Contents(
        front=front,
        results=results,
        budgets=tuple(budget(front, within_one_error(front))) if front.members else (),
        progress=tuple(_progress(results)),
        effects=tuple(_effects(done, settings, names)[:_EFFECTS]),
        mixers=tuple(_mixers(front)),
        by_latency=tuple(_by_latency(front)),
        drawn=_drawn(run, front),
        failures=tuple(Counter(r.failure for r in results.records if r.failure).most_common(20)),
        architectures=texts,
        config=dump_yaml(run.config()),
        manifest=run.manifest,
        policies=tuple(remarks(run.manifest.get("policies", {}), front)),
        typed=run.name if os.path.isabs(typed(run.path)) else typed(run.path),  # who reads it need not know where
    )


def _settings(architecture: Mapping[str, Any]) -> dict[str, str]:
    """An architecture's canonical form as places and what stands there."""
    found: dict[str, str] = {}

    def add(place: str, plain: Any) -> None:
        if isinstance(plain, Mapping):
            for key, value in plain.items():
                if key == "name":
                    found[place] = str(value)
                else:
                    add(f"{place}.{key}" if place else key, value)
        elif isinstance(plain, list):
            found[f"number of {place}"] = str(len(plain))
            for i, value in enumerate(plain):
                add(f"{place}.{i}", value)
        else:
            found[place] = str(plain)

    add("", architecture)
    return found


def _progress(results: Results) -> Iterable[tuple[int, float, float]]:
    """Where the hypervolume grew, in the box that the run had."""
    again = Results(results.objectives, results.constraints, reference=results.reference)
    seconds, before, row = 0.0, -1.0, None
    for record in results.records:
        again.add(record)
        if not record.evaluated:
            continue
        seconds += record.seconds
        value = again.hypervolume()
        if value is None:
            continue
        row = (again.evaluated, seconds, value)
        if value > before:
            before = value
            yield row
    if row is not None:
        yield row


def _effects(done: Sequence[TrialRecord], settings: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[Effect]:
    """Share of each metric's variance between the values of a choice, of those trials that had the choice."""
    places = dict.fromkeys(place for one in settings for place in one)
    known = [name for name in names if all(name in record.metrics for record in done)]
    matrix = np.array([[record.metrics[name] for name in known] for record in done]).reshape(len(done), len(known))
    found = []
    for place in places:
        having = [i for i, one in enumerate(settings) if place in one]
        values = np.array([settings[i][place] for i in having])
        kinds, which, counts = np.unique(values, return_inverse=True, return_counts=True)
        if len(kinds) < 2 or (counts >= _LEAST).sum() < 2:
            continue
        own = matrix[having]
        means = np.stack([own[which == k].mean(axis=0) for k in range(len(kinds))])
        total = ((own - own.mean(axis=0)) ** 2).sum(axis=0)
        between = (counts[:, None] * (means - own.mean(axis=0)) ** 2).sum(axis=0)
        shares = np.divide(between, total, out=np.zeros_like(between), where=total > 0) * len(having) / len(done)
        rows = tuple(
            (str(kind), int(count), dict(zip(known, map(float, mean), strict=True)))
            for kind, count, mean in zip(kinds, counts, means, strict=True)
        )
        found.append(Effect(place, dict(zip(known, map(float, shares), strict=True)), rows))
    return sorted(found, key=lambda effect: -max(effect.shares.values(), default=0.0))


def _blocks(architecture: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Place and mixer of each block."""
    for s, stage in enumerate(architecture["stages"]):
        for b, block in enumerate(stage["blocks"]):
            mixer = block["mixer"]
            yield f"stage {s}, block {b}", mixer if isinstance(mixer, str) else mixer["name"]


def _mixers(front: Front) -> list[tuple[str, str, int]]:
    counted = Counter(pair for member in front.members for pair in _blocks(member.architecture))
    return [(place, mixer, count) for (place, mixer), count in sorted(counted.items())]


def _by_latency(front: Front) -> list[tuple[float, float, str, float]]:
    """The front's networks in up to three groups by latency, and each mixer's share of a group's blocks."""
    timed = sorted((m for m in front.members if "latency_ms" in m.metrics), key=lambda m: m.metrics["latency_ms"])
    found = []
    for group in np.array_split(np.arange(len(timed)), min(3, len(timed))) if timed else []:
        members = [timed[int(i)] for i in group]
        counted = Counter(mixer for member in members for _, mixer in _blocks(member.architecture))
        low, high = members[0].metrics["latency_ms"], members[-1].metrics["latency_ms"]
        found += [(low, high, mixer, n / counted.total()) for mixer, n in sorted(counted.items())]
    return found


def _drawn(run: Run, front: Front) -> dict[str, Sequence[UnitRow]]:
    """Units of the front's networks, where their operators are known here."""
    io, predictor = io_of(run), predictor_of(run)
    if io is None:
        return {}
    found: dict[str, Sequence[UnitRow]] = {}
    for member in front.members[:_DRAWN]:
        try:
            found[member.id] = breakdown(Architecture.from_canonical(member.architecture), io, predictor)
        except (NasError, KeyError) as error:
            log.info("%s is not drawn: %s", member.id, error)
    return found
