"""A number from a series: its frequency. `nas search -c regression.yaml` from this folder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixnas import IOSpec, Split, Task


def record(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy waves (count, 48, 1) and their frequencies (count,), scaled to about unit variance."""
    rng = np.random.default_rng(seed)
    frequency, phase = rng.uniform(1, 6, (count, 1)), rng.uniform(0, 6, (count, 1))
    waves = np.sin(frequency * np.linspace(0, 6, 48) + phase) + rng.normal(0, 0.3, (count, 48))
    return torch.tensor(waves[..., None], dtype=torch.float32), torch.tensor(
        (frequency[:, 0] - 3.5) / 1.44, dtype=torch.float32
    )


class Frequency(Task):
    """One output, trained by the mean squared error and judged by the mean absolute error: less is better."""

    name, metric, direction = "frequency", "mae", "min"

    def __init__(self) -> None:
        self.io = IOSpec("sequence", (48,), in_features=1, num_outputs=1)
        self.train, self.validation, self.test = (Split(*record(n, seed)) for seed, n in enumerate((1200, 400, 400)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - targets).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.squeeze(-1) - targets).abs().mean()
