"""Finalists by what is believed of trials rather than by one noisy look at each."""

from __future__ import annotations

import numpy as np

from mixnas.search.finalists import choose_believed
from mixnas.search.finish import choose_finalists
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.pareto import as_minimised
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search_space.space import SearchSpace

OBJECTIVES = parse_objectives({"accuracy": "max", "params": "min"})
SPACE = SearchSpace.from_dict(
    {
        "stem": "conv",
        "stages": [
            {
                "width": [8, 16, 24],
                "depth": 3,
                "block": {
                    "mixer": ["identity", "pooling", {"name": "dwconv", "kernel_size": [3, 5]}],
                    "channel_mixer": {"name": "mlp", "expansion": [1, 2, 4]},
                },
            }
        ],
    }
)


def searched(seed: int, noise: float, count: int = 120):
    """Trials whose accuracy depends on the choices, seen with noise; and what it is without."""
    rng = np.random.default_rng(seed)
    rows = np.unique(SPACE.sample_many(count, rng), axis=0)
    rng.shuffle(rows)
    weights = rng.normal(size=rows.shape[1])
    size = 1000.0 + 400.0 * (rows + 1).sum(axis=1)
    truth = 0.8 + 0.03 * ((rows / 3) @ weights) + 0.02 * np.log(size / size.mean())
    records = []
    for i, (a, t, s) in enumerate(zip(SPACE.decode_many(rows), truth, size, strict=True)):
        seen = {"accuracy": float(t + noise * rng.normal()), "params": float(s)}
        records.append(TrialRecord(i, "done", a.id, a.to_json(), seen))
    return Results(OBJECTIVES, (), records), truth


def volume(results, truth, chosen):
    points = as_minimised(np.array([(truth[r.number], r.metrics["params"]) for r in chosen]), OBJECTIVES)
    import moocore

    every = as_minimised(np.array([(truth[r.number], r.metrics["params"]) for r in results.records]), OBJECTIVES)
    low, high = every.min(axis=0), every.max(axis=0)
    return moocore.hypervolume((points - low) / (high - low), ref=[1.1, 1.1])


def test_the_front_comes_first_and_then_who_is_believed_to_belong_there():
    gained = []
    for seed in range(4):
        results, truth = searched(seed, noise=0.04)
        front = choose_finalists(results, 20)
        believed = choose_believed(results, SPACE, 20, ["params"])
        assert len({record.id for record in believed}) == len(believed) == 20 > len(front)
        assert believed[: len(front)] == sorted(front, key=lambda r: r.number)
        # beside the front, those that were chosen are worth more than as many at random
        rest = [record for record in results.records if record not in front]
        drawn = np.random.default_rng(seed).permutation(len(rest))[: 20 - len(front)]
        random = [*front, *(rest[i] for i in drawn)]
        gained.append(volume(results, truth, believed) - volume(results, truth, random))
    assert np.mean(gained) > 0


def test_with_few_trials_it_is_the_front():
    results, _ = searched(0, noise=0.0, count=6)
    assert choose_believed(results, SPACE, 3, ["params"]) == choose_finalists(results, 3)
