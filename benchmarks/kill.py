"""`kill -9` of a search at random moments: what was reported finished is there after `nas resume`, and none twice.

    python benchmarks/kill.py [--kills 10] [--seed 0]

Starts a stand-alone search of a small space, kills the whole process at a random moment (import, trial, write, final
phase), looks at what it had reported, resumes, and so on; then lets the last resume end. Prints one JSON.

`hostile.py kills` kills in each phase on purpose: a hook in the process ends it at the n-th time that a place is come
to (`PLACES`), not a clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

_SPACE = """\
space:
  stem: conv
  stages:
    - width: [4, 8]
      depth: [1, 2, 3]
      block:
        mixer: [identity, pooling, {name: dwconv, kernel_size: [3, 5]}]
        channel_mixer: {name: mlp, expansion: [1, 2]}
"""

CONFIG = (
    """\
task: digits
search: {strategy: nsga2, trials: %d, seed: 3, evaluator: standalone}
train: {steps: 12}
final: {candidates: 4}
latency: {passes: 1, final_passes: 2}
"""
    + _SPACE
)


CONFIG_SUPERNET = (
    """\
task: digits
search: {strategy: nsga2, trials: %d, seed: 3}
supernet: {steps: 120, batch_size: 16, samples: 1, checkpoint_every: 0}
final: {candidates: 3, train: {steps: 8}}
latency: {profile: 12s, passes: 1, final_passes: 2}
"""
    + _SPACE
)

_REPORTED = re.compile(r"^trial (\d+) done (\w{12})\s*$", re.MULTILINE)


class _Search:
    """One process of the search, and the trials that it has reported on stderr."""

    def __init__(self, arguments: list[str]) -> None:
        command = [sys.executable, "-m", "mixnas.nas", *arguments, "-v"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
        )
        self.reported: set[tuple[int, str]] = set()
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if match := _REPORTED.match(line):
                self.reported.add((int(match[1]), match[2]))

    def wait(self) -> int:
        status = self.process.wait()
        self._reader.join()
        return status


def _trials(root: Path, run: str) -> list[dict[str, Any]]:
    from mixnas.search.run.directory import Run
    from mixnas.search.study.objectives import parse_objectives
    from mixnas.search.study.reading import read_results

    opened = Run.open(run, root)
    results = read_results(opened.journal, parse_objectives(opened.manifest["fixed"]["objectives"]))
    return [{"number": r.number, "id": r.id, "status": r.status} for r in results.records]


def kill_and_resume(root: Path, kills: int, trials: int, rng: random.Random, longest: float = 16.0) -> dict[str, Any]:
    """Do it; returns what was seen.

    Raises:
        AssertionError: A reported trial was lost, an architecture was evaluated twice, or a process ended badly.
    """
    config = root / "config.yaml"
    config.write_text(CONFIG % trials)
    common = ["--runs", str(root / "runs")]
    arguments = ["search", "-c", str(config), "--name", "killed", *common]
    reported: set[tuple[int, str]] = set()
    moments = []
    done_kills = 0
    while done_kills < kills:
        search = _Search(arguments)
        moment = rng.uniform(0.2, longest)
        time.sleep(moment)
        ended = search.process.poll() is not None
        if not ended:
            search.process.send_signal(signal.SIGKILL)
            done_kills += 1
        status = search.wait()
        assert status in (0, -signal.SIGKILL), f"status {status}: {''.join(search.lines[-5:])}"
        reported |= search.reported
        if (root / "runs" / "killed" / "manifest.json").exists():
            arguments = ["resume", "killed", *common]
            if ended:  # all trials were done: give it more to do
                trials += trials // 2
                arguments += ["--trials", str(trials)]
        moments.append({"seconds": round(moment, 2), "reported": len(reported)})
    arguments = ["resume", "killed", *common, "--trials", str(trials)]
    last = _Search(arguments)
    status = last.wait()
    assert status == 0, f"the last resume ended with {status}: {''.join(last.lines[-8:])}"
    reported |= last.reported
    found = _trials(root / "runs", "killed")
    done = {(t["number"], t["id"]) for t in found if t["status"] == "done"}
    lost = reported - done
    ids = [identity for _, identity in done]
    assert not lost, f"reported and gone: {sorted(lost)}"
    assert len(ids) == len(set(ids)), "an architecture was evaluated twice"
    evaluated = sum(t["status"] in ("done", "failed") for t in found)
    assert evaluated == trials, f"{evaluated} trials evaluated of {trials}"
    interrupted = sum(t["status"] == "interrupted" for t in found)
    return {
        "kills": done_kills,
        "moments": moments,
        "trials_done": len(done),
        "reported": len(reported),
        "lost": len(lost),
        "evaluated_twice": len(ids) - len(set(ids)),
        "interrupted_trials": interrupted,
        "last_status": status,
    }


PLACES = {
    "making the run": ("mixnas.search.run.directory", None, "write_manifest"),
    "manifest": ("mixnas.search.run.directory", "Run", "update"),
    "configuration": ("mixnas.search.run.directory", "Run", "write_config"),
    "tables": ("mixnas.search.run.directory", "Run", "write_tables"),
    "a file's rename": ("mixnas.search_space.files", "os", "replace"),
    "proposal": ("mixnas.search.study.study", "SearchStudy", "ask"),
    "evaluation": ("mixnas.evaluators.protocol", None, "attempt"),
    "telling": ("mixnas.search.study.study", "SearchStudy", "tell"),
    "journal": ("mixnas.search.study.journal", "JournalFile", "flush"),
    "journal to the disk": ("mixnas.search.study.journal", "JournalFile", "sync"),
    "summary": ("mixnas.search.study.study", "SearchStudy", "summarise"),
    "weights": ("mixnas.search_space.formats.safetensors", None, "save_tensors"),
    "final networks": ("mixnas.search.finish", "FinalNetworks", "finish"),
    "end": ("mixnas.search.run.directory", "Run", "finish"),
    "profile": ("mixnas.predictors.measuring.table", "MeasurementTable", "append"),
    "super-network": ("mixnas.evaluators.supernet.training", "_Training", "_save"),
    "fine-tuning": ("mixnas.evaluators.supernet.judging", None, "fine_tune"),
    "measuring": ("mixnas.search.finish", None, "measure_finalists"),
    "export": ("mixnas.search.publishing", None, "publish"),
}
"""Where a process is killed: module, class in it (or None), function; before the call, or after it."""

OF_A_SUPERNET = ("profile", "super-network", "fine-tuning", "measuring")
"""Places that only a search with a super-network comes to."""

_FORKED = r"""
import importlib, json, os, signal, sys

