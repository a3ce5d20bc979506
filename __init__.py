"""mixnas: neural architecture search over token mixers, kernels, gating, depth and quantization.

The public names below are imported when they are first used, so that `import mixnas` costs nothing.

Examples:
    >>> import mixnas
    >>> block = {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}
    >>> mixnas.SearchSpace.from_dict({"stem": "conv", "stages": [{"width": [8, 16], "block": block}]})
    SearchSpace(space: 4 architectures, 2 choices)
    >>> "search" in dir(mixnas)
    True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Architecture": "mixnas.search_space.architecture",
    "IOSpec": "mixnas.search_space.units",
    "LatencyPredictor": "mixnas.predictors.latency.predictor",
    "NasError": "mixnas.search_space.errors",
    "Network": "mixnas.search_space.network",
    "Run": "mixnas.search.run.directory",
    "SearchSpace": "mixnas.search_space.space",
    "Split": "mixnas.evaluators.tasks.task",
    "Supernet": "mixnas.search_space.supernet",
    "Task": "mixnas.evaluators.tasks.task",
    "export": "mixnas.search.export:export_run",
    "load_network": "mixnas.search_space.formats.safetensors",
    "profile": "mixnas.predictors.latency.profile",
    "resume": "mixnas.search.job",
}
"""A public name, and its module; with the name that it has there, where that is another."""

__all__ = ["__version__", *_PUBLIC, "search"]

if TYPE_CHECKING:
    from mixnas.evaluators.tasks.task import Split as Split
    from mixnas.evaluators.tasks.task import Task as Task
    from mixnas.predictors.latency.predictor import LatencyPredictor as LatencyPredictor
    from mixnas.predictors.latency.profile import profile as profile
    from mixnas.search.export import export_run
    from mixnas.search.job import resume as resume
    from mixnas.search.job import search as search
    from mixnas.search.run.directory import Run as Run
    from mixnas.search_space.architecture import Architecture as Architecture
    from mixnas.search_space.errors import NasError as NasError
    from mixnas.search_space.formats.safetensors import load_network as load_network
    from mixnas.search_space.network import Network as Network
    from mixnas.search_space.space import SearchSpace as SearchSpace
    from mixnas.search_space.supernet import Supernet as Supernet
    from mixnas.search_space.units import IOSpec as IOSpec

    export = export_run


def __getattr__(name: str) -> Any:
    if name == "search":  # the package itself, which may be called
        return importlib.import_module("mixnas.search")
    if name in _PUBLIC:
        module, _, own = _PUBLIC[name].partition(":")
        return getattr(importlib.import_module(module), own or name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
