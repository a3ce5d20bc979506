"""Spaces and inputs that the tests of this folder share."""

from __future__ import annotations

import functools
from typing import Any

from mixnas.search_space import registry
from mixnas.search_space.network import IOSpec
from mixnas.search_space.space import SearchSpace

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


@functools.cache
def everything(kind: str) -> SearchSpace:
    """A space in which every registered operator of a kind can occur, each with its knobs at several values."""

    def options(axis: str) -> list[Any]:
        found: list[Any] = []
        for name in registry.names(axis):
            operator = registry.get(axis, name)
            if kind not in operator.kinds:
                continue
            plain: dict[str, Any] = {"name": name}
            for knob_name, knob in operator.knobs.items():
                tried = [knob.default, *(knob.choices or ())[:3], *((knob.low,) if knob.low is not None else ())]
                if isinstance(knob.default, int) and not isinstance(knob.default, bool) and knob.choices is None:
                    tried += [2, 4]
                values: list[Any] = []
                for value in tried:
                    normal = knob.normalise(value)
                    contexts = [registry.Context(w, s, kind) for w in (16, 32) for s in SIZES[kind]]
                    knobs = {k: v.default for k, v in operator.knobs.items()} | {knob_name: normal}
                    fits = normal is not None and normal not in values
                    if fits and (operator.check is None or not any(operator.check(c, knobs) for c in contexts)):
                        values.append(normal)
                # Operators with many knobs at fewer values each: their combinations are all built.
                plain[knob_name] = values[:2] if len(operator.knobs) > 2 else values
            found.append(plain)
        return found

    stem = {"image": "conv", "sequence": {"name": "linear", "position": ["none", "learned"]}, "causal": "embedding"}
    block = {axis: options(axis) for axis in ("mixer", "gate", "channel_mixer", "quant")} | {"recursion": [1, 2]}
    stages: list[dict[str, Any]] = [{"width": [16, 32], "depth": [1, 2], "block": block}]
    second = {"width": [16, 32], "depth": [1, 2], "block": block}
    stages.append(second | ({"downsample": ["patch", "conv"]} if kind == "image" else {}))
    norms = [name for name in registry.names("norm") if kind in registry.get("norm", name).kinds]
    return SearchSpace.from_dict({"stem": stem[kind], "norm": norms, "stages": stages})


SIZES = {"image": [(8, 8), (4, 4)], "sequence": [(12,)], "causal": [(12,)]}
