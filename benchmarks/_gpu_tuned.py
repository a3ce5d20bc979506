"""Step "tuned" of `gpu.py`: launches of the kernels that are furthest from their floors (`kernels.tools.retune`)."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from _gpu_context import Context, root
from _gpu_results import read_json, was_wrong

from mixnas.kernels import configs
from mixnas.kernels.tools import retune, rows


def _jobs(context: Context) -> list[rows.Job]:
    """Every row; in a dry run one, on next to nothing."""
    if not context.dry:
        return rows.jobs()
    launch = configs.rows("norm_forward", configs.INTERPRETER)[-1].launch
    return [rows.Job("norm", "norm_forward", {"channels": 32, "positions": 16}, launch)]


def run(context: Context) -> None:
    """Tune for as long as there is time, and use what is found from here on."""
    gpu = "interpreter" if context.dry else configs._cuda_name(0)
    results = context.results("tuned", gpu=gpu, table_provenance=rows.provenance_of_rows())
    right, jobs = read_json(context.out / "right.json"), _jobs(context)
    for family in dict.fromkeys(job.family for job in jobs):
        if was_wrong(family, right):  # what it takes does not matter
            results.leave_out(family, "its results are wrong: see right.json")
            jobs = [job for job in jobs if job.family != family]
    known = {}
    for job in jobs:
        found = results.known(job.key, rows.sources(job.family))
        if found is not None and not found["state"].startswith("failed"):
            known[job.key] = retune.Record(**found)

    def keep(record: retune.Record) -> None:
        results.keep(record.key, asdict(record))
        if record.state == "tuned":
            _use(context, gpu, results.items)
            print(f"{record.key}: {_times(record.present)} -> {_times(record.best)} us, floor {record.floor_us} us")

    deadline = time.monotonic() + context.left
    tuner = retune.Tuner(
        deadline,
        keep,
        device=context.torch_device,
        workers=1 if context.dry else context.workers,
        repeats=1 if context.dry else 20,
        most=3 if context.dry else 60,
    )
    found = tuner.run(jobs, known)
    for record in found:
        if record.state == "timed":
            results.leave_out(record.key, "out of time: timed, not tuned")
    for job in jobs:
        if job.key not in results.items:
            results.leave_out(job.key, "out of time")
    results.complete()


def _times(side: dict[str, Any]) -> str:
    return "/".join(str(us) for us in side.get("us", {}).values())


def _use(context: Context, gpu: str, items: dict[str, Any]) -> None:
    """Write the tables of the checkout that runs: the steps behind this one take them."""
    if context.dry:
        return  # an interpreter's row is no device's
    records = {key: retune.Record(**item) for key, item in items.items()}
    for family in {record.family for record in records.values() if record.state == "tuned"}:
        table = rows.table_with(family, gpu, retune.launches(records), rows.provenance_of_rows())
        path = root() / "kernels" / f"{family}.json"
        path.write_text(rows.format_table(table), encoding="utf-8")
