"""The engine that evaluates in this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from mixnas.evaluators.protocol import Evaluator
from mixnas.search.engines import ENGINES, Engine
from mixnas.search.engines.session import Session
from mixnas.search_space.errors import NasError
from mixnas.search_space.settings import Between


@ENGINES.register("local")
@dataclass(frozen=True, kw_only=True, slots=True)
class LocalEngine(Engine):
    """One batch after the other, in this process.

    Attributes:
        batch: Architectures that are proposed and evaluated together.
    """

    batch: Annotated[int, Between(1, 10_000)] = 1

    def run(self, session: Session, evaluator: Evaluator) -> None:
        """See `Engine`."""
        while proposals := session.next(self.batch):
            outcomes = evaluator.evaluate([proposal.request for proposal in proposals])
            if len(outcomes) != len(proposals):
                raise NasError(
                    f"the evaluator {type(evaluator).__name__} gave {len(outcomes)} outcomes for {len(proposals)} "
                    "requests. evaluate(requests) gives one for each, in their order."
                )
            for proposal, outcome in zip(proposals, outcomes, strict=True):
                session.done(proposal, outcome)
