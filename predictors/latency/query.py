"""Asking a latency predictor about files: plain architectures and samples of a space, without torch where possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mixnas.predictors.latency.predictor import LatencyPredictor, Prediction
from mixnas.predictors.measuring.device import device_name
from mixnas.predictors.units import architecture_from_canonical
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.space import SearchSpace


def device_or_here(device: str | None) -> str:
    """A device's name; that of this machine where none is given."""
    return device_name() if device in (None, "auto") else str(device)


def ask(predictor: LatencyPredictor, plain: Any, source: str) -> Prediction:
    """The prediction for an architecture as plain data.

    Args:
        predictor: Whom to ask.
        plain: What an architecture file holds (with or without `space:` at the top).
        source: Name for messages.

    Raises:
        ConfigError: Not an architecture.
    """
    if isinstance(plain, Mapping) and "space" in plain:
        plain = plain["space"]
    try:
        architecture = architecture_from_canonical(plain)
        if not predictor.knows(architecture):  # then nothing vouches for it yet
            raise KeyError
    except (KeyError, TypeError, AttributeError, ValueError):
        architecture = Architecture.from_dict(plain, source)
    return predictor.predict(architecture)


def ask_sample(predictor: LatencyPredictor, config: Any, count: int, seed: int, source: str) -> list[dict[str, Any]]:
    """Predictions for random architectures of a space.

    Args:
        predictor: Whom to ask.
        config: What a configuration file holds; its `space:` is sampled.
        count: How many.
        seed: Of the sample.
        source: Name for messages.
    """
    if count < 1:
        raise ConfigError(f"--sample {count}: give a whole number from 1.")
    plain = config["space"] if isinstance(config, Mapping) and "space" in config else config
    table = predictor.stored_space(plain)
    space = SearchSpace.from_dict(plain, f"{source}: space") if table is None else table.space
    matrix = space.sample_many(count, np.random.default_rng(seed))
    rows = []
    for vector in matrix:
        architecture = space.decode(vector)
        rows.append({"id": architecture.id, **to_plain(predictor.predict(architecture)),
                     "architecture": architecture.to_dict()})  # fmt: skip
    return rows


def to_plain(prediction: Prediction) -> dict[str, Any]:
    """Plain data for JSON."""
    return {**dataclasses.asdict(prediction), "outside": list(prediction.outside),
            "units": [dataclasses.asdict(unit) for unit in prediction.units]}  # fmt: skip
