"""Pictures of one's own: which shape is in it. `nas search -c pictures.yaml` from this folder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixnas import IOSpec, Split, Task


def draw(count: int, seed: int, size: int = 24) -> tuple[Tensor, Tensor]:
    """Pictures (count, size, size, 3) of a disc, square, cross or ring in noise, and which of them each is (count,).

    Your own: read them into an array of this shape, floats of about unit variance, channels last.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    pictures, labels = rng.normal(0, 0.3, (count, size, size, 3)), rng.integers(0, 4, count)
    for picture, label in zip(pictures, labels, strict=True):
        radius, (across, down) = rng.uniform(4, 7), rng.uniform(8, size - 8, 2)
        dx, dy = np.abs(x - across), np.abs(y - down)
        distance = np.hypot(dx, dy)
        shapes = (
            distance < radius,
            np.maximum(dx, dy) < radius * 0.9,
            (np.minimum(dx, dy) < radius / 3) & (np.maximum(dx, dy) < radius),
            (distance < radius) & (distance > radius * 0.6),
        )
        picture[shapes[label]] += rng.uniform(0.8, 1.2, 3)
    return torch.tensor(pictures, dtype=torch.float32), torch.tensor(labels)


class Pictures(Task):
    """Four classes, judged by accuracy; turned over from left to right for training."""

    name = "pictures"

    def __init__(self) -> None:
        self.io = IOSpec("image", (24, 24), in_features=3, num_outputs=4)
        self.train, self.validation, self.test = (Split(*draw(n, seed)) for seed, n in enumerate((1200, 400, 400)))

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        turned = torch.rand(len(inputs), generator=generator, device=inputs.device) < 0.5
        return torch.where(turned.view(-1, 1, 1, 1), inputs.flip(2), inputs), targets
