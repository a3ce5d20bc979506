"""The whole configuration file as frozen dataclasses; their defaults are the defaults."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from mixnas.evaluators.supernet.training import SupernetConfig
from mixnas.evaluators.training import TrainConfig
from mixnas.predictors.latency.source import LatencySpec
from mixnas.predictors.measuring.device import DEFAULT_THREADS
from mixnas.predictors.measuring.measure import MeasureConfig
from mixnas.predictors.measuring.table import RUNTIMES
from mixnas.search.engines import Engine
from mixnas.search.engines.local import LocalEngine
from mixnas.search.halving import Halving
from mixnas.search.naming import Named
from mixnas.search.promotion import Asynchronous
from mixnas.search.strategies import Strategy
from mixnas.search.strategies.auto import Auto
from mixnas.search.study.bounds import check_contradictions
from mixnas.search.study.objectives import Comparison, Objective, parse_constraints, parse_objectives
from mixnas.search.study.server import Server
from mixnas.search_space.errors import ConfigError, nearest, shown
from mixnas.search_space.files import dump_yaml, load_yaml
from mixnas.search_space.settings import Between, Seconds, load, one_or_more, to_plain

MOST_SEED = 2**32 - 1

ALTERNATIVES = {
    "train": ("epochs", "steps"),
    "final.train": ("epochs", "steps"),
    "supernet": ("epochs", "steps", "seconds"),
}
"""Keys of which one counts, by the section they stand in: they all say how long a training is."""
_SECTIONS = {"task", "objectives", "search", "space", "train", "supernet", "final", "latency"}


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """How to search.

    Attributes:
        strategy: What proposes architectures: a name of `strategies.STRATEGIES`, or {name: ..., its options}; "auto" by
            what evaluates, and how often.
        trials: Evaluations, done or failed.
        time: Wall-clock limit of the search phase in seconds, None for none.
        seed: Of the strategy and everything else that draws numbers; NumPy takes none above `MOST_SEED`.
        evaluator: What an architecture's metrics come from: taken from the super-network ("supernet"), or trained from
            scratch ("standalone"); a name of `problem.EVALUATORS`.
        engine: What carries out the trials: a name of `engines.ENGINES`, or {name: ..., its options}.
        halving: Where each architecture is trained from scratch: whether it is in rungs, after each of which one in so
            many goes on; `trials` then counts architectures, however far each was trained.
    """

    strategy: Strategy = field(default_factory=Auto)
    trials: Annotated[int, Between(1, 10_000_000)] = 120
    time: Seconds | None = None
    seed: Annotated[int, Between(0, MOST_SEED)] = 0
    evaluator: str = "supernet"
    engine: Engine = field(default_factory=LocalEngine)
    halving: Asynchronous = field(default_factory=Asynchronous)

    MOVED: ClassVar[dict[str, str]] = {
        "population_size": "has moved to its strategy: write strategy: {name: nsga2, population_size: 50}"
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyConfig:
    """How latency is measured and predicted.

    Attributes:
        profile: Time for profiling this machine before a search that predicts latency, the fit included.
        passes: Passes over a network when a search measures it.
        final_passes: Passes over the final candidates.
        runtime: Through which networks run: "eager", "compiled", "onnxruntime" or "graph".
        threads: Threads inside an operator.
        batch_size: Inputs per forward.
    """

    profile: Seconds = 45.0
    passes: Annotated[int, Between(1, 1000)] = 3
    final_passes: Annotated[int, Between(1, 1000)] = 7
    runtime: str = "eager"
    threads: Annotated[int, Between(1, 1024)] = DEFAULT_THREADS
    batch_size: Annotated[int, Between(1, 65_536)] = 1

    def __post_init__(self) -> None:
        if self.runtime not in RUNTIMES:
            raise ConfigError(
                f"runtime: {self.runtime!r} is not allowed.{nearest(self.runtime, RUNTIMES)} "
                f"Allowed: {', '.join(RUNTIMES)}."
            )

    def spec(self, device: str, seed: int, directory: Path | None, reference_ms: float | None) -> LatencySpec:
        """Which latency a search goes by; see `LatencySpec` for the arguments."""
        return LatencySpec(
            device=device,
            runtime=self.runtime,
            threads=self.threads,
            batch_size=self.batch_size,
            directory=directory,
            profile_s=self.profile,
            passes=self.passes,
            seed=seed,
            reference_ms=reference_ms,
        )

    def measure(self, passes: int) -> MeasureConfig:
        """The settings of one measurement."""
        return MeasureConfig(passes=passes, threads=self.threads, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class FinalConfig:
    """What happens to the front after the search.

    Attributes:
        candidates: Networks of the front that are trained to the end and measured.
        weights: In a super-network search: where their training starts, "inherited" or "scratch".
        train: Their training (a stand-alone search has trained them already).
        halving: In a super-network search: whether more networks are begun, and the best of them trained to the end, in
            the same number of steps.
        policies: Networks that are made of finished ones under other quantization policies, at most, each trained on
            for a fifth of their training; none where the space has one policy, or no objective that policies change;
            0 for none, None for twice as many as `candidates`.
    """

    candidates: Annotated[int, Between(1, 10_000)] = 10
    weights: Literal["inherited", "scratch"] = "inherited"
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=20, lr=1e-3))
    halving: Halving = field(default_factory=Halving)
    policies: Annotated[int, Between(0, 10_000)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """A configuration file.

    Attributes:
        task: The task and its options.
        device: What `latency_ms` refers to.
        objectives: Metric to direction.
        constraints: Texts such as "params <= 2e5".
        search: How to search.
        space: The search space (read by `SearchSpace.from_dict`).
        train: Training of a network from scratch.
        supernet: Training of the super-network.
        final: What happens to the front.
        latency: Measuring and predicting latency.
        storage: The PostgreSQL server on which the study lies, where several drivers share it; None for the run's own
            directory.
    """

    task: Named = field(default_factory=lambda: Named("digits"))
    device: str = "auto"
    objectives: dict[str, Literal["max", "min"]] = field(
        default_factory=lambda: {"accuracy": "max", "latency_ms": "min", "params": "min"}
    )
    constraints: tuple[str, ...] = ()
    search: SearchConfig = field(default_factory=SearchConfig)
    space: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    supernet: SupernetConfig = field(default_factory=lambda: SupernetConfig(seconds=110.0))
    final: FinalConfig = field(default_factory=FinalConfig)
    latency: LatencyConfig = field(default_factory=LatencyConfig)
    storage: Server | None = None

    def __post_init__(self) -> None:
        self.parsed_objectives()
        self.parsed_constraints()
        check_contradictions(self.constraints)

    def parsed_objectives(self, known: Iterable[str] | None = None) -> tuple[Objective, ...]:
        """The objectives; with the known metrics, their names are checked."""
        return parse_objectives(self.objectives, known=known)

    def parsed_constraints(self, known: Iterable[str] | None = None) -> tuple[Comparison, ...]:
        """The constraints; with the known metrics, their names are checked."""
        return parse_constraints(self.constraints, known=known)

    def to_plain(self) -> dict[str, Any]:
        """The resolved configuration: every default written out."""
        return {name: to_plain(getattr(self, name)) for name in self.__dataclass_fields__}

    def to_yaml(self) -> str:
        """The resolved configuration as a file."""
        return dump_yaml(self.to_plain())


def read_config(plain: Any, source: str | Path, *, settings: Iterable[str] = ()) -> Config:
    """A configuration from plain data, with `--set` settings.

    Raises:
        ConfigError: With the source, the key, what was given and what is allowed.
    """
    settings = one_or_more(settings)
    asked = [setting.partition("=")[0].strip() for setting in settings]
    return load(
        Config, plain, source, settings=settings, resolve=lambda changed: _one_of_each(changed, asked, str(source))
    )


def _one_of_each(plain: dict[str, Any], asked: Collection[str], source: str) -> dict[str, Any]:
    """Of `ALTERNATIVES`, what a `--set` says in the place of what the file says; the file's own are of one kind.

    A configuration with every section is one that a run has written, with the defaults beside what counts: it is taken
    as it is.

    Args:
        plain: The configuration with its settings; it is changed.
        asked: The keys of the settings.
        source: For messages.

    Raises:
        ConfigError: A file, or the settings, give two of them.
    """
    whole = plain.keys() >= _SECTIONS
    for place, names in ALTERNATIVES.items():
        section: Any = plain
        for part in place.split("."):
            section = section.get(part) if isinstance(section, dict) else None
        given = [name for name in names if isinstance(section, dict) and section.get(name) is not None]
        own = [n for n in given if any(f"{place}.{n}" == key or f"{place}.".startswith(f"{key}.") for key in asked)]
        if len(own) > 1 or (len(given) > 1 and not own and not whole):
            where = "--set" if own else source
            both = " and ".join(f"{name}: {shown(section[name])}" for name in own or given)
            raise ConfigError(f"{where}: {place}: {both} are alternatives. Give one of them.")
        for name in given if own else ():
            if name not in own:
                del section[name]
    return plain


def load_config(path: str | Path, *, settings: Iterable[str] = (), plain: Any = None) -> Config:
    """Read a configuration file and apply `--set` settings.

    Args:
        path: The file.
        settings: `key=value` changes.
        plain: What the file holds, where somebody has read it already.

    Raises:
        ConfigError: See `read_config`.
    """
    plain = load_yaml(path) if plain is None else plain
    if isinstance(plain, dict) and "stages" in plain:  # a space or an architecture alone
        plain = {"space": plain}
    return read_config(plain, path, settings=settings)
