from __future__ import annotations

import pytest

from mixnas.search.strategies.tpe import TPE
from tests.contracts.strategy import StrategyContract


class TestTPE(StrategyContract):
    @pytest.fixture
    def strategy(self):
        return TPE()
