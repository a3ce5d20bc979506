"""Hypervolume by the clock: the super-network's search against stand-alone NSGA-II. Part of `supernet.py`.

Both run the embedded default as a user would, one after the other, the stand-alone one for as long as the other took.
A network counts from when its final weights exist: in the stand-alone search from the end of its trial, in the other
from the end of its fine-tuning; inherited metrics count for nothing. Latencies of all networks that were ever on a
front are then measured anew, together, against one sentinel, since two runs' latencies do not compare.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from svg import Series, chart

from mixnas.predictors.measuring.measure import MeasureConfig, forward_call, make_sentinel, measure_networks
from mixnas.search.config import Config, load_config
from mixnas.search.job import Job, new_run
from mixnas.search.run.progress import make_progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search.study.objectives import Objective, parse_objectives
from mixnas.search.study.pareto import Reference, non_dominated
from mixnas.search.study.results import TrialRecord
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.files import atomic_write
from mixnas.search_space.network import IOSpec, Network

_DIGITS = IOSpec("image", (8, 8), 1, 10)
_PASSES = 5


@dataclass
class Point:
    """A network with final weights: when it came, and what it is worth."""

    seconds: float
    architecture: Architecture
    metrics: dict[str, float]


def searched(
    config: Config, source: Path, folder: Path, name: str, *, after: tuple[Path, float] | None = None
) -> tuple[list[Point], float, dict[str, float]]:
    """One search: its networks, how long it took, and seconds by phase.

    Args:
        config: What is searched.
        source: Its file.
        folder: Of the runs.
        name: Of this one.
        after: Another run whose profile and super-network this one takes, and how many seconds those took; they count
            here as if they had been made anew.
    """
    started = time.time()
    points: list[Point] = []
    standalone = config.search.evaluator == "standalone"

    def on_trial(record: TrialRecord) -> None:
        if standalone and record.status == "done":
            points.append(Point(time.time() - started, record.architecture, dict(record.metrics)))

    run = new_run(config, root=folder, name=name, source=str(source))
    if after is not None:
        other, already = after
        shutil.copytree(other / run.latency.name, run.latency, dirs_exist_ok=True)
        shutil.copy2(other / run.supernet.name, run.supernet)
        started = time.time() - already
    front = Job(run, config, progress=make_progress("quiet"), stop=StopSignal(), on_trial=on_trial).execute()
    seconds = time.time() - started
    for member in (*front.members, *front.others):
        found = next((point for point in points if point.architecture.id == member.id), None)
        if found is not None:
            found.metrics |= {k: v for k, v in member.metrics.items() if k.startswith("test_")}
            continue
        written = (run.networks / f"{member.id}.safetensors").stat().st_mtime
        points.append(Point(written - started, Architecture.from_dict(member.architecture), member.values))
    phases = {phase["name"]: phase["seconds"] for phase in run.manifest["phases"]}
    return sorted(points, key=lambda point: point.seconds), seconds, phases


def ever_on_front(points: list[Point], objectives: tuple[Objective, ...]) -> list[Point]:
    """Points that nothing earlier dominates."""
    kept: list[Point] = []
    for point in points:
        values = np.array([[p.metrics[o.name] for o in objectives] for p in [*kept, point]])
        if non_dominated(values, objectives)[-1]:
            kept.append(point)
    return kept


def measure(points: list[Point], threads: int) -> None:
    """Give all points latencies that compare."""
    torch.set_num_threads(threads)
    unique = {point.architecture.id: point.architecture for point in points}
    generator = torch.Generator().manual_seed(0)
    calls = []
    for architecture in unique.values():
        network = Network(architecture, _DIGITS, generator=generator).eval().deploy()
        calls.append(forward_call(network, _DIGITS.example(1, generator=generator)))
    found = measure_networks(
        calls,
        rng=np.random.default_rng(0),
        config=MeasureConfig(passes=_PASSES, threads=threads, batch_size=1),
        sentinel=make_sentinel("cpu"),
    )
    latencies = dict(zip(unique, found, strict=True))
    for point in points:
        point.metrics["latency_ms"] = latencies[point.architecture.id].latency.ms


def curve(
    points: list[Point], times: np.ndarray, reference: Reference, objectives: tuple[Objective, ...]
) -> list[float]:
    values = np.array([[point.metrics[o.name] for o in objectives] for point in points])
    came = np.array([point.seconds for point in points])
    return [reference.hypervolume(values[came <= t], objectives) for t in times]


def run(args: argparse.Namespace, results: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Search, measure, draw; returns the record."""
    source = results.parents[1] / "configs" / "digits.yaml"
    objectives = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            supernet = load_config(source, settings=[f"search.seed={seed}"])
            points, seconds, phases = searched(supernet, source, Path(folder), f"supernet-{seed}")
            runs.append({"kind": "super-network", "seed": seed, "points": points, "seconds": seconds, "phases": phases})
            say(f"seed {seed}: super-network {seconds:.0f} s, {len(points)} networks")
            settings = [f"search.seed={seed}", "search.evaluator=standalone", "search.strategy=nsga2",
                        "search.trials=100000", f"search.time={seconds:.1f}"]  # fmt: skip
            points, seconds, phases = searched(
                load_config(source, settings=settings), source, Path(folder), f"standalone-{seed}"
            )
            runs.append({"kind": "stand-alone", "seed": seed, "points": points, "seconds": seconds, "phases": phases})
            say(f"seed {seed}: stand-alone {seconds:.0f} s, {len(points)} networks")
    for r in runs:
        r["networks"] = len(r["points"])
        r["points"] = ever_on_front(r["points"], objectives)
    everything = [point for r in runs for point in r["points"]]
    measure(everything, args.threads)
    values = np.array([[point.metrics[o.name] for o in objectives] for point in everything])
    reference = Reference.of(values, objectives)
    times = np.linspace(0, max(r["seconds"] for r in runs), 150)
    series, curves_by_kind, summary = [], {}, {}
    for kind in ("stand-alone", "super-network"):
        curves = np.array([curve(r["points"], times, reference, objectives) for r in runs if r["kind"] == kind])
        low, mean, high = curves.min(axis=0).tolist(), curves.mean(axis=0).tolist(), curves.max(axis=0).tolist()
        points, band = list(zip(times, mean, strict=True)), list(zip(times, low, high, strict=True))
        series.append(Series(f"{kind} search", points, line=True, marks=False, band=band))
        curves_by_kind[kind] = {"mean": mean, "low": low, "high": high}
        summary[kind] = {"final": curves[:, -1].tolist(), "mean": mean[-1]}
        say(f"{kind}: final hypervolume {curves[:, -1]}")
    picture = chart(
        series,
        title=f"Fronts of finally trained networks, digits: mean and range of {args.seeds} seeds",
        x="seconds since the start, profiling and training of the super-network included",
        y="hypervolume (accuracy, latency, parameters)",
    )
    atomic_write(results / "supernet-hypervolume.svg", picture)
    for r in runs:
        r["points"] = [{"seconds": p.seconds, "id": p.architecture.id, "metrics": p.metrics} for p in r["points"]]
    return json.loads(json.dumps({"hypervolume": summary, "reference": reference.point, "span": reference.span,
            "objectives": {o.name: o.direction for o in objectives}, "times": times.tolist(),
            "curves": curves_by_kind, "runs": runs}))  # fmt: skip
