"""`kill -9` of a search at random moments: what was reported finished is there after `nas resume`, and none twice.

    python benchmarks/kill.py [--kills 10] [--seed 0]

Starts a stand-alone search of a small space, kills the whole process at a random moment (import, trial, write, final
phase), looks at what it had reported, resumes, and so on; then lets the last resume end. Prints one JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

CONFIG = """\
task: digits
search: {strategy: nsga2, trials: %d, seed: 3, evaluator: standalone}
train: {steps: 12}
final: {candidates: 4}
latency: {passes: 1, final_passes: 2}
space:
  stem: conv
  stages:
    - width: [4, 8]
      depth: [1, 2, 3]
      block:
        mixer: [identity, pooling, {name: dwconv, kernel_size: [3, 5]}]
        channel_mixer: {name: mlp, expansion: [1, 2]}
"""


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
            match = re.match(r"trial (\d+) done (\w{12})$", line.strip())
            if match:
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
