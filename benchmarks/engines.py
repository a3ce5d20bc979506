"""The engines: how much longer than ideal they take, what they lose when things die, and how far the driver carries.

    python benchmarks/engines.py speed faults simulate quality -o benchmarks/results/engines.json

But for `quality`, evaluations sleep, so two cores are enough; whatever else runs on the machine makes all of it slower.
Each part is written to the file when it is done; parts that are there from before stay. Of `faults` each round is, and
of `quality` each search: those that are there are not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import _engines_postgres
import _quality
import numpy as np
from _engines import SPACE, Sleeper, made_up

from mixnas.predictors.measuring.device import provenance
from mixnas.search.engines import Engine
from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.on_ray import _head, cluster, driver
from mixnas.search.engines.ray import RayEngine
from mixnas.search.engines.session import Budget, Session
from mixnas.search.run.stopping import StopSignal
from mixnas.search.strategies import STRATEGIES
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.pareto import Reference
from mixnas.search.study.reading import read_results
from mixnas.search.study.results import Results
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.errors import NasError
from mixnas.search_space.files import atomic_write
from mixnas.search_space.space import SearchSpace

OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})
WORKERS = 2
NSGA2 = {"name": "nsga2", "population_size": 20}


def _study(path: Path, seed: int = 0, strategy: Any = NSGA2) -> SearchStudy:
    space = SearchSpace.from_dict(SPACE)
    return SearchStudy(path, space, OBJECTIVES, strategy=STRATEGIES.read(strategy, "strategy"), seed=seed)


@contextlib.contextmanager
def _timed_ray() -> Iterator[dict[str, float]]:
    """The seconds that starting and connecting to Ray, and ending it, take meanwhile."""
    seconds = {"start": 0.0, "end": 0.0}
    kept = [(cluster.Head, "__enter__"), (driver.Driver, "connect"), (driver.Driver, "end"), (cluster.Head, "__exit__")]
    before = [getattr(of, name) for of, name in kept]

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            begun = time.monotonic()
            try:
                return function(*args)
            finally:
                seconds[name] += time.monotonic() - begun

        return call

    for i, ((of, name), function) in enumerate(zip(kept, before, strict=True)):
        setattr(of, name, timed("start" if i < 2 else "end", function))
    try:
        yield seconds
    finally:
        for (of, name), function in zip(kept, before, strict=True):
            setattr(of, name, function)


# -- speed -------------------------------------------------------------------------------------------------------------


def timed_search(engine: Engine, trials: int, seconds: float, kill: bool = False) -> dict[str, Any]:
    """A search whose evaluations sleep; with `kill`, one of its workers is killed at a third."""
    ideal = trials * seconds / WORKERS
    with tempfile.TemporaryDirectory() as folder:
        evaluator = Sleeper(Path(folder), seconds)
        killer = evaluator.kill_at(trials // 3) if kill else None
        with _study(Path(folder) / "j") as study, _timed_ray() as ray:
            begun, cpu = time.time(), time.process_time()
            with Session(study, Budget(trials=trials)) as session:
                engine.run(session, evaluator)
                session.ending()
            took, cpu = time.time() - begun, time.process_time() - cpu
            results = study.results
            records = results.records
        if killer is not None:
            killer.join()
        done = evaluator.evaluations()
        first, last = min(one[0] for one in done), max(one[1] for one in done)
        return {
            "engine": engine.to_plain(),
            "trials": trials,
            "seconds": seconds,
            "killed": kill,
            "done": results.counts["done"],
            "failed": results.counts["failed"],
            "retries": sum(len(record.retries) for record in records),
            "ideal_s": ideal,
            "took_s": round(took, 2),
            "ray_start_s": round(ray["start"], 2),
            "ray_end_s": round(ray["end"], 2),
            "of_ideal_without_ray_start": round((took - ray["start"] - ray["end"]) / ideal, 4),
            "of_ideal_first_to_last": round((last - first) / ideal, 4),
            "driver_cpu_s": round(cpu, 2),
            "load": round(os.getloadavg()[0], 1),
        }


_PLAIN = """
import json, sys, time
sys.path[:0] = {path!r}
from mixnas.search.engines.on_ray.cluster import Cluster, Head, settings
trials, seconds, workers = {trials}, {seconds}, {workers}
with settings(own=True), Head(workers=workers) as there, Cluster(there.address):
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    def evaluate(config):
        begin = time.time()
        time.sleep(seconds)
        tune.report(dict(loss=config["x"], begin=begin, end=time.time()))

    begun = time.time()
    tuner = tune.Tuner(
        tune.with_resources(evaluate, dict(cpu=1)),
        param_space=dict(x=tune.uniform(0, 1)),
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric="loss", mode="min"), num_samples=trials, max_concurrent_trials=workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=there.folder, name="plain", verbose=0),
    )
    grid = tuner.fit()
    took = time.time() - begun
    found = [one.metrics for one in grid if one.error is None]
