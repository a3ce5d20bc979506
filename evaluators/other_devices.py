"""Latency on other devices than the one that a search is for: looked up, and called `latency_ms@DEVICE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mixnas.evaluators.protocol import Metric
from mixnas.predictors.latency.source import LatencySource, LatencySpec
from mixnas.predictors.measuring.value import Latency
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec

PREFIX = "latency_ms@"


def devices_in(names: Sequence[str]) -> tuple[str, ...]:
    """The devices that names of metrics refer to, each once, in order."""
    return tuple(dict.fromkeys(name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)))


class OtherDevices:
    """Predicted latency on devices whose predictor is stored: the user's, or one that ships.

    Args:
        devices: Their names.
        latency: Gives runtime and batch size; None where a search has no latency.
        space: Whose networks are asked about.
        io: What they read and answer.

    Raises:
        ConfigError: Nobody measured one of the devices through this runtime with this batch size, or the space has a
            quantization policy that does not run there.
    """

    def __init__(self, devices: Sequence[str], latency: LatencySpec | None, space: SearchSpace, io: IOSpec) -> None:
        self._space, self._io = space, io
        self._sources: dict[str, LatencySource] = {}
        for device in devices:
            if latency is None:
                raise ConfigError(f"{PREFIX}{device}: this search has no latency. Leave the metric out.")
            source = replace(latency, device=device, directory=None, reference_ms=None).open()
            try:
                source.check_policies(space)
                source.find()
            except ConfigError as error:
                raise ConfigError(f"{PREFIX}{device}: {error}") from None
            self._sources[f"{PREFIX}{device}"] = source

    @property
    def metrics(self) -> dict[str, Metric]:
        """See `Evaluator`."""
        return {name: Metric(name, "min", True) for name in self._sources}

    def _predictors(self) -> dict[str, LatencySource]:
        for source in self._sources.values():
            source.adopt()
        return self._sources

    def of(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """Milliseconds (rows,) of encoded architectures (rows, variables), by the metric's name."""
        return {name: self.of_one_device(name, matrix) for name in self._sources}

    def of_one_device(self, metric: str, matrix: np.ndarray) -> np.ndarray:
        """Milliseconds (rows,) of encoded architectures (rows, variables), by the name of one metric."""
        return self._predictors()[metric].predict_many(matrix, self._space, self._io)

    def predict(self, metric: str, architecture: Architecture) -> Latency:
        """Latency of an architecture with its interval, by the name of a metric."""
        return self._predictors()[metric].predict(architecture, self._io)

    def of_one(self, architecture: Architecture) -> dict[str, float]:
        """Milliseconds of an architecture, by the metric's name."""
        return {name: self.predict(name, architecture).ms for name in self._sources}
