"""Finished networks under other policies: who is worth it, what becomes of them, and that a kill changes nothing."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import mixnas
from mixnas.evaluators.training import evaluate
from mixnas.evaluators.varying import calibrated
from mixnas.search.config import read_config
from mixnas.search.job import Job, new_run
from mixnas.search.policies import cheapest_loss, places_of, policies_of, swapped, with_options
from mixnas.search.problem import Problem
from mixnas.search.reproducing import reproduce
from mixnas.search.run.directory import Run
from mixnas.search.run.front import Front, Member
from mixnas.search.run.integrity import problems, read_variants
from mixnas.search.run.progress import Progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search.variants import Tried, entering, evaluator_of, most_variants, proposals, worth
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import IntegrityError, StoppedEarly
from mixnas.search_space.files import parse_json, stamped, without_stamp, write_json
from mixnas.search_space.formats.safetensors import load_network, read_extra
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.policy import uniform, with_policies
from mixnas.search_space.space import SearchSpace
from tests.cli.command import nas, ok
from tests.search.stopping import StopIn

QUANTS = ["fp32", "w8a8_static", "w4a16"]
BLOCK = {"mixer": ["identity", "attention"], "channel_mixer": "mlp"}
PLAIN: dict[str, Any] = {
    "task": "digits",
    "objectives": {"accuracy": "max", "weight_bytes": "min"},
    "search": {"trials": 6, "strategy": "random", "evaluator": "standalone"},
    "train": {"steps": 40},
    "final": {"candidates": 2, "policies": 40},
    "latency": {"passes": 1, "final_passes": 1},
    "space": {
        "stem": {"name": "conv", "stride": 2},
        "stages": [
            {"width": [32, 64], "block": {**BLOCK, "quant": {"mixer": QUANTS, "channel_mixer": QUANTS}}},
        ],
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return mixnas.search(PLAIN, name="varied", runs=tmp_path_factory.mktemp("runs"), progress="quiet")


def _all(front: Front) -> list[Member]:
    return [*front.members, *front.others]


def _phases(run: Run) -> list[str]:
    return [phase["name"] for phase in run.manifest["phases"]]


def test_a_uniform_policy_of_a_finished_network_is_beaten_by_none_of_the_front(run: Run):
    front, problem = run.front(), Problem(read_config(run.config(), "test"))
    finished = [m for m in _all(front) if not m.weights_from]
    judged = 0
    for member in finished:
        network = load_network(run.networks / f"{member.id}.safetensors")
        for policy in policies_of(problem.space):
            other = uniform(network.architecture, policy)
            if other.id in {m.id for m in finished} - {member.id}:
                continue  # which has weights of its own
            score = evaluate(calibrated(other, network, problem.task), problem.task).score
            size = cost(other, problem.io).weight_bytes
            at_least = [
                m for m in front.members if m.metrics["accuracy"] >= score and m.metrics["weight_bytes"] <= size
            ]
            assert at_least, (member.id, policy)
            judged += 1
    assert len(finished) == 2 and judged > 3


def test_they_are_networks_like_others(run: Run, tmp_path: Path):
    front = run.front()
    made = [m for m in _all(front) if m.weights_from]
    assert made and {m.weights_from for m in made} <= {m.id for m in _all(front) if not m.weights_from}
    assert _phases(run)[-3:] == ["try other policies", "train other policies", "measure"]
    assert not list(problems(run.path, run.manifest))
    for member in made:
        architecture = Architecture.from_canonical(member.architecture)
        network = load_network(run.networks / f"{member.id}.safetensors")
        stored = sum(t.numel() * t.element_size() for t in network.deploy().state_dict().values())
        assert network.architecture == architecture and stored == member.metrics["weight_bytes"]
        assert member.metrics["accuracy"] >= member.searched["accuracy"]  # trained on, or left as it was
        extra = read_extra(run.networks / f"{member.id}.safetensors")
        assert (
            extra["weights_from"] == member.weights_from
            and extra["test"]["accuracy"] == member.metrics["test_accuracy"]
        )
        assert member.latency is not None and member.latency.kind == "measured"
    on_front = next(m for m in front.members if m.weights_from)
    runs = "--runs", run.path.parent
    assert f"{on_front.id} (of {on_front.weights_from})" in nas("front", run.name, *runs).stderr
    for words in (("front", run.name, "--json"), ("status", run.name, "--json"), ("report", run.name)):
        ok(*words, *runs)
    ok("export", run.name, *runs, "--pick", on_front.id, "-o", tmp_path / "out", "--format", "safetensors")
    folder = next(path.parent for path in (tmp_path / "out").rglob("card.json"))
    again = reproduce(folder)
    assert again.again == again.exported and on_front.weights_from in (folder / "README.md").read_text()


def test_a_branch_without_products_keeps_its_policy():
    """Another one there would be the same network again."""
    problem = Problem(read_config(PLAIN, "test"), "test")
    block = {**BLOCK, "mixer": "identity", "quant": {"mixer": "w4a16", "channel_mixer": "fp32"}}
    stem = {"name": "conv", "stride": 2}
    own = Architecture.from_dict({"stem": stem, "stages": [{"width": 32, "block": block}]})
    other = with_policies(
        own, {"stages.0.blocks.0.token": Op("fp32"), "stages.0.blocks.0.channel": Op("w4a16", (("group", 32),))}
    )
    evaluator = problem.evaluator(problem.latency())
    network = Network(own, problem.io, generator=torch.Generator().manual_seed(0)).eval()

    def costs(architectures: Sequence[Architecture]) -> Mapping[str, Any]:
        return evaluator.cheap(problem.space.encode_many(architectures))

    judge = evaluator_of(problem, "cpu")
    found = proposals(network, problem.space, costs, ["weight_bytes"], judge, [other])
    assert len(found) == 2 and all(one.stages[0].blocks[0].quant == own.stages[0].blocks[0].quant for one in found)


def test_a_finalist_that_failed_is_not_made_again_under_its_id(run: Run, tmp_path: Path):
    shutil.copytree(run.path, tmp_path / "again")
    other = Run.open(tmp_path / "again")
    lost, kept = (m for m in _all(run.front()) if not m.weights_from)
    for name in (f"networks/{lost.id}.safetensors", "variants.json", "pareto.json"):
        (other.path / name).unlink()
    variants = Job(other, read_config(PLAIN, "test"), progress=Progress(), stop=StopSignal())._variants
    tried = [Tried(kept.id, Architecture.from_canonical(m.architecture), dict(m.metrics)) for m in (lost, kept)]
    assert variants._distinct(tried, {lost.id, kept.id}) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda plain: plain.pop("tried"),
        lambda plain: plain.update(chosen="text"),
        lambda plain: plain.update(chosen=plain["chosen"] * 100),
        lambda plain: plain["chosen"][0]["metrics"].update(accuracy="a"),
        lambda plain: plain["chosen"][0].update(architecture={}),
    ],
)
def test_a_file_of_what_was_tried_that_is_another_is_refused(run: Run, tmp_path: Path, change: Any):
    plain = without_stamp(parse_json((run.path / "variants.json").read_bytes(), "variants.json"))
    before = copy.deepcopy(plain)
    change(plain)
    own = {m.id: SimpleNamespace(architecture=Architecture.from_canonical(m.architecture)) for m in _all(run.front())}
    variants = Job(run, read_config(PLAIN, "test"), progress=Progress(), stop=StopSignal())._variants
    variants._path = tmp_path / "variants.json"
    write_json(variants._path, stamped(plain))
    finished = {
        identity: (own[identity], None) for identity in read_variants(run.path / "variants.json")["asked"]["networks"]
    }
    with pytest.raises(IntegrityError, match="a resume tries the policies again"):
        variants._read(finished)
    for name in ("asked", "chosen"):  # as a kill leaves it while others are still tried
        plain = {key: value for key, value in plain.items() if key != name}
    plain["tried"] = before["tried"]
    write_json(variants._path, stamped(plain))
    assert variants._read(finished) == plain


def _alike(front: Front) -> list[tuple[Any, ...]]:
    metrics = ("accuracy", "test_accuracy", "weight_bytes", "loss")
    return sorted((m.id, m.weights_from, m.reason, *(m.metrics[name] for name in metrics)) for m in _all(front))


def test_stopped_in_each_phase_it_comes_to_the_same(run: Run, tmp_path: Path):
    config = read_config(PLAIN, "test")
    stopped = new_run(config, root=tmp_path, name="stopped", source="test")
    for phase in ("try other policies", "train other policies"):
        stop = StopSignal()
        with pytest.raises(StoppedEarly):
            Job(stopped, config, progress=StopIn(phase, stop), stop=stop).execute()
    assert (stopped.path / "variants.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in stopped.networks.iterdir()}
    Job(stopped, config, progress=Progress(), stop=StopSignal()).execute()
    assert _alike(stopped.front()) == _alike(run.front())
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())


def test_switched_off_or_of_one_policy_nothing_is_tried(run: Run, tmp_path: Path):
    off = mixnas.search(PLAIN, name="off", runs=tmp_path, settings=["final.policies=0"], progress="quiet")
    assert "try other policies" not in _phases(off) and not (off.path / "variants.json").exists()
    assert not any(m.weights_from for m in _all(off.front()))
    finished = {row for row in _alike(run.front()) if not row[1]}
    assert {row[:1] + row[3:] for row in finished} == {row[:1] + row[3:] for row in _alike(off.front())}
    for changes, most in (
        ({}, 40),
        ({"final": {"candidates": 2}}, 4),
        ({"objectives": {"accuracy": "max", "params": "min"}}, 0),
        ({"space": {"stem": "conv", "stages": [{"width": [8, 16], "block": {**BLOCK, "quant": "w8a8"}}]}}, 0),
    ):
        assert most_variants(Problem(read_config(PLAIN | changes, "test"))) == most
    resumed = mixnas.resume(off, settings=["final.policies=1"], progress="quiet")
    assert sum(bool(m.weights_from) for m in _all(resumed.front())) == 1


def test_whoever_breaks_a_budget_is_not_chosen():
    architecture = SearchSpace.from_dict(PLAIN["space"]).sample(np.random.default_rng(0))
    problem = Problem(read_config(PLAIN | {"constraints": ["weight_bytes <= 5e4"]}, "test"))

    def tried(accuracy: float, size: float, **more: float) -> Tried:
        return Tried("", architecture, {"accuracy": accuracy, "weight_bytes": size, **more})

    finished = [tried(0.9, 4e4), tried(0.95, 6e4)]
    within, beyond, behind = tried(0.91, 4.5e4), tried(0.99, 5.1e4), tried(0.9, 4.1e4)
    assert worth(problem, finished, [beyond, within, behind]) == [within]
    free = Problem(read_config(PLAIN, "test"))
    assert worth(free, finished, [beyond, within, behind]) == [beyond, within]
    assert worth(free, finished, [tried(0.99, 5.1e4, latency_ms=float("nan"))]) == []
    assert worth(free, [], [behind, within]) == [behind, within]


def test_with_a_super_network_in_rungs(tmp_path: Path):
    final = {"candidates": 2, "policies": 3, "train": {"steps": 20}, "halving": {"rungs": 2}}
    plain = {**PLAIN, "search": {"trials": 6, "strategy": "random"}, "supernet": {"steps": 20}, "final": final}
    plain["objectives"] = {**PLAIN["objectives"], "latency_ms": "min"}
    found = mixnas.search({**plain, "latency": {**PLAIN["latency"], "profile": 3}}, runs=tmp_path, progress="quiet")
    made = [m for m in _all(found.front()) if m.weights_from]
    share = {m.id: m.metrics.get("train_share") for m in _all(found.front())}
    assert 1 <= len(made) <= 3 and all(share[m.id] == share[m.weights_from] for m in made)
    assert all(m.predicted is not None and m.searched["latency_ms"] > 0 for m in made)


def test_places_hold_what_the_space_ties():
    def space(**block: Any) -> SearchSpace:
        stage = {"width": 8, "depth": [1, 2], "share": block.pop("share", False), "block": {**BLOCK, **block}}
        return SearchSpace.from_dict({"stem": "conv", "stages": [stage]})

    deep = np.random.default_rng(0)
    tied = {"quant": ["fp32", {"name": "w4a16", "group": [32, 64]}]}
    for some, branches in (
        (space(**tied), [("token", "channel")] * 2),
        (space(**tied, share=True), [("token", "channel", "token", "channel")]),
        (space(quant={"mixer": "fp32", "channel_mixer": QUANTS}), [("channel",)] * 2),
    ):
        own = next(a for a in (some.sample(deep) for _ in itertools.count()) if len(a.stages[0].blocks) == 2)
        places = places_of(some, own)
        assert sorted(sorted(n.split(".")[-1] for n in p.branches) for p in places) == sorted(map(sorted, branches))
        assert [len(place.options) for place in places] == [3] * len(branches)
        everything = itertools.product(*(place.options for place in places))
        made = {with_options(own, places, picked) for picked in everything}
        assert len(made) == 3 ** len(places) and all(map(some.contains, made))
        assert set(swapped(own, places)) <= made


def test_the_programme_against_all_there_are():
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(1, 4, size=4)
        rises, spent = ([rng.random(n).tolist() for n in counts] for _ in range(2))
        rises[0][0] = float("inf") if counts[0] > 1 else rises[0][0]
        every = list(itertools.product(*(range(n) for n in counts)))

        def of(rows: list[list[float]], picked: tuple[int, ...]) -> float:
            return sum(row[i] for row, i in zip(rows, picked, strict=True))

        budget = float(np.quantile([of(spent, picked) for picked in every if of(rises, picked) < np.inf], 0.4))
        best = min(of(rises, picked) for picked in every if of(spent, picked) <= budget)
        found = tuple(cheapest_loss(rises, spent, budget))
        assert of(spent, found) <= budget + 1e-9 and of(rises, found) == pytest.approx(best, abs=1e-3)


def test_who_enters_a_front_adds_to_it():
    front = np.array([[0.0, 1.0], [1.0, 0.0]])
    points = np.array([[0.5, 0.5], [1.0, 1.0], [0.5, 0.5], [0.9, 0.2], [0.0, 1.0]])
    assert sorted(entering(front, points, 9)) in ([0, 3], [2, 3])
    assert entering(front, points, 1) == [0] and entering(front, points[1:2], 9) == []
    assert entering(np.empty((0, 2)), points[1:2], 9) == [0] and entering(front, points[:0], 9) == []


def test_weights_are_taken_and_the_other_is_left(run: Run):
    network = load_network(next(run.networks.glob("*.safetensors")))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    problem = Problem(read_config(run.config(), "test"))
    for policy in policies_of(problem.space):
        other = calibrated(uniform(network.architecture, policy), network, problem.task)
        own = dict(other.named_parameters())
        assert all(torch.equal(own[name], value) for name, value in network.named_parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
