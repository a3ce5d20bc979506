#!/usr/bin/env python3
"""A tour of the operators: a search over all of a kind at once, and each of them in a trained and measured network.

    python benchmarks/tours.py operators             # nas search -c configs/operators-tour.yaml, and what follows it
    python benchmarks/tours.py sequence              # nas search -c configs/sequence-tour.yaml, likewise
    python benchmarks/tours.py operators --run RUN   # what follows the search, of a finished run
    python benchmarks/tours.py sequence --set search.trials=4 --set train.steps=5 -o FOLDER   # a short one, to try it

A front has the best operators only. For those that stand in none of its networks, nor in another finalist,
architectures of the space are drawn that have them; these are trained and measured as the finalists were. Writes
`benchmarks/results/operators-tour.json` (or `sequence-tour.json`) and the front as a picture beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import numpy as np  # noqa: E402
from _record import sayable  # noqa: E402
from svg import front_chart  # noqa: E402

import mixnas  # noqa: E402
from mixnas.evaluators.costs import costs  # noqa: E402
from mixnas.evaluators.protocol import Request  # noqa: E402
from mixnas.evaluators.training import evaluate  # noqa: E402
from mixnas.evaluators.workers import finish_all  # noqa: E402
from mixnas.predictors.measuring.device import provenance  # noqa: E402
from mixnas.search.config import read_config  # noqa: E402
from mixnas.search.problem import Problem  # noqa: E402
from mixnas.search.run.directory import Run  # noqa: E402
from mixnas.search.run.front import Front  # noqa: E402
from mixnas.search.study.objectives import parse_objectives  # noqa: E402
from mixnas.search.study.reading import read_results  # noqa: E402
from mixnas.search_space import registry  # noqa: E402
from mixnas.search_space.architecture import Architecture, Op  # noqa: E402
from mixnas.search_space.files import atomic_write, write_json  # noqa: E402
from mixnas.search_space.space import SearchSpace  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
AXES = ("stem", "norm", "downsample", "mixer", "gate", "channel_mixer", "head")
DRAWN = 4000
"""Architectures among which those are looked for that have the operators that are left."""

Names = set[tuple[str, str]]
"""Operators: (axis, name)."""

TOURS = {"operators": "image", "sequence": "causal"}
"""The kind of task that each is of."""

_HEAD = "a head is the task's and not the space's: {} ends in `{}`"
ELSEWHERE: dict[str, dict[tuple[str, str], str]] = {
    "operators": {
        ("head", "attsets"): _HEAD.format("digits", "pool"),
        ("head", "lr_aspp"): _HEAD.format("digits", "pool") + "; segmentation may end in it (`head`)",
        ("head", "offset_learning"): _HEAD.format("digits", "pool") + "; segmentation may end in it (`head`)",
        ("head", "sub_pixel"): _HEAD.format("digits", "pool") + "; configs/super_resolution.yaml ends in it",
        ("head", "token"): _HEAD.format("digits", "pool") + "; configs/segmentation.yaml and the other tour end in it",
    },
    "sequence": {
        ("stem", "linear"): "tokens are embedded; it is on the other tour",
        ("head", "attsets"): _HEAD.format("mqar", "token"),
        ("head", "pool"): _HEAD.format("mqar", "token") + "; the other tour ends in it",
        ("head", "unrolled"): _HEAD.format("mqar", "token"),
    },
}
"""Of each tour the operators that serve its kind of task and cannot stand in its networks, and why."""


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def operators_of(architecture: Architecture, head: str) -> Names:
    """What stands in an architecture, and its task's head; what does nothing ("none") is no operator."""

    def all_ops() -> Iterator[tuple[str, Op]]:
        yield "stem", architecture.stem
        yield "norm", architecture.norm
        yield "head", Op(head)
        for stage in architecture.stages:
            yield "downsample", stage.downsample
            for block in stage.blocks:
                yield from (("mixer", block.mixer), ("gate", block.gate), ("channel_mixer", block.channel_mixer))

    return {(axis, op.name) for axis, op in all_ops() if op.name != "none"}


def serving(tour: str) -> Names:
    """The operators that serve a tour's kind of task, but for those that do nothing."""
    return {
        (axis, name)
        for axis in AXES
        for name in registry.names(axis)
        if name != "none" and TOURS[tour] in registry.get(axis, name).kinds
    }


def wanted(tour: str) -> Names:
    """Those that must come to stand in a trained and measured network: all but those of `ELSEWHERE`."""
    return serving(tour) - set(ELSEWHERE[tour])


def cover(space: SearchSpace, head: str, left: Names, count: int = DRAWN) -> tuple[list[Architecture], Names]:
    """Architectures of the space that together have the operators, and those that none of the drawn has.

    Greedy: of random ones the one that has most of what is left, until nothing is left.
    """
    rng = np.random.default_rng(0)
    drawn = [space.sample(rng) for _ in range(count)]
    has = [operators_of(architecture, head) & left for architecture in drawn]
    chosen: list[Architecture] = []
    left = set(left)
    while left:
        best = max(range(count), key=lambda i: len(has[i] & left))
        if not has[best] & left:
            break
        chosen.append(drawn[best])
        left -= has[best]
    return chosen, left


