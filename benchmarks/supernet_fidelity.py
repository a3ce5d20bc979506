"""Do inherited weights rank architectures as stand-alone training does? Part of `supernet.py`.

The truth is the validation loss of each architecture trained by itself, once a seed: as the final table trains
(`final.train`, from scratch), since that is what a search has to foresee, and beside it as stand-alone search does
(`train`). A method that knew the loss of one training exactly would agree with that of another only as far as the seeds
agree: tau between seeds is the ceiling for tau with one seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

from mixnas.evaluators import proxies
from mixnas.evaluators.supernet.judging import SubnetJudge
from mixnas.evaluators.supernet.training import train_supernet
from mixnas.evaluators.training import TrainConfig, evaluate, train
from mixnas.search.config import Config
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.files import write_json
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet

_METRICS = ("loss", "score", "seconds")
_RESAMPLES = 2000


def tau(first: Any, second: Any) -> float:
    """Kendall's tau-b."""
    return float(kendalltau(first, second).statistic)


# -- the truth ----------------------------------------------------------------------------------------------------


def _train_alone(job: tuple[str, int, TrainConfig, Any]) -> tuple[str, int, dict[str, float]]:
    text, seed, config, task = job
    torch.set_num_threads(1)
    architecture = Architecture.from_json(text)
    generator = torch.Generator().manual_seed(seed)
    network = Network(architecture, task.io, generator=generator)
    result = train(network, task, config, generator=generator)
    judged = evaluate(network, task)
    return architecture.id, seed, {"loss": judged.loss, "score": judged.score, "seconds": result.seconds}


def truth(
    path: Path,
    architectures: list[Architecture],
    seeds: int,
    config: TrainConfig,
    task: Any,
    workers: int,
    say: Callable[[str], None],
) -> dict[str, list[dict[str, float]]]:
    """Metrics by architecture id, one per seed; what is in the file already is not trained again."""
    known: dict[str, Any] = {"train": json.loads(json.dumps(asdict(config))), "found": {}}
    if path.exists():
        stored = json.loads(path.read_text())
        if stored["train"] == known["train"]:
            known = stored
    found = known["found"]
    jobs = [
        (architecture.to_json(), seed, config, task)
        for seed in range(seeds)
        for architecture in architectures
        if str(seed) not in found.get(architecture.id, {})
    ]
    say(f"truth: {len(jobs)} of {seeds * len(architectures)} networks are to be trained")
    if jobs:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for done, (identity, seed, metrics) in enumerate(pool.imap_unordered(_train_alone, jobs), 1):
                found.setdefault(identity, {})[str(seed)] = metrics
                write_json(path, known)
                if done % 10 == 0:
                    say(f"truth: {done} of {len(jobs)}")
    return {a.id: [found[a.id][str(seed)] for seed in range(seeds)] for a in architectures}


# -- agreement ----------------------------------------------------------------------------------------------------


def _interval(values: np.ndarray, truth_AS: np.ndarray) -> list[float]:
    """95% bootstrap interval of tau with the seeds' mean, over architectures."""
    rng = np.random.default_rng(0)
    mean = truth_AS.mean(axis=1)
    taus = []
    for _ in range(_RESAMPLES):
        chosen = rng.integers(len(mean), size=len(mean))
        taus.append(tau(values[chosen], mean[chosen]))
    return [float(q) for q in np.nanquantile(taus, [0.025, 0.975])]


def partial_tau(first: Any, second: Any, known: Any) -> float:
    """Kendall's partial tau: what two rankings have in common beyond what both have in common with a third."""
    a, b, c = tau(first, second), tau(first, known), tau(second, known)
    rest = (1 - b**2) * (1 - c**2)
    return (a - b * c) / math.sqrt(rest) if rest > 0 else math.nan


