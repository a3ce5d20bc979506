"""The work of a unit is the work of its operators, added up; for every registered operator, on a CPU and for a GPU."""

import functools

import pytest
import torch
from torch import nn

from mixnas.predictors.latency import features
from mixnas.predictors.latency.counting import count, finished
from mixnas.predictors.latency.features import Works, deployed_unit, example_input
from mixnas.predictors.latency.gpus import GPUS
from mixnas.predictors.latency.lookup import SpaceUnits
from mixnas.predictors.latency.model import Columns
from mixnas.predictors.latency.unit_rows import UnitRows
from mixnas.search_space import registry
from mixnas.search_space.architecture import Op
from mixnas.search_space.cost import unit_cost
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.registry import Context
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import (
    IOSpec,
    channel_unit,
    downsample_unit,
    head_unit,
    registry_size_after,
    stem_unit,
    token_unit,
)

from ...contracts.cases import refused

SIZES = {"image": (8, 8), "sequence": (16,), "causal": (16,)}
BATCH = 2


def operators(axis, kind, knobs=True):
    """Every registered operator of a kind, with its knobs at their defaults; `knobs`: each once at another value."""
    context = Context(16, SIZES[kind], kind)
    for name in registry.names(axis):
        operator = registry.get(axis, name)
        if kind not in operator.kinds:
            continue
        defaults = {knob: found.default for knob, found in sorted(operator.knobs.items())}
        tried = [defaults]
        for knob, found in operator.knobs.items() if knobs else ():
            others = [value for value in (found.choices or (found.low,)) if value not in (None, found.default)]
            tried += [defaults | {knob: found.normalise(value)} for value in others[:1]]
        for values in tried:
            if operator.check is None or not operator.check(context, values):
                yield Op(name, tuple(values.items()))


@functools.cache
def units(kind):
    """Each mixer, gate, channel mixer, norm, stem, downsample and head in some unit.

    All of a branch under the first policy, with their knobs; a sixth of them under each other one, by turns, and in
    each kind another sixth.
    """
    size, turn = SIZES[kind], 2 * list(SIZES).index(kind)
    context = Context(16, size, kind)
    norm, identity, none = Op("layer"), Op("identity"), Op("none")
    found = []
    for j, quant in enumerate(operators("quant", kind)):

        def some(axis, j=j):
            every = list(operators(axis, kind, knobs=j == 0))
            return every if j == 0 else [op for i, op in enumerate(every) if (i + j + turn) % 6 == 0]

        # Each gate round the mixer that does nothing, each mixer in one of the gates.
        taken = [gate for gate in some("gate") if not refused("gate", gate, context, quant)] or [none]
        found += [token_unit(norm, identity, gate, quant, context) for gate in taken]
        for i, mixer in enumerate(some("mixer")):
            if not refused("mixer", mixer, context, quant):
                found.append(token_unit(norm, mixer, taken[i % len(taken)], quant, context))
        for mixer in some("channel_mixer"):
            if mixer != none and not refused("channel_mixer", mixer, context, quant):
                found.append(channel_unit(norm, mixer, quant, context))
    for other in operators("norm", kind):
        found.append(token_unit(other, identity, none, Op("fp32"), context))
    for stem in operators("stem", kind):
        takes_tokens = getattr(registry.get("stem", stem.name).build, "takes_tokens", False)
        io = IOSpec(kind, tuple(4 * extent for extent in size), 5, 7, tokens=takes_tokens)
        found.append(stem_unit(stem, io, Context(16, registry_size_after("stem", stem, io.before), kind)))
    for downsample in operators("downsample", kind):
        after = Context(24, registry_size_after("downsample", downsample, context), kind)
        found.append(downsample_unit(downsample, context, after))
    for head in operators("head", kind):
        io = IOSpec(kind, size, 5, 7, head=head.name)
        found.append(head_unit(norm, head, io, context, registry_size_after("head", head, context)))
    return UnitRows.of(found)


