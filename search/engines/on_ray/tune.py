"""Trials carried out by Ray Tune, for those that take seconds or more.

Tune owns the loop: its `suggest` is the session's `next`, and a result is told to the session before Tune has dealt
with it. Tune keeps nothing that a resume needs.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from mixnas.evaluators.answering import Answerer, Where
from mixnas.evaluators.protocol import EvaluatorSpec, Outcome
from mixnas.search.engines.on_ray.cluster import Cluster
from mixnas.search.engines.on_ray.driver import Asks, Flight, Work, refuse_other_code
from mixnas.search.engines.on_ray.shelf import Shelf, taken
from mixnas.search_space.errors import NasError

_ANSWER = "answer"


def run_in_tune(cluster: Cluster, search: Asks, spec: EvaluatorSpec, work: Work) -> None:
    """Carry out what the search proposes, until it proposes nothing more and nothing is in flight.

    Args:
        cluster: Connected; nothing else runs on it.
        search: Asked what to evaluate, and told what came of it.
        spec: Makes the evaluator.
        work: With the limit of a trial, at which a worker is ended by its own alarm.

    Raises:
        NasError: What the evaluator raised itself, a worker cannot make it, or it has other code.
    """
    share = cluster.share
    trainable = tune.with_parameters(
        _Trial,
        spec=spec,
        extensions=share.extensions,
        threads=share.threads,
        limit=work.limit,
        code=work.code,
    )

    def place(config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        """What a trial's worker has; a byte of memory tells the seats apart, see `_Flights`."""
        wanted = {"CPU": share.cpus, "GPU": share.gpus, **share.resources, "memory": 1 + config["seat"]}
        return tune.PlacementGroupFactory([{name: amount for name, amount in wanted.items() if amount}])

    flights = _Flights(search, work)
    tuner = tune.Tuner(
        tune.with_resources(trainable, place),
        tune_config=tune.TuneConfig(
            search_alg=_Suggests(flights),
            num_samples=-1,
            max_concurrent_trials=cluster.workers,  # more, and Tune removes workers that are starting
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=work.folder,
            verbose=0,
            callbacks=[_Hears(flights)],
            stop=_Ends(flights),
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    logger = logging.getLogger("ray.tune")  # whose trials are tries: of those that did not complete we say so
    level = logger.level
    try:
        logger.setLevel(logging.CRITICAL)
        with contextlib.redirect_stdout(sys.stderr):  # ours is for results
            tuner.fit()
    except Exception as error:
        raise (flights.error or NasError(f"Ray Tune failed: {error}")) from error
    finally:
        flights.shelf.end()
        logger.setLevel(level)
    if flights.error is not None:
        raise flights.error


def _name(trial: Any) -> str:
    return str(trial.trial_id)


class _Flights:
    """What Tune has in flight, by its own trial ids; what goes wrong ends the experiment, and is raised after it.

    Each flight has a seat, and resources of its own by it. Tune gives a worker that is free to whatever trial waits for
    one with the same resources, and then ends the worker that was starting for that trial: after a worker had died,
    trials shorter than a worker's start were all done by those that were left.
    """

    def __init__(self, search: Asks, work: Work) -> None:
        self._search, self._limit, self._code = search, work.limit, work.code
        self._flying: dict[str, Flight] = {}
        self._seats: dict[str, int] = {}
        self._begun: dict[str, float] = {}
        self.shelf = Shelf()
        self.error: Exception | None = None

    def __reduce__(self) -> Any:
        return object, ()  # Tune saves all that it is given; what a resume needs is in the study

    def _guarded(self, do: Callable[[], None]) -> None:
        try:
            if self.error is None:
                do()
        except Exception as error:
            self.error = error

    def look(self) -> bool:
        """Whether the experiment is to end now."""
        return self.error is not None

    def next(self, trial: str) -> dict[str, Any] | str | None:
        """A configuration; nothing where there is none now; `FINISHED` where there will be none."""
        found: list[Flight] = []
        self._guarded(lambda: found.extend(self._search.next(1)))
        if found:
            self._flying[trial] = found[0]
            self._seats[trial] = min(set(range(len(self._seats) + 1)) - set(self._seats.values()))
            request, place = self.shelf.lay(found[0].number, found[0].request)
            return {"request": request, "place": place, "seat": self._seats[trial]}
        return Searcher.FINISHED if self.error is not None or self._over() else None

    def _over(self) -> bool:
        waiting = 0

        def ask() -> None:
            nonlocal waiting
            waiting = self._search.waiting

        self._guarded(ask)
        return not self._flying and not waiting

    def begun(self, trial: str) -> None:
        """It has a worker."""
        self._begun[trial] = time.monotonic()

    def answered(self, trial: str, answer: list[Outcome] | Where | str | NasError) -> None:
        """What a worker said to a trial."""
        flight = self._flying.pop(trial)
        del self._seats[trial]
        self.shelf.clear(flight.number)

        def take() -> None:
            if isinstance(answer, Where):
                refuse_other_code(answer, self._code)
            elif isinstance(answer, str):
                raise NasError(f"a worker cannot make the evaluator: {answer}")
            elif isinstance(answer, NasError):
                raise answer
            else:
                self._search.done(flight, answer[0])

        self._guarded(take)

    def lost(self, trial: str) -> None:
        """Its worker ended; Tune does not say how."""
        flight = self._flying.pop(trial, None)
        self._seats.pop(trial, None)
        begun = self._begun.pop(trial, None)
        if flight is None:
            return
        self.shelf.clear(flight.number)
        seconds = 0.0 if begun is None else time.monotonic() - begun
        if self._limit is not None and seconds >= self._limit:
            reason = f"took longer than the limit of {self._limit:g} s"
            self._guarded(lambda: self._search.late(flight, reason, seconds))
        else:
            self._guarded(lambda: self._search.lost(flight, "the process that did it ended"))


class _Suggests(Searcher):
    """Tune's `Searcher`. It is never saved: the study is."""

    def __init__(self, flights: _Flights) -> None:
        super().__init__()
        self._flights = flights

    def suggest(self, trial_id: str) -> Any:
        return self._flights.next(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if error:
            self._flights.lost(trial_id)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("resume the run")


class _Hears(tune.Callback):
    """Takes answers out of Tune's results, before it keeps those."""

    def __init__(self, flights: _Flights) -> None:
        self._flights = flights

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._flights.begun(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self._flights.answered(trial.trial_id, result.pop(_ANSWER))


class _Ends(tune.Stopper):
    """Ends the experiment when something went wrong."""

    def __init__(self, flights: _Flights) -> None:
        self._flights = flights

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._flights.look()


class _Trial(tune.Trainable):
    """A worker of Tune's: one step is one evaluation."""

    def setup(  # type: ignore[override]
        self,
        config: dict[str, Any],
        spec: EvaluatorSpec | None = None,
        extensions: tuple[str, ...] = (),
        threads: int = 1,
        limit: float | None = None,
        code: str = "",
    ) -> None:
        assert spec is not None
        self._config, self._limit = config, limit
        self._answerer = Answerer(extensions, threads)
        self._opened: str | None = None
        self._spec, self._code = spec, code

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._config = new_config
        return True

    def step(self) -> dict[str, Any]:
        return {_ANSWER: self._answer(), "done": True}

    def _answer(self) -> Any:
        where = self._answerer.where()
        if where.code != self._code:
            return where
        if self._opened is None:
            self._opened = self._answerer.open(self._spec)
        if self._opened:
            return self._opened
        request = taken(self._config["request"], self._config.get("place"))
        signal.setitimer(signal.ITIMER_REAL, self._limit or 0.0)  # nobody hears it: the kernel ends the process
        try:
            return self._answerer.answer([request])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pass

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass
