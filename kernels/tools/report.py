"""`python -m mixnas.kernels.tools.report` writes docs/kernels.md: what kernels' machine code uses, floors, any times.

A floor is a time no version of the kernel can beat: the least bytes over the copy bandwidth, and the operations over
the rate of the unit that does them. The larger says what the kernel is bound by.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from mixnas.kernels import configs, report
from mixnas.kernels.tools import aot

_HEADER = """# Kernels: resources and floors

Written by `python -m mixnas.kernels.tools.report`; not to be edited. Every kernel and every row of the launch tables
(`kernels/*.json`), compiled ahead of time for sm_90 (H100, H200) with Triton {triton}. {timed}

What became of each finding of the static review: `docs/kernels-findings.md`.

Floors are for an H200: bytes (every operand once) over {bandwidth:.1f} TB/s, a measured copy, and operations over the
rate of their unit: {fp32:.0f} TFLOP/s in plain fp32 (the vendor's figure), {matrix:.0f} TFLOP/s on the tensor cores (a
measured bf16 product), {special:.1f} T/s for exponentials and their like. The largest bounds the kernel from below.
Loads and stores are counted by width in bytes a thread; 16 is the widest. FFMA, MMA: multiply-add instructions, plain
and on the tensor cores; MUFU: exponentials and roots; shared: accesses to shared memory; all static counts of the code,
not of what runs.
"""


def _sections(compiled: list[aot.Compiled]) -> Iterator[str]:
    for kernel, group in groupby(compiled, key=lambda item: item.kernel):
        items = list(group)
        source = configs.load()[items[0].family]["provenance"]["source"]
        yield f"## {kernel}\n\nFrom `kernels/{items[0].family}.py`. Rows: {source}.\n"
        yield (
            "| row | shape | launch | registers | stack | shared memory | instructions | FFMA | MMA | MUFU "
            "| loads 16/8/4/<4 | stores 16/8/4/<4 | shared "
            "| floor, bytes | floor, operations | floor, special | bound by |\n"
            "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|---|---:|---:|---:|---:|---|"
        )
        for item in items:
            count = item.instructions
            widths = [
                "/".join(str(count[f"{kind}_{width}"]) for width in ("16", "8", "4", "narrow"))
                for kind in ("load", "store")
            ]
            floors = aot.floors_us(item)
            bounds = ", ".join(
                f"{name} <= {bound}" for name, bound in configs.rows(kernel, item.gpu)[item.row].up_to.items()
            )
            launch = " ".join(f"{name}={value}" for name, value in item.launch.items())
            yield (
                f"| {item.gpu}: {bounds or 'any'} | {item.label} | {launch} | {item.registers} | {item.stack_bytes} "
                f"| {item.shared_bytes:,} | {count['total']:,} | {count['ffma']} | {count['mma']} | {count['special']} "
                f"| {widths[0]} | {widths[1]} | {count['shared']} | "
                + " | ".join(f"{floors[what]:.1f} µs" for what in ("bytes", "operations", "special"))
                + f" | {max(floors, key=lambda what: floors[what])} |"
            )
        for because in sorted({item.spills_because for item in items} - {""}):
            yield f"\nSpills are accepted here: {because}"
        yield ""


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
_OURS = "mixnas (Triton)"
_FIGURE = "forward, graph, cold"


def _measured(results: Path) -> Iterator[str]:
    """What was timed, by device, from what `benchmarks/gpu.py --take` has put into the results."""
    for path in sorted(results.glob("gpu-*.fast.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        about = data["provenance"]
        yield (
            f"## Measured on {data['device']}\n\nFrom `benchmarks/results/{path.name}`, torch {about['torch']}, Triton "
            f"{about.get('triton', '')}, {about['time'][:10]}: a forward in a CUDA graph on a cold L2, median, beside "
            "its floor there and the fastest that computes the same.\n"
        )
        yield "| family | shape | time | floor | bound by | over floor | fastest other | its time |"
        yield "|---|---|---:|---:|---|---:|---|---:|"
        for item in data["items"].values():
            yield from _measured_row(item)
        yield ""


def _measured_row(item: dict[str, Any]) -> Iterator[str]:
    times = {}
    for name, entry in item["implementations"].items():
        figure = entry.get("times", {}).get(_FIGURE)
        if isinstance(figure, dict) and (name == _OURS or entry.get("same_function")):
            times[name] = figure["p50_us"]
    if _OURS not in times or "floor" not in item:
        return
    ours, floor = times.pop(_OURS), max(item["floor"][f"{what}_us"] for what in ("bytes", "operations", "special"))
    other = min(times, key=lambda name: times[name], default="")
    yield (
        f"| {item['family']} | {item['label']} | {ours:.1f} µs | {floor:.1f} µs | {item['floor']['bound_by']} "
        f"| {ours / floor:.1f} | {other} | {f'{times[other]:.1f} µs' if other else ''} |"
    )


_MODEL = """**Predicted, not timed**: the instructions that a warp runs, counted in machine code with the trips of its
loops, times the warps of the busiest multiprocessor, over what its four schedulers issue: 0.45 a clock with one warp
each, 0.15 more with each further one, 0.75 at most; or longer, where the exponential unit, the tensor cores, L1 with
shared memory, or every operand of the launch once through device memory take longer. Good to about a factor of 1.5. Of
a call with several launches the longest is shown; the prediction is of all, with the bytes of other operations. Floors
know the exponential unit; no launch takes less than 2 us."""


def _predicted(results: Path) -> Iterator[str]:
    """The calls of real spaces with their predicted times, from what `python -m mixnas.kernels.report -o` wrote."""
    path, earlier = results / "kernels-predicted.json", results / "kernels-predicted-before.json"
    if not path.exists():
        return
    table = json.loads(path.read_text(encoding="utf-8"))
    before = json.loads(earlier.read_text(encoding="utf-8")) if earlier.exists() else None
    about = table["provenance"]
    commit = before["provenance"]["commit"] if before else "none"
    yield (
        f"# Kernels: predicted times\n\nFrom `benchmarks/results/{path.name}` (`{about['command']}`, Triton "
        f'{about["triton"]}, commit {about["commit"]}).\n{_MODEL} "Before" is commit {commit}, over the same floors.\n'
    )
    yield from report.lines(table, before)


def main(argv: list[str] | None = None) -> None:
    """Write the resource report of all kernels."""
    default = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m mixnas.kernels.tools.report", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, default=default, help="where to write (default: docs/kernels.md)")
    path = parser.parse_args(argv).output
    import triton

    measured = list(_measured(RESULTS))
    header = _HEADER.format(
        triton=triton.__version__,
        timed="What was timed is at the end." if measured else "Nothing on this page is timed.",
        bandwidth=aot.COPY_BYTES_PER_S / 1e12,
        **{unit: rate / 1e12 for unit, rate in aot.OPERATIONS_PER_S.items()},
    )
    lines = [header, *_sections(aot.compile_table()), *_predicted(RESULTS), *measured]
    path.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
