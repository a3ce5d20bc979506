"""Registers and shared memory of the launches in the tables, without a compiler; and which launches a call makes.

`resources.csv` holds what the ahead-of-time compiler finds for every example of every row, for each Triton that it was
written with. `python -m mixnas.kernels.tools.resources` writes the rows of the Triton that runs it anew: after a change
to a kernel or to a launch table, and for another Triton. Those of others stay while they are of the same launches. It
has no provenance of its own but the columns `arch` and `triton`: it follows from the sources.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixnas.kernels import FAMILIES, dispatch
from mixnas.kernels.tools import aot

PATH = Path(__file__).parents[1] / "resources.csv"
COLUMNS = ("kernel", "gpu", "example", "dtype", "options", "registers", "stack_bytes", "shared_bytes", "arch", "triton")
_FAR = 4.0  # an option that differs and isn't a number counts like a factor of 16

Watch = Callable[[str, tuple[int, ...], str, tuple[Any, ...], Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Resources:
    """What one launch was compiled to.

    Attributes:
        dtype: Of its first floating-point operand.
        options: Constants, `num_warps` and `num_stages` of the launch.
        registers: Per thread.
        shared_bytes: Per block.
    """

    dtype: str
    options: dict[str, int | str]
    registers: int
    shared_bytes: int


def _plain(options: Mapping[str, Any]) -> dict[str, int | str]:
    return {name: int(value) if isinstance(value, int) else str(value) for name, value in sorted(options.items())}


def _value(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def _dtype(arguments: Sequence[Any]) -> str:
    floating = (a.dtype for a in arguments if isinstance(a, torch.Tensor) and a.is_floating_point())
    return str(next(floating, torch.float32)).removeprefix("torch.")


def _columns(options: Mapping[str, Any], arguments: Sequence[Any]) -> dict[str, str]:
    text = " ".join(f"{name}={value}" for name, value in _plain(options).items())
    return {"dtype": _dtype(arguments), "options": text}


def read() -> dict[str, list[dict[str, str]]]:
    """Return the rows of `resources.csv` by Triton's version, the newest last."""
    found: dict[str, list[dict[str, str]]] = {}
    with open(PATH, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["triton"], []).append(row)
    return dict(sorted(found.items(), key=lambda item: _version(item[0])))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def version_taken() -> str:
    """Return the Triton whose resources are taken: the one that is here, or the nearest below, or the lowest."""
    known = list(read())
    if not dispatch.HAS_TRITON:
        return known[-1]
    here = _version(dispatch.triton.__version__)
    return max((version for version in known if _version(version) <= here), key=_version, default=known[0])


@functools.cache
def load() -> dict[str, list[Resources]]:
    """Return what was compiled, by kernel, with the Triton of `version_taken`."""
    found: dict[str, list[Resources]] = {}
    for row in read()[version_taken()]:
        pairs = (item.split("=", 1) for item in row["options"].split())
        options = {name: _value(value) for name, value in pairs}
        compiled = Resources(row["dtype"], options, int(row["registers"]), int(row["shared_bytes"]))
        found.setdefault(row["kernel"], []).append(compiled)
    return found


def resources_of(kernel: str, dtype: str, options: Mapping[str, Any]) -> Resources | None:
    """Return what the most similar launch was compiled to; None for a kernel that isn't in `resources.csv`.

    Args:
        kernel: The kernel's name, without `_kernel`.
        dtype: Of its first floating-point operand, such as "float32".
        options: Of the launch.
    """
    wanted = _plain(options)

    def distance(compiled: Resources) -> float:
        total = 0.0 if compiled.dtype == dtype else _FAR
        for name, value in wanted.items():
            other = compiled.options.get(name)
            if isinstance(value, int) and isinstance(other, int) and min(value, other) > 0:
                total += abs(math.log2(value / other))
            elif value != other:
                total += _FAR
        return total

    return min(load().get(kernel, ()), key=distance, default=None)


@contextlib.contextmanager
def watching(watch: Watch, gpu: str, run: bool) -> Iterator[None]:
    """Tell `watch(kernel, grid, dtype, arguments, options)` of every launch in this process for a while.

    Args:
        watch: Called before each launch.
        gpu: The table's name of the GPU whose rows are taken.
        run: Launch for real, on CUDA tensors. Otherwise nothing is launched, whatever the tensors' device: operators
            take the path of their Triton kernels, and their results are uninitialised memory.
    """
    modules = [importlib.import_module(f"mixnas.kernels.{family}") for family in FAMILIES]
    door = dispatch.launch

    def watched(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
        name = kernel.__name__.removesuffix("_kernel")
        watch(name, tuple(grid), _dtype(arguments), arguments, options)
        door(kernel, grid, *arguments, **options)

    with contextlib.ExitStack() as stack:
        for module in modules:
            if getattr(module, "launch", None) is door:
                stack.callback(setattr, module, "launch", door)
                module.launch = watched  # type: ignore[attr-defined]
        if not run:
            stack.enter_context(dispatch.backend("triton"))
            stack.enter_context(dispatch.recording(lambda *_: None, gpu))
        yield


def launches() -> Iterator[dict[str, str]]:
    """Yield the columns of `resources.csv` that need no compiler, in its order."""
    for _, kernel, gpu, _, _, example in aot._launches(FAMILIES):
        _, operands, options = aot._record(kernel, gpu, example)
        yield {"kernel": kernel, "gpu": gpu, "example": example.label, **_columns(options, operands)}


def table_text() -> str:
    """Compile everything and return the text of `resources.csv`, other Tritons' rows of the same launches included."""
    here, asked = dispatch.triton.__version__, list(launches())
    compiled_here = []
    for columns, compiled in zip(asked, aot.compile_table(), strict=True):
        assert (columns["kernel"], columns["example"]) == (compiled.kernel, compiled.label)
        counts = {name: str(getattr(compiled, name)) for name in ("registers", "stack_bytes", "shared_bytes")}
        compiled_here.append(columns | counts | {"arch": f"sm_{aot.ARCH}", "triton": here})
    tables = {version: rows for version, rows in read().items() if version != here and launches_in(rows) == asked}
    tables[here] = compiled_here
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for version in sorted(tables, key=_version):
        writer.writerows(tables[version])
    return text.getvalue()


def launches_in(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the columns of rows of `resources.csv` that say what was launched."""
    return [{name: row[name] for name in ("kernel", "gpu", "example", "dtype", "options")} for row in rows]


def main(argv: list[str] | None = None) -> None:
    """Compile every launch of the tables ahead of time and write `resources.csv`."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m mixnas.kernels.tools.resources", description=main.__doc__
    )
    parser.add_argument("--output", type=Path, default=PATH, help="where to write (default: beside the launch tables)")
    parser.parse_args(argv).output.write_text(table_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
