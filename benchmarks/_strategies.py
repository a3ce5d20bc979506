"""Every strategy on the default digits space: hypervolume of finished networks by the clock. Part of `search.py clock`.

Each search is the default one with another strategy: profile, super-network, finishing and measuring are on the clock.
The strategies of a seed have the same profile and super-network: the first search makes them, and the seconds that they
took count for each. A network counts from when its final weights exist. Latencies of all networks that were ever on a
front are then measured anew, together, against one sentinel, since two runs' latencies do not compare.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from supernet_hypervolume import Point, curve, ever_on_front, measure, searched
from svg import COLORS, Series, chart

from mixnas.search.config import load_config
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.pareto import Reference
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.files import atomic_write

NAMES = ("predictor", "nsga2", "nsga3", "tpe", "linas", "random")
SHARED = ("profile", "train supernet")
"""Phases that the strategies of a seed have in common."""
SMALL = {
    "latency.profile": "5s",
    "supernet.seconds": 5,
    "search.trials": 60,
    "final.candidates": 4,
    "final.train.epochs": 2,
    "latency.final_passes": 1,
}
"""A try of the benchmark."""
OWN = {"nsga2": {"population_size": 50}, "nsga3": {"population_size": 50}}
"""As in the default search."""
OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})


def search_all(
    path: Path, config: Path, seeds: int, changes: Mapping[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One search with each strategy and seed; those that stand in the file already are not done again."""
    runs: list[dict[str, Any]] = []
    if path.exists():
        before = json.loads(path.read_text())
        runs = before["runs"] if before["settings"] == changes else []
    done = {(run["strategy"], run["seed"]) for run in runs}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        for seed in range(seeds):
            made: tuple[Path, float] | None = None
            for name in NAMES:
                if (name, seed) in done:
                    continue
                changed = {**changes, "search.seed": seed, "search.strategy": {"name": name, **OWN.get(name, {})}}
                settings = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
                points, seconds, phases = searched(
                    load_config(config, settings=settings), config, root, f"{name}-{seed}", after=made
                )
                made = made or (root / f"{name}-{seed}", sum(phases[phase] for phase in SHARED))
                kept = [
                    {"seconds": p.seconds, "architecture": p.architecture.to_dict(), "metrics": p.metrics}
                    for p in ever_on_front(points, OBJECTIVES)
                ]
                runs.append({"strategy": name, "seed": seed, "seconds": seconds, "phases": phases,
                             "networks": len(points), "points": kept})  # fmt: skip
                say(f"{name}, seed {seed}: {seconds:.0f} s, {len(points)} networks")
                path.write_text(json.dumps({"settings": changes, "runs": runs}))
    return runs


def judge(runs: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Hypervolumes by the clock of all runs, in one box, with latencies measured together."""
    points = [
        [Point(p["seconds"], Architecture.from_canonical(p["architecture"]), dict(p["metrics"])) for p in run["points"]]
        for run in runs
    ]
    measure([p for each in points for p in each], threads)
    values = np.array([[p.metrics[o.name] for o in OBJECTIVES] for each in points for p in each])
    box = Reference.of(values, OBJECTIVES)
    times = np.linspace(0, max(run["seconds"] for run in runs), 120)
    curves = [curve(each, times, box, OBJECTIVES) for each in points]
    found: dict[str, Any] = {"reference": box.point, "span": box.span, "times": times.round(1).tolist()}
    found["curves"] = {
        name: [c for c, run in zip(curves, runs, strict=True) if run["strategy"] == name] for name in NAMES
    }
    found["final"] = {name: [c[-1] for c in each] for name, each in found["curves"].items()}
    ended = min(run["seconds"] for run in runs)
    found["when_the_first_ended"] = {
        "seconds": round(ended, 1),
        **{name: [float(np.interp(ended, times, c)) for c in each] for name, each in found["curves"].items()},
    }
    return found


def picture(found: dict[str, Any]) -> str:
    """Mean over the seeds of each strategy."""
    times = found["times"]
    series = [
        Series(name, list(zip(times, np.mean(curves, axis=0).tolist(), strict=True)), line=True, marks=False)
        for name, curves in found["curves"].items()
    ]
    assert len(series) <= len(COLORS)
    return chart(
        series,
        title=f"Finished, measured networks of the digits by strategy: mean of {len(found['curves'][NAMES[0]])} seeds",
        x="seconds since the start, profile and training of the super-network included",
        y="hypervolume (accuracy, latency, parameters)",
    )


def run(
    results: Path, config: Path, seeds: int, threads: int, small: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Search, measure, draw; returns the record."""
    changes = SMALL if small else {}
    unfinished = results / "search-clock.runs.tmp"
    runs = search_all(unfinished, config, seeds, changes, say)
    found = judge(runs, threads)
    atomic_write(results / "search-clock.svg", picture(found))
    unfinished.unlink()
    kept = [{key: value for key, value in one.items() if key != "points"} for one in runs]
    return {"seeds": seeds, "settings": changes, "own": OWN, **found, "runs": kept}
