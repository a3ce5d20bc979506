"""What the search strategies must show, part by part; each is one run and writes one file in `benchmarks/results/`.

    python benchmarks/search.py table         strategies on published tables: share of the exact hypervolume, 20 seeds
                                              (`gp`, `qnehvi`: --strategies gp --expensive-only; hours on one core)
    python benchmarks/search.py nsga2         this project's NSGA-II beside Optuna's own, on the same tables
    python benchmarks/search.py surrogate     rank correlation and coverage of `predictors.surrogate` and plain models
    python benchmarks/search.py constraint    20 searches with a budget on latency: fronts within it, by measurement
    python benchmarks/search.py clock         all strategies on the digits: hypervolume by the clock, with --seeds 3

The tables are not part of this repository: `--data` says where they are (default: ../shared/data). The first three
do not depend on how busy the machine is, but for the time of a proposal; `growth` counts the processor's seconds, and
`constraint` and `clock` measure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import numpy as np  # noqa: E402

from mixnas.evaluators.tabular import Table  # noqa: E402
from mixnas.predictors.measuring.device import provenance  # noqa: E402
from mixnas.search.benchmarking import (  # noqa: E402
    Course,
    Truth,
    checkpoints,
    compare,
    objectives_of,
    search_table,
)
from mixnas.search.strategies import Strategy  # noqa: E402
from mixnas.search.strategies.evolution import NSGA2  # noqa: E402
from mixnas.search.strategies.random import Random  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NB201 = tuple(f"latency_ms_{device}" for device in ("1080ti_32", "2080ti_1", "silver_4114", "samsung_a50"))
PROBLEMS = {
    **{latency: ("nb201-12ep", ("cifar100_val", latency)) for latency in NB201},
    "nas-bench-macro": ("nas-bench-macro", ("cifar10_test", "params")),
}
_CHEAP = [f"{name} (cheap)" for name in PROBLEMS]
CHOSEN_ON = ("latency_ms_1080ti_32", "nas-bench-macro")
"""The problems on which the settings of `predictor` were chosen; the others are reported apart."""


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def write(part: str, record: dict[str, Any], folder: Path = RESULTS) -> None:
    """One result file."""
    path = folder / f"search-{part}.json"
    write_json(path, {**record, "provenance": provenance("cpu", 1)})
    say(f"wrote {path.name}")


# -- table --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _truth(path: Path, names: tuple[str, ...]) -> tuple[Table, Truth]:
    read = Table.load(path)
    return read, Truth(read, objectives_of(read, names))


def _course(
    path: Path, names: tuple[str, ...], strategy: Strategy, trials: int, cheap: Sequence[str], seed: int
) -> Course:
    """One search, in a process of its own."""
    return search_table(*_truth(path, names), strategy, seed, trials, cheap)


def table(args: argparse.Namespace) -> None:
    """Every problem with every strategy; what is done is written as it comes, and a run that was killed goes on."""
    strategies = {name: Strategy.from_plain(name, "--strategies") for name in args.strategies.split(",")}
    found: dict[str, Any] = {}
    done = _Courses(args.output / "search-tables.courses.tmp")
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for cheap in (False, True):
            for name, (file, names) in PROBLEMS.items():
                if args.problems and name not in args.problems.split(","):
                    continue
                path, known = args.data / f"{file}.csv", names[1:] if cheap else ()
                read, truth = _truth(path, names)
                chosen = {"predictor": strategies["predictor"]} if cheap and "predictor" in strategies else strategies
                called = _CHEAP[[*PROBLEMS].index(name)] if cheap else name
                say(f"{name}{', the second objective cheap' if cheap else ''}")
                found[called] = compare(
                    read,
                    truth.objectives,
                    chosen,
                    trials=args.trials,
                    seeds=args.seeds,
                    cheap=known,
                    say=say,
                    courses=lambda strategy, called=called, path=path, names=names, known=known: done.of(
                        {"problem": called, "strategy": repr(strategy), "trials": args.trials},
                        args.seeds,
                        lambda seeds: pool.map(partial(_course, path, names, strategy, args.trials, known), seeds),
                    ),
                )
                _write_tables(found, args.output)
            if "predictor" not in strategies or args.expensive_only:
                break
    done.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Courses:
    """Searches that are done already, in a file that goes when all are; it is no good after a strategy has changed."""

    path: Path

    def of(
        self, which: dict[str, Any], seeds: int, search: Callable[[Sequence[int]], Iterable[Course]]
    ) -> Iterator[Course]:
        """The searches of a strategy by seed: from the file, or else carried out and added to it."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        known = {one["seed"]: one for one in map(json.loads, lines) if which.items() <= one.items()}
        new = iter(search([seed for seed in range(seeds) if seed not in known]))
        for seed in range(seeds):
            if seed in known:
                share = {int(count): value for count, value in known[seed]["share"].items()}
                yield Course(share, known[seed]["proposal_s"])
                continue
            course = next(new)
            with self.path.open("a") as file:
                file.write(json.dumps({**which, "seed": seed, **asdict(course)}) + "\n")
            yield course


