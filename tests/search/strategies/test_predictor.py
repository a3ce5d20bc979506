"""The strategy that predicts: the contract, and what it has to hold beside it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from optuna.trial import TrialState

from mixnas.predictors.gaussian import GaussianProcess
from mixnas.search.strategies import Question
from mixnas.search.strategies.acquisition import Improvement, Scale, shortfall_of_known
from mixnas.search.strategies.modelling import FIT_ROWS, ROWS
from mixnas.search.strategies.predictor import Predictor, PredictorSampler
from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search.study.pareto import boxes_above
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.space import SearchSpace
from tests.contracts.strategy import StrategyContract
from tests.search.problems import SPACE, analytic, cheap_of

OBJECTIVES = parse_objectives({"accuracy": "max", "latency_ms": "min"})
MANY_CHOICES = {
    "stem": {"name": "conv", "stride": 1},
    "stages": [
        {
            "width": [16, 24, 32],
            "depth": [6, 8, 10],
            "block": {
                "mixer": [{"name": "dwconv", "kernel_size": [3, 5, 7]}, {"name": "attention", "heads": [2, 4]}],
                "gate": ["none", "se"],
                "channel_mixer": [{"name": "mlp", "expansion": [2, 4]}, {"name": "swiglu", "expansion": [2, 3]}],
            },
        }
    ]
    * 2,
}


class TestPredictor(StrategyContract):
    trials = 24  # past the twelve that are spread over the space
    same_after_a_stop = False  # its models' parameters start from where they stood

    @pytest.fixture
    def strategy(self):
        return Predictor(candidates=200)  # what is cheap in these tests is slow


def ended(number, params, values=None, failure=""):
    """A finished trial as a study holds it."""
    attrs = {"failure": failure} if failure else {"metrics": values, "seconds": 1.0, "id": str(number)}
    state = TrialState.FAIL if failure else TrialState.COMPLETE
    return SimpleNamespace(number=number, params=params, user_attrs=attrs, state=state)


class Trials(list):
    """As much of a study as a sampler reads."""

    def get_trials(self, deepcopy=False):
        return self


def sampler_of(plain, objectives=OBJECTIVES, constraints=(), cheap=None, seed=0, candidates=300, **options):
    space = SearchSpace.from_dict(plain)
    question = Question(space, objectives, parse_constraints(list(constraints)), seed)
    return PredictorSampler(
        question, cheap and cheap(space), lambda architecture: True, Predictor(candidates=candidates, **options)
    )


def went_on(sampler, function, trials, count=1):
    """A study's trials after the sampler was asked, and answered by a function, so many times."""
    study = Trials()
    while len(study) < trials:
        for architecture in sampler.propose(study, count, np.random.default_rng(len(study))):
            found = function(architecture)
            params = sampler._space.params_of(architecture)
            values, failure = (None, found) if isinstance(found, str) else (found, "")
            study.append(ended(len(study), params, values, failure))
    return study


def test_a_hundred_choices_and_more_trials_than_its_models_know():
    sampler = sampler_of(MANY_CHOICES)
    space = sampler._space
    assert len(space.variables) > 100
    rng = np.random.default_rng(0)
    rows = space.sample_many(900, rng)
    study = Trials()
    for number, architecture in enumerate(space.decode_many(rows)):
        study.append(ended(number, space.params_of(architecture), analytic(architecture)))
    known = {a.id for a in space.decode_many(rows)}
    found = sampler.propose(study, 5, rng)
    assert len(found) >= 5 and not known & {a.id for a in found}
    front = max(t.user_attrs["metrics"]["accuracy"] for t in study)
    assert max(analytic(a)["accuracy"] for a in found) > front  # the made-up metric is easy


