"""Which networks are taken away, by one rule at a time."""

from __future__ import annotations

import pytest

from mixnas.search.picking import Choice
from mixnas.search.run.front import Front, Member
from mixnas.search_space.errors import ConfigError, NasError


def member(identity: str, accuracy: float, latency_ms: float, params: float, error: float | None = 0.02) -> Member:
    metrics = {"accuracy": accuracy, "latency_ms": latency_ms, "params": params}
    if error is not None:
        metrics["accuracy_se"] = error
    return Member(id=identity, trial=0, architecture={}, metrics=metrics)


BEST, NEAR, KNEE, SMALL = (
    member("aa1", 0.90, 3.0, 900),
    member("ab2", 0.885, 2.0, 950),
    member("bc3", 0.80, 1.0, 500),
    member("cd4", 0.30, 0.9, 100),
)
OFF = member("de5", 0.95, 9.0, 9e9)


def front(*members: Member, final: bool = True) -> Front:
    return Front(
        run="r", task="digits", metric="accuracy", objectives={"accuracy": "max", "latency_ms": "min", "params": "min"},
        constraints=("latency_ms <= 4",), evaluator="supernet", device="d", latency="measured", trials={},
        hypervolume=None, reference=None, final=final, members=members, others=(OFF,),
        knee="bc3" if members else None, searched_front=(),
    )  # fmt: skip


FRONT = front(BEST, NEAR, KNEE, SMALL)


@pytest.mark.parametrize(("choice", "ids"), [
    (Choice(), ["ab2"]),  # within one standard error of the best, the fastest
    (Choice(one_se=True), ["ab2"]),
    (Choice(knee=True), ["bc3"]),
    (Choice(pick="b"), ["bc3"]),
    (Choice(pick="de"), ["de5"]),
    (Choice(where="latency_ms < 2.5 and params > 200"), ["ab2", "bc3"]),
    (Choice(everything=True), ["aa1", "ab2", "bc3", "cd4"]),
    (Choice(weights={"accuracy": 1}), ["aa1"]),
    (Choice(weights={"params": 1}), ["cd4"]),
    (Choice(weights={"latency_ms": 1, "accuracy": 1}), ["bc3"]),
])  # fmt: skip
def test_each_rule_chooses(choice, ids):
    assert [m.id for m in choice.of(FRONT)] == ids


def test_without_a_standard_error_the_best_is_taken_and_one_se_is_refused():
    unsure = front(*(member(m.id, m.metrics["accuracy"], 1.0, 1.0, None) for m in (BEST, NEAR)))
    assert [m.id for m in Choice().of(unsure)] == ["aa1"]
    with pytest.raises(ConfigError, match="does not know the standard error of accuracy"):
        Choice(one_se=True).of(unsure)


@pytest.mark.parametrize(("choice", "says"), [
    (Choice(pick="zz"), "'zz' is none of the final networks"),
    (Choice(pick="a"), "'a' stands for several networks"),
    (Choice(where="params < 1"), "no network of the front satisfies 'params < 1'"),
    (Choice(where="parms < 1"), "Did you mean 'params'"),
    (Choice(weights={"acuracy": 1}), "'acuracy' is no objective. Did you mean 'accuracy'"),
    (Choice(weights={"accuracy": -1}), "expected a number above 0"),
])  # fmt: skip
def test_what_chooses_nothing_is_refused(choice, says):
    with pytest.raises(ConfigError, match=says):
        choice.of(FRONT)


def test_one_rule_at_a_time_of_a_final_front():
    with pytest.raises(ConfigError, match="pick and knee: networks are chosen in one way"):
        Choice(pick="a", knee=True)
    with pytest.raises(NasError, match="nas resume r"):
        Choice().of(front(BEST, final=False))
    with pytest.raises(NasError, match=r"no network is on the front, under the constraints latency_ms <= 4.*de5"):
        Choice().of(front())
