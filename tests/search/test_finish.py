"""Choosing finalists, and the front that they make."""

from __future__ import annotations

from mixnas.predictors.measuring.value import Latency
from mixnas.search.finish import choose_finalists, final_front, measure_finalists
from mixnas.search.run.front import Member
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.results import Results, TrialRecord

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
    (latency,) = measure_finalists([_Network()], _Elsewhere(), 7, None, None)
    assert latency.kind == "predicted"
