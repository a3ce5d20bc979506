"""A device that is not this machine: a quick profile of this one, filed under another name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mixnas.predictors.latency.model import FitConfig
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

DEVICE = "cpu-elsewhere-1t"
QUICK = ProfileConfig(
    budget_s=60.0,  # never reached: these networks are measured before
    max_networks=14,
    measure=MeasureConfig(passes=1, window_ms=0.5, sentinel_repeats=4, max_extra_passes=1),
    fit=FitConfig(num_trees=20),
)


@contextmanager
def elsewhere(folder: Path, space: SearchSpace, io: IOSpec) -> Iterator[str]:
    """Within it the user's profiles lie in `folder`, and among them is that of the device whose name is given."""
    predictor = profile(space, io, device="cpu", directory=folder / "here", config=QUICK)
    predictor.meta["device"] = DEVICE
    predictor.save(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXNAS_TABLES", str(folder))
        yield DEVICE
