"""Policies of a run: candidates with one throughout, and what is said of those that do not run as themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import mixnas
from mixnas.predictors.measuring.value import Latency
from mixnas.search.policies import policies_of, remarks, used, with_one_policy
from mixnas.search.report.contents import contents
from mixnas.search.report.page import page
from mixnas.search.run.front import Front, Member
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.pareto import non_dominated
from mixnas.search.study.reading import read_results
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.operators.quantization.policy import uniform
from mixnas.search_space.space import SearchSpace
from tests.cli.command import ok

QUANTS = ["fp32", "w8a8", "w8a16"]
PLAIN = {
    "task": "digits",
    "objectives": {"accuracy": "max", "latency_ms": "min", "weight_bytes": "min"},
    "search": {"trials": 12, "strategy": "random"},
    "supernet": {"steps": 12},
    "final": {"candidates": 3, "train": {"steps": 5}},
    "latency": {"profile": 12, "passes": 1, "final_passes": 1},
    "space": {
        "stem": {"name": "conv", "stride": 2},
        "stages": [
            {
                "width": [8, 16],
                "depth": [1, 2],
                "block": {
                    "mixer": ["identity", "attention"],
                    "channel_mixer": "mlp",
                    "quant": {"mixer": QUANTS, "channel_mixer": QUANTS},
                },
            }
        ],
    },
}


def test_one_policy_throughout_where_the_space_has_it():
    space = SearchSpace.from_dict(PLAIN["space"])
    policies = policies_of(space)
    assert [str(policy) for policy in policies] == QUANTS
    architecture = space.sample(np.random.default_rng(0))
    found = with_one_policy(space, [architecture, architecture])
    assert {uniform(architecture, policy) for policy in policies} - {architecture} == set(found)
    assert with_one_policy(space, [found[0]])[0] != found[0]
    plain = {**PLAIN["space"]["stages"][0]["block"], "quant": {"mixer": "fp32", "channel_mixer": QUANTS}}
    halved = SearchSpace.from_dict({"stem": "conv", "stages": [{"width": 8, "block": plain}]})
    some = halved.sample(np.random.default_rng(1))
    assert all(a.stages[0].blocks[0].channel_quant.name == "fp32" for a in with_one_policy(halved, [some]))
    alone = SearchSpace.from_dict({"stem": "conv", "stages": [{"width": 8, "block": {**plain, "quant": "fp32"}}]})
    assert with_one_policy(alone, [alone.sample(np.random.default_rng(0))]) == []


def test_a_search_judges_uniform_candidates_and_says_what_runs(tmp_path: Path):
    run = mixnas.search(PLAIN, name="mixed", runs=tmp_path, progress="quiet")
    objectives = parse_objectives(PLAIN["objectives"])
    results = read_results(run.journal, objectives, ())
    done = {record.id: record for record in results.records if record.status == "done"}
    space = SearchSpace.from_dict(PLAIN["space"])
    first = [record for record in results.records if record.status == "done"][:12]
    values = np.array([results.values(record) for record in first])
    mixed = [record for record, kept in zip(first, non_dominated(values, objectives), strict=True) if kept]
    uniforms = [a for record in mixed for a in with_one_policy(space, [record.architecture])]
    assert len(done) > 12 and sum(a.id in done for a in uniforms) >= len(done) - 12 > 0
    assert "uniform policies" in [phase["name"] for phase in run.manifest["phases"]]
    front = run.front()
    assert run.manifest["policies"]["w8a8"] == "" and "widened" in run.manifest["policies"]["w8a16"]
    said = remarks(run.manifest["policies"], front)
    assert any(line.startswith("w8a16 does not run as itself") for line in said)
    missing = [name for name in QUANTS if not any(name in used(m.architecture) for m in front.members)]
    assert any("On no network of the front" in line for line in said) == bool(missing)
    text = page(contents(run))
    assert all(line.replace("'", "&#x27;") in text for line in said)
    before = len(results.records)
    mixnas.resume(run, progress="quiet")  # of what is judged nothing is judged again
    assert len(read_results(run.journal, objectives, ()).records) == before
    assert results.queued == len(done) - 12 and run.status().done == 12
    run = mixnas.resume(
        run, settings=["search.trials=14"], progress="quiet"
    )  # two more of the search, whatever was queued
    results = read_results(run.journal, objectives, ())
    assert results.evaluated - results.queued == run.status().done == 14
    assert f"{run.name}: finished, 14 of 14 trials done" in ok("status", run.name, "--runs", tmp_path)


def test_a_policy_on_no_front_is_named():
    plain = {"mixer": "attention", "channel_mixer": "mlp", "quant": "w8a8"}
    architecture = Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": plain}]})
    latency = Latency(0.1, 0.1, 0.1, "measured")
    member = Member(id=architecture.id, trial=0, architecture=architecture.to_dict(), metrics={}, latency=latency)
    front = Front(
        run="r", task="digits", metric="accuracy", objectives={"accuracy": "max"}, constraints=(), evaluator="supernet",
        device="d", latency="measured", trials={}, hypervolume=None, reference=None, final=True, members=(member,),
        others=(), knee=None, searched_front=(),
    )  # fmt: skip
    instead = {"fp32": "", "w8a8": "", "w8a16": "float32: widened"}
    assert remarks(instead, front) == [
        "w8a16 does not run as itself on this device. What runs is float32: widened.",
        "On no network of the front, as measured here: fp32, w8a16.",
    ]
    assert remarks({}, front) == [] and used(member.architecture) == ["w8a8"]
