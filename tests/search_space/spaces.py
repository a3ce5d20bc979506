"""Spaces and inputs that the tests of this folder share."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from typing import Any

import numpy as np

from mixnas.search_space import registry
from mixnas.search_space.architecture import BLOCK_AXES, Architecture, Op
from mixnas.search_space.network import IOSpec
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.space import SearchSpace, Variable

from ..contracts.cases import refused

IMAGE = IOSpec("image", (8, 8), 3, 10)
SEQUENCE = IOSpec("sequence", (12,), 5, 4)
CAUSAL = IOSpec("causal", (12,), 30, 30, head="token", tokens=True)
IOS = {"image": IMAGE, "sequence": SEQUENCE, "causal": CAUSAL}


def small() -> dict[str, Any]:
    """A space small enough to be listed, with every construct of the grammar but `share` and `blocks`."""
    return {
        "stem": "conv",
        "norm": ["layer", "rms"],
        "stages": [
            {
                "width": [4, 8],
                "depth": [1, 2],
                "block": {
                    "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}],
                    "gate": ["none", {"name": "se", "reduction": [2, 4]}],
                    "channel_mixer": {"name": "mlp", "expansion": [1, 2]},
                },
            }
        ],
    }


def basic(kind: str) -> SearchSpace:
    """A space of a few operators with every shape that the store has to hold: widths, kernels, expansions, norms."""
    block = {
        "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}, {"name": "attention", "heads": [2, 4]}],
        "gate": ["none", "output_sigmoid"],
        "channel_mixer": [{"name": "mlp", "expansion": [1, 2]}, {"name": "swiglu", "expansion": [1, 2]}],
        "recursion": [1, 2],
    }
    stem = {"image": "conv", "sequence": "linear", "causal": "embedding"}[kind]
    norms = ["layer", "rms"] if kind == "causal" else ["layer", "batch"]
    stage = {"width": [16, 32], "depth": [1, 2], "block": block}
    second = stage | ({"downsample": "patch"} if kind == "image" else {})
    return SearchSpace.from_dict({"stem": stem, "norm": norms, "stages": [stage, second]})


def _each(option: dict[str, Any]) -> list[Op]:
    """Every operator of an option with lists of values."""
    knobs = {knob: values for knob, values in option.items() if knob != "name"}
    return [
        Op(option["name"], tuple(sorted(zip(knobs, values, strict=True))))
        for values in itertools.product(*knobs.values())
    ]


def takes_some(quant: Op) -> bool:
    """Whether a policy takes projections of some shapes only."""
    check = getattr(policy_of(quant), "check", None)
    return check is not None and any(check(16, inputs) for inputs in range(1, 300))


@functools.cache
def everything(kind: str) -> SearchSpace:
    """A space in which every registered operator of a kind can occur.

    In one of the kinds that it serves, by turns, each of its knobs has two values, and in the others one: a
    super-network makes each operator at each place, under each policy that adds state, with all that its knobs can be
    together. The contract of operators goes through more values in every kind, one after the other.
    """

    contexts = [registry.Context(w, s, kind) for w in (16, 32) for s in SIZES[kind]]

    def fits(axis: str, name: str, knobs: dict[str, Any], quants: list[Op]) -> bool:
        operator = registry.get(axis, name)
        if operator.check is not None and any(operator.check(context, knobs) for context in contexts):
            return False
        if not quants or axis not in ("mixer", "gate", "channel_mixer") or (axis, name) == ("channel_mixer", "none"):
            return True
        op = Op(name, tuple(sorted(knobs.items())))
        return not any(refused(axis, op, context, quant) for context in contexts for quant in quants)

    def options(axis: str, quants: list[Op]) -> list[Any]:
        """Operators and values that fit at each place, and whose projections all of these policies take."""
        found: list[Any] = []
        for i, name in enumerate(registry.names(axis)):
            operator = registry.get(axis, name)
            if kind not in operator.kinds:
                continue
            most = 2 if axis == "quant" or operator.kinds[i % len(operator.kinds)] == kind else 1
            defaults = {k: v.default for k, v in operator.knobs.items()}
            if not operator.knobs and not fits(axis, name, {}, quants):
                continue
            plain: dict[str, Any] = {"name": name}
            for knob_name, knob in operator.knobs.items():
                tried = [knob.default, *(knob.choices or ())[:3], *((knob.low,) if knob.low is not None else ())]
                if isinstance(knob.default, int) and not isinstance(knob.default, bool) and knob.choices is None:
                    tried += [2, 4]
                values: list[Any] = []
                for value in tried:
                    normal = knob.normalise(value)
                    if normal is None or normal in values:
                        continue
                    if fits(axis, name, defaults | {knob_name: normal}, quants):
                        values.append(normal)
                plain[knob_name] = values[:most]
            if all(value != [] for value in plain.values()):
                found.append(plain)
        return found

    stem = {"image": "conv", "sequence": {"name": "linear", "position": ["none", "learned"]}, "causal": "embedding"}
    quants = options("quant", [])
    free = [quant for quant in quants if not any(map(takes_some, _each(quant)))]
    # All operators under the policies that take any projection, and those that all policies take under all of them.
    first = {axis: options(axis, []) for axis in BLOCK_AXES} | {"quant": free, "recursion": [1, 2]}
    stages: list[dict[str, Any]] = [{"width": [16, 32], "depth": [1, 2], "block": first}]
    every = [op for quant in quants for op in _each(quant)]
    block = {axis: options(axis, every) for axis in BLOCK_AXES} | {"recursion": [1, 2]}
    by_branch = {"mixer": quants, "channel_mixer": quants}
    second = {"width": [16, 32], "depth": 1, "block": block | {"quant": by_branch}}
    stages.append(second | ({"downsample": ["patch", "conv"]} if kind == "image" else {}))
    norms = [name for name in registry.names("norm") if kind in registry.get("norm", name).kinds]
    return SearchSpace.from_dict({"stem": stem[kind], "norm": norms, "stages": stages})


def covering(space: SearchSpace, times: int = 1, seed: int = 0) -> list[Architecture]:
    """Architectures that are made, not drawn, so that every operator and every value of a knob occurs in some block.

    Each kind of choice has a deck, whatever the place, that is dealt to the last card and shuffled again.

    Args:
        space: Where from.
        times: How often each occurs, at least.
        seed: Of the shuffles.
    """
    rng = np.random.default_rng(seed)
    decks: dict[tuple[str, str, str], list[Any]] = {}
    every: dict[tuple[str, str, str], list[Any]] = {}
    for variable in space.variables:
        known = every.setdefault((variable.axis, variable.option, variable.knob), [])
        known += [value for value in variable.values if value not in known]
    dealt: Counter[tuple[Any, ...]] = Counter()

    def pick(variable: Variable) -> int:
        kind = (variable.axis, variable.option, variable.knob)
        deck = decks.setdefault(kind, [])
        if not deck:
            deck.extend(every[kind][i] for i in rng.permutation(len(every[kind])))
        card = next((value for value in deck if value in variable.values), None)
        if card is None:  # this place offers none of the rest
            return int(rng.integers(len(variable.values)))
        deck.remove(card)
        dealt[*kind, card] += 1
        return variable.values.index(card)

    wanted = {(v.axis, v.option, v.knob, value) for v in space.variables for value in v.values}
    found = []
    while not all(dealt[one] >= times for one in wanted):
        found.append(space.walk(pick))
        assert len(found) < 400 * times, f"never dealt: {sorted(map(str, wanted - set(dealt)))}"
    return found


SIZES = {"image": [(8, 8), (4, 4)], "sequence": [(12,)], "causal": [(12,)]}
