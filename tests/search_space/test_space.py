from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import INACTIVE, SearchSpace

from .spaces import everything, small

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
SMALL = SearchSpace.from_dict(small())
spaces = st.deferred(lambda: st.sampled_from([SMALL, everything("image"), everything("causal")]))  # seconds to make


def list_all(space: SearchSpace) -> set[str]:
    """Every architecture, by brute force over all vectors."""
    vectors = itertools.product(*(range(len(v.values)) for v in space.variables))
    return {space.decode(v).id for v in vectors}


@given(spaces, seeds)
def test_decode_inverts_encode(space, rng):
    architecture = space.sample(rng)
    vector = space.encode(architecture)
    assert space.decode(vector) == architecture
    assert ((vector >= 0) == space.active(vector)).all()
    assert space.from_params(space.params_of(architecture)) == architecture


@given(spaces, seeds)
def test_canonical_form_is_idempotent_and_text_is_the_identity(space, rng):
    architecture = space.sample(rng)
    again = Architecture.from_dict(architecture.to_dict())
    assert again == architecture and again.id == architecture.id and again.to_dict() == architecture.to_dict()
    assert Architecture.from_yaml(architecture.to_yaml()) == architecture
    assert Architecture.from_yaml(architecture.to_yaml()).to_yaml() == architecture.to_yaml()
    assert Architecture.from_json(architecture.to_json()) == architecture


@given(spaces, seeds)
def test_mutation_and_crossover_stay_inside(space, rng):
    a, b = space.sample(rng), space.sample(rng)
    mutant, child = space.mutate(a, rng), space.crossover(a, b, rng)
    assert space.contains(mutant) and space.contains(child) and mutant != a
    va, vb, vc = space.encode(a), space.encode(b), space.encode(child)
    free = (vc >= 0) & (va < 0) & (vb < 0)  # choices that neither parent had
    assert ((vc == va) | (vc == vb) | free).all()


@settings(max_examples=20)
@given(spaces, seeds)
def test_neighbours_differ_by_one_choice(space, rng):
    architecture = space.sample(rng)
    vector = space.encode(architecture)
    seen = set()
    for neighbour in space.neighbours(architecture):
        other = space.encode(neighbour)
        both = (vector >= 0) & (other >= 0)
        assert (vector[both] != other[both]).sum() == 1
        seen.add(neighbour.id)
    assert len(seen) == (np.array([len(v.values) for v in space.variables])[vector >= 0] - 1).sum()


def test_an_added_block_repeats_the_last():
    space = SMALL
    shallow = next(a for a in map(space.sample, map(np.random.default_rng, range(99))) if len(a.stages[0].blocks) == 1)
    deeper = [n for n in space.neighbours(shallow) if len(n.stages[0].blocks) == 2]
    assert [n.stages[0].blocks for n in deeper] == [shallow.stages[0].blocks * 2]


def test_size_is_the_number_of_distinct_architectures():
    assert SMALL.size() == len(list_all(SMALL)) == 2 * 2 * (18 + 18**2)
    shared = small()
    shared["stages"][0]["share"] = True
    assert SearchSpace.from_dict(shared).size() == len(list_all(SearchSpace.from_dict(shared))) == 2 * 2 * 2 * 18


def test_every_architecture_is_listed_once():
    shared = small()
    shared["stages"][0]["share"] = True
    block = {"mixer": "pooling", "channel_mixer": "mlp"}
    one = {"stem": "conv", "stages": [{"width": 4, "block": block}]}
    spaces = [
        SMALL,
        *map(SearchSpace.from_dict, (shared, one)),
        by_branch(["none", "mlp", "swiglu"]),
        by_branch("none"),
    ]
    for space in spaces:
        rows = space.every()
        assert (space.active(rows) == (rows >= 0)).all()
        listed = [space.decode(row).id for row in rows]
        assert len(listed) == space.size() and set(listed) == list_all(space)


def test_size_is_exact_where_floats_are_not():
    plain = small()
    plain["stages"][0]["depth"] = 30
    assert SearchSpace.from_dict(plain).size() == 2 * 2 * 18**30 > 10**37


def test_vectors_in_bulk_agree_with_one_by_one():
    space = everything("image")
    matrix = space.sample_many(2000, np.random.default_rng(0))
    assert (space.encode_many(space.decode_many(matrix[:200])) == matrix[:200]).all()
    assert (matrix[~space.active(matrix)] == INACTIVE).all() and (matrix >= 0).any(axis=0).all()