from mixnas.cli.main import main
import mixnas.search.export, mixnas.search.job  # so that no search has to import what takes seconds
import optuna.samplers, scipy.stats, sklearn.datasets

for module, _, _ in json.loads(sys.argv[1]):
    importlib.import_module(module)


def hook(module, owner, name, left, after):
    found = importlib.import_module(module)
    holder = getattr(found, owner) if owner else found
    original = getattr(holder, name)

    def hooked(*args, **kwargs):
        nonlocal left
        left -= 1
        if left <= 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(holder, name, hooked)
    for other in list(sys.modules.values()):  # where it was imported by its name
        if not owner and getattr(other, name, None) is original:
            setattr(other, name, hooked)


for line in sys.stdin:
    arguments, place, said = json.loads(line)
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
        if place:
            hook(*place)
        status = 1
        try:
            status = main([*arguments, "-v"])
        finally:
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class _Searches:
    """A process that has imported everything, of which each search is a child: it is killed as any other is."""

    def __init__(self, folder: Path) -> None:
        self.said = folder / "said"
        command = [sys.executable, "-c", _FORKED, json.dumps(list(PLACES.values()))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)

    def __enter__(self) -> _Searches:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def run(self, arguments: list[str], place: list[Any] | None = None) -> tuple[int, set[tuple[int, str]], str]:
        """The status of a search, negative of a signal; the trials that it reported; all that it said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([arguments, place, str(self.said)]), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        text = self.said.read_text(errors="replace")
        return status, {(int(m[1]), m[2]) for m in _REPORTED.finditer(text)}, text


def kill_in_phases(root: Path, each: int, phases: list[str] | None = None, trials: int = 6) -> dict[str, Any]:
    """Kill a search at a place, resume it, kill it there again, and so on; each place with a run of its own.

    Args:
        root: To work in.
        each: Kills at each place, half of them before the call and half after it.
        phases: Of `PLACES`; all if not given.
        trials: Of a run; where it comes to its end, it gets as many more.

    Raises:
        AssertionError: A reported trial was lost or done twice, a run could not be opened, or a process ended badly.
    """
    with _Searches(root) as searches:
        seen = {phase: _kill_at(root, searches, each, phase, trials) for phase in phases or list(PLACES)}
    return {"kills": sum(one["kills"] for one in seen.values()), "lost": 0, "evaluated_twice": 0, "phases": seen}


def _kill_at(root: Path, searches: _Searches, each: int, phase: str, trials: int) -> dict[str, Any]:
    """The kills of one place, and the last resume."""
    folder = root / re.sub(r"\W+", "-", phase)
    runs, wanted, kills, tries, reported = folder / "runs", trials, 0, 0, set[tuple[int, str]]()
    folder.mkdir(parents=True)
    config, common = folder / "config.yaml", ["--runs", str(runs)]
    config.write_text((CONFIG_SUPERNET if phase in OF_A_SUPERNET else CONFIG) % trials)
    exporting, ended, idle = phase == "export", False, 0
    if exporting:
        status, reported, said = searches.run(["search", "-c", str(config), "--name", "killed", *common])
        assert status == 0, said[-2000:]
    while kills < each and tries < 4 * each:
        tries += 1
        if exporting:
            arguments = ["export", "killed", *common]
        elif (runs / "killed" / "manifest.json").exists():
            arguments = ["resume", "killed", "--trials", str(wanted), *common]
        else:
            shutil.rmtree(runs / "killed", ignore_errors=True)  # killed before it was a run: nothing to resume
            arguments = ["search", "-c", str(config), "--name", "killed", *common]
        # the first to fourth time that it comes there; the first where it does not come there as often
        place = [*PLACES[phase], 1 if ended else 1 + kills // 2 % 4, bool(kills % 2)]
        status, told, said = searches.run(arguments, place)
        assert status in (0, -signal.SIGKILL), f"{phase}: status {status}: {said[-2000:]}"
        reported |= told
        kills += status == -signal.SIGKILL
        ended = status == 0
        wanted += trials if ended and not exporting else 0  # it came to its end before: give it more to do
        idle = idle + 1 if ended else 0
        if (runs / "killed" / "manifest.json").exists():
            _check(runs, reported, phase)
        if idle == 2 and kills < each:  # nothing is left to do there, such as to profile: another run
            shutil.rmtree(runs / "killed")
            wanted, idle = trials, 0
            reported.clear()
    last = ["export", "killed"] if exporting else ["resume", "killed", "--trials", str(wanted)]
    status, told, said = searches.run([*last, *common])
    assert status == 0, f"{phase}: the last one ended with {status}: {said[-2000:]}"
    found = _check(runs, reported | told, phase)
    assert found["evaluated"] == wanted, f"{phase}: {found['evaluated']} trials evaluated of {wanted}"
    left = [path.name for path in (runs / "killed").rglob(".*") if path.name != ".lock" and path.suffix != ".lock"]
    seen = {"kills": kills, "reported": len(reported | told), **found, "left_over": len(left)}
    print(phase, seen, file=sys.stderr, flush=True)
    return seen


def _check(runs: Path, reported: set[tuple[int, str]], phase: str) -> dict[str, int]:
    """Whether all that was reported is there, once, and every file is what was written."""
    from mixnas.search.run.directory import Run
    from mixnas.search.run.integrity import problems

    run = Run.open("killed", runs)
    wrong = list(problems(run.path, run.manifest))
    assert not wrong, f"{phase}: {wrong}"
    run.status()
    found = _trials(runs, "killed")
    done = [(t["number"], t["id"]) for t in found if t["status"] == "done"]
    lost = reported - set(done)
    assert not lost, f"{phase}: reported and gone: {sorted(lost)}"
    ids = [identity for _, identity in done]
    assert len(ids) == len(set(ids)), f"{phase}: an architecture was evaluated twice"
    evaluated = sum(t["status"] in ("done", "failed") for t in found)
    return {"done": len(done), "evaluated": evaluated}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", help="write the JSON here too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = kill_and_resume(Path(folder), args.kills, args.trials, random.Random(args.seed))
    from mixnas.predictors.measuring.device import provenance

    text = json.dumps({**seen, "provenance": provenance()}, indent=1)
    print(text)
    if args.output:
        from mixnas.search_space.files import atomic_write

        atomic_write(args.output, text + "\n")


if __name__ == "__main__":
    main()
