from __future__ import annotations

import pytest

from mixnas.search.study.objectives import parse_constraints, parse_objectives
from mixnas.search_space.space import SearchSpace
from tests.search.problems import SPACE, TINY, FromFunction, analytic


@pytest.fixture(scope="session")
def space():
    return SearchSpace.from_dict(SPACE)


@pytest.fixture(scope="session")
def tiny():
    """16 + ... architectures: small enough to run out."""
    return SearchSpace.from_dict(TINY)


@pytest.fixture(scope="session")
def evaluator():
    return FromFunction(analytic)


@pytest.fixture(scope="session")
def objectives():
    return parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})


@pytest.fixture(scope="session")
def constraints():
    return parse_constraints(["params <= 1e4"])
