#!/usr/bin/env python3
"""Write `docs/operators.md`: every operator, what proves it, what it counts and how long it takes on this machine.

    python benchmarks/operators.py [--papers benchmarks/operator_papers.tsv] [--output docs/operators.md]
    python benchmarks/operators.py --list-papers       # which papers are there, and why others are not

The differences and counts are those that `tests/search_space/operators/test_proofs.py` looks at, computed again here.
Times are medians on one thread, forward, at one common shape; those beside the oracles are what `operator_times.py`
measured last, the floors of kernels those of `kernel_floors.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from _checkout import ROOT, use_checkout
from torch import Tensor, nn

use_checkout()
sys.path.insert(0, str(ROOT))

import kernel_floors  # noqa: E402

from mixnas.predictors.measuring.device import device_name  # noqa: E402
from mixnas.search_space import registry  # noqa: E402
from mixnas.search_space.operators.folding import fold  # noqa: E402
from mixnas.search_space.registry import Context  # noqa: E402
from tests.search_space.operators.proofs import COUNTS, PROOFS, register_all  # noqa: E402

AXES = {
    "mixer": "Mixers",
    "gate": "Gates",
    "channel_mixer": "Channel mixers",
    "norm": "Norms",
    "stem": "Stems",
    "downsample": "Downsamplings",
    "head": "Heads",
}
SHAPES = {"image": (56, 56), "sequence": (1024,), "causal": (1024,)}
NAMES = {"image": "images", "sequence": "bidirectional sequences", "causal": "causal sequences"}
WIDTH = 64
REPEATS, LONGEST_S = 9, 3.0
PAPERS = Path(__file__).with_name("operator_papers.tsv")
TIMES = Path(__file__).with_name("results") / "operator-times.json"


def standing(axis: str, name: str, kind: str) -> tuple[nn.Module, Tensor] | str:
    """An operator in evaluation with its input, or why it does not stand there."""
    operator, size = registry.get(axis, name), SHAPES[kind]
    knobs = {knob: found.default for knob, found in operator.knobs.items()}
    if kind not in operator.kinds:
        return f"serves no {NAMES[kind]}"
    tokens = getattr(operator.build, "takes_tokens", False)
    pixels = axis == "stem" and kind == "image"
    before = Context(3 if pixels else 1000 if tokens else WIDTH, (224, 224) if pixels else size, kind)
    why = operator.check(before, knobs) if operator.check is not None else None
    if why:
        return why
    contexts = [before]
    if axis in registry.BETWEEN:
        width = {"stem": WIDTH, "downsample": 2 * WIDTH, "head": 10}[axis]
        contexts.append(Context(width, operator.build.out_size(before.size, **knobs), kind))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *before.size, before.width, generator=generator)
    if tokens:
        x = torch.randint(before.width, (1, *before.size), generator=generator)
    return operator.build(*contexts, **knobs).eval(), x


def timed(axis: str, name: str, kind: str) -> str:
    """Milliseconds of a forward at the kind's shape, or why there is none."""
    found = standing(axis, name, kind)
    if isinstance(found, str):
        return found
    module, x = fold(found[0]), found[1]
    times: list[float] = []
    with torch.inference_mode():
        begun = time.perf_counter()
        while len(times) < REPEATS + 2 and time.perf_counter() - begun < LONGEST_S:
            start = time.thread_time()  # others may be on this machine
            module(x, lambda y: y) if axis == "gate" else module(x)
            times.append(1e3 * (time.thread_time() - start))
    return f"{statistics.median(times[2:] or times):.2f}"


def escaped(text: str) -> str:
    """For a cell of a table."""
    return text.replace("|", "\\|")


def rows(axis: str) -> Iterator[str]:
    """Of an axis's table."""
    for name in registry.names(axis):
        if (axis, name) == ("channel_mixer", "none"):
            continue
        operator = registry.get(axis, name)
        own = [proof for proof in PROOFS if (proof.axis, proof.name) == (axis, name)]
        found = [(proof.oracle, proof.difference(torch.float32), proof.difference(torch.float64)) for proof in own]
        oracle = "; ".join(dict.fromkeys(text for text, _, _ in found))
        single, double = (f"{max(d[i] for d in found):.0e}" for i in (1, 2))
        times = [timed(axis, name, kind) for kind in SHAPES]
        print(axis, name, single, double, *times, file=sys.stderr, flush=True)
        cells = [f"`{name}`", operator.paper, oracle, single, double, *times]
        yield "| " + " | ".join(map(escaped, cells)) + " |"


def page(papers: Path) -> str:
    """The whole page."""
    torch.set_num_threads(1)
    register_all()
    lines = [
        "# Operators",
        "",
        "Written by `python benchmarks/operators.py` from the tests' own results; not by hand.",
        "",
        "*Oracle*: what the operator's numbers are compared with after copying the weights. *Fingerprint*: the sum, "
        "the norm and three entries of a published module's answer to a fixed input with fixed weights. *Formula*: the "
        "definition once more, from torch's own functions, where neither a library nor stored answers exist: it proves "
        "the arithmetic, and the counts below that it is the right operator. *Difference*: the largest, over the "
        "oracle's largest number, in float32 and in float64. *ms*: median of a forward, processor time of one thread "
        f"of {device_name('cpu', 1)}, at (1, 56, 56, {WIDTH}) and (1, 1024, {WIDTH}), deployed, knobs at their "
        "defaults; a gate is round nothing. A stem reads (1, 224, 224, 3), tokens out of 1,000 or 64 features, a "
        "downsampling doubles the width, a head has 10 answers. `dwconv` and `attention` are what others may "
        "be compared with.",
        "",
        *_two_runs(),
    ]
    for axis, title in AXES.items():
        lines += ["", f"## {title}", ""]
        lines += [
            "| operator | paper | oracle | float32 | float64 | image ms | sequence ms | causal ms |",
            "| --- " * 8 + "|",
        ]
        lines += rows(axis)
    lines += ["", "## Counts", "", "Parameters of what was published, and of the same rebuilt from the operator.", ""]
    lines += ["| operator | what | published | rebuilt |", "| --- " * 4 + "|"]
    for count in COUNTS:
        lines.append(f"| `{count.name}` | {escaped(count.model)} | {count.published:,} | {count.rebuilt():,} |")
    lines += ["", *_uncounted()]
    lines += ["", "## Times beside the oracles", "", *_ratios()]
    lines += ["", "## Kernels weighed", "", *_floors()]
    lines += ["", "## Papers", "", *_papers(papers)]
    return "\n".join(lines) + "\n"


