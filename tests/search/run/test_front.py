"""`pareto.json`: written and read again, that of the first format too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mixnas.predictors.measuring.value import Latency
from mixnas.search.run.front import FORMAT, Front, Member
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.results import Results
from mixnas.search_space.errors import ConfigError, IntegrityError
from tests.search.run.fronts import front_of

OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min"})
V1 = Path(__file__).parents[2] / "data" / "v1"


MEMBER = Member(
    id="0123456789ab",
    trial=3,
    architecture={"stem": "conv"},
    metrics={"accuracy": 0.9, "test_accuracy": 0.8, "latency_ms": 2.0, "params": 100.0},
    latency=Latency(2.0, 1.9, 2.1, "measured"),
    predicted=Latency(2.2, 1.8, 2.6, "predicted", ("stem: width 64 is outside",)),
    searched={"accuracy": 0.7, "latency_ms": 2.2},
    seconds=0.25,
)


def final() -> Front:
    base = front_of(Results(OBJECTIVES))
    other = replace(MEMBER, id="ba9876543210", reason="dominated", predicted=None)
    return replace(
        base,
        objectives={"accuracy": "max", "latency_ms": "min"},
        constraints=("latency_ms <= 3",),
        latency="measured",
        hypervolume=0.5,
        reference=(0.1, 3.0),
        final=True,
        members=(MEMBER,),
        others=(other,),
        knee=MEMBER.id,
        searched_front=(MEMBER.id, other.id),
    )


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "pareto.json"
    for front in (front_of(Results(OBJECTIVES)), final()):
        front.write(path)
        assert Front.read(path) == front
        assert json.loads(path.read_text())["format"] == FORMAT


def test_a_filter_may_name_the_ends_of_the_interval():
    assert MEMBER.values == {**MEMBER.metrics, "latency_low_ms": 1.9, "latency_high_ms": 2.1}
    assert replace(MEMBER, latency=None).values == MEMBER.metrics


@pytest.mark.parametrize("name", ["finished", "standalone"])
def test_the_first_format_is_read(name, tmp_path):
    plain = json.loads((V1 / name / "pareto.json").read_text())
    front = Front.read(V1 / name / "pareto.json")
    assert (front.final, front.latency, front.device) == (True, "measured", "cpu-intel-xeon-6-167-1t")
    assert front.evaluator == plain["evaluator"] and front.knee == plain["knee"] and front.trials == plain["trials"]
    assert front.constraints == ("params <= 20000",) and front.searched_front == tuple(plain["searched_front"])
    assert [m.id for m in (*front.members, *front.others)] == [m["id"] for m in (*plain["front"], *plain["others"])]
    for member, was in zip(front.members, plain["front"], strict=True):
        assert member.values == was["metrics"] and member.searched == was["searched"]
        assert member.latency.ms == was["metrics"]["latency_ms"] and member.latency.kind == "measured"
        if name == "finished":
            predicted = member.predicted
            assert (predicted.ms, predicted.low_ms) == (was["predicted"]["latency_ms"], was["predicted"]["low_ms"])
        else:
            assert member.predicted is None
    again = tmp_path / "pareto.json"
    front.write(again)
    assert Front.read(again) == front


def test_a_searched_front_of_the_first_format_is_read(tmp_path):
    """As a search that was killed left it: nothing of what comes after the search."""
    path = tmp_path / "pareto.json"
    plain = json.loads((V1 / "finished" / "pareto.json").read_text())
    for key in ("device", "latency", "evaluator", "searched_front", "others", "final"):
        del plain[key]
    member = {key: plain["front"][0][key] for key in ("id", "trial", "architecture")}
    plain["front"] = [{**member, "metrics": {"accuracy": 0.2, "latency_ms": 0.4}, "seconds": 0.01}]
    path.write_text(json.dumps(plain))
    front = Front.read(path)
    assert not front.final and front.members[0].latency is None and front.members[0].seconds == 0.01
    assert front.searched_front == (member["id"],)


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"format": 2}', '{"format": 2, "front": 3}', '{"front": []}'])
def test_damage_is_told(tmp_path, damage):
    path = tmp_path / "pareto.json"
    path.write_text(damage)
    with pytest.raises(IntegrityError, match=r"pareto\.json: damaged: not a front"):
        Front.read(path)


def test_a_later_format_is_refused(tmp_path):
    path = tmp_path / "pareto.json"
    path.write_text(json.dumps({**final().to_plain(), "format": FORMAT + 1}))
    with pytest.raises(ConfigError, match=f"has format {FORMAT + 1}; this version of mixnas reads up to {FORMAT}"):
        Front.read(path)
