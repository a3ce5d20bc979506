from __future__ import annotations

import pytest

from mixnas.search.strategies.random import Random
from tests.contracts.strategy import StrategyContract


class TestRandom(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return Random()
