"""Step "fast" of `gpu.py`: `kernels.py`'s grid against floors and peers, gone on from where an earlier call ended."""

from __future__ import annotations

import time
import warnings

import torch
from _gpu_context import Context, kernel_sources, require_answers
from _kernel_grid import FLA, grid, tiny

import kernels as benchmark


def run(context: Context) -> None:
    """Time what the time allows; peers that are slow to start come last."""
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if context.dry:
        torch.set_num_threads(1)
    timer = benchmark.Timer(0.001, 1, 2) if context.dry else benchmark.Timer(0.08, 20, 120)
    rates = context.machine.get("rates") or {}
    ceiling = rates if len(rates) == 4 else benchmark.ceilings(timer)
    results = context.results("fast", ceilings=ceiling, cudnn_benchmark=True, allow_tf32=False)
    sources = kernel_sources()
    points = list(tiny() if context.dry else grid())
    todo = [(point, False) for point in points]
    todo += [(point, True) for point in points if not context.dry and (point.compiled or FLA in point.peers)]
    budget = benchmark.Budget(time.perf_counter() + context.left, len(todo))
    for point, slow in todo:
        key = f"{point.family}: {point.label}"
        known = results.known(key, sources)
        if known is not None and known["whole"] and (not slow or known.get("slow_peers")):
            budget.start_point()
            continue
        before = len(budget.left_out)
        record = benchmark.run_point(point, timer, ceiling, budget, slow=slow, record=known if slow else None)
        late = [entry for entry in budget.left_out[before:] if entry["why"] == "out of time"]
        if not record["implementations"] and "failed" not in record:
            results.leave_out(key, "out of time")
            continue
        whole = known["whole"] if slow and known is not None else not late
        results.keep(key, record | {"sources": sources, "whole": whole, "slow_peers": slow and not late})
        benchmark.show(record)
        if any("failed" in entry for entry in (record, *record["implementations"].values())):
            require_answers(context)
    for entry in (*budget.left_out, *benchmark.never_here(points)):
        results.leave_out(", ".join(value for name, value in entry.items() if name != "why"), entry["why"])
    results.complete()