print(json.dumps(dict(
    took=took, done=len(found), first=min(m["begin"] for m in found), last=max(m["end"] for m in found),
)))
"""


def plain_optuna(trials: int, seconds: float) -> dict[str, Any]:
    """Ray Tune's own `OptunaSearch` on a function, on the same kind of cluster, with workers kept between trials."""
    ideal = trials * seconds / WORKERS
    code = _PLAIN.format(path=[str(Path(__file__).parent)], trials=trials, seconds=seconds, workers=WORKERS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return {"engine": "Ray Tune's OptunaSearch", "failure": done.stderr[-2000:]}
    said = json.loads(done.stdout.splitlines()[-1])
    return {
        "engine": "Ray Tune's OptunaSearch",
        "trials": trials,
        "seconds": seconds,
        "done": said["done"],
        "ideal_s": ideal,
        "of_ideal_without_ray_start": round(said["took"] / ideal, 4),
        "of_ideal_first_to_last": round((said["last"] - said["first"]) / ideal, 4),
        "load": round(os.getloadavg()[0], 1),
    }


def speed(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trials of a second, with a worker killed too, and short ones."""
    local, loop = LocalEngine(workers=WORKERS), RayEngine(workers=WORKERS, through="loop")
    tune = RayEngine(workers=WORKERS, through="tune")
    long = (round(200 * args.scale), 1.0)
    found: list[dict[str, Any]] = []

    def note(one: dict[str, Any]) -> None:
        found.append(one)
        print(json.dumps(one), file=sys.stderr, flush=True)
        args.save("speed", found)

    for engine in (local, loop, tune):
        note(timed_search(engine, *long))
    note(plain_optuna(*long))
    for engine in (local, loop, tune):
        note(timed_search(engine, *long, kill=True))
    for engine in (replace(local, batch=16), loop):
        note(timed_search(engine, round(2000 * args.scale), 0.05))
    return found


# -- faults ------------------------------------------------------------------------------------------------------------

_DRIVER = """
import os, sys
sys.path[:0] = {path!r}
from pathlib import Path
from engines import _driven
sys.exit(_driven(Path({folder!r}), {trials}, {seconds}, {seed}))
"""


def _driven(folder: Path, trials: int, seconds: float, seed: int) -> int:
    """A search on a Ray of its own, for a process that is killed; what it reports is in a file."""
    log = os.open(folder / "reported", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def told(record: Any) -> None:
        os.write(log, f"{record.number} {record.id}\n".encode())

    try:
        with (
            StopSignal() as stop,
            _study(folder / "j", seed) as study,
            Session(study, Budget(trials=trials), stop=stop, on_trial=told) as session,
        ):
            RayEngine(workers=WORKERS, through="loop", store_mb=80).run(session, Sleeper(folder, seconds))
            session.ending()
    except NasError as error:
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    return 0


def _replayed(records: list[Any]) -> list[str]:
    """The front of done trials, each looked at against all, without the code that keeps it up to date."""
    done = [r for r in records if r.status == "done"]
    points = [tuple((-1 if o.maximise else 1) * r.metrics[o.name] for o in OBJECTIVES) for r in done]
    front = {}
    for record, point in zip(done, points, strict=True):
        beaten = any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)
        if not beaten and point not in front:
            front[point] = record.id
    return sorted(front.values())


def _judged(journal: Path, reported: set[tuple[int, str]], live: Results | None) -> dict[str, Any]:
    """What a round came to, by the journal alone."""
    found = read_results(journal, OBJECTIVES)
    ended = {(r.number, r.id) for r in found.records if r.evaluated}
    ids = [r.id for r in found.records if r.evaluated]
    fronts = [sorted(r.id for r in one.front()) for one in (found, live) if one is not None]
    return {
        "acknowledged": len(reported),
        "lost": len(reported - ended),
        "doubled": len(ids) - len(set(ids)),
        "running": found.counts["running"],
        "fronts_equal": all(front == _replayed(found.records) for front in fronts),
    }


def _round(engine: Engine, folder: Path, trials: int, evaluator: Sleeper, seed: int) -> dict[str, Any]:
    """A search in this process, whose workers die or hang."""
    reported: set[tuple[int, str]] = set()
    with (
        _study(folder / "j", seed) as study,
        Session(study, Budget(trials=trials), on_trial=lambda r: reported.add((r.number, r.id))) as session,
    ):
        engine.run(session, evaluator)
        session.ending()
        study.sync()
        session._report_safe_trials()
        live, retries = study.results, sum(len(r.retries) for r in study.results.records)
    pids = {int(line.split()[0]) for line in evaluator.begun.read_text().splitlines()} - {os.getpid()}
    until = time.monotonic() + 10
    while (left := sum(map(_alive, pids))) and time.monotonic() < until:
        time.sleep(0.05)
    told = {"evaluated": live.evaluated, "failed": live.counts["failed"], "retries": retries, "processes_left": left}
    return {**_judged(folder / "j", reported, live), **told}


def _alive(pid: int) -> bool:
    return not _head._ended(pid)


def _killed_round(kind: str, folder: Path, seed: int) -> dict[str, Any]:
    """A search in a process of its own, with a Ray of its own: that process, its head or its user ends it."""
    code = _DRIVER.format(path=[str(Path(__file__).parent)], folder=str(folder), trials=1000, seconds=0.1, seed=seed)
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    begun = folder / "begun"
    until = time.monotonic() + 120
    while not begun.exists() or begun.read_text().count("\n") < 4 + 2 * (seed % 10):
        assert time.monotonic() < until and driver.poll() is None, f"{kind}: the search did not begin"
        time.sleep(0.02)
    children = Path(f"/proc/{driver.pid}/task/{driver.pid}/children").read_text().split()
    (head,) = [int(pid) for pid in children if b"_head.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    if kind == "driver killed":
        driver.kill()
    elif kind in ("head killed", "raylet killed"):
        named = {pid: Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0] for pid in _head.processes_of(head)}
        program = b"/gcs_server" if kind == "head killed" else b"/raylet"
        os.kill(next(pid for pid, name in named.items() if name.endswith(program)), signal.SIGKILL)
    else:
        os.kill(driver.pid, signal.SIGINT)
        if kind == "Ctrl-C twice":
            time.sleep(0.3)
            with contextlib.suppress(ProcessLookupError):
                os.kill(driver.pid, signal.SIGINT)
    status = driver.wait(120)
    until = time.monotonic() + 10

    def left_behind() -> int:
        return len(_head.processes_of(head)) + _alive(head) + len(_head.processes_of(driver.pid))

    while left_behind() and time.monotonic() < until:
        time.sleep(0.05)
    left = left_behind()
    lines = [line.split() for line in (folder / "reported").read_text().splitlines(keepends=True) if "\n" in line]
    reported = {(int(number), identity) for number, identity in lines}
    evaluator = Sleeper(folder, 0.001)
    evaluated = read_results(folder / "j", OBJECTIVES).evaluated
    with _study(folder / "j", seed) as study, Session(study, Budget(trials=evaluated + 20)) as session:
        LocalEngine().run(session, evaluator)
        session.ending()
        live = study.results
    return {**_judged(folder / "j", reported, live), "status": status, "processes_left": left}


def faults(args: argparse.Namespace) -> dict[str, Any]:
    """Rounds of each kind, each with its own seed."""
    found: dict[str, Any] = dict(args.known.get("faults", {}))
    hung = {"limit": 1.0}

    def rounds(kind: str, do: Callable[[Path, int], dict[str, Any]]) -> None:
        if args.kinds and kind not in args.kinds:
            return
        total = found.setdefault(kind, {"rounds": 0})
        for seed in range(total["rounds"], args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                one = do(Path(folder), seed)
            if "status" in one:
                total["statuses"] = sorted({*total.get("statuses", []), str(one.pop("status"))})
            for name, count in {"rounds": 1, **one}.items():
                total[name] = total.get(name, 0) + count
            total["commits"] = sorted({*total.get("commits", []), provenance()["commit"]})
            args.save("faults", found)
        print(kind, json.dumps(total), file=sys.stderr, flush=True)

    def with_killed(engine: Engine, folder: Path, seed: int) -> dict[str, Any]:
        evaluator = Sleeper(folder, 0.15)
        killer = evaluator.kill_at(3 + seed % 15)
        found = _round(engine, folder, 24, evaluator, seed)
        killer.join(5)
        return found

    def with_trouble(engine: Engine, trouble: str, folder: Path, seed: int) -> dict[str, Any]:
        return _round(engine, folder, 24, Sleeper(folder, 0.02, trouble, seed), seed)

    local = LocalEngine(workers=WORKERS)
    rounds("local: worker killed", lambda folder, seed: with_killed(local, folder, seed))
    rounds(
        "local: trials hang",
        lambda folder, seed: with_trouble(LocalEngine(workers=WORKERS, **hung), "hung", folder, seed),
    )
    shared = [kind for kind in args.kinds or ("loop", "tune") if kind.startswith(("loop", "tune"))]
    head_of = cluster.Head(workers=WORKERS, store_mb=80) if shared else contextlib.nullcontext()
    with cluster.settings(own=True), head_of as head:
        there: dict[str, Any] = {"address": head.address if head else None, "workers": WORKERS, "through": "loop"}
        rounds("loop: worker killed", lambda folder, seed: with_killed(RayEngine(**there), folder, seed))
        rounds("loop: trials hang", lambda f, seed: with_trouble(RayEngine(**there, **hung), "hung", f, seed))
        rounds("loop: deadly trials", lambda f, seed: with_trouble(RayEngine(**there), "deadly", f, seed))
        tune: dict[str, Any] = {**there, "through": "tune"}
        rounds("tune: worker killed", lambda folder, seed: with_killed(RayEngine(**tune), folder, seed))
    for kind in ("driver killed", "head killed", "raylet killed", "Ctrl-C once", "Ctrl-C twice"):
        rounds(kind, lambda folder, seed, kind=kind: _killed_round(kind, folder, seed))
    team = _engines_postgres
    if not args.kinds or team.KIND in args.kinds:
        with team.server() as there:
            rounds(team.KIND, lambda folder, seed: team.killed_round(_judged, there.new(), folder, seed))
    return found


# -- simulation --------------------------------------------------------------------------------------------------------


def simulate(args: argparse.Namespace) -> dict[str, Any]:
    """Recorded trial times replayed on 1 to 1,024 workers, under a clock of its own.

    The driver's own work (proposals, results, the journal) is done for real, and the time that it has the processor is
    added to that clock: so many trials a second it can carry. Asynchronous: a worker that is free gets the next trial.
    In batches: all workers get one, and wait for the last.
    """
    if args.journal:
        seconds = [r.seconds for r in read_results(args.journal, OBJECTIVES).records if r.status == "done"]
    else:
        seconds = _recorded(args.record)
    spread = statistics.quantiles(seconds, n=10)
    found: dict[str, Any] = {
        "trial_seconds": {
            "of": "trials of a run" if args.journal else "stand-alone trainings of the digits, two epochs each",
            "count": len(seconds), "median": statistics.median(seconds), "tenths": [spread[0], spread[-1]],
        },
        "runs": [],
    }  # fmt: skip
    trials = 1024
    # one box for all: that of a study is of its own first trials
    space, rng = SearchSpace.from_dict(SPACE), np.random.default_rng(0)
    drawn = [made_up(space.sample(rng)) for _ in range(500)]
    box = Reference.of(np.array([[metrics[o.name] for o in OBJECTIVES] for metrics in drawn]), OBJECTIVES)
    for workers in (1, 8, 64, 1024):
        for batched in (False, True) if workers > 1 else (False,):
            volumes, took, driver = [], [], []
            for seed in range(args.seeds):
                with tempfile.TemporaryDirectory() as folder, _study(Path(folder) / "j", seed) as study:
                    clock, spent = _simulated(study, trials, workers, batched, seconds)
                    front = np.array([study.results.values(record) for record in study.results.front()])
                volumes.append(round(box.hypervolume(front, OBJECTIVES), 4))
                took.append(clock)
                driver.append(spent)
            one = {
                "strategy": "nsga2",
                "workers": workers,
                "batched": batched,
                "trials": trials,
                "hypervolume": volumes,
                "simulated_s": round(statistics.mean(took), 2),
                "speedup": round(trials * statistics.mean(seconds) / statistics.mean(took), 1),
                "driver_s": round(statistics.mean(driver), 2),
                "driver_trials_per_s": round(trials / statistics.mean(driver), 1),
            }
            found["runs"].append(one)
            print(json.dumps(one), file=sys.stderr, flush=True)
    return found


def _recorded(trials: int) -> list[float]:
    """The seconds of stand-alone trials of the digits, trained here now, one after the other."""
    import mixnas

    config = {
        "task": "digits",
        "search": {"trials": trials, "evaluator": "standalone", "strategy": "random"},
        "train": {"epochs": 2},
        "final": {"candidates": 1},
        "latency": {"passes": 1, "final_passes": 1},
        "space": SPACE,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = mixnas.search(config, name="recorded", runs=folder, progress="quiet")
        return [r.seconds for r in read_results(run.journal, OBJECTIVES).records if r.status == "done"]


def _simulated(
    study: SearchStudy, trials: int, workers: int, batched: bool, seconds: list[float]
) -> tuple[float, float]:
    """Seconds of the simulated clock, and of the driver's work in it."""
    from mixnas.evaluators.protocol import Outcome

    now = driver = 0.0
    flying: list[tuple[float, int, Any]] = []
    with Session(study, Budget(trials=trials)) as session:
        while True:
            begun = time.process_time()
            free = workers - len(flying)
            proposals = session.next(free) if free and not (batched and flying) else []
            spent = time.process_time() - begun
            now, driver = now + spent, driver + spent
            for proposal in proposals:
                duration = seconds[proposal.number % len(seconds)]
                heapq.heappush(flying, (now + duration, proposal.number, proposal))
            if not flying:
                return now, driver
            when, _, proposal = heapq.heappop(flying)
            now = max(now, when)
            outcome = Outcome(made_up(proposal.architecture))
            begun = time.process_time()
            session.done(proposal, outcome)
            spent = time.process_time() - begun
            now, driver = now + spent, driver + spent


def quality(args: argparse.Namespace) -> dict[str, Any]:
    """See `_quality`."""
    before = args.known.get("quality", {})
    return _quality.quality(args.seeds, before, OBJECTIVES, lambda found: args.save("quality", found))


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "speed": speed,
    "faults": faults,
    "simulate": simulate,
    "quality": quality,
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials of `speed`")
    parser.add_argument("--rounds", type=int, default=20, help="of each kind of fault")
    parser.add_argument("--kinds", nargs="*", help="of faults; all if not given")
    parser.add_argument("--record", type=int, default=40, help="trials whose times are recorded for `simulate`")
    parser.add_argument("--journal", help="of a run whose trial times `simulate` takes, instead of recording some")
    parser.add_argument("--seeds", type=int, default=3, help="of `simulate` and `quality`")
    parser.add_argument("-o", "--output", help="file of the results; parts that are there stay")
    args = parser.parse_args()
    known: dict[str, Any] = {}
    if args.output and Path(args.output).exists():
        known = json.loads(Path(args.output).read_text())

    def save(part: str, found: Any) -> None:
        known[part] = found
        known["provenance"] = {**known.get("provenance", {}), part: provenance()}
        known["command"] = "python benchmarks/engines.py speed faults simulate quality"
        if args.output:
            atomic_write(args.output, json.dumps(known, indent=1) + "\n")

    args.save, args.known = save, known
    for part in args.parts:
        save(part, PARTS[part](args))
    print(json.dumps(known, indent=1))


if __name__ == "__main__":
    main()
