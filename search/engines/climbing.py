"""What a session knows of trials that are trained in rungs: whose training goes on, and from which state.

The rule is `promotion`'s. A state lies in the run's folder before the study is told what came of it, and is the
driver's own: no worker's end loses one. Where one is missing, the training is done again up to there and comes to the
same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from mixnas.evaluators.protocol import Outcome, Part, Request
from mixnas.search.promotion import Rungs
from mixnas.search.study.pareto import as_minimised
from mixnas.search.study.results import Stretch, TrialRecord
from mixnas.search.study.study import Continuation, Proposal, SearchStudy
from mixnas.search_space.errors import NasError
from mixnas.search_space.files import atomic_write, read_bytes

_SAME = 1e-9


class Climbing:
    """See the module. It is used by one session, from its thread.

    Args:
        study: What it holds already is taken in.
        shares: Of a whole training after each rung, the last of them 1.
        factor: One in so many goes on.
        folder: Where states are kept; it is made when there is one.
    """

    def __init__(self, study: SearchStudy, shares: Sequence[float], factor: float, folder: Path) -> None:
        self._study, self._shares, self._folder = study, tuple(shares), folder
        self._rungs = Rungs(len(shares), factor)
        self._records: dict[int, TrialRecord] = {}
        self._retries: dict[int, list[str]] = {}
        for record in study.results.records:
            if record.status == "done":
                stretches = record.stretches or (Stretch(record.share, record.metrics),)
                for stretch in stretches:
                    self._take(record, stretch)

    def _take(self, record: TrialRecord, stretch: Stretch) -> None:
        """Note what came of a part of a trial's training."""
        self._records[record.number] = record
        rungs = [i for i, share in enumerate(self._shares) if abs(share - stretch.share) < _SAME]
        if not rungs:  # of a run that had other rungs before
            return
        (rung,) = rungs
        if stretch.failure:
            self._rungs.drop(record.number, rung - 1)
            return
        results = self._study.results
        values = np.array([float(stretch.metrics[o.name]) for o in results.objectives])
        missed = max(
            (c.violation(stretch.metrics) for c in results.constraints if not c.holds(stretch.metrics)), default=0.0
        )
        self._rungs.add(record.number, rung, as_minimised(values, results.objectives)[0], missed)
        if rung:
            self._rungs.promote(record.number, rung - 1)

    def path(self, identity: str) -> Path:
        """Where an architecture's state lies."""
        return self._folder / f"{identity}.state"

    # -- proposals ----------------------------------------------------------------------------------------------------

    def first(self, proposal: Proposal) -> Proposal:
        """A new trial, of which the first rung is asked for."""
        return replace(proposal, request=replace(proposal.request, part=Part(0.0, self._shares[0])))

    def waits(self, *, last: bool) -> bool:
        """Whether somebody is to be trained on now; see `Rungs.promotable`."""
        return self._rungs.promotable(last=last) is not None

    def next(self, *, last: bool) -> Continuation | None:
        """Whose training goes on now; see `Rungs.promotable`."""
        found = self._rungs.promotable(last=last)
        if found is None:
            return None
        number, rung = found
        self._rungs.promote(number, rung)
        record = self._records[number]
        state: bytes | None = None
        with contextlib.suppress(OSError, NasError):
            state = read_bytes(self.path(record.id))
        part = Part(self._shares[rung], self._shares[rung + 1], state=state)
        return Continuation(cast(Any, None), Request(record.architecture, part=part), record)

    # -- outcomes -----------------------------------------------------------------------------------------------------

    def retried(self, proposal: Continuation, reason: str) -> None:
        """Note that it is tried again."""
        self._retries.setdefault(proposal.number, []).append(reason)

    def keep(self, proposal: Proposal, outcome: Outcome) -> None:
        """Keep the state that an outcome has, in the place of an earlier one; none is kept of who has ended."""
        path = self.path(proposal.architecture.id)
        if outcome.state is not None:
            atomic_write(path, outcome.state)
        elif not outcome.failure:
            path.unlink(missing_ok=True)

    def told(self, record: TrialRecord) -> None:
        """A new trial was told."""
        if record.status == "done":
            self._take(record, Stretch(record.share, record.metrics))

    def further(self, proposal: Continuation, outcome: Outcome) -> TrialRecord:
        """Tell the study what came of more of a trial's training; returns what the trial has become."""
        part = proposal.request.part
        assert part is not None
        retries = tuple(self._retries.pop(proposal.number, ()))
        metrics = {} if outcome.failure else outcome.metrics
        stretch = Stretch(part.until, metrics, round(outcome.seconds, 6), outcome.failure, retries)
        record = self._study.tell_further(self._records[proposal.number], stretch)
        self._take(record, stretch)
        return record
