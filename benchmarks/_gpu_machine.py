"""Step "machine" of `gpu.py`: which device this is, what it reaches, and what is installed."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from _gpu_context import Context, first_line
from _gpu_results import EXIT_REFUSED, WHY, read_json, unfit, write_json
from _gpu_steps import NO_GPU, versions


def _rates() -> dict[str, float]:
    """Copy bandwidth, plain float32 and bf16 matrix rates, as median of several; special functions by the clock."""
    import torch

    def seconds(call: Any, repeats: int = 9) -> float:
        times = []
        for _ in range(3):
            call()
        for _ in range(repeats):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return sorted(times)[repeats // 2]

    pair = [torch.randn(2**29, device="cuda"), torch.empty(2**29, device="cuda")]
    rates = {"copy_bytes_per_s": 2 * 4 * pair[0].numel() / seconds(lambda: pair[1].copy_(pair[0]))}
    pair.clear()
    a, b = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    rates["fp32_operations_per_s"] = 2 * 8192**3 / seconds(lambda: a @ b, 5)
    narrow_a, narrow_b = a.bfloat16(), b.bfloat16()
    rates["matrix_operations_per_s"] = 2 * 8192**3 / seconds(lambda: narrow_a @ narrow_b)
    return rates


def run(context: Context) -> None:
    """Look, and write it into gpu.json under "machine"."""
    import torch

    from mixnas.predictors.measuring.device import provenance

    if not context.dry and not torch.cuda.is_available():
        _refuse(NO_GPU)
    why = unfit(context.out, context.dry, context.device)
    if why:
        _refuse(why)
    found: dict[str, Any] = {"device": context.device, "versions": versions()}
    found["cores"] = os.cpu_count()
    names = ("triton", "numpy", "sklearn", "yaml", "rich", "safetensors", "optuna", "ray", "pandas", "fla", "gemlite")
    found["installed"] = {name: importlib.util.find_spec(name) is not None for name in names}
    if not context.dry:
        found |= provenance("cuda")
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            found["rates"] = _rates()
        except Exception as error:
            found["rates_failed"] = first_line(error)
        properties = torch.cuda.get_device_properties(0)
        clock_hz = 1e3 * getattr(properties, "clock_rate", 1_755_000)
        found.setdefault("rates", {})["special_operations_per_s"] = 16 * properties.multi_processor_count * clock_hz
    path = context.out / "gpu.json"
    write_json(path, read_json(path) | {"machine": found})
    print({key: found[key] for key in ("device", "versions", "cores")}, found.get("rates", {}))


def _refuse(why: str) -> None:
    print(f"{WHY}{why}")
    raise SystemExit(EXIT_REFUSED)
