"""The main job: from a configuration to a front of trained and measured networks, in phases that each can be resumed.

    super-network   profile -> train supernet -> search -> fine-tune -> measure
    stand-alone                                  search -> judge     -> measure

Before they are measured, finished networks are tried under other quantization policies, where a space has several.

Each phase leaves in the run directory what the next one and a resume need, so that nothing finished is done again.
Only the job writes there.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixnas.evaluators.protocol import Evaluator, Outcome
from mixnas.evaluators.tasks.task import recorded
from mixnas.predictors.latency.source import LatencySource
from mixnas.predictors.measuring.value import Latency
from mixnas.search.config import Config, load_config, read_config
from mixnas.search.correcting import Correcting
from mixnas.search.engines.climbing import Climbing
from mixnas.search.engines.session import Budget, Session
from mixnas.search.extending import check_budget, chosen_before, counts, given
from mixnas.search.finalists import choose_believed, furthest
from mixnas.search.finish import (
    FinalNetworks,
    agreement,
    choose_finalists,
    choose_measured,
    choose_structures,
    final_front,
    measure_energies,
    measure_finalists,
    measured_before,
    nearest_to,
    searched_member,
)
from mixnas.search.policies import policies_of, with_one_policy
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search.run.front import Front, Member
from mixnas.search.run.progress import Progress, make_progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search.run.trust import require_trust
from mixnas.search.run.typed import typed
from mixnas.search.rungs import NetworksInRungs
from mixnas.search.sharing import check_same, check_storage, drivers
from mixnas.search.study.reading import read_results
from mixnas.search.study.results import Results, TrialRecord
from mixnas.search.study.study import Proposal, SearchStudy
from mixnas.search.variants import Variants, most_variants
from mixnas.search_space.errors import ConfigError, InfeasibleError, NasError, StoppedEarly
from mixnas.search_space.formats.safetensors import save_network
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import Report, SilentReport
from mixnas.search_space.settings import to_plain


class Job:
    """One run, carried out.

    Args:
        run: Its directory; `execute` takes its lock.
        config: As resolved.
        progress: Where progress is shown.
        stop: Ctrl-C.
        on_trial: Told of every finished trial, once it is safe on the disk.

    Raises:
        ConfigError, InfeasibleError: See `Problem`; or the run cannot be gone on with.
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
        run.check_resumable()
        self.run, self.config, self.progress, self.stop, self._on_trial = run, config, progress, stop, on_trial
        self.problem = Problem(config, str(run.path / "config.yaml"), seed=run.manifest.get("seed"))
        run.check_latency(self.problem.device, self.problem.latency_tag)
        self._report = _PhasesOfRun(run, progress)
        self._drivers = drivers(run, self.problem, stop, progress.note)
        recipe = (
            None if config.search.evaluator == "standalone" else [config.final.weights, to_plain(config.final.train)]
        )
        self._known: Front | None = None  # the final front of before, where the run is extended
        self._final_as_before = False
        self._networks = self._new_networks(recipe)
        where = run.path / "variants.json", run.networks, config.task.to_plain()
        self._variants = Variants(*where, self._networks.recipe, config.search.engine.finish, self.problem)

    def _new_networks(self, recipe: Any) -> FinalNetworks:
        config, problem = self.config, self.problem
        where = self.run.networks, problem.task, config.task.to_plain()
        if not problem.in_rungs:
            return FinalNetworks(*where, recipe, config.search.engine.finish)
        return NetworksInRungs(
            *where,
            [*recipe, to_plain(config.final.halving)],
            halving=config.final.halving,
            networks=config.final.candidates,
            objectives=problem.objectives,
            constraints=problem.constraints,
            finish=config.search.engine.finish,
        )

    def execute(self) -> Front:
        """Carry out what is left of the run; returns what `pareto.json` holds.

        Raises:
            StoppedEarly: Ctrl-C; the run can be resumed.
            InfeasibleError: No finished trial satisfies the constraints.
        """
        run, problem = self.run, self.problem
        record = recorded(problem.task)
        with run, self.progress, self.stop, self._drivers.together(record):
            run.write_data(record)
            final_before = run.config().get("final")
            run.write_config(self.config.to_plain())
            if summary := record.get("summary"):
                self.progress.note(f"data: {summary}")
            for said in problem.told(record):
                self.progress.note(said)
            before = run.front() if run.has_front else None
            self._known = before if before is not None and before.final else None
            self._final_as_before = final_before == self.config.to_plain()["final"]
            run.update(finished=None)
            with self._drivers.preparing() as reference_ms:
                latency = problem.latency(run.latency, reference_ms)
                evaluator = problem.evaluator(latency, run.supernet)
                run.update(policies=latency.instead(policies_of(problem.space)))
                problem.check_latency(latency, self._report, self.stop, evaluator.cheap)
                evaluator.prepare(self._report, self.stop)
                if latency.here:  # latencies of a run compare only under one reference time, also after a resume
                    run.update(reference_ms=latency.reference_ms)
            correcting = Correcting(run, problem, latency, lambda: self.stop.requested)
            results = self._search(evaluator, correcting)
            if results is None:
                return run.front()
            records = self._choose(correcting.current(results), latency, correcting)
            if not results.evaluated:
                limit = f" (search.time: {self.config.search.time:g} s)" if self.config.search.time else ""
                raise NasError(
                    f"{run.path}: the search ended before its first trial{limit}. Give it more time, for example: "
                    f"nas resume {typed(run.path)} --set search.time=60s."
                )
            if not records and not results.counts["done"]:
                failures = Counter(r.failure for r in results.records if r.status == "failed").most_common(3)
                told = "; ".join(f"{failure} ({count} times)" for failure, count in failures)
                raise NasError(f"{run.path}: all {results.evaluated} trials failed: {told}. Mend that, and resume.")
            if not records:
                wanted = ", ".join(map(str, problem.constraints))
                done = [searched_member(record) for record in results.records if record.status == "done"]
                raise InfeasibleError(
                    f"{run.path}: none of {results.evaluated} trials satisfies the constraints {wanted}"
                    f"{nearest_to(done, problem.constraints)}. Relax them, or resume with more trials."
                )
            finished = self._networks.finish(records, evaluator, self._report, self.stop)
            earlier = self._networks.finished_before(results, records)  # a run that is extended loses none of them
            records, finished = (
                [*records, *(record for record, _ in earlier)],
                [*finished, *(one for _, one in earlier)],
            )
            if self.stop.requested:
                raise StoppedEarly("stopped before measuring the candidates.")
            reasons = [
                f"{record.id}: {one}" for record, one in zip(records, finished, strict=True) if isinstance(one, str)
            ]
            if len(reasons) == len(finished):
                advice = "Change final.train, and resume."
                if self.config.search.evaluator == "standalone":  # which trains nothing here
                    advice = "Its trial could be judged: see whether loss and score of the task answer twice alike."
                raise NasError(
                    f"{run.path}: none of the {len(finished)} candidates could be finished; {reasons[0]} {advice}"
                )
            made = self._variants.made(records, finished, results, evaluator, latency, self._report, self.stop)
            finished = [*finished, *made.networks]
            times = measure_finalists(finished, latency, self.config.latency.final_passes, self._known, self._report)
            at_the_time = {record.number: record for record in results.records}  # what the search went by
            searched = [*(at_the_time[record.number] for record in records), *made.records]
            energies = self._energies(finished, latency, self._known)
            each = zip(searched, times, energies, strict=True)
            finalists = [self._member(record, time, latency, energy) for record, time, energy in each]
            if said := agreement(finalists, problem.task.metric):
                self.progress.note(said)
            members, others, knee = final_front(finalists, problem.objectives, problem.constraints)
            kind = "measured" if latency.here else "predicted"
            front = self._front(results, members, knee, others=others, latency=kind, final=True)
            run.write_tables(results.to_csv(), front)
            self._drivers.finished(results)
            run.finish()
            shutil.rmtree(run.rungs, ignore_errors=True)  # whoever extends the run comes to the same without
        if not members and problem.constraints:
            wanted = ", ".join(map(str, problem.constraints))
            raise InfeasibleError(
                f"{run.path}: {len(finalists)} trained, none within {wanted}"
                f"{nearest_to(finalists, problem.constraints)}. They stand in the table. Relax the constraints."
            )
        return front

    def finish_trial(self, number: int) -> Member:
        """A trial's network with its final weights, judged and measured, whether it came on the front or not.

        Raises:
            ConfigError: The study has no finished trial of this number.
            NasError: It could not be finished; the message says why.
            StoppedEarly: Ctrl-C.
        """
        run, problem = self.run, self.problem
        with run, self.progress, self.stop:
            known = read_results(run.journal, problem.objectives, problem.constraints).records
            records = [record for record in known if record.number == number and record.status == "done"]
            if not records:
                done = [record.number for record in known if record.status == "done"]
                raise ConfigError(
                    f"{run.path}: trial {number} is none that was evaluated. Allowed: {len(done)} trials from "
                    f"{min(done, default=0)} to {max(done, default=0)}; see {run.path / 'trials.csv'}."
                )
            front = run.front()
            for member in (*front.members, *front.others) if front.final else ():
                if member.id == records[0].id and member.weights_from:
                    return member  # it has one file, and that is the answer's
            latency = problem.latency(run.latency, run.manifest.get("reference_ms"))
            evaluator = problem.evaluator(latency, run.supernet)
            evaluator.prepare(self._report, self.stop)
            (network,) = self._networks.finish(records, evaluator, self._report, self.stop)
            if isinstance(network, str):
                raise NasError(f"{run.path}: trial {number} could not be finished: {network}")
            (time,) = measure_finalists([network], latency, self.config.latency.final_passes, None, self._report)
            (energy,) = self._energies([network], latency, None)
            return self._member(records[0], time, latency, energy)

    def _energies(
        self, finished: Sequence[Network | str], latency: LatencySource, known: Front | None
    ) -> Sequence[Mapping[str, float]]:
        if not self.problem.energy:
            return [{} for _ in finished]
        return measure_energies(finished, latency, self.config.latency.final_passes, known, self._report)

    def _member(
        self, record: TrialRecord, time: Latency | str, latency: LatencySource, energy: Mapping[str, float]
    ) -> Member:
        """A finished trial as a member of the front, beside what was predicted where something is."""
        predictor = latency.predictor  # as it was fitted: a correction may know this very network
        predicted = None if predictor is None else predictor.predict(record.architecture, self.problem.io).latency
        return self._networks.member(record, time, predicted, energy)

    def _choose(self, results: Results, latency: LatencySource, correcting: Correcting) -> list[TrialRecord]:
        """The finalists; where latency is predicted, has a constraint and can be measured, it is measured first."""
        final, problem = self.config.final, self.problem
        count = final.halving.ladder(final.candidates)[0].candidates if problem.in_rungs else final.candidates
        bounded = any(c.metric == "latency_ms" for c in problem.constraints)
        if not (bounded and latency.here and problem.metrics["latency_ms"].cheap):
            if problem.in_rungs:
                cheap = [name for name, metric in problem.metrics.items() if metric.cheap]
                return choose_believed(results, problem.space, count, cheap, problem.provisional)
            if problem.shares is not None and not results.front():
                return furthest(results, count)
            if most_variants(problem) and self.config.search.evaluator == "supernet":
                return choose_structures(results, count, problem.provisional)
            return choose_finalists(results, count, problem.provisional)
        if self._final_as_before and (same := chosen_before(self._known, results)):
            return same
        with self._report.phase("measure candidates", unit="networks") as phase:
            looked_at = 0

            def measure(records: Sequence[TrialRecord]) -> Sequence[Latency | str]:
                nonlocal looked_at
                if self.stop.requested:
                    raise StoppedEarly("stopped before choosing the candidates.")
                networks = [problem.untrained(record.architecture) for record in records]
                found = latency.measure_each(networks)
                looked_at += len(records)
                phase(looked_at)
                return found

            known, provisional = measured_before(self._known) | correcting.measured, problem.provisional
            return choose_measured(results, count, measure, known=known, provisional=provisional)

    # -- search -----------------------------------------------------------------------------------------------------

    def _search(self, evaluator: Evaluator, correcting: Correcting) -> Results | None:
        """The study's trials, and more of those left off; None where another driver brings them to their end."""
        search, problem = self.config.search, self.problem
        with self._drivers.study(evaluator) as study:
            if study.results.evaluated < search.trials + study.results.queued or problem.shares is not None:
                try:
                    self._carry_out(study, evaluator, correcting)
                finally:
                    self._write_searched(study.results)  # a front so far for whoever stopped it
            if said := self._drivers.left_to_another(study):
                self._write_searched(study.results)
                self.progress.note(f"{said}. If that comes to nothing: nas resume {typed(self.run.path)}")
                return None
            if search.evaluator == "supernet":  # where each would be trained from scratch, it is left to the strategy
                self._judge_uniform(study, evaluator)
            return study.results

    def _judge_uniform(self, study: SearchStudy, evaluator: Evaluator) -> None:
        """Have each likely finalist judged under each policy throughout: a mixed answer is then no worse than those."""
        likely = [
            record.architecture for record in choose_finalists(given(study.results), self.config.final.candidates)
        ]
        before, count = study.results.evaluated, study.queue(with_one_policy(self.problem.space, likely))
        if not count:
            return
        budget = Budget(trials=before + count)
        told = self._report.phase("uniform policies", budget.trials, unit="trials", initial=before)
        with told as phase, Session(study, budget, stop=self.stop, report=phase, on_trial=self._on_trial) as session:
            self.config.search.engine.run(session, evaluator)
            session.ending()
        self._write_searched(study.results)

    def _carry_out(self, study: SearchStudy, evaluator: Evaluator, correcting: Correcting) -> None:
        search, shares = self.config.search, self.problem.shares
        climbing = None if shares is None else Climbing(study, shares, search.halving.factor, self.run.rungs)
        kept = False

        def keep(proposal: Proposal, outcome: Outcome) -> None:
            nonlocal kept
            assert outcome.network is not None
            if self._known is not None and proposal.architecture.id in self._known.ids:
                return  # with other weights; it is the answer's until there is another
            kept = True
            save_network(self._networks.path(proposal.architecture.id), outcome.network)

        def on_trial(record: TrialRecord) -> None:
            if kept:
                self._forget_all_but({member.id for member in study.results.front()})
            if self._on_trial is not None:
                self._on_trial(record)

        begun, beside = study.results.evaluated, study.results.queued  # of a run that is extended
        trials = search.trials + beside
        if beside:
            self.progress.note(f"{beside} of {begun} trials so far are of one policy throughout, beside the budget")
        with self._report.phase("search", trials, unit="trials", seconds=search.time, initial=begun) as phase:
            ended = time.monotonic() + search.time if search.time else math.inf
            alone = self._drivers.alone  # drivers predict alike to the end
            legs = correcting.legs(begun - beside, search.trials, search.engine) if alone else [search.trials]
            for until in legs:
                if until == begun - beside and climbing is None:  # where it was stopped before it could measure
                    if correcting.measure(study.results, until):
                        study.cheap_changed()
                    continue
                with Session(
                    study,
                    Budget(trials=until + beside, seconds=max(ended - time.monotonic(), 0.0) if search.time else None),
                    stop=self.stop,
                    report=phase,
                    keep=keep,
                    on_trial=on_trial,
                    checkpoint=lambda: self._write_searched(study.results),
                    climbing=climbing,
                ) as session:
                    search.engine.run(session, evaluator)
                    ending = session.ending()
                if ending.reason != "trials":
                    self.progress.note(ending.message)
                    break
                if until < search.trials and correcting.measure(study.results, until):
                    study.cheap_changed()

    def _forget_all_but(self, front: set[str]) -> None:
        """Drop the weights of trials that are not on the front, nor final from before the run was extended."""
        if self._known is not None:
            front = front | self._known.ids
        for path in self.run.networks.glob("*.safetensors"):
            if path.stem not in front and not self._networks.is_finished(path.stem):
                path.unlink()

    # -- writing ----------------------------------------------------------------------------------------------------

    def _write_searched(self, results: Results) -> None:
        knee = results.knee()
        kind = "predicted" if self.problem.metrics["latency_ms"].cheap else "measured"
        members = tuple(map(searched_member, results.front()))
        front = self._front(results, members, None if knee is None else knee.id, latency=kind, final=False)
        # A run that is extended keeps its answer until it has another.
        self.run.write_tables(results.to_csv(), self._known or front)

    def _front(
        self,
        results: Results,
        members: tuple[Member, ...],
        knee: str | None,
        *,
        latency: str,
        final: bool,
        others: tuple[Member, ...] = (),
    ) -> Front:
        return Front(
            run=self.run.name,
            task=self.config.task.to_plain(),
            metric=self.problem.task.metric,
            objectives={o.name: o.direction for o in results.objectives},
            constraints=tuple(map(str, results.constraints)),
            evaluator=self.config.search.evaluator,
            device=self.problem.device,
            latency=latency,
            trials=counts(results),
            hypervolume=results.hypervolume(),
            reference=None if results.reference is None else results.reference.point,
            final=final,
            members=members,
            others=others,
            knee=knee,
            searched_front=tuple(record.id for record in results.front()),
        )