def test_ask_asks_for_active_knobs_only():
    space, rng = SMALL, np.random.default_rng(1)
    asked: dict[str, object] = {}

    def suggest(name, choices):
        assert name not in asked and len(choices) > 1
        asked[name] = choices[rng.integers(len(choices))]
        return asked[name]

    for _ in range(50):
        asked.clear()
        architecture = space.ask(SimpleNamespace(suggest_categorical=suggest))
        assert space.params_of(architecture) == asked


def test_inactive_knobs_do_not_exist():
    names = [variable.name for variable in SMALL.variables]
    assert "stages.0.blocks.1.mixer.dwconv.kernel_size" in names
    architecture = SMALL.from_params(
        {
            "norm": "rms", "stages.0.width": 4, "stages.0.depth": 1, "stages.0.blocks.0.mixer": "identity",
            "stages.0.blocks.0.mixer.dwconv.kernel_size": 5, "stages.0.blocks.0.gate": "none",
            "stages.0.blocks.0.channel_mixer.mlp.expansion": 2.0,
        }
    )  # fmt: skip
    assert "kernel_size" not in str(architecture.to_dict()["stages"])


def test_two_files_that_mean_the_same_network_have_one_id():
    brief = {"stem": "conv", "stages": [{"width": 8, "depth": 2, "block": {"mixer": "dwconv", "channel_mixer": "mlp"}}]}
    block = {"mixer": {"name": "dwconv", "kernel_size": 7.0}, "channel_mixer": {"name": "mlp", "expansion": 4}}
    spelled = {"stages": [{"blocks": [block, block], "width": 8}], "norm": "layer", "stem": {"name": "conv"}}
    assert Architecture.from_dict(brief).id == Architecture.from_dict(spelled).id
    # An id is written into runs: it may never change for the same network.
    assert Architecture.from_dict(brief).id == "66e67a5d0589"


def edit(**changes):
    def apply():
        plain = small()
        target = plain["stages"][0]
        for key, value in changes.items():
            if key in ("mixer", "gate", "channel_mixer", "quant", "recursion"):
                target["block"][key] = value
            else:
                target[key] = value
        return plain

    return apply


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (edit(wdth=3), r"space\.stages\[0\]: unknown key 'wdth'. Did you mean 'width'\? Allowed: width, depth"),
        (edit(width=[4, 4]), r"stages\[0\].width: 4 stands twice"),
        (edit(width=0), "a whole number from 1"),
        (edit(width=[]), "list of choices is empty"),
        (edit(depth=True), "a whole number from 1"),
        (edit(share="yes"), "true or false"),
        (edit(blocks=[]), "either 'block'"),
        (edit(mixer="dwconf"), r"block\.mixer: no mixer is called 'dwconf'. Did you mean 'dwconv'"),
        (edit(mixer={"name": "dwconv", "kernel": 3}), r"has no knob 'kernel'. Did you mean 'kernel_size'\?"),
        (edit(mixer={"name": "dwconv", "kernel_size": 4}), r"kernel_size: 4 is not allowed. Allowed: one of 3, 5"),
        (edit(mixer=[{"name": "dwconv", "kernel_size": [3, 5]}, "dwconv", {"name": "dwconv", "kernel_size": 5}]),
         "stands twice with knobs in common"),
        (edit(mixer=[7]), "expected a name or"),
        (edit(channel_mixer={"name": "mlp", "expansion": [2, 2.0]}), "2.0 stands twice"),
    ],
)  # fmt: skip
def test_what_is_refused(make, says):
    with pytest.raises(ConfigError, match=says):
        SearchSpace.from_dict(make())


def test_one_operator_twice_with_disjoint_knobs():
    entries = [{"name": "dwconv", "kernel_size": 3}, {"name": "dwconv", "kernel_size": [5, 7]}]
    space = SearchSpace.from_dict(edit(mixer=entries)())
    assert space.size() == len(list_all(space))
    for seed in range(20):
        architecture = space.sample(np.random.default_rng(seed))
        assert space.decode(space.encode(architecture)) == architecture


def test_an_open_choice_is_not_an_architecture():
    with pytest.raises(ConfigError, match=r"not one architecture: norm \['layer', 'rms'\]"):
        Architecture.from_dict(small())