def _write_tables(found: dict[str, Any], folder: Path) -> None:
    """Beside what the file has of other problems and strategies, and of more seeds or trials of the same strategy."""
    path = folder / "search-tables.json"
    problems = json.loads(path.read_text())["problems"] if path.exists() else {}
    commit = provenance("cpu", 1)["commit"]
    for name, one in found.items():
        problem = {key: value for key, value in one.items() if key not in ("strategies", "seeds", "trials")}
        before = problems.get(name, {})
        alike = all(problem[key] == value for key, value in before.items() if key in problem)
        strategies = dict(before["strategies"]) if alike else {}
        for strategy, result in one["strategies"].items():
            share = {count: {**value, "seeds": one["seeds"]} for count, value in result["share"].items()}
            kept = {
                count: value
                for count, value in strategies.get(strategy, {"share": {}})["share"].items()
                if count not in share or value["seeds"] > one["seeds"]
            }
            strategies[strategy] = {
                **result,
                "commit": commit,
                "share": {count: (share | kept)[count] for count in sorted(share | kept, key=int)},
            }
        problems[name] = {**problem, "strategies": strategies}
    problems = {name: problems[name] for name in sorted(problems, key=[*PROBLEMS, *_CHEAP].index)}
    write("tables", {"problems": problems, "chosen_on": CHOSEN_ON, "mean": _means(problems)}, folder)


def _means(found: dict[str, Any]) -> dict[str, Any]:
    """Of each strategy, the mean share over the problems whose settings were chosen on, and over the others."""
    means: dict[str, Any] = {}
    for group, names in (
        ("chosen on", [n for n in found if n in CHOSEN_ON]),
        ("others", [n for n in found if n in PROBLEMS and n not in CHOSEN_ON]),
        ("nb201", [n for n in found if n in NB201]),
    ):
        shared = (
            [s for s in found[names[0]]["strategies"] if all(s in found[n]["strategies"] for n in names)]
            if names
            else []
        )
        for strategy in shared:
            shares = [found[name]["strategies"][strategy]["share"] for name in names]
            counts = [count for count in shares[0] if all(count in share for share in shares)]
            mean = {count: float(np.mean([share[count]["mean"] for share in shares])) for count in counts}
            means.setdefault(group, {})[strategy] = mean
    return means


# -- nsga2 --------------------------------------------------------------------------------------------------------


