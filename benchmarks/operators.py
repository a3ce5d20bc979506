#!/usr/bin/env python3
"""Write `docs/operators.md`: every operator, what proves it, what it counts and how long it takes on this machine.

    python benchmarks/operators.py [--papers benchmarks/operator_papers.tsv] [--output docs/operators.md]

The differences and counts are those that `tests/search_space/operators/test_proofs.py` looks at, computed again here.
Times are medians on one thread, forward, at one common shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from _checkout import ROOT, use_checkout

use_checkout()
sys.path.insert(0, str(ROOT))

from mixnas.search_space import registry  # noqa: E402
from mixnas.search_space.registry import Context  # noqa: E402
from tests.search_space.operators.proofs import (  # noqa: E402
    COUNTS,
    PROOFS,
    attention,
    channel_mixers,
    coarse_attention,
    convolutions,
    earlier,
    gates,
    global_mixers,
    mixtures,
)

FAMILIES = (attention, channel_mixers, coarse_attention, convolutions, earlier, gates, global_mixers, mixtures)
AXES = {"mixer": "Mixers", "gate": "Gates", "channel_mixer": "Channel mixers", "norm": "Norms", "head": "Heads"}
SHAPES = {"image": (56, 56), "sequence": (1024,), "causal": (1024,)}
WIDTH = 64
REPEATS, LONGEST_S = 9, 3.0
PAPERS = Path(__file__).with_name("operator_papers.tsv")


def timed(axis: str, name: str, kind: str) -> float | None:
    """Milliseconds of a forward at the kind's shape, or None where it does not stand there."""
    operator = registry.get(axis, name)
    context = Context(WIDTH, SHAPES[kind], kind)
    knobs = {knob: found.default for knob, found in operator.knobs.items()}
    if kind not in operator.kinds or (operator.check is not None and operator.check(context, knobs)):
        return None
    module = operator.build(context, **knobs).eval()
    x = torch.randn(1, *context.size, WIDTH, generator=torch.Generator().manual_seed(0))
    found: list[float] = []
    with torch.inference_mode():
        begun = time.perf_counter()
        while len(found) < REPEATS + 2 and time.perf_counter() - begun < LONGEST_S:
            start = time.thread_time()  # others may be on this machine
            module(x, lambda y: y) if axis == "gate" else module(x)
            found.append(1e3 * (time.thread_time() - start))
    return statistics.median(found[2:] or found)


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
        oracle = "; ".join(dict.fromkeys(text for text, _, _ in found)) or "-"
        single, double = (f"{max(d[i] for d in found):.0e}" if found else "-" for i in (1, 2))
        times = []
        for kind in SHAPES:
            ms = timed(axis, name, kind) if axis != "head" else None
            times.append("-" if ms is None else f"{ms:.2f}")
        print(axis, name, single, double, *times, file=sys.stderr, flush=True)
        cells = [f"`{name}`", operator.paper, oracle, single, double, *times]
        yield "| " + " | ".join(map(escaped, cells)) + " |"


def page(papers: Path) -> str:
    """The whole page."""
    torch.set_num_threads(1)
    assert FAMILIES
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
        f"of this machine, at (1, 56, 56, {WIDTH}) and (1, 1024, {WIDTH}), knobs at their defaults; a gate's is round "
        "nothing.",
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
    lines += ["", "## Papers", "", *_papers(papers)]
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--output", type=Path, default=Path("docs/operators.md"))
    args = parser.parse_args()
    args.output.write_text(page(args.papers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
