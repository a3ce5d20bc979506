"""Tasks: what a network is trained and judged on.

A task is one small class: three splits of tensors, the shape of a network for them, a loss, and a metric with its
direction. The search sees `train` and `validation`; `test` is for the final table. Anything that has the
attributes of `Task` will do, so a user's own, named as `package.module:Class`, need not inherit from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixnas.search_space.network import IOSpec

IGNORE = -100
"""A target that is not scored, as in `torch.nn.functional.cross_entropy`."""

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Examples of one split, whole, in memory.

    Attributes:
        inputs: (N, H, W, C) float for images; (N, L) integer tokens or (N, L, C) float for sequences.
        targets: (N,) with the "pool" head; (N, *size) with the "token" head, `IGNORE` where nothing is asked.
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of examples; `indices` (n,) may lie where the tensors are."""
        return self.inputs[indices], self.targets[indices]


class Task:
    """Base of the tasks that come with the package: classification of examples or of positions.

    Attributes:
        name: What the task is called in results.
        io: Shape of a network for it.
        metric: Name of what `score` returns.
        direction: "max" or "min": which way the metric is better.
        train, validation, test: The splits.
    """

    name: str
    io: IOSpec
    metric: str = "accuracy"
    direction: str = "max"
    train: Split
    validation: Split
    test: Split

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over what is labelled; outputs (B, K) or (B, *size, K)."""
        return F.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), ignore_index=IGNORE, label_smoothing=label_smoothing
        )

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """Mean over examples of the share of labelled positions whose largest output is the target.

        `evaluate` averages the scores of batches, weighted by their number of examples.
        """
        right = outputs.argmax(-1) == targets
        if targets.ndim == 1:
            return right.double().mean().item()
        labelled = targets != IGNORE
        asked = labelled.flatten(1).sum(1)
        share = (right & labelled).flatten(1).sum(1).double() / asked.clamp(min=1)
        return share[asked > 0].mean().item()

    def augment(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Randomly changed training inputs; `generator` lives on the inputs' device. The base changes nothing."""
        return inputs
