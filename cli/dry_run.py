"""`nas search --dry-run`: everything is checked and built, a step is taken, and nothing is started."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mixnas.cli.printing import print_json
from mixnas.search_space.errors import counted

if TYPE_CHECKING:
    from mixnas.search.config import Config
    from mixnas.search.rehearsal import Range

_MIB = 2**20


def dry_run(config: Config, source: str, *, json: bool) -> None:
    """Say what a search would do, and what it would take.

    Args:
        config: Of the search.
        source: Its file, for messages.
        json: Whether as JSON.

    Raises:
        NasError: Something of it is wrong, or its networks can't be trained.
    """
    from mixnas.evaluators.tasks.task import recorded
    from mixnas.search.problem import Problem
    from mixnas.search.rehearsal import rehearse
    from mixnas.search.sharing import check_storage
    from mixnas.search.strategies import STRATEGIES

    problem = Problem(config, source)
    check_storage(problem)
    latency, search = config.latency, config.search
    strategy = STRATEGIES.name_of(problem.strategy)
    found = rehearse(problem) if search.evaluator in ("supernet", "standalone") else None
    if json:
        plain: dict[str, Any] = {
            "task": config.task.to_plain(),
            "architectures": problem.space.size(),
            "choices": len(problem.space.variables),
            "objectives": dict(config.objectives),
            "constraints": list(map(str, problem.constraints)),
            "trials": search.trials,
            "strategy": strategy,
            "evaluator": search.evaluator,
            "seed": search.seed,
            "device": problem.device,
            "rehearsal": None if found is None else found.to_plain(),
        }
        print_json(plain)
        return
    limit = "no limit of time" if search.time is None else f"at most {search.time:g} s"
    profile = f"a profile of {latency.profile:g} s" if problem.metrics["latency_ms"].cheap else "no profile"
    record = recorded(problem.task)
    summary = record.get("summary")
    lines = [
        *([f"data          {summary}"] if summary else []),
        *(f"{name:13} {said}" for name, said in (line.split(": ", 1) for line in problem.told(record))),
        f"task          {config.task.name}: {problem.io.kind}, input {'x'.join(map(str, problem.io.size))}",
        f"space         {problem.space.size():,} architectures, {len(problem.space.variables)} choices",
        f"objectives    {', '.join(map(str, problem.objectives))}",
        f"constraints   {', '.join(map(str, problem.constraints)) or 'none'}",
        f"search        {counted(search.trials, 'trial')} by {strategy}, {search.evaluator}, {limit}, "
        f"seed {search.seed}",
        *([f"super-network {_supernet_time(config)}"] if search.evaluator == "supernet" else []),
        f"engine        {_engine(config)}",
        *([f"storage       {config.storage}"] if config.storage else []),
        f"latency       of {problem.device}, {latency.runtime}, {counted(latency.threads, 'thread')}, batch size "
        f"{latency.batch_size}; {profile}",
    ]
    if found is not None:
        lines += [
            f"one step      {_times(found.step_s)} of the cheapest to the dearest network, "
            f"{counted(found.batch_size, 'example')}",
            f"time          {_times(found.total_s)}: " + _listed(found.phases.items()),
            f"memory        {found.memory_bytes / _MIB:,.0f} MiB in this process, in which the dearest was trained",
            f"disk          at most {found.disk_bytes / _MIB:,.1f} MiB",
        ]
    print("\n".join([*lines, "nothing was started (--dry-run)"]))


def _listed(phases: Iterable[tuple[str, Range]]) -> str:
    return ", ".join(f"{name} {_times(seconds)}" for name, seconds in phases)


def _times(seconds: Range) -> str:
    """A range of seconds in words; one number where its ends read alike."""
    low, high = map(_time, seconds)
    return low if low == high else f"{low} to {high}"


def _time(seconds: float) -> str:
    from mixnas.search.run.progress import format_seconds

    return f"{1000 * seconds:.{1 if seconds < 0.01 else 0}f} ms" if seconds < 0.9995 else format_seconds(seconds)


def _engine(config: Config) -> str:
    """Its name, and what is not as it is by default."""
    plain = config.search.engine.to_plain()
    options = {} if isinstance(plain, str) else {key: value for key, value in plain.items() if key != "name"}
    name = plain if isinstance(plain, str) else plain["name"]
    default = type(config.search.engine)()
    told = [f"{key} {value}" for key, value in options.items() if value != getattr(default, key)]
    return ", ".join([name, *told])


def _supernet_time(config: Config) -> str:
    supernet = config.supernet
    if supernet.seconds is not None:
        return f"{supernet.seconds:g} s of training"
    return counted(supernet.steps, "step") if supernet.steps else f"{supernet.epochs} epochs"
