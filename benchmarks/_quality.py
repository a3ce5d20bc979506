"""Whether a search ends as well on Ray as on the local engine: the digits, by both, with several seeds."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mixnas.search.study.objectives import Objective
from mixnas.search.study.pareto import Reference

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
SETTINGS = {  # the default search, in small; steps, not seconds, so that a busy machine changes no weights
    "latency.profile": "20s",
    "supernet.seconds": None,
    "supernet.steps": 500,
    "search.trials": 200,
    "search.strategy.population_size": 20,
    "final.candidates": 8,
    "final.train.epochs": 5,
    "latency.final_passes": 3,
}
ENGINES = {"local": {"name": "local"}, "ray": {"name": "ray", "workers": 2}}


def searched(engine: str, seed: int, settings: dict[str, Any], config: Any = CONFIG) -> dict[str, Any]:
    """A whole search, and the objectives of the networks that it ends with."""
    import mixnas

    changed = {**settings, "search.seed": seed, "search.engine": ENGINES[engine]}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        run = mixnas.search(
            config,
            name=engine,
            runs=folder,
            settings=[f"{key}={json.dumps(value)}" for key, value in changed.items()],
            progress="quiet",
        )
        front = run.front()
    return {
        "engine": engine,
        "seed": seed,
        "seconds": round(time.monotonic() - begun, 1),
        "trials": front.trials,
        "front": [[member.metrics[name] for name in front.objectives] for member in front.members],
    }


def judged(runs: list[dict[str, Any]], objectives: tuple[Objective, ...]) -> dict[str, Any]:
    """Hypervolumes of finished fronts in one box, that of all their networks; and how far apart the engines are.

    Args:
        runs: As `searched` gives them.
        objectives: Of the fronts' columns.
    """
    points = np.array([point for one in runs for point in one["front"]])
    box = Reference.of(points, objectives)
    volumes: dict[str, list[float]] = {}
    for one in runs:
        volumes.setdefault(one["engine"], []).append(round(box.hypervolume(np.array(one["front"]), objectives), 4))
    found: dict[str, Any] = {"hypervolume": volumes}
    if len(volumes) == 2:
        local, ray = volumes["local"], volumes["ray"]
        found["mean"] = {"local": round(float(np.mean(local)), 4), "ray": round(float(np.mean(ray)), 4)}
        found["range_of_seeds"] = round(max(np.ptp(local), np.ptp(ray)), 4)
        found["within_scatter"] = bool(abs(np.mean(local) - np.mean(ray)) <= max(np.ptp(local), np.ptp(ray)))
    return found


def quality(
    seeds: int, before: dict[str, Any], objectives: tuple[Objective, ...], save: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Search with each seed by each engine, those that `before` has left out; each is saved when it is done."""
    same = before.get("settings") == SETTINGS
    runs = list(before["runs"]) if same else []
    done = {(one["engine"], one["seed"]) for one in runs}
    found: dict[str, Any] = before if same else {}
    for seed in range(seeds):
        for engine in ENGINES:
            if (engine, seed) in done:
                continue
            runs.append(searched(engine, seed, SETTINGS))
            print(json.dumps({**runs[-1], "front": len(runs[-1]["front"])}), file=sys.stderr, flush=True)
            found = {"settings": SETTINGS, **judged(runs, objectives), "runs": runs}
            save(found)
    return found
