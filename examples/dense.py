"""A class for each place of a picture, on half its grid: the stem has stride 2. `nas search -c dense.yaml`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mixnas import IOSpec, Split, Task

SIZE, STRIDE = 24, 2


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures (count, 24, 24, 3) with discs of two kinds, and on every second row and column what is there (12, 12).

    The targets are on the grid that the networks answer on; `IOSpec.out_size` says so.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    pictures, kinds = rng.normal(0, 0.5, (count, SIZE, SIZE, 3)), np.zeros((count, SIZE, SIZE), dtype=np.int64)
    for picture, kind in zip(pictures, kinds, strict=True):
        for which in (1, 2):
            across, down = rng.uniform(4, SIZE - 4, 2)
            inside = np.hypot(x - across, y - down) < rng.uniform(3, 6)
            picture[inside] = rng.normal(0, 0.5, (inside.sum(), 3)) + (0.8 if which == 1 else -0.8)
            kind[inside] = which
    return torch.tensor(pictures, dtype=torch.float32), torch.tensor(kinds[:, ::STRIDE, ::STRIDE])


class Dense(Task):
    """Three classes a place (nothing, a bright disc, a dark disc), judged by the share of places that are right."""

    name = "dense"

    def __init__(self) -> None:
        grid = (SIZE // STRIDE, SIZE // STRIDE)
        self.io = IOSpec("image", (SIZE, SIZE), in_features=3, num_outputs=3, head="token", out_size=grid)
        self.train, self.validation, self.test = (Split(*draw(n, seed)) for seed, n in enumerate((400, 150, 150)))
