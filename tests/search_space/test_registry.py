from __future__ import annotations

import pytest

from mixnas.search_space import registry
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


def test_names_match_a_pattern():
    assert registry.names("mixer", "*attention") >= ["attention"]
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
    ],
)
def test_knob_normalises(knob, given, expected):
    value = knob.normalise(given)
    assert value == expected and type(value) is type(expected)