def whole(unit, gpu):
    """Counts of the whole unit in one forward."""
    inputs = example_input(unit, BATCH, torch.Generator().manual_seed(0))
    sums, _ = count(deployed_unit(unit), (inputs,), gpu)
    columns = finished(Columns.of([sums]))
    return {name: value for name, value in zip(columns.names, columns.values[0], strict=True) if value}


@pytest.mark.parametrize("gpu", [None, GPUS["nvidia-h200"]], ids=["cpu", "gpu"])
@pytest.mark.parametrize("kind", SIZES)
def test_operators_add_up_to_the_unit(kind, gpu):
    works = Works(BATCH, gpu=gpu)
    columns, buildable = works.of_all(units(kind))
    assert buildable.all()
    occurring = {axis for slot in units(kind).slots for axis, _ in filter(None, slot)}
    assert occurring == set(registry.AXES), "every axis occurs"
    for unit, values in zip(units(kind), columns.values, strict=True):
        added = {name: value for name, value in zip(columns.names, values, strict=True) if value}
        assert added == pytest.approx(whole(unit, gpu), rel=1e-9), unit
        macs = sum(value for name, value in added.items() if name.endswith(".macs") and ".rounds." not in name)
        assert macs == BATCH * unit_cost(unit).macs, unit


def test_operators_are_counted_once_not_units(monkeypatch):
    counted = []
    real = features.count

    def counting(*given):
        counted.append(given)
        return real(*given)

    monkeypatch.setattr(features, "count", counting)
    block = {
        "mixer": ["identity", "pooling", {"name": "dwconv", "kernel_size": [3, 5, 7, 9]}],
        "gate": ["none", {"name": "se", "reduction": [1, 2, 4, 8]}, "output_sigmoid"],
        "channel_mixer": [{"name": "mlp", "expansion": [1, 2, 3]}, "swiglu"],
        "quant": ["fp32", "bf16"],
    }
    stage = {"width": [8, 16], "block": block}
    space = SearchSpace.from_dict({"stem": "conv", "norm": ["layer", "rms"], "stages": [stage]})
    found = SpaceUnits(space, IOSpec("image", (8, 8), 1, 10)).units
    works = Works()
    works.of_all(found)
    # Of each width and policy 6 mixers, 6 gates (on the type in which the mixer answers) and 4 channel mixers.
    assert len(found) > 300 and len(counted) < 2 * (2 * (6 + 2 * 6 + 4) + 2 + 6) + 4
    before = len(counted)
    for unit in list(found)[::7]:
        works.of(unit)
    assert len(counted) == before


class _Wrong(nn.Module):
    def __init__(self, context):
        super().__init__()
        raise ConfigError("three heads are one too many")


def test_what_cannot_be_built_is_said(monkeypatch):
    context = Context(16, (8, 8), "image")
    monkeypatch.setitem(
        registry._operators,
        ("mixer", "wrong"),
        registry.Operator("mixer", "wrong", _Wrong, registry.KINDS, "nowhere"),
    )
    broken = token_unit(Op("layer"), Op("wrong"), Op("none"), Op("fp32"), context)
    unfit = token_unit(Op("layer"), Op("attention", (("heads", 3),)), Op("none"), Op("fp32"), context)
    fine = token_unit(Op("layer"), Op("identity"), Op("none"), Op("fp32"), context)
    works = Works()
    with pytest.raises(ConfigError, match="one too many"):
        works.of(broken)
    with pytest.raises(ConfigError, match="attention"):
        works.of(unfit)
    assert works.of_all(UnitRows.of([broken, fine, unfit]))[1].tolist() == [False, True, False]


def test_too_little_memory_is_not_built(monkeypatch):
    def no_memory(*_):
        raise torch.cuda.OutOfMemoryError("40 GiB asked for")

    monkeypatch.setattr(features, "build_op", no_memory)
    unit = token_unit(Op("layer"), Op("identity"), Op("none"), Op("fp32"), Context(16, (8, 8), "image"))
    with pytest.raises(ConfigError, match="40 GiB"):
        Works().of(unit)
