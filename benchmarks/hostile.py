"""Attack: damage of every stored file, kills in every phase, and how cost grows with the number of trials.

    python benchmarks/hostile.py campaign [--seed 0] [--cuts 40] [--flips 160]
    python benchmarks/hostile.py kills [--each 20] [--phases NAME,...] [-o FILE]
    python benchmarks/hostile.py growth [--trials 100,1000,10000,50000] [--before PYTHON] [--limit 400]

Each prints one JSON. `--before` is the Python of another checkout's environment, measured in the same run, in turns.
A search that is not at its end after `--limit` seconds of CPU is stopped: its row says how many trials it `reached`,
and its figures are of those. Other programs lengthen what is in seconds or milliseconds, and hardly what is in CPU's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def run_campaign(seed: int, cuts: int, flips: int) -> dict[str, Any]:
    """See `_hostile.campaign`."""
    sys.path.insert(0, str(HERE))
    from _hostile import as_json, campaign

    with tempfile.TemporaryDirectory() as folder:
        counts = campaign(Path(folder), cuts, flips, seed)
    plain: dict[str, Any] = json.loads(as_json(counts))
    return {"seed": seed, "cuts": cuts, "flips": flips, **plain}


# -- growth -------------------------------------------------------------------------------------------------------

GROWTH = r"""
import json, os, sys, time
from array import array
from pathlib import Path

from mixnas.evaluators.protocol import Outcome
from mixnas.search.engines.session import Budget, Session
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.space import SearchSpace

folder, trials, space, limit = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), float(sys.argv[4])
space, objectives = SearchSpace.from_dict(space), parse_objectives({"accuracy": "max", "params": "min"})
journal = folder / "study.journal"


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def evaluated(architecture):
    number = int(architecture.id, 16)
    params = sum(s.width * len(s.blocks) for s in architecture.stages) + number % 7
    return Outcome({"accuracy": number % 9973 / 9973, "params": float(params)}, seconds=0.001)


def carry_out(study, until, times, cpu_times, used):
    # until so many trials are done or the time is up: seconds of each proposal and its CPU, CPU seconds until then
    with Session(study, Budget(trials=until)) as session:
        while time.process_time() < limit:
            began, before = time.perf_counter(), time.process_time()
            proposals = session.next(1)
            if not proposals:
                return
            times.append(time.perf_counter() - began)
            cpu_times.append(time.process_time() - before)
            session.done(proposals[0], evaluated(proposals[0].architecture))
            used.append(time.process_time())