def test_a_foreign_architecture_is_refused_by_place():
    plain = small() | {"norm": "layer"}
    plain["stages"] = [{"width": 12, "block": {"mixer": "identity", "channel_mixer": {"name": "mlp", "expansion": 1}}}]
    with pytest.raises(ConfigError, match=r"stages\.0\.width is 12. Allowed: 4, 8"):
        SMALL.encode(Architecture.from_dict(plain))


def test_spelled_out_blocks_may_differ():
    block = small()["stages"][0]["block"]
    blocks = [block, block | {"mixer": "identity"}]
    space = SearchSpace.from_dict({"stem": "conv", "stages": [{"width": 8, "blocks": blocks}]})
    assert space.size() == 18 * 6 == len(list_all(space))


def by_branch(channel_mixer):
    quant = {"mixer": ["fp32", "bf16"], "channel_mixer": ["bf16", "fp32"]}
    block = {"mixer": ["identity", "dwconv"], "channel_mixer": channel_mixer, "quant": quant}
    return SearchSpace.from_dict({"stem": "conv", "stages": [{"width": 8, "depth": [1, 2], "block": block}]})


@pytest.mark.parametrize(
    ("channel_mixer", "blocks"),
    [("mlp", 2 * 2 * 2), ("none", 2 * 2), (["none", "mlp"], 2 * 2 * (1 + 2)), (["none", "mlp", "swiglu"], 2 * 2 * 5)],
)
def test_a_branch_that_is_not_there_has_no_policy_to_choose(channel_mixer, blocks):
    space = by_branch(channel_mixer)
    assert space.size() == len(list_all(space)) == blocks + blocks**2
    for seed in range(10):
        architecture = space.sample(np.random.default_rng(seed))
        assert space.decode(space.encode(architecture)) == architecture
        assert Architecture.from_dict(architecture.to_dict()) == architecture
        assert Architecture.from_canonical(architecture.to_dict()) == architecture


def test_policies_by_branch_that_agree_are_one_policy():
    def block(quant):
        plain = {"mixer": "dwconv", "channel_mixer": "mlp", "quant": quant}
        return Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": plain}]})

    assert block({"mixer": "bf16", "channel_mixer": "bf16"}).id == block("bf16").id
    assert block({"mixer": "bf16", "channel_mixer": "fp32"}).id != block("bf16").id
    assert str(block({"mixer": "bf16", "channel_mixer": "fp32"})).endswith(":bf16/fp32]")
    with pytest.raises(ConfigError, match=r"block\.quant: 'channel_mixer' is missing"):
        block({"mixer": "bf16"})
    with pytest.raises(ConfigError, match=r"block\.quant: unknown key 'mixr'. Did you mean 'mixer'"):
        block({"mixr": "bf16", "channel_mixer": "bf16"})
    with pytest.raises(ConfigError, match=r"quant\.channel_mixer is .*fp32"):
        tied = {"mixer": "dwconv", "channel_mixer": "mlp", "quant": ["fp32", "bf16"]}
        space = SearchSpace.from_dict({"stem": "conv", "stages": [{"width": 8, "block": tied}]})
        space.encode(block({"mixer": "bf16", "channel_mixer": "fp32"}))


def test_variables_know_where_they_stand():
    space = everything("image")
    for variable in space.variables:
        parts = variable.name.split(".")
        place = parts[2:] if parts[0] == "stages" else parts
        assert variable.stage == (int(parts[1]) if parts[0] == "stages" else None)
        assert variable.block == (int(parts[3]) if "blocks" in parts else None)
        place = place[2:] if "blocks" in parts else place
        axis = {"quant": "channel_quant" if place[:2] == ["quant", "channel_mixer"] else "quant"}.get(
            place[0], place[0]
        )
        assert variable.axis == axis
        assert (variable.option, variable.knob) == ((place[-2], place[-1]) if variable.knob else ("", ""))
    assert {v.axis for v in space.variables} >= {"width", "depth", "mixer", "gate", "channel_mixer", "channel_quant"}


def test_walk_asks_for_active_variables():
    space, rng = everything("image"), np.random.default_rng(0)
    asked = {}

    def pick(variable):
        asked[variable.name] = int(rng.integers(len(variable.values)))
        return asked[variable.name]

    vector = space.encode(space.walk(pick))
    assert {space.variables[i].name: int(vector[i]) for i in np.flatnonzero(vector >= 0)} == asked
