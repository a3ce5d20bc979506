from __future__ import annotations

import pytest

from mixnas.search.strategies.gp import GP
from tests.contracts.strategy import StrategyContract

FEW_CHOICES = {
    "stem": {"name": "conv", "stride": 1},
    "stages": [
        {
            "width": [16, 24, 32],
            "depth": [1, 2],
            "block": {
                "mixer": [{"name": "dwconv", "kernel_size": [3, 5]}, "identity"],
                "channel_mixer": {"name": "mlp", "expansion": [2, 4]},
            },
        }
    ],
}


class TestGP(StrategyContract):
    trials = 12  # the model begins at the eleventh, and takes its time
    plain = FEW_CHOICES

    @pytest.fixture
    def strategy(self):
        return GP()
