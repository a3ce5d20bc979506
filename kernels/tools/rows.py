"""The rows of the launch tables as work for `retune`, each with the shapes that it is timed on; and back to tables."""

import datetime
import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mixnas.kernels import FAMILIES, configs, dispatch
from mixnas.kernels.tools import aot


@dataclass(frozen=True)
class Job:
    """One row to tune.

    Attributes:
        bounds: The row's, with that of a small launch where it is one.
        launch: The present one.
        small: Whether it is the small launches of a row.
    """

    family: str
    kernel: str
    bounds: Mapping[str, int]
    launch: Mapping[str, int]
    small: bool = False
    spills_because: str = ""

    @property
    def key(self) -> str:
        """Names the row in records."""
        bounds = ", ".join(f"{name} <= {bound}" for name, bound in self.bounds.items())
        return f"{self.kernel}: {bounds or 'any'}"

    def examples(self) -> list[aot.Example]:
        """The shapes that it is timed on; the first is what candidates are compared on."""
        module = importlib.import_module(f"mixnas.kernels.{self.family}")
        return [example for example in module.aot_examples(self.kernel, dict(self.bounds)) if example.timed]


def jobs(families: Iterable[str] = FAMILIES) -> list[Job]:
    """Every row for any GPU, and its small launches."""
    found = []
    for family in families:
        small = getattr(importlib.import_module(f"mixnas.kernels.{family}"), "SMALL", None)
        for kernel in configs.load()[family]["kernels"]:
            for row in configs.rows(kernel, configs.ANY_GPU):
                if small:
                    found.append(Job(family, kernel, row.up_to | small, row.launch, True, row.spills_because))
                found.append(Job(family, kernel, row.up_to, row.launch, False, row.spills_because))
    return found


def sources(family: str) -> str:
    """12 hexadecimal digits of what a family's timings depend on beside its table: its source and what all share."""
    digest = hashlib.sha256(dispatch.triton.__version__.encode())
    shared = ("dispatch", "fast_math", "epilogue", "depthwise", "norm")  # the fused block is made of the last three
    for name in (family, f"{family}_kernels", *shared):
        path = configs.TABLES / f"{name}.py"
        digest.update(path.read_bytes() if path.exists() else b"")
    return digest.hexdigest()[:12]


def table_with(
    family: str, gpu: str, launches: Mapping[str, Mapping[str, int]], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a family's table with rows for a GPU: those for any GPU, with other launches where there are any.

    Args:
        family: Which.
        gpu: The table's name of the GPU.
        launches: By `Job.key`; of small launches too, which become rows of their own where they differ.
        provenance: Stands beside the rows.
    """
    table: dict[str, Any] = json.loads(json.dumps(configs.load()[family]))
    for kernel, by_gpu in table["kernels"].items():
        rows: list[dict[str, Any]] = []
        for job in (job for job in jobs([family]) if job.kernel == kernel):
            launch = dict(launches.get(job.key, job.launch))
            if job.small and launch == dict(job.launch):
                continue
            row: dict[str, Any] = {"up_to": dict(job.bounds)} if job.bounds else {}
            row["launch"] = launch
            if job.spills_because and launch == dict(job.launch):
                row["spills_because"] = job.spills_because
            rows.append(row)
        if any(job.kernel == kernel and job.key in launches for job in jobs([family])):
            by_gpu[gpu] = rows
            table["provenance"][gpu] = dict(provenance)
    return table


def format_table(table: dict[str, Any]) -> str:
    """Write a table with one row a line."""
    text = json.dumps(table, indent=2)

    def one_line(match: re.Match[str]) -> str:
        return re.sub(r"\s*\n\s*", " ", match[0]).replace("{ ", "{").replace(" }", "}")

    return re.sub(r'\{\s*"(up_to|launch)"[\s\S]*?\}\s*\}(?=,?\s*[\n\]])', one_line, text) + "\n"


def provenance_of_rows() -> dict[str, Any]:
    """What stands beside rows that were timed here."""
    return {
        "source": "timed by mixnas.kernels.tools.retune: the kernel alone in a CUDA graph, cold L2, median",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": dispatch.triton.__version__,
    }
