"""`python -m mixnas.kernels.tools.retune` measures launch configurations on this GPU and writes its table rows.

For each kernel and each bucket of shapes that the table has for any GPU, the candidates around the present row (halves
and doubles of every block size, number of warps and stages) are run on the row's own example, and the fastest whose
outputs equal the present row's is kept under this GPU's name. The table stays deterministic: it changes only here.
"""

import argparse
import datetime
import importlib
import itertools
import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mixnas.kernels import FAMILIES, configs, dispatch
from mixnas.kernels.tools import aot

LIMITS = {"num_warps": (1, 32), "num_stages": (1, 4), "ROWS": (1, 2)}
LARGEST_BLOCK = 65536


def candidates(row: configs.Row) -> Iterator[dict[str, int]]:
    """Yield the row's own launch first, then those with up to two of its values halved or doubled."""
    yield row.launch
    names = list(row.launch)
    single = [(name, value) for name in names for value in (row.launch[name] // 2, row.launch[name] * 2)]
    for changes in itertools.chain(((one,) for one in single), itertools.combinations(single, 2)):
        launch = row.launch | dict(changes)
        within = all(
            LIMITS.get(name, (1, LARGEST_BLOCK))[0] <= value <= LIMITS.get(name, (1, LARGEST_BLOCK))[1]
            for name, value in launch.items()
        )
        if within and len({name for name, _ in changes}) == len(changes):
            yield launch


def _on_device(value: Any, generator: torch.Generator, made: dict[int, torch.Tensor]) -> Any:
    """Replace "meta" tensors by random ones on the GPU, each once."""
    if isinstance(value, torch.Tensor):
        if id(value) not in made:
            drawn = torch.randn(value.shape, generator=generator, device="cuda", dtype=torch.float32)
            # Negative, so that decays decay.
            made[id(value)] = (-0.5 * drawn.abs()).to(value.dtype)
        return made[id(value)]
    if isinstance(value, (tuple, list)):
        return type(value)(_on_device(item, generator, made) for item in value)
    return value


def _launches(example: aot.Example, kernel: str) -> Any:
    """Return the example's call with its tensors on the GPU (examples are `functools.partial`s)."""
    generator = torch.Generator("cuda").manual_seed(0)
    made: dict[int, torch.Tensor] = {}
    call: Any = example.call
    arguments = [_on_device(argument, generator, made) for argument in call.args]
    keywords = {name: _on_device(value, generator, made) for name, value in call.keywords.items()}
    return lambda: call.func(*arguments, **keywords)


def _flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for item in result or () for tensor in _flat(item)] if isinstance(result, (tuple, list)) else []


def _time_us(call: Any, repeats: int = 30) -> float:
    """Return the median time of a call on a cold L2, in microseconds."""
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def tune_row(kernel: str, row: configs.Row, example: aot.Example) -> tuple[dict[str, int], float, float]:
    """Return the fastest launch whose result equals the present one's, its time and the present one's, in µs."""
    call = _launches(example, kernel)
    best, best_us, present_us, expected = row.launch, float("inf"), float("nan"), None
    for launch in candidates(row):
        try:
            with dispatch.backend("triton"), configs.override(kernel, launch):
                result = [tensor.double() for tensor in _flat(call())]
                torch.cuda.synchronize()
                if expected is None:
                    expected = result
                scale = [max(float(want.norm()), 1e-30) for want in expected]
                errors = [float((got - want).norm()) / s for got, want, s in zip(result, expected, scale, strict=True)]
                if not all(error < 1e-2 for error in errors):
                    continue
                took = _time_us(call)
        except Exception as error:  # what a candidate can't do (registers, shared memory) is known only by trying
            if launch == row.launch:
                raise
            print(f"  {launch}: {type(error).__name__}", file=sys.stderr)
            continue
        present_us = took if launch == row.launch else present_us
        if took < best_us * 0.98:  # a difference within the noise isn't worth a change
            best, best_us = launch, took
    return best, best_us, present_us


def format_table(table: dict[str, Any]) -> str:
    """Write a table with one row a line."""
    text = json.dumps(table, indent=2)

    def one_line(match: re.Match[str]) -> str:
        return re.sub(r"\s*\n\s*", " ", match[0]).replace("{ ", "{").replace(" }", "}")

    return re.sub(r'\{\s*"(up_to|launch)"[\s\S]*?\}\s*\}(?=,?\s*[\n\]])', one_line, text) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Retune the launch tables for this machine's GPU."""
    parser = argparse.ArgumentParser(prog="python -m mixnas.kernels.tools.retune", description=main.__doc__)
    parser.add_argument("families", nargs="*", default=FAMILIES, help="which families (default: all)")
    parser.add_argument("--output", type=Path, default=configs.TABLES, help="folder to write the tables to")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() or not dispatch.HAS_TRITON:
        parser.error("retuning times kernels on a GPU: it needs a CUDA device and Triton, and finds none here")
    gpu = configs.gpu_of(torch.empty(0, device="cuda"))
    for family in arguments.families:
        module = importlib.import_module(f"mixnas.kernels.{family}")
        table = json.loads(json.dumps(configs.load()[family]))
        for kernel in table["kernels"]:
            tuned = []
            for row in configs.rows(kernel, configs.ANY_GPU):
                example = next(iter(module.aot_examples(kernel, dict(row.up_to))))
                launch, best_us, before_us = tune_row(kernel, row, example)
                print(f"{kernel} {example.label}: {before_us:.1f} -> {best_us:.1f} us with {launch}")
                tuned.append(({"up_to": row.up_to} if row.up_to else {}) | {"launch": launch})
            table["kernels"][kernel][gpu] = tuned
        table["provenance"][gpu] = {
            "source": "timed by mixnas.kernels.tools.retune, cold L2, median",
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "triton": dispatch.triton.__version__,
        }
        (arguments.output / f"{family}.json").write_text(format_table(table), encoding="utf-8")


if __name__ == "__main__":
    main()