def agreement(values: np.ndarray, truth_AS: np.ndarray, ceiling: float, sizes: np.ndarray) -> dict[str, Any]:
    """How well a method's values (lower is better) rank the architectures.

    Args:
        values: (A,).
        truth_AS: Validation loss (A, seeds).
        ceiling: Mean tau between two seeds.
        sizes: (A,) parameters, which everybody knows beforehand.
    """
    single = [tau(values, truth_AS[:, s]) for s in range(truth_AS.shape[1])]
    known = (
        {} if np.array_equal(values, -sizes) else {"given_params": partial_tau(values, truth_AS.mean(axis=1), sizes)}
    )
    return {
        "tau_with_mean_of_seeds": tau(values, truth_AS.mean(axis=1)),
        "interval": _interval(values, truth_AS),
        "tau_with_one_seed": float(np.mean(single)),
        "share_of_ceiling": float(np.mean(single)) / ceiling,
        **known,
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over super-networks, of what `agreement` gave for each."""
    keys = ("tau_with_mean_of_seeds", "tau_with_one_seed", "share_of_ceiling")
    return {key: float(np.mean([row[key] for row in rows])) for key in keys}


def _mean(values: list[float]) -> float:
    """NaN of nothing, without a warning."""
    return float(np.mean(values)) if values else math.nan


def _between_seeds(truth_AS: np.ndarray) -> float:
    """Mean tau between two seeds; NaN of a single one."""
    return _mean([tau(first, second) for first, second in itertools.combinations(truth_AS.T, 2)])


def run(
    args: argparse.Namespace,
    config: Config,
    space: SearchSpace,
    task: Any,
    results: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train, judge, compare; returns the record."""
    rng = np.random.default_rng(args.sample_seed)
    architectures = list(dict.fromkeys(space.sample(rng) for _ in range(args.architectures)))

    def trained(name: str, recipe: TrainConfig) -> dict[str, np.ndarray]:
        """Each metric (architectures, seeds) of the trainings kept under a name."""
        kept = results / f"supernet-fidelity-truth-{name}.json"
        found = truth(kept, architectures, args.seeds, recipe, task, args.workers, say)
        return {key: np.array([[m[key] for m in found[a.id]] for a in architectures]) for key in _METRICS}

    final = trained("final", config.final.train)
    truth_AS, scores_AS = final["loss"], final["score"]
    other_AS = trained("standalone", config.train)["loss"]
    ceiling, other_ceiling = _between_seeds(truth_AS), _between_seeds(other_AS)
    others = [
        tau(truth_AS[:, s], np.delete(truth_AS, s, axis=1).mean(axis=1)) for s in range(args.seeds) if args.seeds > 2
    ]

    sizes = np.array([cost(architecture, task.io).params for architecture in architectures])
    trainings = []
    for seed in range(args.supernets):
        supernet = Supernet(space, task.io, torch.Generator().manual_seed(seed))
        started = time.perf_counter()
        result = train_supernet(supernet, task, config.supernet, seed=seed)
        between = time.perf_counter()
        judged = SubnetJudge(supernet, task, probe=config.supernet.probe).judge_many(architectures)
        ended = time.perf_counter()
        losses = np.array([m["loss"] for m in judged])
        unprobed = np.array([m["loss"] for m in SubnetJudge(supernet, task).judge_many(architectures)])
        trainings.append(
            {
                "seed": seed,
                "steps": result.steps,
                "train_seconds": between - started,
                "judge_seconds": ended - between,
                **agreement(losses, truth_AS, ceiling, sizes),
                "without_probe": agreement(unprobed, truth_AS, ceiling, sizes),
                "with_standalone_truth": agreement(losses, other_AS, other_ceiling, sizes),
                "tau_of_accuracies": tau([m[task.metric] for m in judged], scores_AS.mean(axis=1)),
                "inherited_loss": losses.tolist(),
            }
        )
        say(f"super-network {seed}: { ({k: v for k, v in trainings[-1].items() if k != 'inherited_loss'}) }")
    scored = [proxies.score(architecture, task) for architecture in architectures]
    baselines = {
        name: agreement(-np.array([s[name] for s in scored]), truth_AS, ceiling, sizes) for name in proxies.PROXIES
    }
    for name, row in baselines.items():
        say(f"{name}: {row['tau_with_mean_of_seeds']:.3f}")
    return {
        "goal": {"tau": 0.7, "share_of_ceiling": 0.85},
        "settings": list(args.set),
        "sample_seed": args.sample_seed,
        "architectures": [a.to_dict() for a in architectures],
        "train": asdict(config.final.train),
        "supernet": asdict(config.supernet),
        "truth": {
            "loss": truth_AS.tolist(),
            "score": scores_AS.tolist(),
            "mean_seconds": float(final["seconds"].mean()),
        },
        "ceiling": {"tau_between_seeds": ceiling, "tau_of_one_with_mean_of_others": _mean(others)},
        "standalone_truth": {
            "train": asdict(config.train),
            "loss": other_AS.tolist(),
            "tau_between_seeds": other_ceiling,
            "tau_with_final": tau(truth_AS.mean(axis=1), other_AS.mean(axis=1)),
        },
        "inherited": {
            **_means(trainings),
            "without_probe": _means([t["without_probe"] for t in trainings]),
            "trainings": trainings,
        },
        "proxies": baselines,
    }