class _PhasesOfRun(SilentReport):
    """A report whose phases are shown, and noted in the run's manifest when they are done."""

    def __init__(self, run: Run, progress: Progress) -> None:
        self._run, self._progress = run, progress

    @contextmanager
    def phase(self, name: str, total: float | None = None, **about: Any) -> Iterator[Report]:
        """See `Report`."""
        self._run.begin_phase(name)
        with self._progress.phase(name, total, **about) as phase:
            yield phase
        self._run.add_phase(name, phase.seconds)


def new_run(config: Config, *, root: str | Path, name: str | None, source: str, prefix: str | None = None) -> Run:
    """Check a configuration and make its run directory.

    Args:
        config: As resolved.
        root: The directory of all runs.
        name: Of the run; made up of the prefix, date and time if not given.
        source: The configuration's, for messages.
        prefix: The task's name if not given.

    Raises:
        ConfigError, InfeasibleError: See `Problem`; nothing is made then.
    """
    problem = Problem(config, source)
    check_storage(problem)
    return Run.create(
        root,
        config.to_plain(),
        name=name,
        prefix=prefix or config.task.name,
        seed=config.search.seed,
        device=problem.device,
        latency=problem.latency_tag,
    )


def reopen(
    name: str | Path,
    root: str | Path = "runs",
    *,
    config: str | Path | None = None,
    settings: Sequence[str] = (),
    trust: bool = False,
    plain: Any = None,
) -> tuple[Run, Config]:
    """Open a run to go on with it, under a configuration in which its budget may be changed.

    Nothing is written: `Job.execute` notes what is changed, under the run's lock.

    Args:
        name: Of the run, or its path.
        root: The directory of all runs.
        config: A configuration file to go on under; the run's own if not given.
        settings: `key=value` changes, as `--set`.
        trust: Whether a task that is not of the package may be run though the run was not started here with it.
        plain: What the file `config` holds, where somebody has read it already.

    Raises:
        ConfigError: No such run, it cannot be gone on with, something was changed that its trials depend on, its
            budget is one that is spent (`check_budget`), or its task may not be run (see `trust`).
    """
    run = Run.open(name, root)
    run.check_resumable()
    if config is None:
        changed = read_config(run.config(), run.path / "config.yaml", settings=settings)
    else:
        changed = load_config(config, settings=settings, plain=plain)
    run.check_fixed(changed.to_plain())
    check_same(run.config(), changed, run.path)
    check_budget(run, changed)
    require_trust(run.manifest, run.path, "resume", trust)
    return run, changed


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
        The finished run; its front is `run.front()`.

    Raises:
        NasError: See `Problem` and `Job.execute`.

    Examples:
        >>> import mixnas
        >>> config = {
        ...     "task": "digits",
        ...     "search": {"trials": 3, "evaluator": "standalone"},
        ...     "train": {"steps": 5},
        ...     "latency": {"passes": 1, "final_passes": 1},
        ...     "space": {"stem": "conv", "stages": [
        ...         {"width": [4, 8], "block": {"mixer": ["identity", "pooling"], "channel_mixer": "mlp"}}]},
        ... }
        >>> run = mixnas.search(config, name="small", progress="quiet")
        >>> run
        Run('runs/small', finished)
        >>> front = run.front()
        >>> front.trials["done"], front.latency, front.members[0].latency.ms > 0
        (3, 'measured', True)
    """
    source = str(config) if isinstance(config, str | Path) else "configuration"
    read = (
        load_config(config, settings=settings)
        if isinstance(config, str | Path)
        else read_config(config, source, settings=settings)
    )
    run = new_run(read, root=runs, name=name, source=source)
    Job(run, read, progress=make_progress(progress), stop=StopSignal()).execute()
    return run


def resume(
    run: str | Path | Run,
    *,
    runs: str | Path = "runs",
    config: str | Path | None = None,
    settings: Sequence[str] = (),
    progress: str = "auto",
    trust: bool = False,
) -> Run:
    """Go on with a run to its end: what `nas resume` does.

    Args:
        run: Its name or path, or itself.
        runs: The directory of all runs.
        config: See `reopen`.
        settings: `key=value` changes, as `--set`: of its seed, strategy and budget.
        progress: As of `search`.
        trust: See `reopen`.

    Returns:
        The finished run.

    Raises:
        NasError: See `reopen` and `Job.execute`.

    Examples:
        After the example of `search`, with one more trial:

        >>> import mixnas
        >>> run = mixnas.resume("small", settings=["search.trials=4"], progress="quiet")
        >>> run.front().trials["done"]
        4
    """
    path = run.path if isinstance(run, Run) else run
    opened, changed = reopen(path, runs, config=config, settings=settings, trust=trust)
    with opened:  # before anything is looked at more closely: another process may be at it
        Job(opened, changed, progress=make_progress(progress), stop=StopSignal()).execute()
    return opened
