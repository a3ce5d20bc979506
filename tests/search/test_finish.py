"""Choosing finalists, and the front that they make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.training import DivergedError
from mixnas.predictors.measuring.value import Latency
from mixnas.search.finish import (
    FinalNetworks,
    agreement,
    choose_finalists,
    choose_measured,
    choose_structures,
    final_front,
    measure_finalists,
    nearest_to,
)
from mixnas.search.run.front import Member
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SILENT
from mixnas.search_space.space import SearchSpace

OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min"})


def _records(values: list[tuple[float, float]]) -> Results:
    records = [
        TrialRecord(i, "done", f"{i:012d}", "{}", {"accuracy": a, "latency_ms": ms}) for i, (a, ms) in enumerate(values)
    ]
    return Results(OBJECTIVES, (), records)


def _member(identity: str, accuracy: float, latency_ms: float) -> Member:
    metrics = {"accuracy": accuracy, "latency_ms": latency_ms}
    return Member(id=identity, trial=0, architecture={}, metrics=metrics)


def test_finalists_span_the_front():
    front = [(0.1 * i, 0.1 * i * i) for i in range(1, 10)]
    results = _records([*front, (0.3, 5.0)])  # the last is dominated
    chosen = choose_finalists(results, 4)
    values = [(record.metrics["accuracy"], record.metrics["latency_ms"]) for record in chosen]
    assert len(set(values)) == 4 and front[0] in values and front[-1] in values and (0.3, 5.0) not in values
    assert len(choose_finalists(results, 99)) == 9


def test_one_of_each_structure_is_finished_the_one_that_stores_most():
    stage = {"width": [8, 16, 32], "block": {"mixer": "identity", "channel_mixer": "mlp", "quant": ["fp32", "w8a8"]}}
    space = SearchSpace.from_dict({"stem": "conv", "stages": [stage]})
    objectives = parse_objectives({"accuracy": "max", "weight_bytes": "min"})
    trials = [
        (8, "fp32", 0.5, 40), (8, "w8a8", 0.5, 10), (16, "fp32", 0.7, 80), (16, "w8a8", 0.69, 20),
        (32, "w8a8", 0.9, 90), (32, "fp32", 0.88, 300),
    ]  # fmt: skip

    def record(i: int, width: int, quant: str, accuracy: float, size: float) -> TrialRecord:
        vectors = (space.decode([w, q]) for w in range(3) for q in range(2))
        one = next(a for a in vectors if a.stages[0].width == width and a.stages[0].blocks[0].quant.name == quant)
        return TrialRecord(i, "done", one.id, one.to_json(), {"accuracy": accuracy, "weight_bytes": size})

    records = [record(i, *trial) for i, trial in enumerate(trials)]
    found = choose_structures(Results(objectives, (), records), 3)
    assert sorted(r.number for r in found) == [0, 2, 5]  # in float32, on the front or not
    assert sorted(r.number for r in choose_structures(Results(objectives, (), records), 2)) == [0, 5]  # the ends
    bounded = Results(objectives, parse_constraints(["weight_bytes <= 100"]), records)
    assert sorted(r.number for r in choose_structures(bounded, 3)) == [0, 2, 4]
    assert choose_structures(Results(objectives, (), []), 3) == []


def test_who_stores_most_but_trains_half_of_its_weights_is_not_the_one():
    stage = {"width": 32, "block": {"mixer": "identity", "channel_mixer": "mlp", "quant": ["sparse24", "w8a8"]}}
    space = SearchSpace.from_dict({"stem": "conv", "stages": [stage]})
    pruned, whole = (space.decode([i]) for i in range(2))
    records = [
        TrialRecord(i, "done", one.id, one.to_json(), {"accuracy": accuracy, "weight_bytes": size})
        for i, (one, accuracy, size) in enumerate([(pruned, 0.9, 90), (whole, 0.8, 40)])
    ]
    results = Results(parse_objectives({"accuracy": "max", "weight_bytes": "min"}), (), records)
    assert [record.id for record in choose_structures(results, 3)] == [whole.id]


def test_a_bound_that_training_may_still_keep_does_not_leave_everything_unfinished():
    """accuracy >= 0.9 was status 3 after the search, where trained networks reach 0.99 and inherited weights 0.75."""
    trials = [(0.5, 1.0), (0.7, 2.0), (0.75, 4.0), (0.74, 5.0), (0.72, 9.0)]
    bounded = Results(OBJECTIVES, parse_constraints(["accuracy >= 0.9", "latency_ms <= 8"]), _records(trials).records)
    assert choose_finalists(bounded, 2) == []
    chosen = choose_finalists(bounded, 2, ["accuracy"])
    assert [record.metrics["accuracy"] for record in chosen] == [0.75, 0.7]  # the rest is dominated, or too slow
    kept = Results(OBJECTIVES, parse_constraints(["accuracy >= 0.72", "latency_ms <= 8"]), _records(trials).records)
    assert [r.metrics["accuracy"] for r in choose_finalists(kept, 2, ["accuracy"])] == [0.75, 0.7]
    assert [r.metrics["accuracy"] for r in choose_finalists(kept, 1, ["accuracy"])] == [0.75]

    def measure(records):
        return [Latency(r.metrics["latency_ms"], None, None, "measured") for r in records]

    assert choose_measured(bounded, 2, measure) == []
    found = choose_measured(bounded, 2, measure, provisional=["accuracy"])
    assert {record.metrics["accuracy"] for record in found} == {0.75, 0.7}


def test_the_final_front_says_why_the_others_are_not_on_it():
    fast, good = _member("fast", 0.6, 1.0), _member("good", 0.9, 3.0)
    dominated, slow = _member("dominated", 0.5, 1.5), _member("slow", 0.95, 9.0)
    constraints = parse_constraints(["latency_ms <= 5", "accuracy >= 0.55"])
    members, others, knee = final_front([fast, dominated, slow, good], OBJECTIVES, constraints)
    assert members == (good, fast) and knee in ("good", "fast")
    assert {other.id: other.reason for other in others} == {
        "dominated": "violates accuracy >= 0.55",
        "slow": "violates latency_ms <= 5",
    }
    _, others, _ = final_front([fast, dominated, slow, good], OBJECTIVES, ())
    assert {other.id: other.reason for other in others} == {"dominated": "dominated"}
    assert final_front([], OBJECTIVES, ()) == ((), (), None)
    # one that the runtime does not compute right has no latency, and a reason
    wrong = Member(id="wrong", trial=0, architecture={}, metrics={"accuracy": 0.99}, reason="does not compute")
    members, others, _ = final_front([wrong, fast], OBJECTIVES, ())
    assert members == (fast,) and others == (wrong,)


class _Elsewhere:
    here = False

    def predict(self, architecture, io):
        return Latency(1.0, 0.9, 1.1, "predicted")


class _Network:
    architecture = io = None


def test_another_device_is_predicted_to_the_end():
    latency, reason = measure_finalists([_Network(), "it diverged"], _Elsewhere(), 7, None, None)
    assert latency.kind == "predicted" and reason == "it diverged"


SPACE = SearchSpace.from_dict(
    {"stem": "conv", "stages": [{"width": [4, 8], "block": {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}}]}
)


class _Finishing:
    """An evaluator of which one network diverges, and another has weights that are no numbers."""

    finishing = "fine-tune"
    device = "cpu"

    def __init__(self, task, diverging, spoilt):
        self.task, self.diverging, self.spoilt, self.asked = task, diverging, spoilt, []

    def finish(self, architecture, report, should_stop):
        self.asked.append(architecture.id)
        if architecture.id == self.diverging:
            raise DivergedError("the training loss is nan at step 3. Lower lr or clip.", step=3)
        network = Network(architecture, self.task.io, generator=torch.Generator().manual_seed(0))
        if architecture.id == self.spoilt:
            with torch.no_grad():
                next(network.parameters()).fill_(float("nan"))
        return network.eval()


def test_a_finalist_that_diverges_is_named_and_the_rest_is_finished(tmp_path):
    task = by_name("digits")
    architectures = list(dict.fromkeys(SPACE.sample(np.random.default_rng(seed)) for seed in range(20)))[:3]
    records = [
        TrialRecord(i, "done", a.id, a.to_json(), {"accuracy": 0.5, "latency_ms": 1.0})
        for i, a in enumerate(architectures)
    ]
    diverging, good, spoilt = (record.id for record in records)
    evaluator = _Finishing(task, diverging, spoilt)

    def finish(recipe="first"):
        networks = FinalNetworks(tmp_path, task, "digits", recipe)
        return networks, networks.finish(records, evaluator, SILENT, lambda: False)

    networks, finished = finish()
    assert evaluator.asked == [diverging, good, spoilt]
    assert "training loss is nan at step 3" in finished[0] and "validation loss is nan" in finished[2]
    latencies = measure_finalists(finished, _Elsewhere(), 7, None, None)
    members = [networks.member(r, latency, None) for r, latency in zip(records, latencies, strict=True)]
    front, others, best = final_front(members, OBJECTIVES, ())
    assert [m.id for m in front] == [good] == [best]
    assert {m.id: m.reason for m in others} == {diverging: finished[0], spoilt: finished[2]}
    assert 0 < front[0].metrics["accuracy_se"] < 0.1 and 0 < front[0].metrics["test_accuracy_se"] < 0.1
    # a resume repeats neither what was finished nor what failed, until it is to be finished otherwise
    _, again = finish()
    assert evaluator.asked == [diverging, good, spoilt] and again[0] == finished[0] and again[2] == finished[2]
    evaluator.diverging = ""
    _, other = finish("second")
    assert evaluator.asked[3:] == [diverging, good, spoilt] and not isinstance(other[0], str)
    assert isinstance(finish("second")[1][0], Network) and len(evaluator.asked) == 6


def test_how_far_the_search_agreed_with_the_final_weights_is_said():
    def members(pairs):
        return [replace(_member(str(i), after, 1.0), searched={"accuracy": before}) for i, (before, after) in pairs]

    good = agreement(members(enumerate([(0.1 * i, 0.5 + 0.05 * i) for i in range(1, 9)])), "accuracy")
    assert good.startswith("accuracy of the candidates: 0.1 to 0.8 in the search, 0.55 to 0.9 with their final weights")
    assert good.endswith("Kendall's tau between the two orders 1.00")
    chance = agreement(members(enumerate([(0.3, 0.9), (0.46, 0.8), (0.31, 0.7), (0.4, 0.95), (0.35, 0.6)])), "accuracy")
    assert "as by chance: train the super-network for longer (supernet.seconds)" in chance
    assert agreement(members(enumerate([(0.1, 0.2)] * 4)), "accuracy") == ""
    alike = agreement(members(enumerate([(0.1 * i, 1.0) for i in range(5)])), "accuracy")
    assert alike.endswith("1 to 1 with their final weights; with their final weights all alike: no order to tell")
    alike = agreement(members(enumerate([(0.5, 0.1 * i) for i in range(5)])), "accuracy")
    assert alike.endswith("; in the search all alike: no order to tell") and "nan" not in alike


def _flattered(bound: str, count: int = 30):
    """Trials whose predicted latency is short by a tenth, and by a third where it looks best; and a measurement."""
    constraints = parse_constraints([bound])
    records, truth = [], {}
    for i in range(count):
        predicted = 0.5 + 0.1 * i
        metrics = {"accuracy": 0.5 + 0.01 * i, "latency_ms": predicted}
        records.append(TrialRecord(i, "done", f"{i:012d}", "{}", metrics))
        truth[records[-1].id] = predicted * (1.5 if i % 3 == 0 else 1.1)
    asked = []

    def measure(some):
        asked.extend(record.id for record in some)
        return [Latency(truth[r.id], 0.98 * truth[r.id], 1.02 * truth[r.id], "measured") for r in some]

    return Results(OBJECTIVES, constraints, records), measure, truth, asked


def test_a_bound_on_latency_is_kept_by_what_was_measured():
    results, measure, truth, asked = _flattered("latency_ms <= 2")
    by_prediction = choose_finalists(results, 6)
    assert any(truth[record.id] > 2 for record in by_prediction)
    chosen = choose_measured(results, 6, measure)
    assert len(chosen) == 6 and all(1.02 * truth[record.id] <= 2 for record in chosen)
    assert len(set(asked)) == len(asked) < 30 and {record.id for record in chosen} <= set(asked)
    # the most accurate that keeps it is among them
    best = max((r for r in results.records if 1.02 * truth[r.id] <= 2), key=lambda r: r.metrics["accuracy"])
    assert best.id in {record.id for record in chosen}


def test_where_nothing_keeps_a_bound_the_nearest_are_chosen():
    results, measure, truth, _ = _flattered("latency_ms <= 0.5")
    chosen = choose_measured(results, 3, measure)
    assert sorted(truth[record.id] for record in chosen) == sorted(truth.values())[:3]


def test_what_cannot_be_measured_is_not_chosen():
    results, measure, _, _ = _flattered("latency_ms <= 2")

    def partly(some):
        return ["no such runtime" if int(r.id) % 2 else one for r, one in zip(some, measure(some), strict=True)]

    chosen = choose_measured(results, 4, partly)
    assert len(chosen) == 4 and all(int(record.id) % 2 == 0 for record in chosen)


def test_what_comes_nearest_is_said():
    constraints = parse_constraints(["latency_ms <= 0.9"])
    members = [_member("slow", 0.9, 2.0), _member("nearest", 0.8, 1.18)]
    assert nearest_to(members, constraints) == "; nearest is nearest with latency_ms 1.18"
    assert nearest_to([], constraints) == ""
