"""mixnas: neural architecture search over token mixers, kernels, gating, depth and quantization.

The public names below are imported when they are first used, so that `import mixnas` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Architecture": "mixnas.search_space.architecture",
    "LatencyPredictor": "mixnas.predictors.latency.predictor",
    "NasError": "mixnas.search_space.errors",
    "Network": "mixnas.search_space.network",
    "Run": "mixnas.search.run.directory",
    "SearchSpace": "mixnas.search_space.space",
    "Supernet": "mixnas.search_space.supernet",
    "Task": "mixnas.evaluators.tasks.task",
    "load_network": "mixnas.search_space.formats.safetensors",
}

__all__ = ["__version__", *_PUBLIC, "search"]

if TYPE_CHECKING:
    from mixnas.evaluators.tasks.task import Task as Task
    from mixnas.predictors.latency.predictor import LatencyPredictor as LatencyPredictor
    from mixnas.search.job import search as search
    from mixnas.search.run.directory import Run as Run
    from mixnas.search_space.architecture import Architecture as Architecture
    from mixnas.search_space.errors import NasError as NasError
    from mixnas.search_space.formats.safetensors import load_network as load_network
    from mixnas.search_space.network import Network as Network
    from mixnas.search_space.space import SearchSpace as SearchSpace
    from mixnas.search_space.supernet import Supernet as Supernet


def __getattr__(name: str) -> Any:
    if name == "search":  # the package itself, which may be called
        return importlib.import_module("mixnas.search")
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
