"""What asynchronous halving (`search.halving`) gives in the same number of epochs. Part of what the engines must show.

    python benchmarks/rungs.py --seeds 3                     # some four minutes of one core a seed and strategy
    python benchmarks/rungs.py --only 0 --strategies random  # one seed; what is in the file already stays

The digits, stand-alone: accuracy against multiply-accumulates and parameters, none of which depends on the clock. One
way trains so many architectures to the end; the others begin more and train one in three of each rung on, and take at
most as many epochs (the largest number of trials with which they do). What counts is the hypervolume on the test split
of the networks that were trained to the end, in the box of those of all ways together, and the best accuracy among
them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import numpy as np  # noqa: E402

from mixnas.evaluators.protocol import Outcome, Request  # noqa: E402
from mixnas.evaluators.standalone import StandaloneEvaluator, StandaloneSpec  # noqa: E402
from mixnas.evaluators.training import TrainConfig, evaluate, steps_of  # noqa: E402
from mixnas.predictors.measuring.device import provenance  # noqa: E402
from mixnas.search.config import load_config  # noqa: E402
from mixnas.search.engines.climbing import Climbing  # noqa: E402
from mixnas.search.engines.local import LocalEngine  # noqa: E402
from mixnas.search.engines.session import Budget, Session  # noqa: E402
from mixnas.search.promotion import Asynchronous  # noqa: E402
from mixnas.search.strategies import STRATEGIES  # noqa: E402
from mixnas.search.study.objectives import parse_objectives  # noqa: E402
from mixnas.search.study.pareto import Reference  # noqa: E402
from mixnas.search.study.study import SearchStudy  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402

OBJECTIVES = parse_objectives({"accuracy": "max", "macs": "min", "params": "min"})
WAYS = {
    "to the end": None,
    "2 rungs": Asynchronous(rungs=2, factor=3),
    "3 rungs": Asynchronous(rungs=3, factor=3),
}
STRATEGIES_COMPARED = ("random", "predictor")


class Remembering(StandaloneEvaluator):
    """Trains nothing twice, whichever way asks for it, and counts what was asked for."""

    def __init__(self, spec: StandaloneSpec) -> None:
        super().__init__(spec)
        self._known: dict[tuple[str, float], Outcome] = {}
        self.spent = 0.0  # whole trainings
        self.whole: dict[str, Outcome] = {}

    def begin(self) -> None:
        """Count from here."""
        self.spent, self.whole = 0.0, {}

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """See `Evaluator`."""
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Outcome:
        begun, until = (0.0, 1.0) if request.part is None else (request.part.begun, request.part.until)
        key = request.architecture.id, until
        if key not in self._known:
            (self._known[key],) = super().evaluate([request])
        self.spent += until - begun
        if until == 1 and not self._known[key].failure:
            self.whole[request.architecture.id] = self._known[key]
        return self._known[key]


def searched(way: Asynchronous | None, trials: int, strategy: str, seed: int, evaluator: Remembering) -> None:
    """One search; what it trained is the evaluator's."""
    evaluator.begin()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = STRATEGIES.read(strategy, "strategy")
        journal = folder / "journal"
        options = {"strategy": chosen, "seed": seed, "cheap": evaluator.cheap}
        with SearchStudy(journal, evaluator.space, OBJECTIVES, **options) as study:
            climbing = None
            if way is not None:
                train, examples = evaluator.spec.train, len(evaluator.task.train)
                shares = way.shares(steps_of(train, examples), examples // train.batch_size)
                climbing = Climbing(study, shares, way.factor, folder / "rungs")
            with Session(study, Budget(trials=trials), climbing=climbing) as session:
                LocalEngine().run(session, evaluator)


def compared(strategy: str, seed: int, networks: int, epochs: int) -> dict[str, Any]:
    """All ways of one seed."""
    config = load_config(ROOT / "configs" / "digits.yaml")
    train = TrainConfig(epochs=epochs)
    evaluator = Remembering(StandaloneSpec(task="digits", space=config.space, train=train, seed=seed))
    found: dict[str, dict[str, Any]] = {}
    trained: dict[str, np.ndarray] = {}
    for name, way in WAYS.items():
        trials, begun = networks, time.monotonic()
        if way is not None:
            shares = [way.factor ** (i + 1 - way.rungs) for i in range(way.rungs)]
            trials = int(networks / way.effort(shares))
        while True:
            searched(way, trials, strategy, seed, evaluator)
            if evaluator.spent <= networks + 1e-9:
                break
            trials -= 1
        rows = []
        for outcome in evaluator.whole.values():
            assert outcome.network is not None
            score = evaluate(outcome.network, evaluator.task, "test").score
            rows.append([score, outcome.metrics["macs"], outcome.metrics["params"]])
        trained[name] = np.array(rows)
        found[name] = {
            "trials": trials,
            "whole_trainings": evaluator.spent,
            "to_the_end": len(rows),
            "best_test_accuracy": max(row[0] for row in rows),
            "seconds": time.monotonic() - begun,
        }
    box = Reference.of(np.concatenate(list(trained.values())), OBJECTIVES)
    for name, values in trained.items():
        found[name]["hypervolume"] = box.hypervolume(values, OBJECTIVES)
    return found


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", type=int, help="this seed alone")
    parser.add_argument("--strategies", default=",".join(STRATEGIES_COMPARED))
    parser.add_argument("--networks", type=int, default=12, help="that could be trained to the end")
    parser.add_argument("--epochs", type=int, default=18, help="of a whole training")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "rungs.json")
    args = parser.parse_args()
    settings = {"networks": args.networks, "epochs": args.epochs}
    known: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    runs: dict[str, Any] = known["runs"] if known.get("settings") == settings else {}
    for strategy in args.strategies.split(","):
        for seed in range(args.seeds) if args.only is None else [args.only]:
            found = compared(strategy, seed, args.networks, args.epochs)
            runs[f"{strategy}, seed {seed}"] = found
            for name, one in found.items():
                print(
                    f"{strategy}, seed {seed}, {name}: {one['trials']} begun, {one['to_the_end']} to the end, "
                    f"{one['whole_trainings']:.2f} whole trainings, hypervolume {one['hypervolume']:.4f}, "
                    f"best test accuracy {one['best_test_accuracy']:.4f}",
                    flush=True,
                )
            plain = {"provenance": provenance("cpu", 1), "settings": settings, "runs": dict(sorted(runs.items()))}
            write_json(args.output, plain)


if __name__ == "__main__":
    main()