def nsga2(args: argparse.Namespace) -> None:
    """This project's NSGA-II with several populations, Optuna's own, and random search; repeats do not count."""
    import optuna
    from optuna.samplers import NSGAIISampler

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, Any] = {}
    for name in (NB201[0], "nas-bench-macro"):
        file, names = PROBLEMS[name]
        read = Table.load(args.data / f"{file}.csv")
        truth = Truth(read, objectives_of(read, names))
        values = np.stack([read.values[o.name] for o in truth.objectives], axis=1)
        courses = []
        for seed in range(args.seeds):
            study = optuna.create_study(
                directions=["maximize" if o.maximise else "minimize" for o in truth.objectives],
                sampler=NSGAIISampler(seed=seed),
            )
            rows: dict[int, None] = {}
            while len(rows) < args.trials:
                trial = study.ask()
                row = read.space.row(read.space.encode(read.space.ask(trial)))
                study.tell(trial, values[row].tolist())
                rows[row] = None
            courses.append([truth.share(values[list(rows)[:count]]) for count in checkpoints(args.trials)])
        shares = np.array(courses)
        own = compare(
            read,
            truth.objectives,
            {
                "population 20": NSGA2(first=20),
                "population 20, 50 first": NSGA2(first=50),
                "population 50": NSGA2(population_size=50),
                "random": Random(),
            },
            trials=args.trials,
            seeds=args.seeds,
            say=say,
        )
        found[name] = {
            "optuna": {
                str(count): {"mean": float(s.mean()), "sd": float(s.std(ddof=1))}
                for count, s in zip(checkpoints(args.trials), shares.T, strict=True)
            },
            **{strategy: one["share"] for strategy, one in own["strategies"].items()},
        }
        write("nsga2", {"seeds": args.seeds, "problems": found})


# -- surrogate ----------------------------------------------------------------------------------------------------


def surrogate(args: argparse.Namespace) -> None:
    """Rank correlation on rows that were not seen, and how many of them the 90% intervals hold."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, WhiteKernel
    from sklearn.linear_model import RidgeCV
    from sklearn.svm import SVR

    from mixnas.predictors.encoding import MaskedEncoding
    from mixnas.predictors.surrogate import Surrogate, rank_correlation

    plain: dict[str, Callable[[], Any]] = {
        "ridge": lambda: RidgeCV(alphas=np.logspace(-3, 3, 13)),
        "svr": lambda: SVR(C=10.0, epsilon=0.05),
        "gp": lambda: GaussianProcessRegressor(RBF(2.0) + WhiteKernel(0.1), normalize_y=True),
        "boosted trees": lambda: HistGradientBoostingRegressor(min_samples_leaf=5),
    }
    found: dict[str, Any] = {}
    for file, metric in (
        ("hat-wmt14ende_cpu_xeon", "latency_ms"),
        ("nb201-12ep", "cifar100_val"),
        ("nas-bench-macro", "cifar10_test"),
    ):
        read = Table.load(args.data / f"{file}.csv")
        options = [v.values for v in read.space.variables]
        rows, truth = read.space.rows, read.values[metric]
        x = MaskedEncoding(options)(rows)
        of_metric: dict[str, Any] = {}
        for count in (50, 100, 200, 400):
            scores: dict[str, list[float]] = {name: [] for name in ("surrogate", *plain)}
            held = []
            for seed in range(args.seeds):
                order = np.random.default_rng(seed).permutation(len(rows))
                seen, unseen = order[:count], order[count : count + 1500]
                model = Surrogate.fit(options, rows[seen], truth[seen])
                mean, deviation = model.predict(rows[unseen])
                scores["surrogate"].append(rank_correlation(mean, truth[unseen]))
                held.append(float((np.abs(mean - truth[unseen]) <= 1.645 * deviation).mean()))
                scale = truth[seen].std() or 1.0
                for name, make in plain.items():
                    fitted = make().fit(x[seen], (truth[seen] - truth[seen].mean()) / scale)
                    scores[name].append(rank_correlation(fitted.predict(x[unseen]), truth[unseen]))
            of_metric[str(count)] = {
                "rank_correlation": {name: float(np.mean(s)) for name, s in scores.items()},
                "coverage": {"mean": float(np.mean(held)), "low": min(held), "high": max(held)},
            }
            text = ", ".join(f"{name} {np.mean(s):.5f}" for name, s in scores.items())
            say(f"{file} {metric}, {count} rows: {text}; 90% intervals hold {np.mean(held):.1%}")
        found[f"{file} {metric}"] = of_metric
        write("surrogate", {"seeds": args.seeds, "metrics": found}, args.output)


# -- growth -------------------------------------------------------------------------------------------------------

_LARGE = """
stem: {name: conv, stride: 1}
stages:
  - width: [16, 24, 32]
    depth: [6, 8, 10]
    block:
      mixer: [{name: dwconv, kernel_size: [3, 5, 7]}, {name: attention, heads: [2, 4]}]
      gate: [none, se]
      channel_mixer: [{name: mlp, expansion: [2, 4]}, {name: swiglu, expansion: [2, 3]}]