def test_what_models_are_fitted_on_does_not_grow_with_the_search(monkeypatch):
    """Of thousands of trials no model knows more than `ROWS`, and no proposal waits for the fit of two of them."""
    fits, known = [], []
    fit, condition = GaussianProcess.fit, GaussianProcess.condition
    monkeypatch.setattr(
        GaussianProcess, "fit", lambda *a, **k: (fits.append((len(a[2]), k["iterations"])), fit(*a, **k))
    )
    monkeypatch.setattr(GaussianProcess, "condition", lambda *a: (known.append(len(a[2])), condition(*a)))
    sampler = sampler_of(SPACE, parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"}))
    space, rng, study = sampler._space, np.random.default_rng(0), Trials()
    for architecture in space.decode_many(space.sample_many(2000, rng)):
        study.append(ended(len(study), space.params_of(architecture), analytic(architecture)))
    sampler.propose(study, 1, rng)
    assert len(fits) == 3 and sum(rows * steps for rows, steps in fits) < FIT_ROWS * 20
    for _ in range(3):  # the models that were fitted roughly, one after the other
        fits.clear()
        sampler.propose(study, 1, rng)
        assert len(fits) == 1 and fits[0][0] <= FIT_ROWS
    fits.clear()
    sampler.propose(study, 1, rng)
    assert not fits and max(known) == ROWS


def test_constraints_that_are_known_later_are_learned():
    sampler = sampler_of(SPACE, constraints=["latency_ms <= 0.25"])
    study = went_on(sampler, analytic, 40)
    kept = [t.user_attrs["metrics"]["latency_ms"] <= 0.25 for t in study]
    assert np.mean(kept[12:]) > np.mean(kept[:12]) and np.mean(kept[-15:]) > 0.6


def test_few_architectures_that_keep_a_constraint_known_beforehand_are_found():
    """Of a hundred choices hardly a random one is as small."""
    sampler = sampler_of(
        MANY_CHOICES,
        objectives=parse_objectives({"accuracy": "max", "params": "min"}),
        constraints=["params <= 1.1e4"],
        cheap=lambda space: cheap_of(space, analytic, "params"),
    )
    rng = np.random.default_rng(0)
    small = sampler._draw_feasible(100, rng)
    assert len(small) >= 10
    assert all(analytic(a)["params"] <= 1.1e4 for a in sampler._space.decode_many(small))
    drawn = sampler._space.decode_many(sampler._space.sample_many(100, rng))
    assert np.mean([analytic(a)["params"] <= 1.1e4 for a in drawn]) < 0.05


def test_about_so_many_parameters_are_kept_from_the_first_proposal_on():
    sampler = sampler_of(
        SPACE,
        objectives=parse_objectives({"accuracy": "max", "latency_ms": "min"}),
        constraints=["about 2k parameters"],
        cheap=lambda space: cheap_of(space, analytic, "params"),
    )
    study = went_on(sampler, analytic, 20)
    assert all(1800 <= t.user_attrs["metrics"]["params"] <= 2200 for t in study)


@pytest.mark.parametrize(
    ("plain", "works"),
    [(SPACE, {16, 24}), (MANY_CHOICES, {24})],
    ids=["few choices", "a hundred choices"],
)
def test_a_region_that_fails_is_learned(plain, works):
    """One choice of a hundred decides: a linear model, or a process with a length for each, does not find it."""

    def fails(architecture):
        return analytic(architecture) if architecture.stages[0].width in works else "out of memory"

    study = went_on(sampler_of(plain, candidates=100), fails, 48)
    failed = [t.state == TrialState.FAIL for t in study]
    assert sum(failed[:36]) >= 2 and sum(failed[36:]) <= 2


@pytest.mark.parametrize(
    "objectives",
    [
        {"accuracy": "max"},
        {"params": "min"},
        {"accuracy": "min", "latency_ms": "max"},
        {"accuracy": "max", "latency_ms": "min", "params": "min"},
        {"accuracy": "max", "latency_ms": "min", "params": "min", "latency_ms_other": "min"},
    ],
)
def test_any_number_of_objectives_in_either_direction(objectives):
    def function(architecture):
        found = analytic(architecture)
        return {**found, "latency_ms_other": found["latency_ms"] * (2 if "attention" in architecture.to_json() else 1)}

    study = went_on(sampler_of(SPACE, parse_objectives(objectives)), function, 20, count=4)
    assert len({tuple(sorted(t.params.items())) for t in study}) == len(study)


def test_noise_and_the_same_architecture_twice():
    noise = np.random.default_rng(0)

    def noisy(architecture):
        found = analytic(architecture)
        return {**found, "accuracy": found["accuracy"] + 0.05 * noise.normal()}

    sampler = sampler_of(SPACE)
    study = went_on(sampler, noisy, 20)
    again = dict(study[3].params)
    study.append(ended(20, again, noisy(sampler._space.from_params(again))))
    study.append(ended(21, again, noisy(sampler._space.from_params(again))))
    assert sampler.propose(study, 1, np.random.default_rng(0))


def test_a_metric_that_never_varies():
    study = went_on(sampler_of(SPACE), lambda a: {"accuracy": 0.5, "latency_ms": 1.0}, 16)
    assert len(study) >= 16


def test_batches_grow_as_the_search_goes_on():
    sampler = sampler_of(SPACE)
    assert [sampler._batch(n) for n in (12, 59, 60, 100, 200, 5000)] == [1, 1, 2, 5, 10, 10]


def test_quick_evaluations_make_batches_that_keep_the_share():
    sampler = sampler_of(SPACE, share=0.5)
    went_on(sampler, analytic, 14)
    sampler._seconds = 0.2
    sampler._history._seconds = [0.01] * 14
    assert sampler._batch(14) == 20
    sampler._history._seconds = [10.0] * 14
    assert sampler._batch(14) == 1


def test_the_reference_point_lies_beyond_what_was_seen_where_the_models_say_so():
    """Evaluated were narrow networks alone; that wide ones are slower is no reason to leave them."""
    sampler = sampler_of(SPACE)
    space, study = sampler._space, Trials()
    for architecture in space.decode_many(space.sample_many(400, np.random.default_rng(0))):
        if architecture.stages[0].width < 32:
            study.append(ended(len(study), space.params_of(architecture), analytic(architecture)))
    seen = max(t.user_attrs["metrics"]["latency_ms"] for t in study)
    sampler.propose(study, 1, np.random.default_rng(0))
    assert sampler._reference[1] > 1.06 * seen


def test_the_reference_point_never_comes_nearer():
    sampler = sampler_of(SPACE)
    study, points = Trials(), []
    for n in range(24):
        for architecture in sampler.propose(study, 1, np.random.default_rng(n)):
            study.append(ended(len(study), sampler._space.params_of(architecture), analytic(architecture)))
        points.append(sampler._reference.copy())
    assert (np.diff(np.array(points[13:]), axis=0) >= 0).all() and np.isfinite(points[-1]).all()


def test_where_a_size_is_known_the_first_points_are_one_of_each_quantile(tmp_path):
    space = SearchSpace.from_dict(SPACE)
    cheap = cheap_of(space, analytic, "params")
    objectives = parse_objectives({"accuracy": "max", "params": "min"})
    with SearchStudy(tmp_path / "j", space, objectives, strategy=Predictor(), cheap=cheap) as study:
        study.begin_batch(12)
        params = [analytic(study.ask().architecture)["params"] for _ in range(12)]
    everything = cheap(space.sample_many(600, np.random.default_rng(0)))["params"]
    quantiles = np.searchsorted(np.sort(everything), np.sort(params)) / 600
    assert np.abs(quantiles - (np.arange(12) + 0.5) / 12).max() < 0.15


# -- the acquisition --------


def test_the_expected_improvement_is_that_of_samples():
    rng = np.random.default_rng(0)
    front = np.array([[1.0, 5.0], [2.0, 3.0], [4.0, 1.0]])
    reference = np.array([6.0, 6.0])
    scales = [Scale(0.0, 0.8, 0.5), Scale(0.3, 0.5, 0.7)]
    mean, deviation = rng.normal(size=(2, 4)), 0.2 + rng.random((2, 4))
    improvement = Improvement(front, reference)
    found = improvement(
        [s.shortfall(b, m, d) for s, b, m, d in zip(scales, improvement.bounds, mean, deviation, strict=True)]
    )
    lower, upper = np.array([[-9.0, 1.0, 2.0, 4.0]]).T, np.array([[1.0, 2.0, 4.0, 6.0]]).T
    height = np.array([6.0, 5.0, 3.0, 1.0])
    for i in range(4):
        y = [s.back(m[i] + d[i] * rng.normal(size=200_000)) for s, m, d in zip(scales, mean, deviation, strict=True)]
        wide = np.maximum(upper - np.maximum(lower, y[0]), 0)
        sampled = (wide * np.maximum(height[:, None] - y[1], 0)).sum(axis=0) / (8 * 8)  # spans of 5 and of 5
        assert found[i] == pytest.approx(sampled.mean(), abs=5 * sampled.std() / np.sqrt(len(sampled)))


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_an_improvement_has_no_unit(size):
    front = np.array([[1.0, 5.0], [2.0, 3.0], [4.0, 1.0]]) * size
    improvement = Improvement(front, np.array([6.0, 6.0]) * size)
    values = np.array([[0.5, 2.0], [3.0, 2.5], [5.0, 5.0]]) * size
    found = improvement([shortfall_of_known(b, v) for b, v in zip(improvement.bounds, values.T, strict=True)])
    span = 2.0 ** np.frexp(5 * size)[1] / size
    np.testing.assert_allclose(found * span**2, [7.0, 0.5, 0.0], atol=1e-12)


def test_a_large_front_of_four_objectives_is_thinned_out_before_its_boxes_are_millions():
    front = np.random.default_rng(0).dirichlet(np.ones(4), size=1500)  # none dominates another
    improvement = Improvement(front, np.ones(4))
    shortfalls = [shortfall_of_known(b, v) for b, v in zip(improvement.bounds, (front + 0.01).T, strict=True)]
    assert len(front) > shortfalls[0].shape[1] and np.isfinite(improvement(shortfalls)).all()
    assert boxes_above(front, np.ones(4), most=50) is None and boxes_above(front[:1], np.ones(4), most=50) is not None


@pytest.mark.parametrize("positive", [True, False])
def test_a_scale_goes_back_and_forth(positive):
    values = np.array([1.0, 2.0, 2.5, 4.0, 40.0])
    scale = Scale.of(values, positive=positive, margin=0.1)
    u = scale.forward(values)
    assert u.mean() == pytest.approx(0) and u.std() == pytest.approx(1)
    np.testing.assert_allclose(scale.back(u), values)
    assert scale.forward(np.array([-1e9]))[0] == -np.inf and scale.back(np.array([-50.0]))[0] >= scale.shift
