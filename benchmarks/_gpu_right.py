"""Step "right" of `gpu.py`: every kernel and every operator against float64, before anything is timed.

The checks are dealt out in groups, each to a process of its own, several at a time: nothing is timed here. A check that
kills its process (an illegal access) or hangs costs that check: the group goes on behind it in a new process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _gpu_context import EXIT_LOST, Context, first_line, kernel_sources
from _gpu_results import Results

_SCRIPT = Path(__file__).with_name("gpu.py")
_SANITIZER = "/usr/local/cuda/bin/compute-sanitizer"
_LOST = ("illegal memory access", "misaligned address", "device-side assert", "illegal instruction", "launch failure")
_CHECK_S = 100.0  # a check that takes longer has hung
_MEMORY_S = 8.0  # after which another group may have given memory back
_EXIT_BAD_ACCESS = 99
_EXIT_LATE = 4  # there was no time for the rest


def groups(dry: bool) -> list[str]:
    """The groups, those that take longest first; parts of one are joined by "+"."""
    from _gpu_checks import families

    operators = ["operators 0", "operators 1", "operators 2", "policies"]
    if dry:  # starting a process takes longer than most of its checks
        return ["+".join(families(dry)), "+".join(operators)]
    return [*families(dry), *operators, *(["sanitized"] if _sanitizer() is not None else [])]


def _sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or (_SANITIZER if os.path.exists(_SANITIZER) else None)


@dataclass
class _Worker:
    """A group's process, and where its answers stand."""

    group: str
    answers: Path
    process: subprocess.Popen[bytes]
    read: int = 0
    part: str = ""
    begun: str = ""
    since: float = field(default_factory=time.monotonic)

    @property
    def hangs(self) -> bool:
        """Whether it has been at one check for too long."""
        return time.monotonic() - self.since > _CHECK_S

    @property
    def parts_left(self) -> list[str]:
        """Parts of the group that it has not gone through."""
        parts = self.group.split("+")
        return parts[parts.index(self.part) if self.part else 0 :]

    def news(self) -> Iterator[dict[str, Any]]:
        """What it has answered since the last look."""
        try:
            with open(self.answers, "rb") as file:
                file.seek(self.read)
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for line in whole.decode().splitlines():
            answer = json.loads(line)
            self.since = time.monotonic()
            self.begun, self.part = answer["check"] if "begun" in answer else "", answer["group"]
            yield answer


def _start(context: Context, group: str, results: Results, sources: str) -> _Worker:
    answers = context.work / f"right.{time.monotonic_ns()}"
    skip = context.work / f"{answers.name}.skip"
    skip.write_text(json.dumps([key for key in results.items if results.known(key, sources)]))
    command = [sys.executable, str(_SCRIPT), "--step", f"right:{group}"]
    command += ["--seconds", f"{max(context.left, 1.0):.1f}", "--out", str(context.out), "--work", str(context.work)]
    command += ["--answers", str(answers), *(["--dry"] if context.dry else [])]
    environment = dict(os.environ)
    sanitizer = _sanitizer() if group == "sanitized" else None
    if sanitizer is not None:
        options = ["--tool", "memcheck", "--error-exitcode", str(_EXIT_BAD_ACCESS), "--print-limit", "5"]
        command = [sanitizer, *options, *command]
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # an access outside a tensor is one outside an allocation
    return _Worker(group, answers, subprocess.Popen(command, env=environment))


def run(context: Context) -> None:
    """Run all groups, some at a time, until all is checked or the time is over."""
    sources = kernel_sources()
    results = context.results("right")
    waiting = groups(context.dry)
    running: list[_Worker] = []
    while (waiting or running) and context.left > 0:
        while waiting and len(running) < max(2, context.workers - 2):
            running.append(_start(context, waiting.pop(0), results, sources))
        for worker in list(running):
            code = worker.process.poll()
            _take(worker, results, sources)
            hung = code is None and worker.hangs
            if hung:
                worker.process.kill()
                code = worker.process.wait()
            if code is None:
                continue
            _take(worker, results, sources)
            running.remove(worker)
            if code == 0:
                continue
            if code == EXIT_LOST:
                waiting.insert(0, worker.group)
            elif code == _EXIT_LATE:
                _leave_out(results, worker.parts_left, "out of time")
            elif code == _EXIT_BAD_ACCESS and worker.group == "sanitized":
                results.keep("sanitized", {"sources": sources, "right": False, "why": "bad accesses: see log.txt"})
            elif worker.begun:
                why = f"no answer in {_CHECK_S:.0f} s" if hung else f"its process ended with {code}"
                results.keep(worker.begun, {"sources": sources, "group": worker.part, "right": False, "why": why})
                waiting.insert(0, worker.group)
            else:
                _leave_out(results, worker.parts_left, f"its process ended with {code} between two checks")
        time.sleep(0.1)
    for worker in running:
        _take(worker, results, sources)
        worker.process.kill()
        worker.process.wait()
        _leave_out(results, worker.parts_left, f"out of time{', during ' + worker.begun if worker.begun else ''}")
    for group in waiting:
        _leave_out(results, group.split("+"), "out of time")
    if not context.dry and _sanitizer() is None:
        results.leave_out("sanitized", "no compute-sanitizer here")
    results.complete()


def _leave_out(results: Results, parts: list[str], why: str) -> None:
    for part in parts:
        results.leave_out(part, why)


def _take(worker: _Worker, results: Results, sources: str) -> None:
    for answer in worker.news():
        if "begun" not in answer:
            key = answer.pop("check")
            results.keep(key, {"sources": sources, **answer})


def work(context: Context, group: str, answers: Path) -> None:
    """A group's process: one check after the other, each announced before it begins."""
    from _gpu_checks import checks

    skip = set(json.loads(answers.with_name(f"{answers.name}.skip").read_text()))
    with open(answers, "a", encoding="utf-8", buffering=1) as file:

        def answer(**what: Any) -> None:
            file.write(json.dumps(what) + "\n")
            file.flush()

        every = ((part, key, check) for part in group.split("+") for key, check in checks(part, context))
        for part, key, check in every:
            if key in skip:
                continue
            if context.left <= 0:
                raise SystemExit(_EXIT_LATE)
            answer(group=part, check=key, begun=True)
            found = _answered(check)
            answer(group=part, check=key, **found)
            if found.get("context_lost"):
                raise SystemExit(EXIT_LOST)


def _answered(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    began = time.monotonic()
    found: dict[str, Any] = {}
    for patience in (_MEMORY_S, _MEMORY_S, 0.0):
        try:
            found = check()
            break
        except Exception as error:
            found = {"right": False, "raised": True, "why": first_line(error)}
            if any(word in str(error) for word in _LOST):
                found["context_lost"] = True
            if "out of memory" not in str(error).lower():
                break
        # The other groups hold it: not wrong, and to be asked again.
        found |= {"right": None, "sources": "out of memory"}
        _give_back_memory()
        time.sleep(patience)
    return found | {"seconds": round(time.monotonic() - began, 2)}


def _give_back_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
