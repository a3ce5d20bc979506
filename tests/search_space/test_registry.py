from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixnas.search_space import operators, registry
from mixnas.search_space.errors import ConfigError, NasError
from mixnas.search_space.registry import Knob, register


def test_first_set_is_registered():
    assert {"identity", "pooling", "dwconv", "inception_dwconv", "attention", "linear_attention"} <= set(
        registry.names("mixer")
    )
    assert {"none", "se", "output_sigmoid"} <= set(registry.names("gate"))
    assert {"mlp", "swiglu", "inverted_residual"} <= set(registry.names("channel_mixer"))
    assert {"fp32", "bf16"} <= set(registry.names("quant"))


def test_every_operator_names_its_paper_and_describes_its_class():
    for axis in registry.AXES:
        for name in registry.names(axis):
            operator = registry.get(axis, name)
            assert operator.paper and operator.build.__doc__, f"{axis} {name}"


def written_in_files() -> set[tuple[str, str]]:
    """Axis and name of every operator that a file below `operators/` registers, as its text says."""
    found = set()
    for path in Path(operators.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "register":
                axis, name = (ast.literal_eval(argument) for argument in node.args)
                found.add((axis, name))
    return found


def test_what_is_listed_is_what_the_files_register():
    code = (
        "import json; from mixnas.search_space import registry as r; print(json.dumps({a: r.names(a) for a in r.AXES}))"
    )
    # In a process of its own: other tests register operators in this one.
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    listed = json.loads(answer.stdout)
    wanted = written_in_files()
    assert len(wanted) > 25
    assert listed == {axis: sorted(name for a, name in wanted if a == axis) for axis in registry.AXES}


def test_names_are_those_of_one_axis_that_match_a_pattern(monkeypatch: pytest.MonkeyPatch):
    registry.load()
    monkeypatch.setattr(registry, "_operators", {})
    for axis, name in (("mixer", "attention"), ("mixer", "slot_attention"), ("mixer", "attend"), ("gate", "attention")):
        register(axis, name, paper="-")(type("Made", (), {}))
    assert registry.names("mixer") == ["attend", "attention", "slot_attention"]
    assert registry.names("mixer", "*attention") == ["attention", "slot_attention"]
    assert registry.names("gate", "*attention") == ["attention"]
    assert registry.names("mixer", "nothing*") == []


def test_an_unknown_name_says_what_is_near_and_what_there_is():
    with pytest.raises(ConfigError, match=r"no mixer is called 'dwconf'. Did you mean 'dwconv'\? Allowed: .*attention"):
        registry.get("mixer", "dwconf")
    with pytest.raises(ConfigError, match="It is a channel mixer"):
        registry.get("mixer", "swiglu")


def test_a_duplicate_and_a_bad_default_are_refused():
    with pytest.raises(NasError, match="registered twice"):

        @register("mixer", "identity", paper="-")
        class Again:
            """Taken."""

    with pytest.raises(NasError, match="default of size"):
        register("mixer", "other", paper="-", knobs={"size": Knob(4, low=5)})


@pytest.mark.parametrize(
    ("knob", "given", "expected"),
    [
        (Knob(3, choices=(3, 5)), 5.0, 5),
        (Knob(3, choices=(3, 5)), 4, None),
        (Knob(3, low=1, high=9, step=2), 2, None),
        (Knob(2.0, low=1, high=4), 3, 3.0),
        (Knob(2.0, low=1, high=4), True, None),
        (Knob(True), 1, None),
        (Knob(True), False, False),
        (Knob("a", choices=("a", "b")), "b", "b"),
        (Knob("a"), 1, None),
        (Knob(1), "1", None),
        (Knob(0.3, low=0.0, high=1.0, step=0.1), 0.3, 0.3),
        (Knob(0.3, low=0.0, high=1.0, step=0.1), 0.7, 0.7),
        (Knob(0.3, low=0.0, high=1.0, step=0.1), 0.35, None),
        (Knob(0.15, low=0.05, step=0.1), 0.25, 0.25),
        (Knob(1e-4, low=0.0, step=1e-4), 3e-4, 3e-4),
        (Knob(1, low=1, step=2), 10**30, None),
        (Knob(1.0), 10**400, None),
        (Knob(1.0), float("nan"), None),
        (Knob(1.0), float("-inf"), None),
    ],
)
def test_knob_normalises(knob, given, expected):
    value = knob.normalise(given)
    assert value == expected and type(value) is type(expected)
