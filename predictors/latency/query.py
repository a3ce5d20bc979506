"""Asking a latency predictor about files: plain architectures and samples of a space, without torch where possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixnas.predictors.latency.predictor import LatencyPredictor, Prediction
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec


def ask(predictor: LatencyPredictor, plain: Any, source: str, io: IOSpec | None = None) -> Prediction:
    """The prediction for an architecture as plain data.

    Args:
        predictor: Whom to ask.
        plain: What an architecture file holds (with or without `space:` at the top).
        source: Name for messages.
        io: The task's input; may be left out where the predictor was profiled for only one.

    Raises:
        ConfigError: Not an architecture; or no input is given and there is not exactly one.
    """
    if isinstance(plain, Mapping) and "space" in plain:
        plain = plain["space"]
    io = predictor.input_of(io)
    try:
        architecture = Architecture.from_canonical(plain)
        if not predictor.knows(architecture, io):  # then nothing vouches for it yet
            raise KeyError
    except (KeyError, TypeError, AttributeError, ValueError):
        architecture = Architecture.from_dict(plain, source)
    return predictor.predict(architecture, io)


def ask_sample(
    predictor: LatencyPredictor, space: SearchSpace, count: int, seed: int, io: IOSpec
) -> list[dict[str, Any]]:
    """Predictions for random architectures of a space.

    Args:
        predictor: Whom to ask.
        space: Where from.
        count: How many.
        seed: Of the sample.
        io: The task's input.
    """
    if count < 1:
        raise ConfigError(f"--sample {count}: give a whole number from 1.")
    rows = []
    for vector in space.sample_many(count, np.random.default_rng(seed)):
        architecture = space.decode(vector)
        answer = to_plain(predictor.predict(architecture, io))
        rows.append({"id": architecture.id, **answer, "architecture": architecture.to_dict()})
    return rows


def to_plain(prediction: Prediction) -> dict[str, Any]:
    """Plain data for JSON."""
    latency = prediction.latency
    return {
        "latency_ms": latency.ms,
        "low_ms": latency.low_ms,
        "high_ms": latency.high_ms,
        "outside": list(latency.outside),
        "units": [dataclasses.asdict(unit) for unit in prediction.units],
        "device": prediction.device,
        "runtime": prediction.runtime,
        "estimate": prediction.estimate,
    }
