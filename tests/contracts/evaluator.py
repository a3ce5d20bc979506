"""What every evaluator keeps to. A test class inherits it; fixtures give `evaluator` (prepared) and `space`."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest

from mixnas.evaluators.protocol import Apart, Request
from mixnas.search_space.reporting import Report, SilentReport


class Phases(SilentReport):
    """A report that notes the phases of the work."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    @contextmanager
    def phase(self, name: str, total: float | None = None, **about: object) -> Iterator[Report]:
        self.begun.append(name)
        yield self


def opened_elsewhere(pickled: bytes, answers) -> None:
    """Runs in another process: open a spec, prepare, evaluate; no phase may be left to do."""
    spec, architectures = pickle.loads(pickled)
    phases = Phases()
    evaluator = spec.open()
    evaluator.prepare(phases)
    outcomes = evaluator.evaluate([Request(architecture) for architecture in architectures])
    answers.put((phases.begun, [(outcome.metrics, outcome.failure) for outcome in outcomes]))


class EvaluatorContract:
    """See the module."""

    steady: frozenset[str] = frozenset()
    """Metrics that are the same whenever an architecture is evaluated."""

    @pytest.fixture
    def matrix(self, space) -> np.ndarray:
        return space.encode_many([space.sample(np.random.default_rng(seed)) for seed in range(4)])

    def _steady(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: metrics[name] for name in self.steady}

    def test_every_outcome_has_every_metric(self, evaluator, space, matrix):
        requests = [Request(architecture) for architecture in space.decode_many(matrix)]
        for outcome in evaluator.evaluate(requests):
            assert outcome.failure == "" and outcome.seconds > 0
            assert set(evaluator.metrics) <= set(outcome.metrics)
            assert all(np.isfinite(value) for value in outcome.metrics.values())

    def test_cheap_metrics_are_those_of_an_evaluation(self, evaluator, space, matrix):
        found = evaluator.cheap(matrix)
        assert set(found) == {metric.name for metric in evaluator.metrics.values() if metric.cheap}
        outcomes = evaluator.evaluate([Request(architecture) for architecture in space.decode_many(matrix)])
        for name, values in found.items():
            expected = [outcome.metrics[name] for outcome in outcomes]
            np.testing.assert_allclose(values, expected, rtol=1e-5)
        assert {name: len(values) for name, values in evaluator.cheap(matrix[:0]).items()} == dict.fromkeys(found, 0)

    def test_many_together_are_each_by_itself_in_the_order_asked(self, evaluator, space, matrix):
        requests = [Request(architecture) for architecture in space.decode_many(matrix)]
        together = [self._steady(outcome.metrics) for outcome in evaluator.evaluate(requests)]
        alone = [self._steady(evaluator.evaluate([request])[0].metrics) for request in requests]
        assert together == alone
        assert evaluator.evaluate([]) == []

    def test_in_two_parts_of_which_the_first_is_done_anywhere_it_is_the_same(self, evaluator, space, matrix):
        if not isinstance(evaluator, Apart):
            pytest.skip("evaluations have one part")
        requests = [Request(architecture) for architecture in space.decode_many(matrix[:2])]
        elsewhere = pickle.loads(pickle.dumps(evaluator.elsewhere())).open()
        phases = Phases()
        elsewhere.prepare(phases)
        assert phases.begun == []
        firsts = elsewhere.evaluate(requests)
        assert not any("latency_ms" in outcome.metrics for outcome in firsts)
        whole = [evaluator.complete(*both) for both in zip(requests, firsts, strict=True)]
        for outcome, here in zip(whole, evaluator.evaluate(requests), strict=True):
            assert outcome.failure == "" and set(outcome.metrics) == set(here.metrics)
            assert self._steady(outcome.metrics) == self._steady(here.metrics)
            assert (outcome.network is None) == (here.network is None)

    def test_preparing_again_does_nothing(self, evaluator):
        phases = Phases()
        evaluator.prepare(phases)
        assert phases.begun == []

    def test_another_process_opens_the_spec_and_finds_the_same(self, evaluator, space, matrix):
        architectures = space.decode_many(matrix[:2])
        here = [self._steady(o.metrics) for o in evaluator.evaluate([Request(a) for a in architectures])]
        context = multiprocessing.get_context("spawn")
        answers = context.SimpleQueue()
        pickled = pickle.dumps((evaluator.spec, architectures))
        assert len(pickled) < 50_000  # plain: no data, no weights
        process = context.Process(target=opened_elsewhere, args=(pickled, answers))
        process.start()
        begun, there = answers.get()
        process.join()
        assert begun == [] and [failure for _, failure in there] == [""] * 2
        assert [self._steady(metrics) for metrics, _ in there] == here
