from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixnas.evaluators.supernet.training import SupernetConfig
from mixnas.evaluators.training import TrainConfig
from mixnas.search.config import Config, SearchConfig, load_config
from mixnas.search.naming import Named
from mixnas.search.strategies.tpe import TPE
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.files import dump_yaml, parse_yaml
from mixnas.search_space.settings import Between, Seconds, apply_overrides, build, load, parse_duration, to_plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: Annotated[float, Between(0, 1)] = 0.5
    mode: Literal["fast", "slow"] = "fast"
    limit: Seconds | None = None

    def __post_init__(self):
        if self.mode == "slow" and self.limit is None:
            raise ConfigError("slow needs a limit.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    count: Annotated[int, Between(1)] = 3
    on: bool = False
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = field(default_factory=Inner)
    by_name: dict[str, Inner] = field(default_factory=dict)
    task: Named = field(default_factory=lambda: Named("digits"))
    threads: int | Literal["auto"] = "auto"
    anything: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    train: TrainConfig = field(default_factory=TrainConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)


def test_build():
    outer = build(
        Outer,
        parse_yaml(
            "{name: a, count: 1e2, on: true, sizes: [4], inner: {rate: 1, limit: 1h30m}, by_name: {x: {mode: fast}},"
            " task: {name: mqar, length: 64}, threads: 2, anything: [1, {b: 2}]}"
        ),
        "file.yaml",
    )
    assert outer == Outer(
        name="a",
        count=100,
        on=True,
        sizes=(4,),
        inner=Inner(rate=1.0, limit=5400.0),
        by_name={"x": Inner()},
        task=Named("mqar", {"length": 64}),
        threads=2,
        anything=[1, {"b": 2}],
    )
    assert type(outer.count) is int and type(outer.inner.rate) is float
    assert build(Outer, to_plain(outer), "again") == outer


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "file.yaml: name: is missing"),
        (
            "{name: a, cuont: 3}",
            "file.yaml: cuont: unknown key 'cuont'. Did you mean 'count'? Allowed: name, count, on",
        ),
        ("{name: a, inner: {moed: fast}}", "file.yaml: inner.moed: unknown key 'moed'. Did you mean 'mode'?"),
        (
            "{name: a, inner: {mode: fats}}",
            "inner.mode: 'fats' is not allowed. Did you mean 'fast'? Allowed: fast, slow",
        ),
        ("{name: a, inner: {mode: slow}}", "file.yaml: inner: slow needs a limit."),
        ("{name: a, by_name: {x: {rate: 2}}}", "by_name.x.rate: 2 is not allowed. Allowed: a number from 0 to 1."),
        ("{name: a, count: 0}", "count: 0 is not allowed. Allowed: a whole number from 1."),
        ("{name: a, count: 1.5}", "count: 1.5 is not allowed. Allowed: a whole number."),
        ("{name: a, count: true}", "count: true is not allowed"),
        ("{name: a, on: yes}", "on: 'yes' is not allowed. Allowed: true or false."),
        ("{name: a, sizes: 3}", "sizes: expected a list; got 3."),
        ("{name: a, sizes: [3, x]}", "sizes.1: 'x' is not allowed. Allowed: a whole number."),
        ("{name: a, inner: 3}", "inner: expected a mapping with rate, mode, limit; got 3."),
        ("{name: a, inner: {limit: 5 minutes}}", "inner.limit: '5 minutes' is not a duration. Allowed: 90s, 5m, 1h30m"),
        ("{name: a, inner: {rate: .nan}}", "inner.rate: nan is not allowed"),
        ("{name: a, threads: many}", "threads: 'many' is not allowed. Allowed: a whole number or auto."),
        ("{name: a, task: 3}", "task: expected a name or"),
        ("[1]", "file.yaml: expected a mapping"),
    ],
)
def test_what_does_not_fit_is_named(text, said):
    with pytest.raises(ConfigError) as error:
        load(Outer, parse_yaml(text), "file.yaml")
    assert said in str(error.value)


def test_bounds_are_said_in_full():
    assert str(Between(1, 4_294_967_295)) == " from 1 to 4294967295"
    assert str(Between(0.01)) == " from 0.01" and str(Between(None, 1234567.5)) == " to 1234567.5"


