"""The token-manipulation tasks of mechanistic architecture design: six small probes of what a mixer can do.

In-context, fuzzy and noisy recall, selective copying, compression and memorisation, with the definitions, baselines and
vocabularies of MAD-lab (commit 6e7e4c9). Training examples of in-context and noisy recall, compression and memorisation
come in the order of draws of its code, number for number. Fuzzy recall draws motifs without first listing them all, and
puts its probe always in; selective copying draws its places from the same generator as all else, not a global one.

The metric is the share of labelled positions that are right, averaged over examples; the suite's own is averaged over
classes.

Source: Poli et al. 2024, "Mechanistic Design and Scaling of Hybrid Architectures" (arXiv 2403.17844), section 3,
and its code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mixnas.evaluators.tasks.options import check_share, check_whole
from mixnas.evaluators.tasks.task import IGNORE, SPLITS, Split, Task
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.units import IOSpec

Example = tuple[list[int], list[int]]
"""Tokens, and what is asked at each position."""

Instance = tuple[Callable[..., Example], tuple[Any, ...]]
"""What draws one example, and its arguments before the generator and whether it is for training; equal ones draw alike.
"""

_MOST_TOKENS = 2**28  # 2 GiB of them
SEED = 12345
"""That of the suite."""


class TokenManipulation(Task):
    """What the six have in common: examples of one generator, on causal sequences.

    Args:
        instance: What draws an example.
        length: Tokens of an example as a network reads it.
        vocab_size: Number of tokens.
        sizes: Examples of train, validation and test.
        seed: Of the examples; each split has its own stream, training that of the suite.
        label_smoothing: See `Task`.
    """

    head: ClassVar[str] = "token"

    def set_up(
        self,
        instance: Instance,
        length: int,
        vocab_size: int,
        sizes: tuple[int, int, int],
        seed: int,
        label_smoothing: float,
    ) -> None:
        """What an `__init__` ends with.

        Raises:
            ConfigError: Too many tokens, or an option that cannot be.
        """
        where = f"task {self.name}"
        check_whole(where, train_size=sizes[0], validation_size=sizes[1], test_size=sizes[2])
        check_whole(where, low=0, seed=seed)
        check_share(where, label_smoothing=label_smoothing)
        if (tokens := sum(sizes) * length) > _MOST_TOKENS:
            raise ConfigError(f"{where}: {tokens:,} tokens in all. Allowed: up to {_MOST_TOKENS:,}.")
        self.label_smoothing = label_smoothing
        self.train, self.validation, self.test = (
            Split(*_generated(instance, size, (seed,) if at == 0 else (seed, at), at == 0))
            for at, size in enumerate(sizes)
        )
        assert self.train.inputs.shape[1] == length
        self.io = IOSpec("causal", (length,), vocab_size, vocab_size, head=self.head, tokens=True)


@lru_cache(maxsize=len(SPLITS))
def _generated(instance: Instance, count: int, seed: tuple[int, ...], training: bool) -> tuple[Tensor, Tensor]:
    """(n, L) tokens and targets; kept, as a search makes its task more than once."""
    rng = np.random.default_rng(seed[0] if len(seed) == 1 else list(seed))
    draw, arguments = instance
    inputs, targets = zip(*(draw(*arguments, rng, training) for _ in range(count)), strict=True)
    return torch.tensor(inputs, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)


def _shifted(tokens: list[int], asked: list[int], training: bool) -> Example:
    """Each position is asked for the next token: while training for every one, else for what is `asked`."""
    return tokens[:-1], tokens[1:] if training else asked[1:]


def _vocabulary(where: str, tokens: int) -> tuple[int, int]:
    """Number of keys, which come first, and of values behind them."""
    if tokens < 4:
        raise ConfigError(f"task {where}: its vocabulary leaves {tokens} tokens for keys and values; at least 4.")
    return tokens // 2, tokens - tokens // 2


# -- recall -------------------------------------------------------------------------------------------------------


def recall(vocab_size: int, length: int, noise_vocab: int, noise: float) -> Instance:
    """Pairs of key and value, drawn again and again: a key that was there before has the value that it had."""
    return (_recall, (vocab_size - noise_vocab, length, noise_vocab, noise))


def _recall(
    tokens: int, length: int, noise_vocab: int, noise: float, rng: np.random.Generator, training: bool
) -> Example:
    keys, values = _vocabulary("recall", tokens)
    book: dict[int, int] = {}
    said: list[int] = []
    asked: list[int] = []
    sure = int(rng.integers(length // 2))  # this pair is none of noise
    for at in range(length // 2 - 1):
        if noise and at != sure and rng.random() < noise:
            said += (tokens + rng.integers(noise_vocab, size=2)).tolist()
            asked += [IGNORE, IGNORE]
            continue
        key = int(rng.integers(keys))
        known = key in book
        value = book[key] if known else keys + int(rng.integers(values))
        book[key] = value
        said += [key, value]
        asked += [IGNORE, value if known else IGNORE]
    if not book:  # `sure` was the last pair, and all others are noise
        key, value = int(rng.integers(keys)), keys + int(rng.integers(values))
        said[:2], book[key] = [key, value], value
    probe = list(book)[int(rng.integers(len(book)))]
    return _shifted([*said, probe, book[probe]], [*asked, IGNORE, book[probe]], training)


class InContextRecall(TokenManipulation):
    """Which value stood behind this key before? Asked wherever a key comes again.

    Args:
        vocab_size: V, half keys, half values.
        length: L, even; networks read L - 1 tokens.
        train_size, validation_size, test_size, seed, label_smoothing: See `TokenManipulation`.
    """

    name = "in_context_recall"

    def __init__(
        self,
        *,
        vocab_size: int = 16,
        length: int = 128,
        train_size: int = 12_800,
        validation_size: int = 1_280,
        test_size: int = 1_280,
        seed: int = SEED,
        label_smoothing: float = 0.0,
    ) -> None:
        _check_pairs(self.name, vocab_size, length)
        instance = recall(vocab_size, length, 0, 0.0)
        sizes = (train_size, validation_size, test_size)
        self.set_up(instance, length - 1, vocab_size, sizes, seed, label_smoothing)


class NoisyRecall(TokenManipulation):
    """In-context recall with pairs of noise between, of tokens of its own.

    Args:
        vocab_size: V, the noise's tokens included.
        noise_vocab: Those, the last of the vocabulary.
        noise: Share of pairs that are noise.
        length, train_size, validation_size, test_size, seed, label_smoothing: As of `in_context_recall`.
    """

    name = "noisy_recall"

    def __init__(
        self,
        *,
        vocab_size: int = 32,
        noise_vocab: int = 16,
        noise: float = 0.2,
        length: int = 128,
        train_size: int = 12_800,
        validation_size: int = 1_280,
        test_size: int = 1_280,
        seed: int = SEED,
        label_smoothing: float = 0.0,
    ) -> None:
        _check_pairs(self.name, vocab_size, length)
        check_whole(f"task {self.name}", high=vocab_size - 4, noise_vocab=noise_vocab)
        check_share(f"task {self.name}", noise=noise)
        instance = recall(vocab_size, length, noise_vocab, noise)
        sizes = (train_size, validation_size, test_size)
        self.set_up(instance, length - 1, vocab_size, sizes, seed, label_smoothing)


def _check_pairs(name: str, vocab_size: object, length: object) -> None:
    check_whole(f"task {name}", low=4, high=1 << 20, vocab_size=vocab_size, length=length)
    if length % 2:  # type: ignore[operator]
        raise ConfigError(f"task {name}: length is {length}, it must be even: keys and values stand in pairs.")


def _fuzzy(tokens: int, length: int, motif: int, rng: np.random.Generator, training: bool) -> Example:
    keys, values = _vocabulary("fuzzy_recall", tokens)
    pad = tokens

    def key() -> tuple[int, ...]:
        size = int(rng.integers(1, motif + 1)) if training else motif
        return tuple(rng.permutation(keys)[:size].tolist())

    def value() -> tuple[int, ...]:
        return tuple((keys + rng.permutation(values)[: int(rng.integers(1, motif + 1))]).tolist())

    probe, answer = key(), value()
    last = length - len(probe) - len(answer) - 2 * motif  # no pair begins behind
    where = int(rng.integers(last - 2 * motif))  # the probe stands at the first pair from here
    book: dict[tuple[int, ...], tuple[int, ...]] = {}
    said: list[int] = []
    asked: list[int] = []
    while len(said) < last:
        wanted = probe if len(said) >= where and probe not in book else key()
        known = wanted in book
        found = book[wanted] if known else answer if wanted == probe else value()
        book[wanted] = found
        said += [*wanted, *found]
        asked += [IGNORE] * len(wanted) + (list(found) if known else [IGNORE] * len(found))
    said += [*probe, *answer]
    asked += [IGNORE] * len(probe) + list(answer)
    padding = length + 1 - len(said)
    return _shifted([pad] * padding + said, [IGNORE] * padding + asked, training)


class FuzzyRecall(TokenManipulation):
    """In-context recall whose keys and values are motifs, different tokens in order; judged keys are the longest.

    Args:
        vocab_size: V: keys, values and one token of padding, on the left.
        length: L, which networks read.
        motif: Tokens of a key or a value, at most.
        train_size, validation_size, test_size, seed, label_smoothing: See `TokenManipulation`.
    """

    name = "fuzzy_recall"

    def __init__(
        self,
        *,
        vocab_size: int = 16,
        length: int = 128,
        motif: int = 3,
        train_size: int = 12_800,
        validation_size: int = 1_280,
        test_size: int = 1_280,
        seed: int = SEED,
        label_smoothing: float = 0.0,
    ) -> None:
        where = f"task {self.name}"
        check_whole(where, low=5, high=1 << 20, vocab_size=vocab_size, length=length)
        check_whole(where, high=(vocab_size - 1) // 2, motif=motif)
        if length <= 8 * motif:
            raise ConfigError(f"{where}: length is {length}; with motifs of {motif} it must be above {8 * motif}.")
        instance = (_fuzzy, (vocab_size - 1, length, motif))
        sizes = (train_size, validation_size, test_size)
        self.set_up(instance, length, vocab_size, sizes, seed, label_smoothing)


# -- copying, compression, memorisation ---------------------------------------------------------------------------


def _copying(vocab_size: int, length: int, count: int, rng: np.random.Generator, training: bool) -> Example:
    blank, copy = vocab_size - 2, vocab_size - 1
    content = rng.integers(vocab_size - 2, size=count)
    places = rng.integers(count, size=length - 2 * count - 1)
    scattered = np.insert(content, places, blank).tolist()
    answers: list[int] = content.tolist()
    return [*scattered, copy, *[blank] * count], [IGNORE] * (length - count) + answers


class SelectiveCopying(TokenManipulation):
    """Tokens that stand scattered among blanks are said again, in order, behind the token that asks for it.

    Args:
        vocab_size: V; its last two tokens are the blank and the request.
        length: L.
        copied: Tokens to copy.
        train_size, validation_size, test_size, seed, label_smoothing: See `TokenManipulation`.
    """

    name = "selective_copying"

    def __init__(
        self,
        *,
        vocab_size: int = 16,
        length: int = 256,
        copied: int = 16,
        train_size: int = 12_800,
        validation_size: int = 1_280,
        test_size: int = 1_280,
        seed: int = SEED,
        label_smoothing: float = 0.0,
    ) -> None:
        where = f"task {self.name}"
        check_whole(where, low=3, high=1 << 20, vocab_size=vocab_size, length=length)
        check_whole(where, high=(length - 2) // 2, copied=copied)
        instance = (_copying, (vocab_size, length, copied))
        sizes = (train_size, validation_size, test_size)
        self.set_up(instance, length, vocab_size, sizes, seed, label_smoothing)


def _compressed(vocab_size: int, length: int, rng: np.random.Generator, training: bool) -> Example:
    said = [*rng.integers(vocab_size - 1, size=length - 1).tolist(), vocab_size - 1]
    return said, list(said)


class Compression(TokenManipulation):
    """Random tokens are told from what is behind the last one alone; the head `unrolled` decodes it for each position.

    Args:
        vocab_size: V; its last token stands at the end.
        length: L.
        train_size, validation_size, test_size, seed, label_smoothing: See `TokenManipulation`.
    """

    name = "compression"
    head = "unrolled"

    def __init__(
        self,
        *,
        vocab_size: int = 16,
        length: int = 32,
        train_size: int = 12_800,
        validation_size: int = 1_280,
        test_size: int = 1_280,
        seed: int = SEED,
        label_smoothing: float = 0.0,
    ) -> None:
        check_whole(f"task {self.name}", low=2, high=1 << 20, vocab_size=vocab_size, length=length)
        instance = (_compressed, (vocab_size, length))
        sizes = (train_size, validation_size, test_size)
        self.set_up(instance, length, vocab_size, sizes, seed, label_smoothing)


@lru_cache(maxsize=8)
def _facts(tokens: int, seed: int) -> tuple[tuple[int, int], ...]:
    """Keys and the value of each, in the order in which the suite has them."""
    rng = np.random.default_rng(seed)
    keys, values = list(range(tokens // 2)), list(range(tokens // 2, tokens))
    rng.shuffle(keys)
    rng.shuffle(values)
    return tuple(zip(keys, values, strict=False))


def _memorised(vocab_size: int, length: int, seed: int, rng: np.random.Generator, training: bool) -> Example:
    facts = _facts(vocab_size - 1, seed)
    rng.integers(length // 2)  # the suite draws which pair is no noise, of which there is none
    chosen = [facts[int(rng.integers(len(facts)))] for _ in range(length // 2)]
    said = [token for key, _ in chosen for token in (key, vocab_size - 1)]
    return said, [token for _, value in chosen for token in (IGNORE, value)]


class Memorisation(TokenManipulation):
    """A fixed book of keys and values, which is never told: the value is asked for behind each key.

    It measures parameters rather than a mixer.

    Args:
        vocab_size: V; its last token asks.
        length: L, even.
        train_size, validation_size, test_size, label_smoothing: See `TokenManipulation`.
        seed: Of the book and of the examples.
    """

    name = "memorisation"

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        length: int = 32,
        train_size: int = 256,
        validation_size: int = 1_280,
        test_size: int = 1_280,
        seed: int = SEED,
        label_smoothing: float = 0.0,
    ) -> None:
        _check_pairs(self.name, vocab_size, length)
        check_whole(f"task {self.name}", low=0, seed=seed)
        instance = (_memorised, (vocab_size, length, seed))
        sizes = (train_size, validation_size, test_size)
        self.set_up(instance, length, vocab_size, sizes, seed, label_smoothing)


def names() -> list[str]:
    """The six, in the suite's order."""
    own: list[Any] = [InContextRecall, NoisyRecall, FuzzyRecall, Memorisation, Compression, SelectiveCopying]
    return [cls.name for cls in own]
