"""Which sub-networks a step of the super-network trains: the sandwich rule with fair choices.

Fair: at each place, every option is drawn equally often. Each choice has a deck of its options that is shuffled, dealt
to the last card and shuffled again (FairNAS, Chu et al. 2021, arXiv 1907.01845, section 3.2, which deals all decks
together; here each place deals its own, so that places with different numbers of options, and places that only
deeper networks have, are as fair). The sandwich rule (Yu and Huang 2019, arXiv 1903.05134, section 3.3) wants the
largest and the smallest sub-network in every step. Sizes are what it is about, so those take the extreme of every
number (width, depth, kernel size, expansion), while their operators are dealt like everyone's: else the operators of
the two corners would be trained far more often than the others. Either corner can be left out.

One option is special: a block without its second half (channel mixer "none") relies on the blocks around it to make up
for that, which they learn only from the steps that leave halves out. Dealt as often as any other option it is judged
worse than it is. Leaving parts out more often is the remedy of Bender et al. 2018 ("Understanding and Simplifying
One-Shot Architecture Search", section 3.2).
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.space import SearchSpace, Variable

Size = Callable[[Sequence[Any]], Any]

CORNERS: dict[str, tuple[Size, ...]] = {"both": (max, min), "largest": (max,), "none": ()}
"""Names of the sandwich rule's two corners, or what is left of them."""


class FairSampler:
    """Deals architectures of a space; the same seed and state deal the same ones.

    Args:
        space: Where from.
        seed: Of the shuffles.
        omissions: Cards that "none" has in a deck of channel mixers, where every other option has one.

    Attributes:
        dealt: By place, how many cards have been dealt: the whole state.
    """

    def __init__(self, space: SearchSpace, seed: int, omissions: int = 1) -> None:
        self.space = space
        self.seed = seed
        self.omissions = omissions
        self.dealt: dict[str, int] = {}
        self._decks: dict[str, tuple[int, np.ndarray]] = {}

    def state(self) -> dict[str, int]:
        """Plain data from which `restore` goes on."""
        return dict(self.dealt)

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a state."""
        self.dealt = {str(name): int(count) for name, count in state.items()}
        self._decks = {}

    def step(self, random: int, corners: str = "both") -> list[Architecture]:
        """The sub-networks of one step: the corners, the largest first, and `random` others.

        Args:
            random: How many.
            corners: One of `CORNERS`.
        """
        return [*(self.draw(size) for size in CORNERS[corners]), *(self.draw() for _ in range(random))]

    def draw(self, size: Size | None = None) -> Architecture:
        """One architecture.

        Args:
            size: `max` or `min` to take that of every number; None to have every choice dealt.
        """
        return self.space.walk(functools.partial(self._pick, size))

    def _pick(self, size: Size | None, variable: Variable) -> int:
        """A position in the values of a choice: the extreme of numbers where a size is asked for, else dealt."""
        values = variable.values
        if size is not None and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            return values.index(size(values))
        omitted = values.index("none") if variable.axis == "channel_mixer" and "none" in values else None
        more = 0 if omitted is None else self.omissions - 1  # cards behind those of the values, all for "none"
        card = self._deal(variable.name, len(values) + more)
        return card if omitted is None or card < len(values) else omitted

    def _deal(self, name: str, count: int) -> int:
        """The next card of a place's deck of `count`."""
        at = self.dealt.get(name, 0)
        self.dealt[name] = at + 1
        shuffle, card = divmod(at, count)
        deck = self._decks.get(name)
        if deck is None or deck[0] != shuffle:
            rng = np.random.default_rng([self.seed, zlib.crc32(name.encode()), shuffle])
            deck = self._decks[name] = (shuffle, rng.permutation(count))
        return int(deck[1][card])
