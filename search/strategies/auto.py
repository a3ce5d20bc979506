"""The strategy that is chosen where none is named."""

from __future__ import annotations

from dataclasses import dataclass

from optuna.samplers import BaseSampler

from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.evolution import NSGA2
from mixnas.search.strategies.predictor import Predictor

MANY = 1000
"""Quick evaluations from which on evolution is as good, and takes no time to propose."""


@STRATEGIES.register("auto")
@dataclass(frozen=True, kw_only=True, slots=True)
class Auto(Strategy):
    """`predictor`; where evaluations are quick, in batches so large that proposing takes at most half the time.

    With a thousand quick evaluations or more `nsga2`: on the published tables its front is then as good.
    """

    def resolve(self, *, quick: bool, trials: int) -> Strategy:
        """The strategy for a search.

        Args:
            quick: Whether an evaluation takes milliseconds (a super-network's) rather than a training.
            trials: Evaluations in all.
        """
        if not quick:
            return Predictor()
        return NSGA2() if trials >= MANY else Predictor(share=0.5)

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`; where nothing is known of the evaluations."""
        return self.resolve(quick=False, trials=0).make(question, cheap, acceptable)