def test_durations():
    written = {"90s": 90, "5m": 300, "1h30m": 5400, "2d": 172800, "1.5h": 5400, 12: 12, "7": 7, 0.5: 0.5}
    assert {text: parse_duration(text) for text in written} == written
    for wrong in ("", "m", "5x", "m5", "-3s", 0, -1, True, None, [], float("nan"), float("inf"), "0s", "5m 3"):
        with pytest.raises(ConfigError, match="not a duration"):
            parse_duration(wrong)


def test_settings_of_the_command_line():
    plain = {"search": {"trials": 3}, "space": {"stages": [{"width": 8}, {"width": 16}]}}
    settings = ["search.trials=20", "space.stages.1.width=[16, 24]", "train.lr=1e-3", "objectives={accuracy: max}"]
    changed, overridden = apply_overrides(plain, settings)
    assert changed == {
        "search": {"trials": 20},
        "space": {"stages": [{"width": 8}, {"width": [16, 24]}]},
        "train": {"lr": 1e-3},
        "objectives": {"accuracy": "max"},
    }
    assert plain["search"]["trials"] == 3 and plain["space"]["stages"][1]["width"] == 16
    assert overridden["search.trials"] == "search.trials=20"
    for wrong in ("search.trials", "=3", "search..trials=3", "space.stages.2.width=3", "search.trials.x=3", "a=[1"):
        with pytest.raises(ConfigError, match=r"^--set "):
            apply_overrides(plain, [wrong])


@pytest.mark.parametrize("text", ["*.log", "*", "&a", "!cats", "%d", "@home", "`x`", "#1", "*it's", "!!str 5"])
def test_a_setting_that_begins_with_a_mark_of_yaml_is_text(text):
    changed, _ = apply_overrides({}, [f"task.pattern={text}"])
    assert changed == {"task": {"pattern": text}} and parse_yaml(dump_yaml(changed)) == changed
    assert apply_overrides({}, ["a='*.log'"])[0] == {"a": "*.log"}
    with pytest.raises(ConfigError, match="not valid YAML"):
        apply_overrides({}, ["a=[*.log]"])


def test_a_class_that_names_itself_is_named_once():
    for text, said in (
        ("supernet: {samples: -1}", "c.yaml: supernet: samples is -1"),
        ("supernet: {steps: 0}", "c.yaml: supernet: steps is 0"),
        ("train: {steps: 0}", "c.yaml: train: steps is 0"),
    ):
        with pytest.raises(ConfigError) as error:
            load(Trained, parse_yaml(text), "c.yaml")
        assert str(error.value).startswith(said)


def test_a_wrong_setting_is_named_as_one():
    with pytest.raises(ConfigError, match=r"^--set inner.rate=2: inner.rate: 2 is not allowed"):
        load(Outer, {"name": "a"}, "file.yaml", settings=["inner.rate=2"])
    with pytest.raises(ConfigError, match=r"^file.yaml: inner.rate: 2 is not allowed"):
        load(Outer, {"name": "a", "inner": {"rate": 2}}, "file.yaml", settings=["count=2"])


WHOLE = st.integers(-(2**63) + 1, 2**63 - 1)  # what a file may hold


@given(
    st.builds(
        Outer,
        name=st.text(),
        count=st.integers(1, 10**12),
        on=st.booleans(),
        sizes=st.lists(WHOLE).map(tuple),
        inner=st.builds(Inner, rate=st.floats(0, 1), limit=st.floats(1e-3, 1e6)),
        task=st.builds(Named, st.text(), st.dictionaries(st.sampled_from(["a", "b"]), WHOLE | st.booleans())),
        threads=st.just("auto") | WHOLE,
    )
)
def test_plain_data_and_yaml_and_back(outer):
    from mixnas.search_space.files import dump_yaml

    assert build(Outer, parse_yaml(dump_yaml(to_plain(outer))), "text") == outer


def test_the_configuration_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("task: {name: mqar, length: 64}\nsearch: {time: 5m, trials: 1e1}\nconstraints: ['params <= 2e5']\n")
    config = load_config(path, settings=["search.seed=7", "search.strategy=tpe"])
    assert config.search == SearchConfig(time=300.0, trials=10, seed=7, strategy=TPE())
    assert [str(c) for c in config.parsed_constraints()] == ["params <= 200000"]
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    path.write_text("constraints: ['params <= lots']\n")
    with pytest.raises(ConfigError, match=r"c\.yaml: constraints\[0\]: 'params <= lots': expected a number"):
        load_config(path)
    path.write_text("")
    assert load_config(path) == Config()
