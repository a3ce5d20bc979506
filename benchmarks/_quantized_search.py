"""Architecture and policy searched together, against the two-step habit. Part of `quantization.py joint`.

Both arms of a seed have the same device, profile, task, recipes and time:

- two steps: a super-network and a search in float32 alone; its finalists are trained on; then each is quantized
  throughout as w8a8, and by an integer programme that gives each branch the policy of least sensitivity within a
  budget of latency or bytes; what comes of it is trained on with its policies.
- jointly: one super-network, one search over architectures and policies, finalists trained on, and tried under other
  policies (`final.policies`); whoever would enter the front is trained on with its policies.

Both train their super-network for as many steps, judge as many trials, with the strategy that a user gets who names
none, and train their finalists by one recipe; networks under other policies are trained on by one recipe too, a fifth
as long (`search.variants.recipe_of`), with the same code. The joint arm comes first, and the habit has at least as
long: as long as time is left it makes further networks by the programme, with other budgets, and then trains on what it
has. Each arm is one process on one thread, so its time is that of the processor (what a clock on the wall says on a
quiet machine); both are in the record. The profile of the space is made once and serves both: it is no part of either.
Whoever is chosen is chosen on validation. All networks of a seed are then measured together, and judged on the test
split, which neither arm has seen. Of the two ways to quantize, the habit is given the better one of each seed by that
split: an advantage that nobody has. Settings were chosen on seeds that are not reported.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from svg import Series, chart

from mixnas.evaluators.costs import SpaceCosts
from mixnas.evaluators.protocol import Part
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import evaluate
from mixnas.evaluators.varying import VaryingEvaluator, VaryingSpec, sensitivities
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring.device import device_name, provenance
from mixnas.predictors.measuring.measure import MeasureConfig, fixed_threads, forward_call, measure_networks
from mixnas.predictors.measuring.sentinel import make_sentinel
from mixnas.search.config import Config, load_config
from mixnas.search.job import Job, new_run
from mixnas.search.policies import by_place, cheapest_loss, places_of, swapped, with_options
from mixnas.search.run.directory import Run
from mixnas.search.run.progress import make_progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.pareto import Reference, non_dominated
from mixnas.search.variants import EXAMPLES, recipe_of
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.cost import cost
from mixnas.search_space.files import atomic_write
from mixnas.search_space.formats.safetensors import load_network
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.policy import uniform
from mixnas.search_space.space import SearchSpace

OBJECTIVES = {"accuracy": "max", "latency_ms": "min", "weight_bytes": "min"}
JOINT, FP32, W8A8, PROGRAMME, TWO_STEPS = "joint", "fp32 alone", "all w8a8", "integer programme", "two steps, the best"
SHARES = (0.25, 0.5, 0.1, 0.75, 0.0, 0.35, 0.9, 0.05, 0.6, 0.15)
"""Budgets of the integer programme, from the least possible (0) to what the float32 network takes (1), in order."""

Say = Callable[[str], None]


class _Clock:
    """Seconds since it was made, of the processor in this process and on the wall."""

    def __init__(self) -> None:
        self._begun = time.process_time(), time.monotonic()

    def seconds(self) -> dict[str, float]:
        """Until now."""
        now = time.process_time(), time.monotonic()
        return {
            name: round(then - begun, 1)
            for name, begun, then in zip(("processor", "wall"), self._begun, now, strict=True)
        }


@dataclass
class Found:
    """A network that an arm ends with."""

    arm: str
    network: Network
    metrics: dict[str, float]


def second_step(
    finalists: list[Network],
    space: SearchSpace,
    predictor: LatencyPredictor,
    trainer: VaryingEvaluator,
    late: Callable[[], bool],
) -> list[tuple[str, Network]]:
    """What the habit makes of float32 networks; each is trained on with its policies, as a search trains on its own.

    Each network throughout as w8a8, and by the programme with the first of `SHARES` as a budget of latency and one of
    bytes; and with the next ones until it is `late`. Where budgets end before that, what was made is trained on again.
    """
    made: dict[str, tuple[str, Network]] = {}

    def make(how: str, quantized: Architecture, network: Network) -> None:
        if quantized.id not in made:
            made[quantized.id] = (how, trainer.finish_part(quantized, Part(0, 1, network)))

    asked = []
    for network in finalists:
        own, io = network.architecture, network.io
        make(W8A8, uniform(own, Op("w8a8")), network)
        places = places_of(space, own)
        swaps = swapped(own, places)
        matrix = space.encode_many(swaps)
        taken = [predictor.predict_many(matrix, space, io), SpaceCosts(space, io).of(matrix)["weight_bytes"]]
        rises = by_place(places, sensitivities(network, swaps, trainer.task, EXAMPLES))
        asked.append((network, places, rises, [by_place(places, values) for values in taken]))
    for turn, share in enumerate(SHARES):
        for network, places, rises, by_what in asked:
            for spent in by_what:
                if turn and late():
                    return list(made.values())
                least = sum(map(min, spent))
                most = sum(row[place.options.index(Op("fp32"))] for place, row in zip(places, spent, strict=True))
                slack = 1e-9 * sum(max(map(abs, row)) for row in spent)
                picked = cheapest_loss(rises, spent, least + share * max(most - least, 0.0) + slack)
                policies = [place.options[i] for place, i in zip(places, picked, strict=True)]
                make(PROGRAMME, with_options(network.architecture, places, policies), network)
    while not late():  # nothing new is left to make: all are trained on once more, one after the other
        for identity, (how, network) in list(made.items()):
            if late():
                break
            made[identity] = (how, trainer.finish_part(network.architecture, Part(0, 1, network)))
    return list(made.values())


def carry_out(config: Config, source: Path, folder: Path, name: str, tables: Path) -> tuple[Run, list[Network]]:
    """One search with the shared profile; its finalists with final weights."""
    run = new_run(config, root=folder, name=name, source=str(source))
    shutil.copytree(tables, run.latency, dirs_exist_ok=True)
    Job(run, config, progress=make_progress("quiet"), stop=StopSignal()).execute()
    front = run.front()
    networks = [
        load_network(path)
        for member in (*front.members, *front.others)
        if (path := run.networks / f"{member.id}.safetensors").exists()
    ]
    return run, networks


def fp32_alone(plain: Any) -> Any:
    """A space as written, with float32 in the place of every choice of a policy."""
    plain = copy.deepcopy(plain)
    for stage in plain["stages"]:
        stage["block"]["quant"] = "fp32"
    return plain


def measure(found: list[Found], task: Task, passes: int) -> None:
    """Test accuracy, bytes, and latencies that compare."""
    unique = {(each.arm, each.network.architecture.id): each for each in found}
    calls = []
    example = task.io.example(1, generator=torch.Generator().manual_seed(0))
    for each in unique.values():
        each.metrics["accuracy"] = evaluate(each.network, task, "test").score
        each.metrics["validation_accuracy"] = evaluate(each.network, task, "validation").score
        each.metrics["weight_bytes"] = float(cost(each.network.architecture, task.io).weight_bytes)
        calls.append(forward_call(copy.deepcopy(each.network).eval().requires_grad_(False).deploy(), example))
    config = MeasureConfig(passes=passes, threads=1)
    measured = measure_networks(calls, rng=np.random.default_rng(0), config=config, sentinel=make_sentinel("cpu"))
    for each, one in zip(unique.values(), measured, strict=True):
        each.metrics["latency_ms"] = one.latency.ms


def one_seed(args: argparse.Namespace, seed: int, folder: Path, tables: Path, say: Say) -> dict[str, Any]:
    """Both arms; returns their networks and seconds."""
    source = args.config
    shared = [
        f"search.seed={seed}",
        f"search.trials={args.trials}",
        f"supernet.steps={args.steps}",
        "supernet.seconds=null",
        "latency.final_passes=1",
        f"final.train.epochs={args.epochs}",
    ]
    several = [f"final.candidates={args.candidates}", f"final.policies={args.policies}"]
    joint = load_config(source, settings=[*shared, *several])
    alone = load_config(source, settings=[*shared, f"final.candidates={args.candidates_first}"])
    alone = replace(alone, space=fp32_alone(alone.space))
    task = by_name(joint.task.to_plain())
    predictor = LatencyPredictor.load(device_name("cpu", 1), directory=tables)
    begun = _Clock()
    other, networks = carry_out(joint, source, folder, f"joint-{seed}", tables)
    took = begun.seconds()
    found = [Found(JOINT, network, {}) for network in networks]
    say(f"seed {seed}: jointly {took}, {len(networks)} networks; {phases(other)}")
    begun = _Clock()
    run, finalists = carry_out(alone, source, folder, f"two-steps-{seed}", tables)
    in_float32 = begun.seconds()
    space = SearchSpace.from_dict(joint.space)
    found += [Found(FP32, network, {}) for network in finalists]
    spec = VaryingSpec(task=joint.task.to_plain(), train=recipe_of(joint, len(task.train)), seed=seed)

    def late() -> bool:
        return begun.seconds()["processor"] >= took["processor"]

    for how, network in second_step(finalists, space, predictor, VaryingEvaluator(spec, task), late):
        found.append(Found(how, network, {}))
    two_steps = begun.seconds()
    say(f"seed {seed}: two steps {two_steps}, {in_float32} of them in float32, {len(found) - len(networks)} networks")
    with fixed_threads(1):
        measure(found, task, args.passes)
    return {
        "seed": seed,
        "seconds": {"two steps": two_steps, "of them float32": in_float32, "joint": took},
        "phases": {"float32": phases(run), "joint": phases(other)},
        "trials": {"float32": run.front().trials["done"], "joint": other.front().trials["done"]},
        "networks": [
            {
                "arm": each.arm,
                "id": each.network.architecture.id,
                "policies": policies_used(each.network.architecture),
                **each.metrics,
            }
            for each in found
        ],
    }


def phases(run: Run) -> dict[str, float]:
    """Seconds of the phases of a run, by the clock on the wall."""
    return {phase["name"]: phase["seconds"] for phase in run.manifest["phases"]}


def policies_used(architecture: Architecture) -> list[str]:
    """The policy of each branch in the order in which they run, without knobs."""
    blocks = [block for stage in architecture.stages for block in stage.blocks]
    return [quant.name for block in blocks for quant in (block.quant, block.channel_quant)]


def judged(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Hypervolume of each arm and seed in one box: that of all networks of all seeds."""
    objectives = parse_objectives(OBJECTIVES)

    def values(networks: list[dict[str, Any]]) -> np.ndarray:
        return np.array([[n[name] for name in OBJECTIVES] for n in networks]).reshape(-1, len(OBJECTIVES))

    reference = Reference.of(values([n for seed in seeds for n in seed["networks"]]), objectives)
    volumes: dict[str, list[float]] = {}
    for seed in seeds:
        of = {arm: [n for n in seed["networks"] if n["arm"] == arm] for arm in (JOINT, FP32, W8A8, PROGRAMME)}
        of["two steps, w8a8"] = [*of[FP32], *of[W8A8]]
        of["two steps, integer programme"] = [*of[FP32], *of[PROGRAMME]]
        of["two steps, everything"] = [*of[FP32], *of[W8A8], *of[PROGRAMME]]
        for arm, networks in of.items():
            volumes.setdefault(arm, []).append(reference.hypervolume(values(networks), objectives))
    pairs = [("two steps, w8a8", "two steps, integer programme")]
    volumes[TWO_STEPS] = [max(volumes[a][i], volumes[b][i]) for a, b in pairs for i in range(len(seeds))]
    gained = np.array(volumes[JOINT]) - np.array(volumes[TWO_STEPS])
    against_all = np.array(volumes[JOINT]) - np.array(volumes["two steps, everything"])
    return {
        "reference": list(reference.point),
        "hypervolume": {arm: [round(v, 4) for v in found] for arm, found in volumes.items()},
        "mean": {arm: round(float(np.mean(found)), 4) for arm, found in volumes.items()},
        "joint beyond the better of the two": [round(float(v), 4) for v in gained],
        "joint beyond both together": [round(float(v), 4) for v in against_all],
        "joint is better, of the seeds": int((gained > 0).sum()),
        "processor time of joint over that of two steps": [
            round(seed["seconds"]["joint"]["processor"] / seed["seconds"]["two steps"]["processor"], 2)
            for seed in seeds
            if "seconds" in seed
        ],
    }


