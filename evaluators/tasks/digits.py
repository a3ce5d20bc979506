"""The UCI handwritten digits that scikit-learn carries: 1,797 grey images of 8 by 8 pixels, ten classes."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor

from mixnas.evaluators.tasks.preparing import Prepared
from mixnas.evaluators.tasks.task import Split, Task
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.units import IOSpec

# The split belongs to the task, not to a run: whatever the run's seed, nobody trains on another's test images.
_SPLIT_SEED = 20_240_901
_SHARES = (0.6, 0.2, 0.2)
_HIGHEST = 16.0  # value of a pixel
_LARGEST = 256  # 450 MiB of them


class Digits(Task):
    """Digits 0 to 9, split 60 : 20 : 20 within each class, standardised by the training pixels (`prepared`).

    Args:
        label_smoothing: See `Task`.
        size: Extent of an image, a multiple of 8 up to 256: larger ones are enlarged, each pixel to a square.

    Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI repository, 1998.
    """

    name = "digits"

    def __init__(self, *, label_smoothing: float = Task.label_smoothing, size: int = 8) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or not 8 <= size <= _LARGEST or size % 8:
            raise ConfigError(f"task digits: size is {size!r}, it must be a multiple of 8 from 8 to {_LARGEST}.")
        self.label_smoothing = label_smoothing
        self.scale = size // 8
        images, labels = load_digits(return_X_y=True)
        raw = images.astype(np.float32).reshape(-1, 8, 8, 1)
        parts = stratified_split(labels, _SHARES, _SPLIT_SEED)
        seen = raw[parts[0]] / np.float32(_HIGHEST)
        self.prepared = Prepared(
            what="pixels", low=0.0, high=_HIGHEST, divided_by=_HIGHEST,
            mean=(float(seen.mean()),), std=(float(seen.std()),), repeated=self.scale,
        )  # fmt: skip
        inputs, targets = torch.from_numpy(self.prepared(raw)), torch.from_numpy(labels.astype(np.int64))
        self.train, self.validation, self.test = (Split(inputs[part], targets[part]) for part in parts)
        self.io = IOSpec(kind="image", size=(size, size), in_features=1, num_outputs=10, head="pool")
        self._background = float(inputs.min())

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Shift each image by up to one pixel of its own down and across; what comes in is background."""
        return random_shift(inputs, self.scale, self._background, generator), targets


def stratified_split(labels: NDArray[np.integer], shares: tuple[float, ...], seed: int) -> list[Tensor]:
    """Sorted indices of disjoint parts that together hold everything, each class in the given shares.

    RandomState's stream is frozen by NumPy's compatibility policy, so the split is the same in every version.
    """
    rng = np.random.RandomState(seed)
    parts: list[list[NDArray[np.integer]]] = [[] for _ in shares]
    for label in np.unique(labels):
        indices = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.round(np.cumsum(shares)[:-1] * len(indices)).astype(int)
        for part, chunk in zip(parts, np.split(indices, cuts), strict=True):
            part.append(chunk)
    return [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]


def random_shift(x_BHWC: Tensor, pixels: int, fill: float, generator: torch.Generator) -> Tensor:
    """Shift each image by its own whole number of pixels in -`pixels`..`pixels`, down and across."""
    batch, height, width, channels = x_BHWC.shape
    padded = x_BHWC.new_full((batch, height + 2 * pixels, width + 2 * pixels, channels), fill)
    padded[:, pixels : pixels + height, pixels : pixels + width] = x_BHWC
    device = x_BHWC.device
    offset = torch.randint(2 * pixels + 1, (2, batch, 1), generator=generator, device=device)
    rows = offset[0] + torch.arange(height, device=device)
    columns = offset[1] + torch.arange(width, device=device)
    examples = torch.arange(batch, device=device)
    return padded[examples[:, None, None], rows[:, :, None], columns[:, None, :]]
