"""What finishing in rungs gives in the same number of training steps. Part of what the search strategies must show.

    python benchmarks/finishing.py --seeds 3                     # some ten minutes of one core a seed

A super-network of the embedded default is trained, its space is searched for accuracy against multiply-accumulates and
parameters, none of which depends on the clock, and the same search is finished in three ways. Each way trains as many
steps as ten networks to the end take. What counts is the hypervolume of the networks on the test split, in the box
that the search fixed. In rungs the networks that were left behind count where nobody dominates them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import numpy as np  # noqa: E402

from mixnas.evaluators.protocol import Part  # noqa: E402
from mixnas.evaluators.supernet.evaluator import SupernetEvaluator, SupernetSpec  # noqa: E402
from mixnas.evaluators.training import steps_of  # noqa: E402
from mixnas.predictors.measuring.device import provenance  # noqa: E402
from mixnas.search.config import load_config  # noqa: E402
from mixnas.search.engines.local import LocalEngine  # noqa: E402
from mixnas.search.engines.session import Budget, Session  # noqa: E402
from mixnas.search.finalists import choose_believed  # noqa: E402
from mixnas.search.finish import FinalNetworks, choose_finalists  # noqa: E402
from mixnas.search.halving import Halving  # noqa: E402
from mixnas.search.run.front import SHARE  # noqa: E402
from mixnas.search.rungs import NetworksInRungs  # noqa: E402
from mixnas.search.strategies.predictor import Predictor  # noqa: E402
from mixnas.search.study.objectives import parse_objectives  # noqa: E402
from mixnas.search.study.results import Results, TrialRecord  # noqa: E402
from mixnas.search.study.study import SearchStudy  # noqa: E402
from mixnas.search_space.architecture import Architecture  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402
from mixnas.search_space.network import Network  # noqa: E402
from mixnas.search_space.reporting import SILENT, Report  # noqa: E402

OBJECTIVES = parse_objectives({"accuracy": "max", "macs": "min", "params": "min"})
CHEAP = ("macs", "params")
WAYS = {"to the end": None, "2 rungs": Halving(rungs=2), "3 rungs": Halving(rungs=3)}


class _Counting(SupernetEvaluator):
    """Counts the steps of finishing."""

    shares = 0.0

    def finish(self, architecture: Architecture, report: Report = SILENT, should_stop: Any = None) -> Network:
        self.shares += 1
        return super().finish(architecture, report, should_stop)

    def finish_part(
        self, architecture: Architecture, part: Part, report: Report = SILENT, should_stop: Any = None
    ) -> Network:
        self.shares += part.until - part.begun
        return super().finish_part(architecture, part, report, should_stop)


def _finish(
    way: Halving | None, results: Results, evaluator: _Counting, folder: Path, networks: int
) -> tuple[dict[str, Any], list[TrialRecord]]:
    """One way: what its networks are worth, and what it cost."""
    rungs = 1 if way is None else way.rungs
    first = networks if way is None else way.ladder(networks)[0].candidates
    space, task = evaluator.space, evaluator.task
    records = choose_finalists(results, first) if way is None else choose_believed(results, space, first, CHEAP)
    evaluator.shares = 0.0
    final: FinalNetworks
    if rungs == 1:
        final = FinalNetworks(folder, task, "digits", "benchmark")
    else:
        assert way is not None
        final = NetworksInRungs(
            folder, task, "digits", "benchmark", halving=way, networks=networks, objectives=OBJECTIVES
        )
    found = final.finish(records, evaluator, SILENT, lambda: False)
    members = [
        final.member(record, "", None).metrics
        for record, one in zip(records, found, strict=True)
        if not isinstance(one, str)
    ]
    values = np.array([[m["test_accuracy"], m["macs"], m["params"]] for m in members]).reshape(-1, 3)
    assert results.reference is not None
    return {
        "hypervolume": results.reference.hypervolume(values, OBJECTIVES),
        "begun": len(records),
        "finished": len(members),
        "to_the_end": sum(m.get(SHARE, 1.0) == 1.0 for m in members),
        "whole_trainings": evaluator.shares,
        "test_accuracy": sorted((m["test_accuracy"] for m in members), reverse=True),
    }, records


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000, help="of the super-network")
    parser.add_argument("--trials", type=int, default=150)
    parser.add_argument("--networks", type=int, default=10, help="that could be trained to the end")
    parser.add_argument("--epochs", type=int, default=20, help="of a whole training to the final weights")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "finishing.json")
    args = parser.parse_args()
    seeds: list[dict[str, Any]] = []
    for seed in range(args.seeds):
        settings = ["supernet.seconds=null", f"supernet.steps={args.steps}", f"final.train.epochs={args.epochs}"]
        config = load_config(ROOT / "configs" / "digits.yaml", settings=settings)
        spec = SupernetSpec(
            task="digits", space=config.space, supernet=config.supernet, final=config.final.train, seed=seed
        )
        evaluator = _Counting(spec)
        evaluator.prepare()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with (
                SearchStudy(
                    folder / "journal",
                    evaluator.space,
                    OBJECTIVES,
                    strategy=Predictor(share=0.5),
                    seed=seed,
                    cheap=evaluator.cheap,
                ) as study,
                Session(study, Budget(trials=args.trials)) as session,
            ):
                LocalEngine().run(session, evaluator)
                results = study.results
            found = {}
            for number, (way, halving) in enumerate(WAYS.items()):
                found[way], _ = _finish(halving, results, evaluator, folder / str(number), args.networks)
                one = found[way]
                print(
                    f"seed {seed}, {way}: hypervolume {one['hypervolume']:.4f}, {one['begun']} begun, "
                    f"{one['to_the_end']} to the end, {one['whole_trainings']:.2f} whole trainings",
                    file=sys.stderr,
                    flush=True,
                )
        seeds.append(found)
        write_json(
            args.output,
            {
                "networks": args.networks,
                "steps_of_a_whole_training": steps_of(config.final.train, len(evaluator.task.train)),
                "supernet_steps": args.steps,
                "trials": args.trials,
                "seeds": seeds,
                "mean_hypervolume": {way: float(np.mean([s[way]["hypervolume"] for s in seeds])) for way in WAYS},
                "provenance": provenance("cpu", 1),
            },
        )


if __name__ == "__main__":
    main()
