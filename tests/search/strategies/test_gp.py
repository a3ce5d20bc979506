from __future__ import annotations

import pytest
from optuna.samplers import GPSampler

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.strategies.gp import GP
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.space import SearchSpace
from tests.contracts.engine import carry_out
from tests.contracts.strategy import OBJECTIVES, StrategyContract
from tests.search.problems import FromFunction, analytic

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


def test_what_is_in_flight_is_known_to_the_model(tmp_path, monkeypatch):
    """With all choices, those too that its architecture does not have; the one that is asked for is not in flight."""
    running, original = [], GPSampler._sample_relative_impl

    def spied(self, study, completed, in_flight, space):
        assert all(trial.params.keys() == space.keys() for trial in [*completed, *in_flight])
        running.append(len(in_flight))
        return original(self, study, completed, in_flight, space)

    monkeypatch.setattr(GPSampler, "_sample_relative_impl", spied)
    space = SearchSpace.from_dict(FEW_CHOICES)
    with SearchStudy(tmp_path / "j", space, OBJECTIVES, strategy=GP()) as study:
        carry_out(LocalEngine(), study, FromFunction(analytic), Budget(trials=11))
        running.clear()
        proposals = [study.ask() for _ in range(3)]
    assert running == [0, 1, 2] and len({p.architecture.id for p in proposals}) == 3
