#!/usr/bin/env python3
"""How long each operator takes beside its oracle, or the plain composition that its formula is, on one thread.

    pip install timm                   # the oracles that are a library's; without it the compositions alone are timed
    python benchmarks/operator_times.py [--only NAME ...] [--seconds S]

Forwards at (1, 56, 56, 64) and (1, 1024, 64), knobs at their defaults, in turn: ours, the other, ours, the other, and
so on, processor time of one thread, so that others on this machine do not matter. A composition has our weights and
must give our answer: where it does not nothing is written. Writes `benchmarks/results/operator-times.json`; with
--only, that part of it anew.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import torch  # noqa: E402
from operator_forms import Form, load  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mixnas.predictors.measuring.device import provenance  # noqa: E402
from mixnas.search_space import registry  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402
from mixnas.search_space.operators.folding import fold  # noqa: E402
from mixnas.search_space.registry import Context  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "operator-times.json"
WIDTH = 64
SHAPES = {"image": (56, 56), "sequence": (1024,)}
TOLERANCE = 2e-4
"""Largest difference of a composition's answer over the largest of ours, in float32."""
FEWEST, MOST = 3, 200
"""Pairs of forwards."""


class WrongError(Exception):
    """A composition does not answer as the operator does."""


def built(axis: str, name: str, kind: str) -> nn.Module | None:
    """The operator as it is deployed, with weights that hide nothing, or None where it does not stand there."""
    operator, context = registry.get(axis, name), Context(WIDTH, SHAPES[kind], kind)
    knobs = {knob: found.default for knob, found in operator.knobs.items()}
    if kind not in operator.kinds or (operator.check is not None and operator.check(context, knobs)):
        return None
    torch.manual_seed(0)
    module: nn.Module = operator.build(context, **knobs)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point() and ("norm" in name or name.endswith("bias") or not tensor.any()):
                tensor.add_(0.2 * torch.rand(tensor.shape))
    return module.eval()


def every() -> set[str]:
    """Names of operators."""
    return {name for axis in ("mixer", "gate", "channel_mixer", "norm") for name in registry.names(axis)}


def seconds(run: Callable[[Tensor], Any], x: Tensor) -> float:
    """Of one forward."""
    begun = time.thread_time()
    run(x)
    return time.thread_time() - begun


def compare(
    ours: Callable[[Tensor], Any], theirs: dict[str, tuple[Callable[[Tensor], Any], Tensor]], x: Tensor, limit: float
) -> dict[str, Any]:
    """Medians in milliseconds, and of each other form the median of the ratios of neighbours."""
    runs = {"ours": (ours, x), **theirs}
    for run, given in runs.values():
        run(given)
    found: dict[str, list[float]] = {name: [] for name in runs}
    begun = time.monotonic()
    while len(found["ours"]) < FEWEST or (time.monotonic() - begun < limit and len(found["ours"]) < MOST):
        for name, (run, given) in runs.items():
            found[name].append(seconds(run, given))
    medians = {name: statistics.median(times) for name, times in found.items()}
    fastest = min(theirs, key=medians.__getitem__)
    ratios = [a / b for a, b in zip(found["ours"], found[fastest], strict=True)]
    return {
        "ours_ms": 1e3 * medians["ours"],
        "fastest": fastest,
        "others_ms": {name: 1e3 * medians[name] for name in theirs},
        "ratio": statistics.median(ratios),
        "pairs": len(ratios),
    }


@torch.inference_mode()
def looked_at(module: nn.Module, is_gate: bool, kind: str, forms: list[Form], limit: float) -> dict[str, Any]:
    """One operator at one shape."""
    if not forms:
        raise WrongError("nothing to compare it with: write its composition in benchmarks/operator_forms")
    x = torch.randn(1, *SHAPES[kind], WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(False):
        deployed = fold(copy.deepcopy(module))
    channels_first = x.movedim(-1, 1).contiguous()

    def ours(t: Tensor) -> Tensor:
        y: Tensor = deployed(t, lambda u: u) if is_gate else deployed(t)
        return y

    theirs, largest = {}, 0.0
    for form in forms:
        given = channels_first if form.first else x
        if form.build is not None:
            theirs[form.source] = (form.build(module, given), given)
            continue
        assert form.forward is not None
        theirs[form.source] = ((lambda f: lambda t: f(module, t))(form.forward), given)
        answer = form.forward(module, given)
        answer, expected = answer.movedim(1, -1) if form.first else answer, ours(x)
        difference = float((answer - expected).abs().max() / expected.abs().max())
        if not answer.shape == expected.shape or not difference < TOLERANCE:
            raise WrongError(f"{form.source} differs by {difference:.1e}: it is not the operator")
        largest = max(largest, difference)
    return {**compare(ours, theirs, x, limit), "difference": largest}


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="operators; all where none is given")
    parser.add_argument("--seconds", type=float, default=1.5, help="for each operator and shape")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    forms, wrong = load(), []
    record = json.loads(args.output.read_text()) if args.only and args.output.exists() else {"operators": {}}
    for axis, name, kind in itertools.product(("mixer", "gate", "channel_mixer", "norm"), sorted(every()), SHAPES):
        module = built(axis, name, kind) if name in registry.names(axis) and name in (args.only or [name]) else None
        fitting = [f for f in forms if (f.axis, f.name) == (axis, name) and kind in f.kinds]
        if module is None or name in ("none", "identity"):  # what does nothing takes no time
            continue
        try:
            one = looked_at(module, axis == "gate", kind, fitting, args.seconds)
        except Exception as error:  # all that is wrong is told together
            wrong.append(f"{axis} {name}, {kind}: {type(error).__name__}: {error}")
            continue
        record["operators"].setdefault(f"{axis} {name}", {})[kind] = one
        told = f"{one['ours_ms']:.2f} ms, {one['ratio']:.2f} of {one['fastest']}"
        print(f"{axis} {name} {kind}: {told}", file=sys.stderr, flush=True)
    if wrong:
        print("\n".join(["Nothing is written:", *wrong]), file=sys.stderr)
        return 1
    record |= {
        "command": "python benchmarks/operator_times.py",
        "shapes": SHAPES,
        "width": WIDTH,
        "provenance": provenance("cpu", 1),
    }
    write_json(args.output, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
