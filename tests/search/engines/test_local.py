from __future__ import annotations

import pytest

from mixnas.search.engines.local import LocalEngine
from tests.contracts.engine import EngineContract


class TestOneByOne(EngineContract):
    @pytest.fixture
    def engine(self):
        return LocalEngine()


class TestInBatches(EngineContract):
    @pytest.fixture
    def engine(self):
        return LocalEngine(batch=4)


class TestInWorkers(EngineContract):
    @pytest.fixture
    def engine(self):
        return LocalEngine(workers=2)
