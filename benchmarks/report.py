"""How long a run's page takes to write, and how large it is, by the number of trials.

    python benchmarks/report.py [--trials 1000 10000] [--output FILE]

The runs are made up: architectures of the embedded default, drawn at random, with metrics from their sizes and noise.
Their studies are as a search writes them. Timed is `nas report` in a process of its own, from nothing. Where Chromium
is installed the page is opened in it: seconds until its charts are drawn and the first network of the front was pointed
at and chosen, and what the console and the network had to say. And where it is installed, how long `optuna-dashboard`
takes to open the study, and what it sees. What is not installed is said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import wsgiref.util
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()
sys.path.insert(0, str(ROOT))

from mixnas.search.config import load_config  # noqa: E402
from mixnas.search.finish import searched_member  # noqa: E402
from mixnas.search.run.directory import Run  # noqa: E402
from mixnas.search.run.front import Front  # noqa: E402
from mixnas.search.strategies.random import Random  # noqa: E402
from mixnas.search.study.study import SearchStudy  # noqa: E402
from mixnas.search_space.architecture import Architecture  # noqa: E402
from mixnas.search_space.cost import cost  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402
from mixnas.search_space.space import SearchSpace  # noqa: E402
from mixnas.search_space.units import IOSpec  # noqa: E402
from tests.search.report.browser import browser, visited, why_not  # noqa: E402

DIGITS = IOSpec("image", (8, 8), 1, 10)
CONSTRAINED = ('constraints=["params <= 30000"]',)
FAILING = 50  # every so many trials one fails


def _metrics(architecture: Architecture, rng: np.random.Generator) -> dict[str, float]:
    known = cost(architecture, DIGITS)
    accuracy = 1 - 0.5 * (known.macs + 1e4) ** -0.1 + 0.02 * rng.standard_normal()
    latency_ms = (0.1 + known.macs / 5e6) * float(np.exp(0.05 * rng.standard_normal()))
    return {"accuracy": float(accuracy), "latency_ms": latency_ms, "params": known.params, "macs": known.macs}


def make_run(root: Path, trials: int, seed: int = 0) -> Run:
    """A run that looks as if so many trials had been evaluated."""
    config = load_config(ROOT / "configs" / "digits.yaml", settings=CONSTRAINED)
    objectives, constraints = config.parsed_objectives(), config.parsed_constraints()
    facts = {"seed": seed, "device": "made-up", "latency": "eager"}
    run = Run.create(root, config.to_plain(), name=f"made-{trials}", **facts)
    rng = np.random.default_rng(seed)
    space = SearchSpace.from_dict(config.space)
    with SearchStudy(run.journal, space, objectives, constraints, strategy=Random(), seed=seed) as study:
        for i in range(trials):
            proposal = study.ask()
            if i % FAILING == FAILING - 1:
                study.tell_failure(proposal, "training gave NaN at step 12", 0.2)
            else:
                study.tell(proposal, _metrics(proposal.architecture, rng), 0.2)
        results = study.results
        members = tuple(map(searched_member, results.front()))
        front = Front(
            run=run.name,
            task="digits",
            metric="accuracy",
            objectives={o.name: o.direction for o in objectives},
            constraints=tuple(map(str, constraints)),
            evaluator="supernet",
            device="made-up",
            latency="predicted",
            trials={status: results.counts[status] for status in ("done", "failed", "duplicate", "infeasible")},
            hypervolume=results.hypervolume(),
            reference=None if results.reference is None else results.reference.point,
            final=False,
            members=members,
            others=(),
            knee=members[0].id,
            searched_front=tuple(m.id for m in members),
        )
        run.write_tables(results.to_csv(), front)
    return run


def measure(trials: int) -> dict[str, Any]:
    """Seconds and bytes of one page."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), trials)
        begun = time.perf_counter()
        command = [sys.executable, str(ROOT / "nas.py"), "report", str(run.path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        size = (run.path / "report.html").stat().st_size
        found: dict[str, Any] = {"trials": trials, "seconds": round(seconds, 2), "bytes": size}
        found["browser"] = why_not() or in_browser(run.path / "report.html")
        there = importlib.util.find_spec("optuna_dashboard") is not None
        found["dashboard"] = dashboard(run.journal) if there else "optuna-dashboard is not installed"
    return found


def in_browser(page: Path) -> dict[str, Any]:
    """What a reader of the page meets in a headless Chromium."""
    with browser() as chromium:
        begun = time.perf_counter()
        found = visited(chromium, page.as_uri())
        return {"seconds": round(time.perf_counter() - begun, 2), **found}


def dashboard(journal: Path) -> dict[str, Any]:
    """What `optuna-dashboard` answers when a browser opens the study, and after how many seconds."""
    import optuna
    from optuna_dashboard import wsgi

    begun = time.perf_counter()
    app = wsgi(optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal))))

    def get(place: str) -> Any:
        environ: dict[str, Any] = {}
        wsgiref.util.setup_testing_defaults(environ)
        return json.loads(b"".join(app({**environ, "PATH_INFO": place}, lambda *_: None)))

    (study,) = get("/api/studies")["study_summaries"]
    found = get(f"/api/studies/{study['study_id']}")
    seconds = time.perf_counter() - begun
    done = [trial for trial in found["trials"] if trial["state"] == "Complete"]
    described = sum("architecture" in {a["key"] for a in trial["user_attrs"]} for trial in found["trials"])
    return {
        "seconds": round(seconds, 2),
        "trials": len(found["trials"]),
        "with_architecture": described,
        "with_constraints": sum(bool(trial["constraints"]) for trial in done),
        "objectives": found["objective_names"],
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--output")
    args = parser.parse_args()
    found = [measure(trials) for trials in args.trials]
    print(json.dumps(found, indent=1))
    if args.output:
        write_json(args.output, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
