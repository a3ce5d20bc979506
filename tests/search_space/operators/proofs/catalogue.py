"""The catalogue's two means: stored answers of the authors' modules (fixtures), and fingerprints with a fixed fill.

The fixtures lie in `tests/data/operators`, the larger ones with one of their two examples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).resolve().parents[3] / "data" / "operators"


def load(name: str) -> tuple[dict[str, Any], Tensor, Tensor, dict[str, Tensor]]:
    """Configuration, input, output and weights of a fixture."""
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as stored:
        weights = {key[2:]: torch.from_numpy(stored[key]) for key in stored.files if key.startswith("w.")}
        config = json.loads(str(stored["cfg"]))
        return config, torch.from_numpy(stored["x"]), torch.from_numpy(stored["y"]), weights


def _u(count: int, start: int = 1) -> Tensor:
    i = torch.arange(start, start + count, dtype=torch.int64)
    return ((7919 * i * i + 104729 * i) % 99991).double() / 99991 - 0.5


def drawn(*shape: int) -> Tensor:
    """The input X(shape) of catalogue b, appendix A."""
    return (3 * _u(int(np.prod(shape)), 501)).view(shape)


def filled(*shape: int, bias: bool = False) -> Tensor:
    """A parameter of this shape, as appendix A fills it."""
    u = _u(int(np.prod(shape)))
    if len(shape) >= 2:
        return (u * (12 * shape[0] / u.numel()) ** 0.5).view(shape)
    return 0.2 * u if bias else 1 + 0.5 * u


def fingerprint(y: Tensor) -> list[float]:
    """Sum, L2 norm and three entries, as appendix A lists them."""
    flat = y.detach().double().flatten()
    return [float(v) for v in (flat.sum(), flat.norm(), flat[0], flat[flat.numel() // 2], flat[-1])]


def fingerprints(y: Tensor, expected: list[float]) -> tuple[Tensor, Tensor]:
    """Both, each number over the listed one where that is above 1; in float32 without the sum, whose terms cancel."""
    scale = torch.tensor(expected, dtype=torch.float64).abs().clamp(min=1)
    found = torch.tensor(fingerprint(y), dtype=torch.float64) / scale
    listed = torch.tensor(expected, dtype=torch.float64) / scale
    begin = 0 if y.dtype == torch.float64 else 1
    return found[begin:], listed[begin:]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||."""
    return float((actual.detach().double() - expected.double()).norm() / expected.double().norm())
