"""Time series of one's own: which of three machines is it. `nas search -c series.yaml` from this folder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixnas import IOSpec, Split, Task

LENGTH = 64


def record(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Series (count, 64, 2) of two sensors, and which machine they are of (count,): each hums with its own overtone.

    Your own: an array of this shape, floats of about unit variance.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    time = np.arange(LENGTH) * rng.uniform(0.25, 0.35, (count, 1))
    overtone = np.sin(time * np.array([2.0, 3.0, 4.0])[labels][:, None] + rng.uniform(0, 6, (count, 1)))
    first = np.sin(time) + 0.5 * overtone
    second = np.cos(time) + 0.5 * np.roll(overtone, 3, axis=1)
    series = np.stack([first, second], axis=-1) + rng.normal(0, 0.5, (count, LENGTH, 2))
    return torch.tensor(series, dtype=torch.float32), torch.tensor(labels)


class Series(Task):
    """Three classes of sequences, judged by accuracy."""

    name = "series"

    def __init__(self) -> None:
        self.io = IOSpec("sequence", (LENGTH,), in_features=2, num_outputs=3)
        self.train, self.validation, self.test = (Split(*record(n, seed)) for seed, n in enumerate((1200, 400, 400)))
