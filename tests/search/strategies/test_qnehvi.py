"""BoTorch's strategy: refused by name where BoTorch is missing, and a strategy like the others where it is there."""

from __future__ import annotations

import importlib.util

import pytest

from mixnas.search.config import read_config
from mixnas.search.problem import Problem
from mixnas.search.strategies import Strategy
from mixnas.search.strategies.qnehvi import QNEHVI
from mixnas.search_space.errors import ConfigError
from tests.contracts.strategy import StrategyContract

HERE = importlib.util.find_spec("botorch") is not None


def test_without_botorch_it_says_what_to_install_before_any_work(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    block = {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}
    plain = {
        "task": "digits",
        "search": {"strategy": "qnehvi"},
        "space": {"stem": "conv", "stages": [{"width": [4, 8], "block": block}]},
    }
    with pytest.raises(ConfigError, match=r"qnehvi needs BoTorch.*pip install 'botorch"):
        Problem(read_config(plain, "c.yaml"))
    assert Strategy.from_plain("qnehvi", "x") == QNEHVI()


@pytest.mark.skipif(not HERE, reason="BoTorch, an extra, is not installed")
class TestQNEHVI(StrategyContract):
    trials = 14
    same_after_a_stop = False  # a batch that was decided is decided anew

    @pytest.fixture
    def strategy(self):
        return QNEHVI(first=6, candidates=60)
