"""The engine of a Ray cluster, on this machine or on many."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from mixnas.evaluators import answering
from mixnas.evaluators.protocol import Apart, Evaluator, Outcome, Request
from mixnas.search.engines import ENGINES, Engine
from mixnas.search.engines.elsewhere import Errands
from mixnas.search.engines.session import Session
from mixnas.search_space.errors import ConfigError, StoppedEarly
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.settings import Between, Seconds

if TYPE_CHECKING:
    from mixnas.predictors.latency.source import LatencySource, LatencySpec
    from mixnas.search.engines.on_ray.cluster import Head, Share
    from mixnas.search.engines.on_ray.driver import Work

WORTH_TUNE = 3.0
"""Seconds of a trial from which on Ray Tune carries them out: it never replaces a dead worker of shorter ones."""


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
        measure: Whether latency is measured on the cluster's node that is the search's `device`, instead of on this
            machine; see `on_ray.meter`.
        limit: Time that a trial may take until its worker is ended and it has failed.
        dashboard: Whether Ray's dashboard runs, of a cluster that is started here.
        store_mb: Memory for what workers share, of such a cluster.
        folder: Where the files of such a cluster lie meanwhile, and what it spills; that is in the run's directory if
            not given.
        disk_mb: How much of the disk both may take, until the search ends (status 4).
    """

    address: str | None = None
    workers: Annotated[int, Between(1)] | None = None
    cpus: Annotated[float, Between(0)] = 1.0
    gpus: Annotated[float, Between(0)] = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    through: Literal["auto", "tune", "loop"] = "auto"
    measure: bool = False
    limit: Seconds | None = None
    dashboard: bool = False
    store_mb: Annotated[int, Between(80)] = 256
    folder: str | None = None
    disk_mb: Annotated[int, Between(100)] = 10_000

    def __post_init__(self) -> None:
        if not self.cpus and not self.gpus and not any(self.resources.values()):
            raise ConfigError("cpus, gpus and resources are all 0; a worker has to take something.")
        if self.measure and self.address is None:
            raise ConfigError("measure: true is for a cluster that runs already. Give its address, or leave it out.")

    def latency(self, spec: LatencySpec) -> LatencySource:
        """See `Engine`."""
        if not self.measure:
            return spec.open()
        from mixnas.search.engines.on_ray.meter import MeteredLatency

        assert self.address is not None
        return MeteredLatency(spec, self.address)

    def run(self, session: Session, evaluator: Evaluator) -> None:
        """See `Engine`.

        Raises:
            NasError: Ray does not start or cannot be reached, or a worker cannot make the evaluator.
            MachineError: Ray ended, or what of it runs on this machine; the run can be resumed.
        """
        from mixnas.search.engines.on_ray.driver import Driver, pickled

        if session.over:
            return
        if self.through == "tune" and not self._tune_may(evaluator):
            raise ConfigError(
                "search.engine: latency is measured on this machine after each trial, and Ray Tune's workers on a "
                "cluster that others use too cannot be halted meanwhile. Use through: loop, or leave address out."
            )
        head = self._head(session) if self.address is None else None
        driver = Driver(own=head is not None)
        with contextlib.ExitStack() as stack:
            stack.callback(driver.end)
            errands = Errands(session, evaluator, quiet=driver.quiet)
            spec = pickled(errands.spec)
            if head is not None:
                try:
                    stack.enter_context(head)
                except StoppedEarly:
                    if session.stopped:
                        return
                    raise
            stack.enter_context(driver)  # a second time, as it ends before the head does
            work = self._work(evaluator, spec, head)
            if driver.connect(work, head, lambda: session.stopped):
                driver.serve(session, errands)

    def finish(
        self,
        evaluator: Evaluator,
        requests: Sequence[Request],
        total: int,
        report: Report = SILENT,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[int, Outcome]]:
        """See `Engine`: on a cluster that runs already by its workers, else by processes of this machine."""
        if self.address is None:
            return Engine.finish(self, evaluator, requests, total, report, should_stop)
        from mixnas.search.engines.on_ray.finishing import finish_on_ray

        work = self._work(evaluator, b"", None)
        return finish_on_ray(work, evaluator, requests, total, report, should_stop)

    def together(self) -> Callable[..., AbstractContextManager[None]] | None:
        """See `Engine`: on a cluster that runs already workers help."""
        if self.address is None:
            return None
        from mixnas.search.engines.on_ray.together import processes_on

        return processes_on(self.address, self._share())

    def _share(self) -> Share:
        from mixnas.search.engines.on_ray.cluster import Share

        return Share(cpus=self.cpus, gpus=self.gpus, resources=self.resources)

    def _workers(self) -> int | None:
        """How many are asked for; of a Ray that is started here without GPUs, one for each of its cores."""
        from mixnas.search.engines.on_ray.cluster import cores

        if self.workers is not None or self.gpus or self.address is not None:
            return self.workers
        return max(1, math.floor(cores() / self.cpus)) if self.cpus else 1

    def _head(self, session: Session) -> Head:
        from mixnas.search.engines.on_ray.cluster import Head

        return Head(
            self._share(),
            self._workers(),
            dashboard=self.dashboard,
            store_mb=self.store_mb,
            folder=self.folder,
            spill=self.folder or str(session.folder),
            disk_mb=self.disk_mb,
            should_stop=lambda: session.stopped,
        )

    def _work(self, evaluator: Evaluator, spec: bytes, head: Head | None) -> Work:
        from mixnas.search.engines.on_ray.driver import Work

        return Work(
            address=head.address if head is not None else self.address or "auto",
            share=self._share(),
            workers=self._workers(),
            through=self.through,
            worth_tune=WORTH_TUNE if self._tune_may(evaluator) else None,
            limit=self.limit,
            spec=spec,
            code=answering.code_version(),
            session=None if head is None else head.session,
            folder=None if head is None else head.folder,
        )

    def _tune_may(self, evaluator: Evaluator) -> bool:
        """Whether what is measured on this machine after each trial is undisturbed, where Tune carries that out."""
        return self.address is None or not (isinstance(evaluator, Apart) and evaluator.quiet)