def finished(run: Run, architectures: Sequence[Architecture]) -> list[dict[str, Any]]:
    """Architectures brought to their final weights, judged and measured as a run's finalists are."""
    config = read_config(run.config(), run.path / "config.yaml")
    problem = Problem(config, str(run.path / "config.yaml"), seed=run.manifest.get("seed"))
    latency = problem.latency(run.latency, run.manifest.get("reference_ms"))
    evaluator = problem.evaluator(latency, run.supernet)
    evaluator.prepare()
    task, found, networks = problem.task, {}, {}
    requests = [Request(architecture) for architecture in architectures]
    for i, outcome in finish_all(evaluator, requests, len(requests)):
        say(f"{len(found) + 1} of {len(requests)}: {architectures[i]}")
        found[i] = {"architecture": architectures[i].to_dict(), "failure": outcome.failure}
        if outcome.network is None:
            continue
        networks[i] = outcome.network
        judged = {split: evaluate(outcome.network, task, split).named(task.metric) for split in ("validation", "test")}
        metrics = judged["validation"] | {f"test_{name}": value for name, value in judged["test"].items()}
        found[i]["metrics"] = {**metrics, **costs(architectures[i], task.io)}
    measured = latency.measure_each(list(networks.values()), config.latency.final_passes) if networks else []
    for i, one in zip(networks, measured, strict=True):
        if isinstance(one, str):
            found[i]["failure"] = one
        else:
            found[i]["latency"] = one.to_plain()
    return [found[i] for i in sorted(found)]


def measured_names(front: Front, head: str) -> dict[str, Names]:
    """Of each final network with a measured latency, its operators, by the architecture's id."""
    members = [m for m in (*front.members, *front.others) if m.latency is not None and m.latency.kind == "measured"]
    return {m.id: operators_of(Architecture.from_canonical(m.architecture), head) for m in members}


def tally(tour: str, finalists: Mapping[str, Names], others: Sequence[Names]) -> dict[str, Any]:
    """By axis: each operator with the trained and measured networks that have it, and those that no network has."""
    table: dict[str, Any] = {}
    for axis in AXES:
        names = sorted(name for a, name in wanted(tour) if a == axis)
        rows = {}
        for name in names:
            key = (axis, name)
            rows[name] = {
                "finalists": sum(key in had for had in finalists.values()),
                "others": sum(key in had for had in others),
            }
        missing = [name for name, row in rows.items() if not row["finalists"] + row["others"]]
        table[axis] = {"wanted": len(names), "in_a_network": len(names) - len(missing), "missing": missing}
        table[axis]["elsewhere"] = {name: why for (a, name), why in ELSEWHERE[tour].items() if a == axis}
        table[axis]["networks"] = rows
    return table


def tour(name: str, path: Path | None, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """Search (or open a run), bring the rest into networks, write both files; returns the record."""
    config = ROOT / "configs" / f"{name}-tour.yaml"
    begun = time.monotonic()
    run = mixnas.search(config, settings=settings, progress="lines") if path is None else Run.open(path)
    seconds = None if path is not None else round(time.monotonic() - begun, 1)
    front = run.front()
    space = SearchSpace.from_dict(run.config()["space"], str(run.path))
    task = Problem(read_config(run.config(), run.path / "config.yaml")).task
    head = task.io.head
    finalists = measured_names(front, head)
    left = wanted(name) - set().union(*finalists.values())
    architectures, nowhere = cover(space, head, left)
    say(f"{len(left)} operators are in none of {len(finalists)} finalists; {len(architectures)} networks have them")
    begun = time.monotonic()
    covering = finished(run, architectures)
    good = [each for each in covering if not each["failure"]]
    others = [operators_of(Architecture.from_canonical(each["architecture"]), head) for each in good]
    record = {
        "command": " ".join(["python benchmarks/tours.py", name, *(f"--set {each}" for each in settings)]),
        "config": f"configs/{name}-tour.yaml",
        "seconds": {"search": seconds, "networks of the rest": round(time.monotonic() - begun, 1)},
        "phases": run.manifest["phases"],
        "architectures": space.size(),
        "operators": tally(name, finalists, others),
        "in_no_architecture_drawn": sorted(f"{axis} {op}" for axis, op in nowhere),
        "front": front.to_plain(),
        "networks_of_the_rest": covering,
        "provenance": provenance("cpu", 1),
    }
    write_json(folder / f"{name}-tour.json", sayable(record))
    results = read_results(run.journal, parse_objectives(run.manifest["fixed"]["objectives"]))
    done = [r.metrics for r in results.records if r.status == "done"]
    atomic_write(folder / f"{name}-tour.svg", front_chart(front, [(m["latency_ms"], m[front.metric]) for m in done]))
    return record


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tour", choices=tuple(TOURS))
    parser.add_argument("--run", type=Path, metavar="RUN", help="a finished run of the configuration")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a change of the configuration")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, metavar="FOLDER", help="where the files go")
    args = parser.parse_args()
    if args.run and args.set:
        parser.error("--run is of a search that has ended, and --set changes one that is to come: give one of them.")
    args.output.mkdir(parents=True, exist_ok=True)
    record = tour(args.tour, args.run, args.set, args.output)
    for axis, row in record["operators"].items():
        missing = f"; not {', '.join(row['missing'])}" if row["missing"] else ""
        print(f"{axis}: {row['in_a_network']} of {row['wanted']} in a trained and measured network{missing}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