first, times, cpu_times, used = min(50, trials // 2), array("d"), array("d"), array("d")
began = time.perf_counter()
with SearchStudy(journal, space, objectives) as study:
    carry_out(study, first, times, cpu_times, used)
    base, cpu = resident(), time.process_time()
    carry_out(study, trials, times, cpu_times, used)
    took, memory, reached = time.perf_counter() - began, resident() - base, len(used)
tenth = max(1, reached // 10)
began, before = time.perf_counter(), time.process_time()
study = SearchStudy(journal, space, objectives)
opened, opened_cpu = time.perf_counter() - began, time.process_time() - before
study.close()
print(json.dumps({
    "trials": trials,
    "reached": reached,
    "search_s": took,
    "proposal_ms_of_the_last_tenth": 1e3 * sorted(times[-tenth:])[tenth // 2],
    "proposal_cpu_ms_of_the_last_tenth": 1e3 * sorted(cpu_times[-tenth:])[tenth // 2],
    "cpu_ms_a_trial": 1e3 * (used[-1] - cpu) / (reached - first),
    "cpu_ms_a_trial_of_the_last_tenth": 1e3 * (used[-1] - used[-tenth - 1]) / tenth,
    "memory_kb_a_trial": memory / (reached - first) / 1e3,
    "open_s": opened,
    "open_cpu_s": opened_cpu,
    "journal_mb": journal.stat().st_size / 1e6,
}))
"""

ASKED = r"""
import json, resource, shutil, subprocess, sys, time
from pathlib import Path

from mixnas.search.run.directory import Run
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.space import SearchSpace
from mixnas.search.finish import searched_member
from mixnas.search.run.front import Front

folder, plain = Path(sys.argv[1]), json.loads(sys.argv[3])
space, objectives = SearchSpace.from_dict(plain), parse_objectives({"accuracy": "max", "params": "min"})
config = {
    "task": "digits", "objectives": {"accuracy": "max", "params": "min"}, "constraints": [], "space": plain,
    "search": {"trials": int(sys.argv[2]), "seed": 0}, "latency": {"batch_size": 1},
}
run = Run.create(folder / "runs", config, name="r", device="cpu-x-1t", latency="eager", seed=0)
for path in folder.glob("study.*"):
    shutil.copy(path, run.path / path.name)
with SearchStudy(run.journal, space, objectives) as study:
    results, knee = study.results, study.results.knee()
    run.write_tables(results.to_csv(), Front(
        run=run.name, task="digits", metric="accuracy", objectives=config["objectives"], constraints=(),
        evaluator="standalone", device="cpu-x-1t", latency="measured", trials={"done": results.counts["done"]},
        hypervolume=results.hypervolume(), reference=results.reference.point if results.reference else None,
        final=False, members=tuple(map(searched_member, results.front())), others=(), knee=knee.id,
        searched_front=tuple(r.id for r in results.front())))
found = {}
for verb in ("status", "front"):
    best = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mixnas.nas", verb, "r", "--json", "--runs", str(folder / "runs")],
                       check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        best.append((time.perf_counter() - began, cpu))
    found[f"{verb}_s"], found[f"{verb}_cpu_s"] = min(best)
print(json.dumps(found))
"""


def _child(python: str, code: str, folder: str, trials: int, space: Mapping[str, Any], limit: float) -> dict[str, Any]:
    command = [python, "-c", code, folder, str(trials), json.dumps(space), str(limit)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=folder, check=False
    )
    if done.returncode:
        return {"trials": trials, "failed": done.stderr.strip().splitlines()[-1:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def growth(
    trials: list[int], before: str | None, space: Mapping[str, Any], limit: float, output: str | None
) -> dict[str, Any]:
    """Time and memory of searches with a trivial evaluator, a process each.

    Args:
        trials: Of each search.
        before: Python of another checkout, whose figures stand beside.
        space: What is searched.
        limit: Seconds of CPU that one search may take.
        output: Of an earlier call that was ended: what it has measured is not measured again.
    """
    pythons = {"now": sys.executable} | ({"before": before} if before else {})
    found: dict[str, Any] = {"limit_cpu_s": limit, **{name: [] for name in pythons}}
    if output and Path(output).exists():
        earlier = json.loads(Path(output).read_text())
        found |= earlier if earlier["limit_cpu_s"] == limit else {}
    for count in trials:
        for name, python in pythons.items():
            if any(row["trials"] == count for row in found[name]):
                continue
            with tempfile.TemporaryDirectory() as folder:
                row = _child(python, GROWTH, folder, count, space, limit)
                if "failed" not in row:
                    row |= _child(python, ASKED, folder, count, space, limit)
                found[name].append({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()})
            print(name, json.dumps(found[name][-1]), file=sys.stderr, flush=True)
            if output:
                Path(output).write_text(json.dumps(found, indent=1) + "\n")
    return found


# -- kills --------------------------------------------------------------------------------------------------------


def kills(each: int, phases: list[str] | None, output: str | None) -> dict[str, Any]:
    """See `kill.kill_in_phases`; goes on where an earlier call's output has some of the phases."""
    sys.path.insert(0, str(HERE))
    from kill import PLACES, kill_in_phases

    seen: dict[str, Any] = {}
    if output and Path(output).exists():
        before = json.loads(Path(output).read_text())
        seen = dict(before["phases"]) if before["each"] == each else {}
    for phase in phases or list(PLACES):
        if phase not in seen:
            with tempfile.TemporaryDirectory() as folder:
                seen[phase] = kill_in_phases(Path(folder), each, [phase])["phases"][phase]
            if output:  # the next phase may find a fault
                Path(output).write_text(json.dumps({"each": each, "phases": seen}, indent=1) + "\n")
    total = sum(one["kills"] for one in seen.values())
    return {"each": each, "kills": total, "lost": 0, "evaluated_twice": 0, "phases": seen}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    verbs = parser.add_subparsers(dest="verb", required=True)
    damage = verbs.add_parser("campaign")
    damage.add_argument("--seed", type=int, default=0)
    damage.add_argument("--cuts", type=int, default=40, help="of each file, for each reader")
    damage.add_argument("--flips", type=int, default=160, help="likewise")
    killing = verbs.add_parser("kills")
    killing.add_argument("--each", type=int, default=20, help="kills in each phase")
    killing.add_argument("--phases", help="only these, separated by commas")
    growing = verbs.add_parser("growth")
    growing.add_argument("--trials", default="100,1000,10000,50000")
    growing.add_argument("--before", metavar="PYTHON", help="of another checkout's environment")
    growing.add_argument(
        "--limit", type=float, default=400.0, metavar="SECONDS", help="of CPU that one search may take"
    )
    for one in (damage, killing, growing):
        one.add_argument("-o", "--output", help="write the JSON here too")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.verb == "campaign":
        seen = run_campaign(args.seed, args.cuts, args.flips)
    elif args.verb == "kills":
        seen = kills(args.each, args.phases.split(",") if args.phases else None, args.output)
    else:
        sys.path.insert(0, str(HERE))
        from _hostile import SPACE

        seen = growth([int(count) for count in args.trials.split(",")], args.before, SPACE, args.limit, args.output)
    from mixnas.predictors.measuring.device import provenance

    seen = {**seen, "took_s": round(time.perf_counter() - began, 1), "provenance": provenance()}
    text = json.dumps(seen, indent=1)
    print(text)
    if args.output:
        from mixnas.search_space.files import atomic_write

        atomic_write(args.output, text + "\n")
    if seen.get("wrong"):
        sys.exit(1)


if __name__ == "__main__":
    main()