def _two_runs() -> Iterator[str]:
    """What the two kinds of times on the page have to do with each other, and which operators have both."""
    record = json.loads(TIMES.read_text())
    beside = sum(len(kinds) for kinds in record["operators"].values())
    there = {name.split()[0] for name in record["operators"]}
    without = [title.lower() for axis, title in AXES.items() if axis not in there]
    yield (
        "These times and those beside the oracles, further down, are of two runs (the latter on "
        f"{record['provenance']['device']}): a number here differs a little from the same operator's there. "
        f"{_and(without).capitalize()} are not among the {beside} that are timed beside an oracle."
    )


def _and(words: list[str]) -> str:
    """In words: "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _uncounted() -> Iterator[str]:
    """Those of which no count is published."""
    free, others = [], []
    counted = {(count.axis, count.name) for count in COUNTS}
    for axis in ("mixer", "gate", "channel_mixer"):
        for name in registry.names(axis):
            if (axis, name) in counted or (axis, name) == ("channel_mixer", "none"):
                continue
            found = next(
                found for found in (standing(axis, name, kind) for kind in SHAPES) if not isinstance(found, str)
            )
            (others if any(True for _ in found[0].parameters()) else free).append(f"`{name}`")
    yield f"The catalogue has no count of {', '.join(others)}: their arithmetic alone is proved. "
    yield f"There is nothing to count in {', '.join(free)}."


def _ratios() -> Iterator[str]:
    """What `operator_times.py` measured."""
    record = json.loads(TIMES.read_text())
    yield (
        f"By `{record['command']}`, on one thread of {record['provenance']['device']}: ours and the other in turn, "
        "processor time, the median of the ratios of neighbours. A library's module is its own code; a composition is "
        "the formula from torch's functions as its authors write it, with our weights, and gives our answer. The "
        "fastest of them is shown. `identity` and `none` do nothing and take no time."
    )
    rows = [(name, kind, one) for name, kinds in record["operators"].items() for kind, one in kinds.items()]
    slow = [
        f"`{name.split()[1]}` on {NAMES[kind]} ({one['ratio']:.2f})" for name, kind, one in rows if one["ratio"] > 2
    ]
    most = max(one["ratio"] for _, _, one in rows)
    yield ""
    told = (
        f"{len(slow)} take more than twice: {', '.join(slow)}"
        if slow
        else "None takes more than twice the other's time"
    )
    yield f"{told}; the largest ratio of {len(rows)} is {most:.2f}."
    yield ""
    yield "| operator | shape | ours, ms | other, ms | ratio | the other |"
    yield "| --- " * 6 + "|"
    for name, kind, one in rows:
        shape = "x".join(map(str, (1, *record["shapes"][kind], record["width"])))
        other = one["others_ms"][one["fastest"]]
        cells = f"{one['ours_ms']:.3f} | {other:.3f} | {one['ratio']:.2f} | {escaped(one['fastest'])}"
        yield f"| `{name.split()[1]}` | {shape} | {cells} |"


def _floors() -> Iterator[str]:
    """What `kernel_floors.py` computes."""
    yield (
        "By `python benchmarks/kernel_floors.py`, not measured: sums of the floors of launches on an H100, in bfloat16 "
        f"(bytes over {kernel_floors.H100.bandwidth} TB/s, operations over the data sheet's peaks, at least "
        f"{kernel_floors.LAUNCH_US:.0f} µs), as the operator runs now and with one fused pass between its projections."
    )
    yield ""
    yield from kernel_floors.lines()


def _papers(path: Path) -> Iterator[str]:
    """The catalogue's papers that carry an operator: where they are, or why not."""
    every = [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    there = 0
    table = ["| entries | paper | class | operators, or why not |", "| --- " * 4 + "|"]
    for entries, paper, classes, names, reason in every:
        for name in filter(None, names.split(", ")):
            if not any(name in registry.names(axis) for axis in registry.AXES):
                raise SystemExit(f"{path}: {entries} names {name!r}, which is not registered.")
        there += bool(names)
        listed = ", ".join(f"`{name}`" for name in filter(None, names.split(", ")))
        table.append(f"| {entries} | {escaped(paper)} | {classes} | {'. '.join(filter(None, (listed, reason)))} |")
    yield (
        f"Of the catalogue's {len(every)} papers of class M (token mixer), C (channel mixer), G (gate) or S (stem, "
        f"downsampling, macro) {there} have an operator here. For each other the reason."
    )
    yield ""
    yield from table


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--papers", type=Path, default=PAPERS)
    parser.add_argument("--list-papers", action="store_true", help="print the list of papers alone")
    parser.add_argument("--output", type=Path, default=Path("docs/operators.md"))
    args = parser.parse_args()
    if args.list_papers:
        print("\n".join(_papers(args.papers)))
        return 0
    args.output.write_text(page(args.papers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
