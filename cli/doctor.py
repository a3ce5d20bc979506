"""`nas doctor`: what this machine has, and what follows for mixnas."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mixnas.cli.printing import print_json, print_table
from mixnas.cli.verbs import Verb

PLACE = 5


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: Its name.
        found: What is there, in words.
        ok: Whether that suffices; None where there is nothing to judge.
        advice: What to do, or what follows.
        required: Whether mixnas cannot work without it.
    """

    what: str
    found: str
    ok: bool | None = None
    advice: str = ""
    required: bool = False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_PACKAGES = (
    # package, required, what it is for, what to install
    ("torch", True, "networks", "torch>=2.11,<2.14"),
    ("numpy", True, "vectors", "numpy>=2"),
    ("scikit-learn", True, "predictors and the digits", "scikit-learn>=1.7"),
    ("pyyaml", True, "files", "pyyaml"),
    ("optuna", False, "searching", "optuna>=5,<6"),
    ("safetensors", False, "saving weights", "safetensors"),
    ("moocore", False, "Pareto fronts", "moocore"),
    ("pillow", False, "pictures from files", "pillow"),
    ("rich", False, "tables and progress", "rich"),
    ("ray", False, "searching on many machines", "'ray[tune]'"),
    ("onnxruntime", False, "measuring the onnxruntime runtime", "onnxruntime onnx onnxscript"),
)


def _packages() -> Iterator[Finding]:
    for name, required, purpose, install in _PACKAGES:
        version = _version(name)
        advice = f"for {purpose}" if version else f"for {purpose}: pip install {install}"
        optional = name in ("ray", "onnxruntime")
        yield Finding(
            name, version or "not installed", True if version else (None if optional else False), advice, required
        )


def _ray() -> Finding:
    from mixnas.search.engines.on_ray.cluster import tried
    from mixnas.search_space.errors import NasError

    try:
        found = tried()
    except NasError as error:
        return Finding("Ray here", f"does not work: {error}", None, "engine: {name: local, workers: 2} needs no Ray")
    return Finding("Ray here", found, "loopback only" in found, "nas search --engine ray")


def _triton() -> Finding:
    version = _version("triton") or _version("pytorch-triton")
    if sys.platform != "linux":
        return Finding("triton", f"not available on {platform.system()}", None, "kernels run as plain PyTorch here")
    if version is None:
        return Finding("triton", "not installed", False, "pip install 'triton>=3.6,<3.8' for the GPU kernels")
    return Finding("triton", version, True, "GPU kernels; on a CPU only in the interpreter, for tests")


def _gpu() -> Finding:
    import torch

    from mixnas.predictors.latency.predictor import installed

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, driver for CUDA {torch.version.cuda}"
        return Finding("GPU", found, True, "searching and profiling run on it with device: auto")
    reason = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
    measured = sorted({device for device, _, _ in installed() if not device.startswith("cpu-")})
    others = f"tables answer for {', '.join(measured)}" if measured else "other devices: nas latency query --estimate"
    return Finding("GPU", f"none: {reason}", None, f"everything runs on the CPU; {others}")


def _energy() -> Finding:
    import torch

    from mixnas.predictors.measuring.energy import counter_of
    from mixnas.search_space.errors import ConfigError

    try:
        counter_of("cuda" if torch.cuda.is_available() else "cpu")
    except ConfigError as error:
        return Finding("energy", "not counted here", None, str(error))
    return Finding("energy", "the device counts it", True, "objectives and constraints may name energy_mj")


def _cpu() -> Iterator[Finding]:
    import torch

    from mixnas.search_space.errors import counted

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding(
        "CPU",
        f"{counted(cores, 'core')}, torch uses {counted(torch.get_num_threads(), 'thread')}",
        True,
        torch.backends.cpu.get_cpu_capability(),
    )
    load = os.getloadavg()[0]
    busy = load > 0.5 * cores
    advice = "other work is running: latencies will have wide intervals" if busy else "quiet enough to measure"
    yield Finding("load", f"{load:.1f} over the last minute", None if busy else True, advice)


def examine() -> list[Finding]:
    """Look at Python, packages, processors, disk. Imports torch."""
    version = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 13)
    findings = [
        Finding("Python", version, supported, "" if supported else "3.11 to 3.13 is supported", required=True),
        Finding("system", f"{platform.system()} {platform.machine()}", sys.platform in ("linux", "darwin") or None),
        *_packages(),
        _triton(),
    ]
    if _version("torch") is not None:
        from mixnas.predictors.measuring.device import device_name

        findings += [_gpu(), *_cpu(), _energy()]
        findings.append(Finding("device name", device_name(), None, "as in nas latency query --device"))
    if _version("ray") is not None and _version("torch") is not None:
        findings.append(_ray())
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    findings.append(Finding("disk", f"{free:.1f} GiB free here", free > 1, "" if free > 1 else "runs need about 1 GiB"))
    return findings


def doctor(args: argparse.Namespace) -> int:
    """What this machine has, what will work, what to install."""
    findings = examine()
    if args.json:
        print_json([{"what": f.what, "found": f.found, "ok": f.ok, "advice": f.advice} for f in findings])
    else:
        mark = {True: "ok", False: "missing", None: "-"}
        print_table(args, ["what", "", "found", "advice"], [[f.what, mark[f.ok], f.found, f.advice] for f in findings])
    return 0 if all(f.ok is not False or not f.required for f in findings) else 1


VERBS = (Verb("doctor", "what this machine has, what will work, what to install", doctor),)
