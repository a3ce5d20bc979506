"""Fronts for tests of what is written."""

from __future__ import annotations

from mixnas.search.finish import searched_member
from mixnas.search.run.front import Front
from mixnas.search.study.results import Results


def front_of(results: Results) -> Front:
    """The searched front of made-up trials."""
    knee = results.knee()
    return Front(
        run="r",
        task={"name": "digits", "seed": 1},
        metric="accuracy",
        objectives={o.name: o.direction for o in results.objectives},
        constraints=tuple(map(str, results.constraints)),
        evaluator="supernet",
        device="cpu-x-1t",
        latency="predicted",
        trials={"done": results.counts["done"], "failed": 0, "duplicate": 0, "infeasible": 0},
        hypervolume=results.hypervolume(),
        reference=None if results.reference is None else results.reference.point,
        final=False,
        members=tuple(map(searched_member, results.front())),
        others=(),
        knee=None if knee is None else knee.id,
        searched_front=tuple(record.id for record in results.front()),
    )
