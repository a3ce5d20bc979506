from __future__ import annotations

import pytest

from mixnas.search.strategies.linas import Linas
from tests.contracts.strategy import StrategyContract


class TestLinas(StrategyContract):
    same_after_a_stop = False  # a population that was decided is decided anew

    @pytest.fixture
    def strategy(self):
        return Linas(population_size=10, generations=5)
