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
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError
from tests.search.run.fronts import front_of

OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min"})
V1 = Path(__file__).parents[2] / "data" / "v1"


def architecture(width: int) -> Architecture:
    block = {"mixer": "identity", "channel_mixer": "none"}
    return Architecture.from_dict({"stem": "conv", "stages": [{"width": width, "blocks": [block]}]})


MEMBER = Member(
    id=architecture(8).id,
    trial=3,
    architecture=architecture(8).to_dict(),
    metrics={"accuracy": 0.9, "test_accuracy": 0.8, "latency_ms": 2.0, "params": 100.0},
    latency=Latency(2.0, 1.9, 2.1, "measured"),
    predicted=Latency(2.2, 1.8, 2.6, "predicted", ("stem: width 64 is outside",)),
    searched={"accuracy": 0.7, "latency_ms": 2.2},
    seconds=0.25,
)


def final() -> Front:
    base = front_of(Results(OBJECTIVES))
    second = architecture(16)
    other = replace(MEMBER, id=second.id, architecture=second.to_dict(), reason="dominated", predicted=None)
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


def _set(plain, value, *keys):
    for key in keys[:-1]:
        plain = plain[key]
    plain[keys[-1]] = value


NONSENSE = {
    "an id that leads out": (("front", 0, "id"), "../../../victim/proj"),
    "an id that is another's": (("front", 0, "id"), architecture(16).id),
    "an absolute id": (("front", 0, "id"), "/etc/cron.d/x"),
    "an id that is no text": (("front", 0, "id"), 7),
    "a searched id": (("searched_front", 0), "../x"),
    "another network": (("front", 0, "architecture", "stages", 0, "width"), 9),
    "a NaN": (("front", 0, "metrics", "accuracy"), float("nan")),
    "a metric in words": (("front", 0, "metrics", "accuracy"), "high"),
    "a negative latency": (("front", 0, "latency", "ms"), -1.0),
    "a negative time": (("front", 0, "seconds"), -0.5),
    "a time in words": (("front", 0, "latency", "low_ms"), "0.1"),
    "no latency": (("front", 0, "latency"), {}),
    "a knee": (("knee",), "ffffffffffff"),
    "a direction": (("objectives", "accuracy"), "up"),
    "no members": (("front",), [{}]),
    "a deep architecture": (("front", 0, "architecture", "stages"), json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_what_a_stranger_may_have_written_is_one_sentence(tmp_path, name):
    path = tmp_path / "pareto.json"
    keys, value = NONSENSE[name]
    plain = json.loads(json.dumps(final().to_plain()))
    _set(plain, value, *keys)
    path.write_text(json.dumps(plain))
    with pytest.raises(IntegrityError, match=r"pareto\.json: damaged: not a front") as refused:
        Front.read(path)
    assert len(str(refused.value).removeprefix(str(tmp_path))) <= 300 and str(refused.value).isprintable()


def test_a_later_format_is_refused(tmp_path):
    path = tmp_path / "pareto.json"
    path.write_text(json.dumps({**final().to_plain(), "format": FORMAT + 1}))
    with pytest.raises(ConfigError, match=f"has format {FORMAT + 1}; this version of mixnas reads up to {FORMAT}"):
        Front.read(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plain: plain["front"][0]["metrics"].pop("latency_ms"), "has no 'latency_ms'"),
        (lambda plain: plain.update(metric="recall"), "has no 'recall'"),
        (lambda plain: plain.update(task=["digits"]), "the task is"),
        (lambda plain: plain["front"][0]["architecture"]["stages"][0].update(width=10**12), "not a front"),
        (
            lambda plain: plain["front"][0]["architecture"]["stages"][0]["blocks"][0].update(recursion=10**9),
            "not a front",
        ),
        (lambda plain: plain["front"][0]["architecture"]["stages"][0].update(blocks=[]), "not a front"),
    ],
)
def test_what_a_stranger_may_write_is_refused(change, says):
    """Counting a block that runs a thousand million times took for ever."""
    plain = final().to_plain()
    plain = json.loads(json.dumps(plain))
    change(plain)
    with pytest.raises(IntegrityError, match=says):
        Front.parse(json.dumps(plain), "pareto.json")
