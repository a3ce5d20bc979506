"""The schemas of `nas schema`: of every verb's JSON (`command.nas` compares each answer), and of a configuration."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from mixnas.cli.schema import ANSWERS
from mixnas.search.config import Config
from mixnas.search_space.files import load_yaml
from mixnas.search_space.schema import attribute_texts, schema_of

from .command import nas, ok
from .test_main import WORDS

ROOT = Path(__file__).parents[2]
SILENT = {"completion", "schema", "space check"}
"""Verbs that do not answer as JSON."""

Validator = jsonschema.Draft202012Validator


def test_every_verb_s_answer_has_one():
    assert {" ".join(words) for words in WORDS} - SILENT == set(ANSWERS)
    listed = ok("schema").splitlines()
    assert listed == ["config", *ANSWERS]
    for name in listed:
        schema = json.loads(ok("schema", *name.split()))
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        Validator.check_schema(schema)
    wrong = nas("schema", "latency", "qeury")
    assert wrong.returncode == 2 and "Did you mean 'latency query'?" in wrong.stderr


def test_answers_are_what_they_say(searched: Path):
    """Each compared by `command.nas`."""
    runs = ("--runs", searched / "runs", "--json")
    first = json.loads(ok("front", "first", *runs))["front"][0]["id"]
    for words in (["status"], ["status", "first"], ["explain", "first", first], ["diff", "first", "first"]):
        ok(*words, *runs)
    for words in (["report", "first"], ["export", "first", "--no-verify"]):
        ok(*words, "-o", searched / f"of-{words[0]}", *runs)
    config = searched / "config.yaml"
    for words in (["show", config], ["size", config], ["sample", config, "-n", 2], ["scale", config, "--macs", "2x"]):
        ok("space", *words, "--json")
    for words in (["ops"], ["doctor"], ["latency", "devices"]):
        ok(*words, "--json")


def test_an_answer_of_another_kind_is_noticed(searched: Path):
    front = json.loads(ok("front", "first", "--runs", searched / "runs", "--json"))
    for change in ({"more": 1}, {"knee": 3}, {"front": [{"id": "x"}]}):
        assert not Validator(ANSWERS["front"]).is_valid({**front, **change})


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("examples/*.yaml")]), ids=lambda p: p.name
)
def test_every_configuration_keeps_to_the_schema(path: Path):
    Validator(json.loads(ok("schema", "config"))).validate(load_yaml(path))


def test_a_resolved_configuration_keeps_to_it_and_a_wrong_one_does_not():
    schema = Validator(json.loads(ok("schema", "config")))
    schema.validate(Config().to_plain())
    for wrong in (
        {"serach": {}},
        {"search": {"trials": 0}},
        {"search": {"strategy": "nsga"}},
        {"search": {"strategy": {"name": "nsga2", "population": 3}}},
        {"search": {"time": "soon"}},
        {"objectives": {"accuracy": "most"}},
        {"final": {"weights": "others"}},
        {"task": {"seed": 1}},
    ):
        assert not schema.is_valid(wrong), wrong
    for right in (
        {"search": {"strategy": {"name": "nsga2", "population_size": 30}, "time": "1h30m"}},
        {"task": {"name": "digits", "seed": 1}},
        {"latency": {"profile": 12.5}},
    ):
        schema.validate(right)


def test_texts_and_defaults_are_the_dataclass_s():
    trials = schema_of(Config)["properties"]["search"]["properties"]["trials"]
    assert trials == {
        "description": "Evaluations, done or failed.",
        "type": "integer",
        "minimum": 1,
        "maximum": 10_000_000,
        "default": 120,
    }
    supernet = schema_of(Config)["properties"]["supernet"]["properties"]
    assert "AdamW" in attribute_texts(type(Config().supernet))["betas"]  # of the class that it stands on
    assert supernet["seconds"]["anyOf"] == [{"type": "number"}, {"type": "null"}]