def picture(seeds: list[dict[str, Any]], device: str) -> str:
    """All networks on their seed's fronts: accuracy against latency; a label says how many kilobytes."""
    objectives = parse_objectives(OBJECTIVES)
    series = []
    for arm in (FP32, W8A8, PROGRAMME, JOINT):
        points, labels = [], []
        for seed in seeds:
            networks = [n for n in seed["networks"] if n["arm"] == arm]
            if not networks:
                continue
            kept = non_dominated(np.array([[n[name] for name in OBJECTIVES] for n in networks]), objectives)
            for n, keep in zip(networks, kept, strict=True):
                if keep:
                    points.append((n["latency_ms"], n["accuracy"]))
                    labels.append(f"{n['weight_bytes'] / 1000:.0f}k" if seed is seeds[0] else "")
        if points:
            series.append(Series(arm, points, labels=labels))
    return chart(
        series,
        title=f"Test accuracy against latency of both arms, {len(seeds)} seeds; label: bytes (of the first)",
        x=f"latency on {device}, ms (logarithmic)",
        y="test accuracy",
        x_log=True,
    )


SETTINGS = (
    "steps",
    "trials",
    "candidates",
    "policies",
    "candidates_first",
    "epochs",
    "passes",
)
"""Arguments that a record's seeds must have in common."""


