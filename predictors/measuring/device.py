"""Which device this is: its standard name, and the provenance that stands beside every measurement.

Naming needs no torch, so that a query answers quickly; provenance of a GPU does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixnas.search_space.errors import ConfigError, nearest

DEFAULT_THREADS = 1
"""Threads inside an operator. One: small networks gain nothing from more, and a shared machine disturbs one less."""

_LONGEST_NAME = 200

INTERPRETER = "interpreter"
"""Device name of timings taken in Triton's interpreter: they are no device's, and no predictor is fitted on them."""


def nearest_device(name: str, known: Iterable[str]) -> str:
    """`nearest`, among devices with the same numbers in their names: a device of another number is another device."""
    numbers = re.findall(r"\d+", str(name)[:_LONGEST_NAME])
    return nearest(name, [device for device in known if re.findall(r"\d+", device) == numbers])


def _slug(text: str) -> str:
    text = re.sub(r"\((?:r|tm|c)\)|®|™|\bcpu\b|@.*$|\bwith radeon.*$", " ", text.lower())
    text = re.sub(r"\b\d+-core\b|\bprocessor\b", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


@functools.cache
def cpu_model() -> str:
    """The CPU's model as a short slug, for example "intel-xeon-6-167" (family and model where the name is hidden)."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if not line.strip():
                break
            fields[key.strip()] = value.strip()
    except OSError:
        pass
    name = fields.get("model name") or fields.get("Model") or ""
    if not name and platform.system() == "Darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        name = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    slug = _slug(name or platform.processor() or platform.machine() or "unknown")
    if not any(character.isdigit() for character in slug) and "cpu family" in fields:
        slug += f"-{fields['cpu family']}-{fields.get('model', '0')}"  # a hypervisor hides the number
    return slug


def gpu_models() -> list[str]:
    """Slugs of the NVIDIA GPUs of this machine, for example ["nvidia-h200"]; needs no torch."""
    found = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        match = re.search(r"^Model:\s*(.+)$", path.read_text(), re.MULTILINE)
        if match:
            found.append(match.group(1))
    if not found and shutil.which("nvidia-smi"):  # some containers show no /proc/driver
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
            found = [line for line in done.stdout.splitlines() if line.strip() and not done.returncode]
    torch = sys.modules.get("torch")
    if not found and torch is not None and torch.cuda.is_available():  # others have neither
        found = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    slugs = map(_slug, found)
    return [slug if slug.startswith("nvidia") else f"nvidia-{slug}" for slug in slugs]


def device_name(kind: str = "auto", threads: int = DEFAULT_THREADS) -> str:
    """The standard name of a device of this machine.

    Args:
        kind: "cpu", "cuda", or "auto": the GPU where there is one, else the CPU. Another name is returned unchanged.
        threads: Threads inside an operator; part of a CPU's name.

    Returns:
        For example "cpu-intel-xeon-6-167-1t" or "nvidia-h200".

    Raises:
        ConfigError: "cuda" on a machine without an NVIDIA GPU.
    """
    if kind not in ("auto", "cpu", "cuda"):
        return kind
    gpus = gpu_models() if kind != "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") != "" else []
    if kind == "cuda" and not gpus:
        raise ConfigError("device 'cuda': this machine has no NVIDIA GPU. Allowed here: cpu, or the name of a device.")
    return gpus[0] if gpus else f"cpu-{cpu_model()}-{threads}t"


def require_cuda() -> None:
    """Refuse to take a CPU for the GPU that was asked for.

    Raises:
        ConfigError: This machine has no NVIDIA GPU, or torch cannot use it.
    """
    import torch

    if not torch.cuda.is_available():
        device_name("cuda")  # whether there is one at all
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise ConfigError(
            f"device 'cuda': torch {torch.__version__} cannot use this machine's GPU: it {build}. Install a torch that "
            "fits the driver (nas doctor), or allow another device: cpu, or the name of one."
        )


def _commit() -> str:
    """The commit of the checkout that this file is in, "" where it is not in one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def provenance(kind: str = "cpu", threads: int = DEFAULT_THREADS) -> dict[str, Any]:
    """What a measurement depends on beside the network; names no host, user or path.

    Args:
        kind: "cpu" or "cuda".
        threads: Threads inside an operator.

    Returns:
        Plain data: device, cpu, cores, threads, driver, clocks and launch tables of a GPU, versions, commit,
        time (UTC).
    """
    import numpy
    import torch

    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    record: dict[str, Any] = {
        "device": device_name(kind, threads),
        "cpu": cpu_model(),
        "cores": cores,
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "gpu": torch.cuda.get_device_name(0),
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "launch_tables": launch_tables_digest(),
            **_nvidia_smi(),
        }
        try:
            import triton

            record["triton"] = triton.__version__
        except ImportError:
            record["triton"] = ""
    return record


def launch_tables_digest() -> str:
    """12 hexadecimal digits of the Triton kernels' launch tables: with a shape they say how a kernel was configured."""
    tables = sorted((Path(__file__).resolve().parents[2] / "kernels").glob("*.json"))
    return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in tables)).hexdigest()[:12]


def _nvidia_smi() -> dict[str, str]:
    fields = {"driver_version": "driver", "clocks.sm": "clock_sm", "clocks.mem": "clock_memory", "power.limit": "power"}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(fields.values(), values, strict=True)) if len(values) == len(fields) else {}
