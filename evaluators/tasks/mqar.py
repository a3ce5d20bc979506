"""Multi-query associative recall: which value stood beside this key, earlier in the sequence?

Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", ICLR 2024, section 3
and the generator of its code, whose random stream is reproduced number for number.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mixnas.evaluators.tasks.task import IGNORE, Split, Task
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.units import IOSpec

_MOST_WORDS = 2**20
_MOST_TOKENS = 2**28  # 2 GiB of them


class Mqar(Task):
    """Causal sequences of key-value pairs followed by the keys again; the value is asked for at each such key.

    Args:
        vocab_size: V. Token 0 is filler, keys are 1..V/2-1, values V/2..V-1; larger than `length`.
        length: N, even.
        pairs: D key-value pairs an example, at most `length` / 4.
        power_a: Exponent a of where queries stand, p_i ~ i^(a-1): near 0 they crowd behind the pairs, 1 is uniform.
        num_passes: How often the pairs are repeated before the queries.
        random_non_queries: Replace filler by random tokens.
        train_size, validation_size, test_size: Number of examples.
        seed: Of the data; each split has its own stream.
        label_smoothing: See `Task`.
    """

    name = "mqar"
    metric = "recall"

    def __init__(
        self,
        *,
        vocab_size: int = 64,
        length: int = 32,
        pairs: int = 4,
        power_a: float = 0.01,
        num_passes: int = 1,
        random_non_queries: bool = False,
        train_size: int = 20_000,
        validation_size: int = 1_000,
        test_size: int = 2_000,
        seed: int = 0,
        label_smoothing: float = Task.label_smoothing,
    ) -> None:
        self.label_smoothing = label_smoothing
        for option, value, low in (
            ("vocab_size", vocab_size, 4),
            ("length", length, 4),
            ("pairs", pairs, 1),
            ("num_passes", num_passes, 1),
            ("train_size", train_size, 1),
            ("validation_size", validation_size, 1),
            ("test_size", test_size, 1),
            ("seed", seed, 0),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(f"task 'mqar': {option} is {value!r}, it must be a whole number from {low}.")
        tokens = (train_size + validation_size + test_size) * length
        for what, value, high in (("vocab_size", vocab_size, _MOST_WORDS), ("tokens in all", tokens, _MOST_TOKENS)):
            if value > high:
                raise ConfigError(f"task 'mqar': {what}: {value:,}. Allowed: up to {high:,}.")
        if not isinstance(power_a, int | float) or not 0 < power_a < float("inf"):
            raise ConfigError(f"task 'mqar': power_a is {power_a!r}, it must be a number above 0.")
        if not isinstance(random_non_queries, bool):
            raise ConfigError(f"task 'mqar': random_non_queries is {random_non_queries!r}, it must be true or false.")
        sizes = (train_size, validation_size, test_size)
        # Zoology seeds each segment with a number of its own.
        self.train, self.validation, self.test = (
            Split(
                *generate(
                    num_examples=size,
                    vocab_size=vocab_size,
                    length=length,
                    pairs=pairs,
                    power_a=power_a,
                    num_passes=num_passes,
                    random_non_queries=random_non_queries,
                    seed=len(sizes) * seed + segment,
                )
            )
            for segment, size in enumerate(sizes)
        )
        self.io = IOSpec(
            kind="causal", size=(length,), in_features=vocab_size, num_outputs=vocab_size, head="token", tokens=True
        )

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy over the labelled positions; outputs (B, L, V), targets (B, L)."""
        if outputs.device.type == "cpu":
            # Few positions are labelled: picking them first saves most of the softmax. On a GPU it would synchronise.
            labelled = targets != IGNORE
            return F.cross_entropy(outputs[labelled], targets[labelled], label_smoothing=label_smoothing)
        return super().loss(outputs, targets, label_smoothing=label_smoothing)


def generate(
    *,
    num_examples: int,
    vocab_size: int,
    length: int,
    pairs: int,
    power_a: float = 0.01,
    num_passes: int = 1,
    random_non_queries: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Generate examples from NumPy's legacy generator, in the order of draws of Zoology's code.

    Returns:
        Inputs (n, L) and targets (n, L), int64; targets are `IGNORE` except where a key stands again.

    Raises:
        ConfigError: A combination of sizes that the task does not allow.
    """
    context = 2 * pairs * num_passes
    slots = (length - context) // 2
    if length % 2:
        raise ConfigError(f"task 'mqar': length is {length}, it must be even.")
    if vocab_size <= length:
        raise ConfigError(f"task 'mqar': vocab_size is {vocab_size}, it must be larger than length ({length}).")
    if 4 * pairs > length:
        raise ConfigError(f"task 'mqar': pairs is {pairs}, at most length / 4 = {length // 4} fit.")
    if slots < pairs:
        raise ConfigError(
            f"task 'mqar': {num_passes} passes over {pairs} pairs leave {slots} places for {pairs} queries."
        )

    rng = np.random.RandomState(seed)
    keys = _draw(rng, np.arange(1, vocab_size // 2), num_examples, pairs)
    values = _draw(rng, np.arange(vocab_size // 2, vocab_size), num_examples, pairs)
    weights = power_a * np.arange(1, slots + 1) ** (power_a - 1.0)
    gaps = _draw(rng, np.arange(slots), num_examples, pairs, weights / weights.sum())

    inputs = np.zeros((num_examples, length), dtype=np.int64)
    targets = np.full((num_examples, length), IGNORE, dtype=np.int64)
    inputs[:, :context] = np.tile(np.stack([keys, values], axis=2).reshape(num_examples, -1), (1, num_passes))
    queries = context + 2 * gaps
    np.put_along_axis(inputs, queries, keys, axis=1)
    np.put_along_axis(targets, queries, values, axis=1)
    if random_non_queries:
        filler = inputs == 0
        inputs[filler] = rng.randint(vocab_size, size=int(filler.sum()))
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def _draw(
    rng: np.random.RandomState,
    items: NDArray[np.int64],
    num_examples: int,
    count: int,
    probabilities: NDArray[np.float64] | None = None,
) -> NDArray[np.int64]:
    """`count` distinct items for each example, (num_examples, count)."""
    return np.stack([rng.choice(items, count, replace=False, p=probabilities) for _ in range(num_examples)])
