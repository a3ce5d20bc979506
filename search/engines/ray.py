"""The engine of a Ray cluster, on this machine or on many."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from mixnas.evaluators.protocol import Apart, Evaluator
from mixnas.search.engines import ENGINES, Engine
from mixnas.search.engines.elsewhere import Errands
from mixnas.search.engines.session import Session
from mixnas.search_space.errors import ConfigError, NasError, StoppedEarly
from mixnas.search_space.settings import Between, Seconds

if TYPE_CHECKING:
    from mixnas.search.engines.on_ray.cluster import Cluster

WORTH_TUNE = 3.0
"""Seconds of a trial from which on Ray Tune carries them out: it never replaces a dead worker of shorter ones."""

_HEAD_SECONDS = 5.0  # in which it shows that the head is gone, where Ray fails


@ENGINES.register("ray")
@dataclass(frozen=True, kw_only=True, slots=True)
class RayEngine(Engine):
    """Workers on a Ray cluster; the study stays here, and only this process writes it.

    Attributes:
        address: Of a cluster that runs already, `host:port` or `auto`; none to start Ray on this machine, on the
            loopback, and to end it with the search.
        workers: Processes that evaluate; none for as many as fit.
        cpus: Cores of a worker, and its threads.
        gpus: GPUs of a worker, a fraction too.
        resources: More that the cluster's nodes were given, and a worker takes.
        through: What carries trials out: Ray Tune, or our own loop, which hands quick ones out in batches and replaces
            workers that die. "auto" is the loop until trials are known to take three seconds or more, then Tune.
        limit: Time that a trial may take until its worker is ended and it has failed.
        dashboard: Whether Ray's dashboard runs, of a cluster that is started here.
        store_mb: Memory for what workers share, of such a cluster.
        folder: Where the files of such a cluster lie meanwhile, and what it spills.
    """

    address: str | None = None
    workers: Annotated[int, Between(1)] | None = None
    cpus: Annotated[float, Between(0)] = 1.0
    gpus: Annotated[float, Between(0)] = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    through: Literal["auto", "tune", "loop"] = "auto"
    limit: Seconds | None = None
    dashboard: bool = False
    store_mb: Annotated[int, Between(80)] = 256
    folder: str | None = None

    def __post_init__(self) -> None:
        if not self.cpus and not self.gpus and not any(self.resources.values()):
            raise ConfigError("cpus, gpus and resources are all 0; a worker has to take something.")

    def run(self, session: Session, evaluator: Evaluator) -> None:
        """See `Engine`.

        Raises:
            NasError: Ray does not start or cannot be reached, or a worker cannot make the evaluator.
            MachineError: The cluster's head is gone; the run can be resumed.
        """
        from mixnas.search.engines.on_ray.cluster import Cluster, Share

        if session.over:
            return
        if self.through == "tune" and not self._tune_may(evaluator):
            raise ConfigError(
                "search.engine: latency is measured on this machine after each trial, and Ray Tune's workers on a "
                "cluster that others use too cannot be halted meanwhile. Use through: loop, or leave address out."
            )
        cluster = Cluster(
            self.address,
            Share(cpus=self.cpus, gpus=self.gpus, resources=self.resources),
            self.workers,
            dashboard=self.dashboard,
            store_mb=self.store_mb,
            folder=self.folder,
            should_stop=lambda: session.stopped,
        )
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(cluster)
            except StoppedEarly:
                if session.stopped:
                    return
                raise
            try:
                self._run_on(cluster, session, evaluator)
            except NasError:
                raise
            except Exception as error:
                cluster.check(_HEAD_SECONDS)
                raise NasError(f"search.engine: Ray failed: {type(error).__name__}: {error}") from error

    def _run_on(self, cluster: Cluster, session: Session, evaluator: Evaluator) -> None:
        from mixnas.search.engines.on_ray.loop import Loop

        errands = Errands(session, evaluator, quiet=cluster.quiet)
        through = self.through if session.seconds() is None else self._chosen(session, evaluator)
        if through != "tune":
            with Loop(cluster, session, errands, self.limit) as loop:
                if through == "auto":  # the first of each worker says how long one takes
                    loop.run(most=cluster.workers)
                    through = self._chosen(session, evaluator)
                if through == "loop":
                    loop.run()
        if through == "tune" and not session.over:
            from mixnas.search.engines.on_ray.tune import run_in_tune

            run_in_tune(cluster, session, errands, self.limit)

    def _chosen(self, session: Session, evaluator: Evaluator) -> str:
        """What carries trials out that take as long as those so far."""
        if self.through != "auto":
            return self.through
        return "tune" if (session.seconds() or 0.0) >= WORTH_TUNE and self._tune_may(evaluator) else "loop"

    def _tune_may(self, evaluator: Evaluator) -> bool:
        """Whether what is measured on this machine after each trial is undisturbed, where Tune carries that out."""
        return self.address is None or not (isinstance(evaluator, Apart) and evaluator.quiet)
