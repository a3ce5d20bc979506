"""How `gpu.py` runs its steps: each in a process group of its own, with a share of the time, whatever becomes of it.

Needs the standard library only: nothing that a step can break is loaded here.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _checkout import ROOT, use_checkout
from _gpu_results import DRY_DEVICE, EXIT_REFUSED, WHY, read_json, write_json

NO_GPU = "gpu.py measures a CUDA device, and torch finds none here. Try it out with --dry."
WEIGHTS = {"right": 95, "tuned": 85, "fast": 95, "measured": 150, "trained": 75}
DRY_WEIGHTS = {"right": 200, "tuned": 80, "fast": 120, "measured": 100, "trained": 100}
INTERPRETED = ("right", "tuned", "fast")  # of a dry run; the others run ATen's forms
_MACHINE_S = 90.0
_WORK = "mixnas-gpu-"  # working folders begin with it
OWNER = "owner"  # in a working folder: locked for as long as the call lives that made it
_NODES = ("nvidia*", "nvhost*", "dxg")  # in /dev, on any machine where CUDA can be
_RATES = 4
_TRIES = 3
_TERM_S = 3.0  # between asking a process to end and ending it
_KEPT_LOG = 4 * 2**20
_LEFT_BEHIND = (
    *(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "docs", "tests", "results"),
    *("shared", "node_modules"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of `gpu.py`.

    Attributes:
        out: Where the results go.
        work: What does not come back: the checkout that runs, caches.
        deadline: When all must have ended, on the clock of `time.monotonic`.
        dry: See `gpu.py`.
        grace_s: How much longer than its share a step may take before it is ended.
        least_s: With less left of its share a step that died is not tried again.
        python: What runs the steps.
    """

    out: Path
    work: Path
    deadline: float
    dry: bool
    grace_s: float
    least_s: float = 15.0
    python: str = sys.executable

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()


def gpus_may_be_here() -> bool:
    """Whether torch could find a CUDA device: a look that takes no time, before a process with torch is started."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    return any(True for node in _NODES for _ in Path("/dev").glob(node)) or bool(devices_here())


def devices_here() -> list[str]:
    """Standard names of the GPUs of this machine, as far as they are known without torch."""
    use_checkout()
    from mixnas.predictors.measuring.device import gpu_models

    return gpu_models()


def new_work() -> Path:
    """A working folder, locked as long as this process lives; those of calls that were killed are removed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_WORK}*/{OWNER}"):
        with contextlib.suppress(OSError), open(folder, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held by one that lives
            shutil.rmtree(folder.parent, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=_WORK))
    descriptor = os.open(work / OWNER, os.O_RDWR | os.O_CREAT, 0o600)  # stays open; no child inherits it
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return work


def checkout(work: Path) -> Path:
    """Copy this checkout, so that launch tables can be tuned without changing it; returns its folder for PYTHONPATH."""
    folder = work / "src"
    shutil.copytree(ROOT, folder / "mixnas", ignore=shutil.ignore_patterns(*_LEFT_BEHIND), dirs_exist_ok=True)
    return folder


def commit() -> str:
    """The commit of this checkout; empty where there is no git to ask."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if not done.returncode else ""


def environment(run: Run, step: str) -> dict[str, str]:
    """What a step's process finds in its environment."""
    known = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    before = [known["PYTHONPATH"]] if known.get("PYTHONPATH") else []
    known["PYTHONPATH"] = os.pathsep.join([str(run.work / "src"), *before])
    known["PYTHONUNBUFFERED"] = "1"
    known["MIXNAS_COMMIT"] = commit()
    # What was compiled serves the next call too.
    cache = Path(tempfile.gettempdir()) / f"mixnas-gpu-cache-{os.getuid()}"
    known.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    known.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    known["TORCHINDUCTOR_COMPILE_THREADS"] = "2" if step == "right" else "8"
    if run.dry:
        known["OMP_NUM_THREADS"] = "1"
        known["CUDA_VISIBLE_DEVICES"] = ""
        if step in INTERPRETED:
            known["TRITON_INTERPRET"] = "1"
    return known


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started; what cannot be ended is left alone."""
    for number, patience in ((signal.SIGTERM, _TERM_S), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # those that it left behind


def start(run: Run, step: str, seconds: float) -> subprocess.Popen[bytes]:
    """Start a step's process; what it says goes into the log."""
    script = run.work / "src" / "mixnas" / "benchmarks" / "gpu.py"
    command = [run.python, str(script), "--step", step, "--seconds", f"{seconds:.1f}"]
    command += ["--out", str(run.out), "--work", str(run.work), *(["--dry"] if run.dry else [])]
    with open(run.out / "log.txt", "ab") as log:
        log.write(f"\n== {step}, {seconds:.0f} s\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            env=environment(run, step),
            cwd=run.work,
            stdin=subprocess.PIPE,  # nothing comes; its end tells the step that this process is no more
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
        )


def wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The exit code of a process; raises `subprocess.TimeoutExpired` where it takes longer."""
    return process.wait(seconds)


def one_try(run: Run, step: str, seconds: float) -> tuple[str, str]:
    """Run a step once; returns how it ended ("done", "refused", "failed", "died", "timed out") and why."""
    process = start(run, step, seconds)
    try:
        code = wait(process, seconds + run.grace_s)
    except subprocess.TimeoutExpired:
        return "timed out", f"it was ended {run.grace_s:.0f} s after its {seconds:.0f} s"
    finally:
        _end(process)
        if process.stdin is not None:
            process.stdin.close()
    if code == 0:
        return "done", ""
    if code < 0:
        return "died", f"by signal {-code}"
    return "refused" if code == EXIT_REFUSED else "failed", _last_words(run.out / "log.txt")


def _last_words(log: Path) -> str:
    """Why the last process ended: what it said of it, or else its last line (helpers may speak after it)."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 8000))
        text = file.read().decode(errors="replace")
    lines = [line for line in text.rpartition("\n== ")[2].splitlines()[1:] if line.strip()]
    said = [line.removeprefix(WHY) for line in lines if line.startswith(WHY)] or lines
    return said[-1][:300] if said else "it said nothing"


def _progress(run: Run, step: str) -> int:
    """How much a step has found so far: it is tried again as long as it gets further."""
    return len(str(read_json(run.out / f"{step}.json").get("items", "")))


def run_step(run: Run, step: str, seconds: float) -> dict[str, Any]:
    """Run a step, again where it died on the way, until its seconds are over; returns what became of it."""
    began, until = time.monotonic(), time.monotonic() + seconds
    tries: list[str] = []
    state, why = "timed out", "there was no time for it"
    while len(tries) < _TRIES and (until - time.monotonic() > run.least_s or not tries):
        before = _progress(run, step)
        state, why = one_try(run, step, max(run.least_s / 15, until - time.monotonic()))
        tries.append(f"{state} {why}".strip())
        if state in ("done", "refused", "timed out") or _progress(run, step) == before:
            break
    found = read_json(run.out / f"{step}.json")
    if state == "done" and found and not found.get("complete"):
        state, why = "incomplete", f"{len(found.get('left_out', {}))} things left out for want of time"
    return {"state": state, "why": why, "tries": tries, "seconds": round(time.monotonic() - began, 1)}


def versions() -> dict[str, str]:
    """What is installed, of what results depend on; "" where it is not."""
    found = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def machine_is_known(run: Run) -> bool:
    """Whether an earlier call has looked at this device with these packages: the look takes a start of torch."""
    machine = read_json(run.out / "gpu.json").get("machine")
    if not isinstance(machine, dict) or machine.get("versions") != versions():
        return False
    if run.dry:
        return machine.get("device") == DRY_DEVICE
    rates = machine.get("rates")
    return isinstance(rates, dict) and len(rates) == _RATES and machine.get("device") in devices_here()[:1]


def share(step: str, steps: list[str], left: float, dry: bool = False) -> float:
    """A step's share of the seconds that are left for it and those behind it: what one leaves over goes to these."""
    weights = DRY_WEIGHTS if dry else WEIGHTS
    return left * weights[step] / sum(weights[name] for name in steps[steps.index(step) :])


def run_all(run: Run, steps: list[str], say: Any = print) -> dict[str, Any]:
    """Run the steps one after the other; returns the call as it is noted in gpu.json."""
    path = run.out / "gpu.json"
    call: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(run.left, 1),
        "steps": {},
    }
    calls = [*read_json(path).get("calls", []), call]

    def note() -> None:
        write_json(path, read_json(path) | {"format": 1, "dry": run.dry, "calls": calls})

    note()
    if machine_is_known(run):
        machine: dict[str, Any] = {"state": "known", "why": "from an earlier call", "seconds": 0.0}
    else:
        machine = run_step(run, "machine", min(_MACHINE_S, max(run.left - run.grace_s, 5.0)))
    call["steps"]["machine"] = machine
    note()
    say(f"machine: {machine['state']} in {machine['seconds']} s {machine['why']}")
    if machine["state"] == "refused":
        return call
    for step in steps:
        seconds = share(step, steps, run.left, run.dry) - run.grace_s
        if seconds < min(2.0, run.least_s):
            call["steps"][step] = {"state": "left out", "why": "out of time", "seconds": 0.0}
        else:
            say(f"{step}: {seconds:.0f} s ...")
            call["steps"][step] = run_step(run, step, seconds)
        ended = call["steps"][step]
        say(f"{step}: {ended['state']} after {ended['seconds']} s {ended['why']}")
        note()
        shorten(run.out / "log.txt")
    return call


def shorten(log: Path) -> None:
    """Keep the log within what comes back."""
    if log.exists() and log.stat().st_size > _KEPT_LOG:
        with open(log, "rb+") as file:
            file.seek(-_KEPT_LOG // 2, os.SEEK_END)
            rest = file.read()
            file.seek(0)
            file.write(b"(the beginning was cut)\n" + rest)
            file.truncate()
