"""The main job: from a configuration to a front of trained and measured networks, in phases that each can be resumed.

    super-network   profile -> train supernet -> search -> fine-tune -> measure
    stand-alone                                  search -> finish    -> measure

Each phase leaves in the run directory what the next one and a resume need, so that nothing finished is done again.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import evaluate
from mixnas.predictors.measuring.device import device_name
from mixnas.predictors.measuring.measure import Latency
from mixnas.search.config import Config, load_config
from mixnas.search.engines.engine import Budget, LocalEngine
from mixnas.search.finish import Finalist, architecture_of, choose_finalists, final_front
from mixnas.search.run.directory import Run
from mixnas.search.run.progress import Progress, make_progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search.sources import Source, make_source
from mixnas.search.study.feasibility import COSTS, Corners, check_constraints, corners
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.enumeration import check_space
from mixnas.search_space.errors import InfeasibleError, StoppedEarly
from mixnas.search_space.formats.safetensors import load_network, read_extra, save_network
from mixnas.search_space.network import IOSpec, Network, cost
from mixnas.search_space.settings import load
from mixnas.search_space.space import SearchSpace

_logger = logging.getLogger(__name__)


class Plan:
    """A configuration, checked against its task and space before any work is started.

    Raises:
        ConfigError: The task, the space, an objective or a constraint is wrong.
        InfeasibleError: No architecture can meet a constraint on costs.
    """

    def __init__(self, config: Config, source: str = "configuration") -> None:
        self.config = config
        self.task: Task = by_name(config.task.to_plain())
        self.space = SearchSpace.from_dict(config.space, f"{source}: space")
        self.io: IOSpec = self.task.io
        check_space(self.space, self.io)
        known = (self.task.metric, "loss", *COSTS, "latency_ms")
        self.objectives = config.parsed_objectives(known)
        self.constraints = config.parsed_constraints(known)
        self.corners: Corners = corners(self.space, self.io)
        check_constraints(self.constraints, self.corners)


class Job:
    """One run, carried out.

    Args:
        run: Its directory; `execute` takes its lock.
        config: As resolved.
        progress: Where progress is shown.
        stop: Ctrl-C.
        on_trial: Told of every finished trial, once it is safe on the disk.
    """

    def __init__(
        self,
        run: Run,
        config: Config,
        *,
        progress: Progress,
        stop: StopSignal,
        on_trial: Callable[[TrialRecord], None] | None = None,
    ) -> None:
        self.run, self.config, self.progress, self.stop, self._on_trial = run, config, progress, stop, on_trial
        self.plan = Plan(config, str(run.path / "config.yaml"))

    def execute(self) -> dict[str, Any]:
        """Carry out what is left of the run; returns what `pareto.json` holds.

        Raises:
            StoppedEarly: Ctrl-C; the run can be resumed.
            InfeasibleError: No finished trial satisfies the constraints.
        """
        with self.run, self.progress, self.stop:
            self.run.update(finished=None)
            source = make_source(self.plan, self.run, self.stop, self._phase)
            results = self._search(source)
            finalists = choose_finalists(results, self.config.final.candidates)
            if not finalists:
                wanted = ", ".join(map(str, self.plan.constraints))
                raise InfeasibleError(
                    f"{self.run.path}: none of {results.evaluated} trials satisfies the constraints {wanted}. "
                    "Relax them, or resume with more trials."
                )
            networks = self._finish(source, finalists)
            latencies = self._measure(source, networks)
            pareto = self._write(source, results, finalists, networks, latencies)
            self.run.finish()
        return pareto

    @contextlib.contextmanager
    def _phase(self, name: str, total: float | None = None, **options: Any) -> Iterator[Any]:
        with self.progress.phase(name, total, **options) as phase:
            yield phase
        self.run.add_phase(name, phase.seconds)

    def _stop_between(self, what: str) -> None:
        if self.stop.requested:
            raise StoppedEarly(f"stopped {what}.")

    # -- search -----------------------------------------------------------------------------------------------------

    def _search(self, source: Source) -> Results:
        search, plan = self.config.search, self.plan
        with SearchStudy(
            self.run.journal,
            plan.space,
            plan.objectives,
            plan.constraints,
            strategy=search.strategy,
            seed=search.seed,
            population_size=search.population_size,
            precheck=lambda architecture: asdict(cost(architecture, plan.io)),
        ) as study:

            def on_trial(record: TrialRecord) -> None:
                source.forget_others({member.id for member in study.results.front()})
                if self._on_trial is not None:
                    self._on_trial(record)

            def write_tables() -> None:
                self.run.write_tables(study.results.to_csv(), {**self._facts(), **study.results.to_plain()})

            begun = study.results.evaluated
            if begun < search.trials:
                try:
                    with self._phase(
                        "search", search.trials, unit="trials", seconds=search.time, initial=begun
                    ) as phase:
                        finish = LocalEngine().run(
                            study,
                            source.evaluate,
                            Budget(trials=search.trials, seconds=search.time),
                            stop=self.stop,
                            report=phase,
                            on_trial=on_trial,
                            checkpoint=write_tables,
                        )
                finally:
                    write_tables()  # a front so far for whoever stopped it
                if finish.reason != "trials":
                    self.progress.note(finish.message)
            return study.results

    # -- finalists --------------------------------------------------------------------------------------------------

    def _network_path(self, architecture: Architecture) -> Path:
        return self.run.path / "networks" / f"{architecture.id}.safetensors"

    def _finish(self, source: Source, finalists: list[TrialRecord]) -> list[Network]:
        architectures = [architecture_of(record) for record in finalists]
        paths = [self._network_path(architecture) for architecture in architectures]
        left = [i for i, path in enumerate(paths) if not (path.exists() and "test" in read_extra(path))]
        if left:
            total = len(finalists)
            with self._phase(source.finishing, total, unit="networks", initial=total - len(left)) as phase:
                for done, i in enumerate(left, total - len(left)):
                    self._stop_between(f"after {done} of {total} candidates")
                    network = source.finish(architectures[i], functools.partial(_fraction, phase, done, total))
                    save_network(paths[i], network.cpu(), self._judge(network))
                    phase(done + 1)
        return [load_network(path) for path in paths]

    def _judge(self, network: Network) -> dict[str, Any]:
        """Final metrics; the test split is looked at here and nowhere else."""
        extra: dict[str, Any] = {"task": self.config.task.to_plain()}
        for split in ("validation", "test"):
            judged = evaluate(network, self.plan.task, split)
            extra[split] = {self.plan.task.metric: judged.score, "loss": judged.loss}
        return extra

    def _measure(self, source: Source, networks: list[Network]) -> list[Latency] | None:
        """Measured latency; None where the device that the search is for is not this machine."""
        if not source.measurable:
            return None
        self._stop_between("before measuring the candidates")
        with self._phase("measure", len(networks), unit="networks") as phase:
            latencies = source.measure(networks)
            phase(len(networks))
        return latencies

    # -- writing ----------------------------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        return {"run": self.run.name, "task": self.config.task.to_plain(), "metric": self.plan.task.metric}

    def _write(
        self,
        source: Source,
        results: Results,
        records: list[TrialRecord],
        networks: list[Network],
        latencies: list[Latency] | None,
    ) -> dict[str, Any]:
        finalists = []
        for i, (record, network) in enumerate(zip(records, networks, strict=True)):
            architecture = network.architecture
            extra = read_extra(self._network_path(architecture))
            predicted = source.predict(architecture)
            metrics = {
                **extra["validation"],
                **{f"test_{name}": value for name, value in extra["test"].items()},
                **asdict(cost(architecture, self.plan.io)),
            }
            if latencies is not None:
                latency = latencies[i]
                metrics |= {"latency_ms": latency.latency_ms}
                metrics |= {"latency_low_ms": latency.low_ms, "latency_high_ms": latency.high_ms}
            else:
                metrics |= {"latency_ms": predicted["latency_ms"]}
                metrics |= {"latency_low_ms": predicted["low_ms"], "latency_high_ms": predicted["high_ms"]}
            finalists.append(Finalist(architecture, record.number, metrics, record.metrics, predicted))
        front = final_front(finalists, self.plan.objectives, self.plan.constraints)
        pareto = {
            **self._facts(),
            **results.to_plain(),
            "device": source.device_name,
            "latency": "measured" if latencies is not None else "predicted",
            "evaluator": self.config.search.evaluator,
            "searched_front": [member["id"] for member in results.to_plain()["front"]],
            **front,
            "final": True,
        }
        self.run.write_tables(results.to_csv(), pareto)
        return pareto


def _fraction(phase: Any, number: int, total: int, step: int, steps: int, **_: object) -> None:
    """Progress inside one of several networks."""
    phase(round(number + step / steps, 1), total)


def new_run(config: Config, *, root: str | Path, name: str | None, source: str) -> Run:
    """Check a configuration and make its run directory.

    Raises:
        ConfigError, InfeasibleError: See `Plan`; nothing is made then.
    """
    Plan(config, source)
    return Run.create(
        root,
        config.to_plain(),
        name=name,
        prefix=config.task.name,
        seed=config.search.seed,
        device=device_name() if config.device == "auto" else config.device,
    )


def search(
    config: Mapping[str, Any] | str | Path,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    settings: Sequence[str] = (),
    progress: str = "auto",
) -> Run:
    """A whole search: what `nas search` does.

    Args:
        config: A configuration as plain data, or its file.
        name: Of the run; made up if not given.
        runs: The directory of all runs.
        settings: `key=value` changes, as `--set`.
        progress: "auto", "bar", "lines" or "quiet".

    Returns:
        The finished run; its front is `run.pareto()["front"]`.

    Raises:
        NasError: See `Plan` and `Job.execute`.
    """
    source = str(config) if isinstance(config, str | Path) else "configuration"
    read = load_config(config, settings=settings) if isinstance(config, str | Path) else load(
        Config, config, source, settings=settings
    )  # fmt: skip
    run = new_run(read, root=runs, name=name, source=source)
    Job(run, read, progress=make_progress(progress), stop=StopSignal()).execute()
    return run