"""


def growth(args: argparse.Namespace) -> None:
    """Proposals for three objectives, none of them cheap, after so many trials that somebody else evaluated."""
    from optuna.trial import TrialState

    from mixnas.search.strategies import Question
    from mixnas.search.strategies.predictor import Predictor, PredictorSampler
    from mixnas.search.study.objectives import parse_objectives
    from mixnas.search_space.files import parse_yaml
    from mixnas.search_space.space import SearchSpace

    plain = parse_yaml(_LARGE)
    space = SearchSpace.from_dict({**plain, "stages": plain["stages"] * 2})
    objectives = parse_objectives({"accuracy": "max", "latency_ms": "min", "energy": "min"})
    rng = np.random.default_rng(0)
    weights = rng.random((len(space.variables), len(objectives)))

    def trials(rows: np.ndarray, first: int) -> list[Any]:
        values = np.exp((rows + 1) @ weights / weights.sum(axis=0))  # some dependence on every choice
        return [
            SimpleNamespace(
                number=first + i,
                params=space.params_of(architecture),
                user_attrs={
                    "metrics": dict(zip((o.name for o in objectives), v, strict=True)),
                    "seconds": 1.0,
                    "id": i,
                },
                state=TrialState.COMPLETE,
            )
            for i, (architecture, v) in enumerate(zip(space.decode_many(rows), values.tolist(), strict=True))
        ]

    found = {}
    for count in (100, 300, 600, 1250, 2500, 5000):
        study = _Finished(trials(space.sample_many(count, rng), 0))
        sampler = PredictorSampler(Question(space, objectives), None, lambda architecture: True, Predictor())
        seconds, proposals = [], 0
        for _ in range(args.batches):
            started = time.process_time()
            chosen = sampler.propose(study, 1, rng)
            seconds.append(time.process_time() - started)
            proposals += len(chosen)
            study += trials(space.encode_many(chosen), len(study))
        found[str(count)] = {
            "first_s": seconds[0],
            "longest_s_of_the_others": max(seconds[1:]),
            "median_s_of_the_others": float(np.median(seconds[1:])),
            "proposals_at_a_time": proposals / args.batches,
        }
        say(f"after {count} trials: {', '.join(f'{s:.2f}' for s in seconds)} s")
    write("growth", {"choices": len(space.variables), "after": found})


class _Finished(list[Any]):
    """As much of a study as a sampler reads."""

    def get_trials(self, deepcopy: bool = False) -> list[Any]:
        return self


# -- constraint ---------------------------------------------------------------------------------------------------

_SMALL = """
task: digits
search: {strategy: predictor, trials: 40, evaluator: supernet}
supernet: {seconds: 8}
latency: {profile: 20, passes: 2, final_passes: 5}
final: {candidates: 4, train: {epochs: 2, lr: 1e-3}}
space:
  stem: {name: conv, stride: 1}
  stages:
    - width: [8, 16, 24]
      depth: [1, 2, 3]
      block:
        mixer: [identity, {name: dwconv, kernel_size: [3, 5]}, {name: attention, heads: [2]}]
        gate: [none, se]
        channel_mixer: {name: mlp, expansion: [1, 2, 4]}
