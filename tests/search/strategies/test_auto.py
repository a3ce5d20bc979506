from __future__ import annotations

import pytest

from mixnas.search.config import SearchConfig
from mixnas.search.strategies import Question
from mixnas.search.strategies.auto import MANY, Auto
from mixnas.search.strategies.evolution import NSGA2
from mixnas.search.strategies.predictor import Predictor, PredictorSampler
from mixnas.search.study.objectives import parse_objectives
from mixnas.search_space.space import SearchSpace
from tests.search.problems import TINY


@pytest.mark.parametrize(
    ("quick", "trials", "chosen"),
    [
        (False, 50, Predictor()),
        (False, 10 * MANY, Predictor()),
        (True, MANY - 1, Predictor(share=0.5)),
        (True, MANY, NSGA2()),
    ],
)
def test_it_goes_by_what_evaluates_and_how_often(quick, trials, chosen):
    assert Auto().resolve(quick=quick, trials=trials) == chosen


def test_it_is_the_default_and_proposes_where_nothing_is_known():
    assert SearchConfig().strategy == Auto()
    question = Question(SearchSpace.from_dict(TINY), parse_objectives({"accuracy": "max"}))
    assert isinstance(Auto().make(question, None, lambda architecture: True), PredictorSampler)
