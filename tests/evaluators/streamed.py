"""A task whose examples are computed when asked for, with dense targets, and a metric that is no mean of batches."""

from __future__ import annotations

import torch
from torch import Tensor

from mixnas.evaluators.tasks import Task
from mixnas.search_space.network import IOSpec


class Noise:
    """Split of noise; a position's target is whether it is positive.

    Attributes:
        asked: The indices of each call, in order.
    """

    def __init__(self, first: int, count: int, size: tuple[int, int]) -> None:
        self.first, self.count, self.size = first, count, size
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.asked.append(indices.tolist())
        inputs = torch.stack([self._image(index) for index in indices.tolist()])
        return inputs, (inputs[..., 0] > 0).long()

    def _image(self, index: int) -> Tensor:
        return torch.randn(*self.size, 1, generator=torch.Generator().manual_seed(self.first + index))


class Overlap:
    """Mean over the classes of intersection over union, of all positions of a split together."""

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        pairs = self.classes * targets.flatten() + outputs.argmax(-1).flatten()
        self.confusion += torch.bincount(pairs.cpu(), minlength=self.classes**2).view(self.classes, self.classes)

    def result(self) -> float:
        both = self.confusion.diagonal()
        either = self.confusion.sum(0) + self.confusion.sum(1) - both
        return (both / either.clamp(min=1)).mean().item()


class Signs(Task):
    """Is this pixel positive? Images are flipped left to right, and the answers with them."""

    name = "signs"
    metric = "overlap"

    def __init__(self, train_size: int = 160, size: tuple[int, int] = (6, 5)) -> None:
        self.io = IOSpec(kind="image", size=size, in_features=1, num_outputs=2, head="token")
        self.train = Noise(10_000, train_size, size)
        self.validation, self.test = Noise(0, 90, size), Noise(5_000, 30, size)

    def new_metric(self) -> Overlap:
        return Overlap(2)

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        flip = torch.rand(len(inputs), generator=generator, device=inputs.device) < 0.5
        inputs = torch.where(flip[:, None, None, None], inputs.flip(2), inputs)
        return inputs, torch.where(flip[:, None, None], targets.flip(2), targets)


class HalfFlipped(Signs):
    """The mistake that the former protocol forced: the inputs are flipped, the answers are not."""

    name = "half_flipped"

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return super().augment(inputs, targets, generator)[0], targets