"""


def constraint(args: argparse.Namespace) -> None:
    """Searches with a budget at the 30th percentile of the space, as predicted; one profile serves them all."""
    from mixnas.search.config import read_config
    from mixnas.search.job import Job, new_run
    from mixnas.search.problem import Problem
    from mixnas.search.run.progress import make_progress
    from mixnas.search.run.stopping import StopSignal
    from mixnas.search_space.errors import InfeasibleError
    from mixnas.search_space.files import parse_yaml

    searches = []
    with tempfile.TemporaryDirectory() as folder:
        tables = Path(folder) / "tables"
        os.environ["MIXNAS_TABLES"] = str(tables)
        plain = parse_yaml(_SMALL)
        problem = Problem(read_config(plain, "constraint"))
        latency = problem.latency()
        latency.prepare(problem.space, problem.io, plain={"task": plain["task"], "space": plain["space"]})
        drawn = problem.space.sample_many(2000, np.random.default_rng(0))
        bound = float(np.quantile(latency.predict_many(drawn, problem.space, problem.io), 0.3))
        for seed in range(args.seeds):
            config = read_config(
                {**plain, "constraints": [f"latency_ms <= {bound:.6g}"]}, "constraint", settings=[f"search.seed={seed}"]
            )
            run = new_run(config, root=Path(folder) / "runs", name=f"c{seed}", source="constraint")
            run.latency.mkdir(parents=True, exist_ok=True)
            for path in tables.iterdir():
                (run.latency / path.name).write_bytes(path.read_bytes())
            try:
                Job(run, config, progress=make_progress("quiet"), stop=StopSignal()).execute()
                ended = "front"
            except InfeasibleError as error:
                ended = str(error)
            front = run.front()
            within = [m.metrics["latency_ms"] <= bound for m in front.members]
            named = [m for m in front.others if "violates" in m.reason]
            searches.append(
                {
                    "seed": seed,
                    "front": len(front.members),
                    "within": sum(within),
                    "over_and_named": len(named),
                    "latency_ms": [m.metrics["latency_ms"] for m in front.members],
                    "predicted_ms": [m.predicted.ms for m in front.members if m.predicted is not None],
                    "ended": ended,
                }
            )
            say(f"seed {seed}: front of {len(front.members)}, {sum(within)} within, {len(named)} over and named")
    write(
        "constraint",
        {
            "bound_ms": bound,
            "searches": searches,
            "fronts_not_empty": sum(s["front"] > 0 for s in searches),
            "all_within": sum(s["front"] == s["within"] for s in searches),
            "of": len(searches),
        },
    )


def clock(args: argparse.Namespace) -> None:
    """See `_strategies.py`."""
    import _strategies

    found = _strategies.run(args.output, ROOT / "configs" / "digits.yaml", args.seeds, 1, args.small, say)
    write("clock", found, args.output)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {
        "table": table,
        "nsga2": nsga2,
        "surrogate": surrogate,
        "growth": growth,
        "constraint": constraint,
        "clock": clock,
    }
    parser.add_argument("part", choices=parts)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="where the tables are")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--strategies", default="predictor,linas,nsga2,nsga3,tpe,random")
    parser.add_argument("--problems", help="only these, joined by commas")
    parser.add_argument("--workers", type=int, default=1, help="table: searches at the same time")
    parser.add_argument(
        "--batches", type=int, default=6, help="growth: proposals in a row, the first of them of a fresh sampler"
    )
    parser.add_argument("--expensive-only", action="store_true", help="table: without the runs with a cheap objective")
    parser.add_argument("--small", action="store_true", help="clock: a try, minutes in all")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="table, surrogate, clock: its folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    parts[args.part](args)


if __name__ == "__main__":
    main()