def run(args: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Profile once; both arms for each seed that records of the same settings (`args.before`) lack; judge and draw."""
    config = load_config(args.config)
    space, task = SearchSpace.from_dict(config.space), by_name(config.task.to_plain())
    settings = {name: getattr(args, name) for name in SETTINGS} | {"space": config.space}
    record: dict[str, Any] = {"provenance": provenance("cpu", 1)}
    seeds: list[dict[str, Any]] = []
    for before in args.before:
        if before["settings"] == settings:
            seeds += [seed for seed in before["seeds"] if seed["seed"] not in {known["seed"] for known in seeds}]
    wanted = args.only or range(1, args.seeds + 1)

    def keep() -> None:
        seeds.sort(key=lambda seed: seed["seed"])
        record.update(
            what="architecture and policy searched together, against float32 first and policies after",
            config=args.config.name,
            settings=settings,
            **judged(seeds),
            seeds=seeds,
        )
        args.checkpoint(record)
        say(f"hypervolume so far: {record['mean']}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tables = args.tables or folder / "tables"
        left = [seed for seed in wanted if seed not in {known["seed"] for known in seeds}]
        if left and not list(tables.glob("*.npz")):
            begun = time.monotonic()
            measuring = MeasureConfig(passes=2, threads=1)
            profiling = ProfileConfig(budget_s=args.profile, measure=measuring, seed=0)
            profile(space, task.io, device="cpu", directory=tables, config=profiling)
            say(f"profiled in {time.monotonic() - begun:.0f} s")
        torch.set_num_threads(1)
        for seed in left:
            seeds.append({**one_seed(args, seed, folder, tables, say), "commit": record["provenance"]["commit"]})
            keep()
    keep()
    svg = args.output / "quantization-joint.svg"
    atomic_write(svg, picture(seeds, record["provenance"]["device"]))
    return record
