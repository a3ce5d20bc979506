"""Profiling a device: measure the units of a space and some whole networks, then fit the predictor.

The budget is spent in rounds. The first measures what a fit needs at least, in as much of the time as that takes, and
covers every operator; what things took there decides how much the later ones measure, of the units that the model is
least sure of. Whole networks, which the fit and its calibration need, get about half of the time throughout. What is
measured is in the table within seconds, so a stopped profile goes on where it was.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixnas.predictors.latency.enough import check_enough
from mixnas.predictors.latency.features import Works, deployed_unit, example_input
from mixnas.predictors.latency.fit import fit
from mixnas.predictors.latency.gpus import gpu_of
from mixnas.predictors.latency.lookup import SpaceTable, SpaceUnits
from mixnas.predictors.latency.model import MIN_UNITS, Columns, FitConfig, totals
from mixnas.predictors.latency.predictor import LatencyPredictor, plain_digest, user_directory
from mixnas.predictors.latency.selection import (
    cover,
    disagreement,
    draw_by_size,
    largest_affordable,
    sample_rows,
    unit_sizes,
)
from mixnas.predictors.latency.transfer import MIN_NETWORKS, nearest_source, sources_of, spaces_before, transfer
from mixnas.predictors.latency.unit_rows import POLICY, UnitRows
from mixnas.predictors.measuring import runtimes
from mixnas.predictors.measuring.device import INTERPRETER, device_name, provenance, require_cuda
from mixnas.predictors.measuring.measure import (
    Call,
    CudaClock,
    HotInput,
    MeasureConfig,
    Measurement,
    Meter,
    fixed_threads,
    measuring,
    windows_of,
)
from mixnas.predictors.measuring.sentinel import make_sentinel, sentinel_module
from mixnas.predictors.measuring.table import BY_SIZE, MeasurementTable, Subject, subject
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, StoppedEarly
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, Unit, describe

log = logging.getLogger(__name__)

_PATIENCE = 5.0
"""Budgets after which a profile gives up that has not measured what a fit needs."""
_LEAST_PATIENCE_S = 60.0
"""It does not give up before."""
_KEEP_S = 15.0
"""Seconds of measurements that a kill may lose."""
_CANDIDATES = 2000
"""Units, at most, among which those to measure next are chosen; of more a sample, in which every operator occurs."""
_LISTED = 512  # of a space up to this size, networks are measured to the last, whatever is drawn
_SAMPLE = 256
"""Random networks of which those are taken that are small enough."""
_BEYOND = 0.1
"""Share of the budget that networks may take beyond it, as far as there are networks so small."""
_FIRST_UNITS = 24
"""With fewer measured units the next are chosen such that all operators occur: the model knows too little to choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """How a device is profiled.

    Attributes:
        budget_s: Wall-clock time for everything, the fit included.
        network_share: Share of the measuring time that goes to whole networks. All of it, where building one takes
            seconds (a compiler) and another device's or runtime's predictor can be transferred from.
        by_size_share: Share of those networks that are drawn such that small and large ones occur about equally
            (`selection`); the others are drawn uniformly. None in a space that `max_networks` nearly covers.
        max_networks: Whole networks per space, at most; with these and every unit measured, profiling ends early.
        min_units: With fewer measured units, the predictor is transferred from another, where there is one.
        measure: How each is measured.
        fit: How the predictor is fitted.
        seed: Of the choice of units and networks, and of the weights and inputs.
    """

    budget_s: float = 150.0
    network_share: float = 0.5
    by_size_share: float = 0.25
    max_networks: int = 600
    min_units: int = 60
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    seed: int = 0


class Profiler:
    """Measures a space into a table; see `profile`."""

    def __init__(
        self,
        space: SearchSpace,
        io: IOSpec,
        *,
        device: str,
        runtime: str,
        directory: Path,
        config: ProfileConfig,
        plain: Any = None,
    ) -> None:
        self.space, self.io, self.config, self.runtime = space, io, config, runtime
        threads = config.measure.threads
        self.name = device if device == INTERPRETER else device_name(device, threads)
        here = device_name("auto", threads), device_name("cpu", threads), INTERPRETER
        if self.name not in here:
            raise ConfigError(
                f"device {device!r} is not this machine's. Allowed here: {', '.join(dict.fromkeys(here))}."
            )
        self.torch_device = "cuda" if self.name == here[0] != here[1] else "cpu"
        if self.torch_device == "cuda":
            require_cuda()
        self.gpu = gpu_of(self.name, self.torch_device)
        runtimes.require(runtime, self.torch_device)
        self.clock = runtimes.clock_of(runtime, self.torch_device)
        self.generator = torch.Generator().manual_seed(config.seed)
        # A GPU's launches are counted without it, as whoever asks about other networks later counts them.
        self.works = Works(config.measure.batch_size, self.torch_device if self.gpu is None else "cpu", self.gpu)
        self.directory = Path(directory)
        self.meter = Meter(config.measure, sentinel=self._sentinel(), clock=self.clock)
        self.table = MeasurementTable.create_or_open(
            self.directory, self.name, runtime, threads, self._reference_ms(), config.measure.batch_size
        )
        self._provenance: int | None = None
        self.known = SpaceUnits(space, io, () if plain is None else (plain_digest(plain),))
        self.left_out: dict[str, str] = {}  # subjects that turned out not to run here, and why
        self._rows: dict[str, int] = {}  # of the space's units by subject
        self._last: list[Subject] = []  # networks of which `_cost` tells
        self.rng = np.random.default_rng([config.seed, len(self.table.subjects)])
        # Seconds that building a subject and a window of it took, by kind; guesses until something was measured.
        self._building, self._window = {"unit": 0.005, "network": 0.01}, {"unit": 0.02, "network": 0.03}

    def _cost(self, kind: str) -> float:
        """Seconds that a subject will take."""
        return self._building[kind] + self.config.measure.passes * self._window[kind]

    def _sentinel(self) -> Call:
        if self.runtime == "graph":
            return runtimes.prepare(*sentinel_module(self.torch_device), "graph", self.config.measure.threads)
        return make_sentinel(self.torch_device)

    def _reference_ms(self) -> float:
        with measuring(self.config.measure.threads):
            for _ in range(12):
                self.meter.window(make_sentinel(self.torch_device))
        return float(np.median(self.meter.readings)) * 1e-6

    # -- subjects -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def amounts(self) -> np.ndarray:
        """(units, 2) calls and multiply-accumulates of the space's units; NaN where one cannot be measured."""
        units = self.known.units
        found = np.empty((len(units), 2))
        for part, some in units.chunks():
            counted, buildable = self.works.of_all(some)
            found[part] = np.where(buildable[:, None], totals(counted)[:, :2], np.nan)
        for number, policy in enumerate(units.slots[POLICY]):
            reason = "" if policy is None else policy_of(policy[1]).why_not(self.torch_device, self.runtime)
            if policy is not None and reason:
                log.info("left out of the profile: policy %s: %s", policy[1], reason)
                found[units.rows[:, 1 + POLICY] == number] = np.nan
        return found

    def unit_subject(self, row: int) -> Subject:
        """What the table calls a unit of the space."""
        unit = self.known.units[row]
        what = subject("unit", unit.to_plain(), self.works.of(unit), self.config.measure.batch_size)
        self._rows[what.id] = row
        return what

    def _row_of(self, what: Subject) -> int:
        """The row of a unit among the space's; -1 where it is another space's."""
        if what.id not in self._rows:
            self._rows[what.id] = self.known.units.find(Unit.from_plain(what.config))
        return self._rows[what.id]

    def network_subject(self, architecture: Architecture, work: Mapping[str, float] | None = None) -> Subject:
        """What the table calls a whole network; `work` says how it was drawn."""
        config = {"architecture": architecture.to_dict(), "io": self.io.to_plain()}
        return subject("network", config, work or {}, self.config.measure.batch_size)

    def call_of(self, what: Subject) -> Call:
        """The forward of a subject through the runtime, on random inputs."""
        batch = self.config.measure.batch_size
        if what.kind == "unit":
            unit = Unit.from_plain(what.config)
            name = f"the {unit.role} unit of {', '.join(str(op) for _, op in unit.choices)}"
            module = deployed_unit(unit, self.torch_device)
            inputs = example_input(unit, batch, self.generator, self.torch_device)
        else:
            architecture = Architecture.from_canonical(what.config["architecture"])
            name = f"network {architecture.id}"
            module = runtimes.built_on(
                self.torch_device,
                lambda: Network(architecture, self.io, generator=self.generator).eval().requires_grad_(False).deploy(),
            )
            inputs = self.io.example(batch, generator=self.generator).to(self.torch_device)
        call = runtimes.prepare(module, inputs, self.runtime, self.config.measure.threads, name)
        if self.torch_device == "cuda":  # now rather than in its first window: whether its memory suffices
            with torch.inference_mode():
                call()
            torch.cuda.synchronize()
            if what.kind == "unit":  # in a network the unit before has just written what it reads
                call = HotInput(call, inputs)
        return call

    def _built(self, subjects: Sequence[Subject], until: float) -> tuple[list[Subject], list[Call]]:
        """The subjects that could be built before `until` (at least one), and their calls."""
        built: list[Subject] = []
        calls: list[Call] = []
        taken: dict[str, list[float]] = {"unit": [], "network": []}
        for what in subjects:
            if calls and (time.monotonic() > until or self._memory_is_low()):
                break
            begun = time.monotonic()
            try:
                calls.append(self.call_of(what))
                built.append(what)
                taken[what.kind].append(time.monotonic() - begun)
            except (ConfigError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not runtimes.is_out_of_memory(error):
                    raise
                log.warning("left out of the profile: %s", error)
                self.left_out[what.id] = str(error)
                if self.torch_device == "cuda":
                    torch.cuda.empty_cache()
        for kind, seconds in taken.items():
            if seconds:
                self._building[kind] = sum(seconds) / len(seconds)
        return built, calls

    def measure(
        self,
        subjects: Sequence[Subject],
        deadline: float,
        stop: Callable[[], bool] | None = None,
        tick: Callable[[], None] | None = None,
        *,
        once: bool = False,
    ) -> int:
        """Measure subjects in shuffled passes until all are done or it is `deadline` (`time.monotonic`).

        Args:
            subjects: What.
            deadline: When to end.
            stop: Asked before each window.
            tick: Called after each window.
            once: Whether to end as soon as each has a window.

        Returns:
            How many subjects were begun; what was built too late to be measured is left for another time.
        """
        if self._provenance is None:
            kind = "cuda" if self.torch_device == "cuda" else "cpu"
            record = provenance(kind, self.config.measure.threads) | {"device": self.name, "runtime": self.runtime}
            if isinstance(self.clock, CudaClock):
                record["subtracted_us"] = round(self.clock.overhead_ns * 1e-3, 3)
            self._provenance = self.table.add_provenance(record)
        begun = time.monotonic()
        # Half of the time at most for building (a compiler may take seconds a unit), the rest for measuring.
        subjects, calls = self._built(subjects, begun + (deadline - begun) / 2)
        rows = []
        kept = before = time.monotonic()
        seen: set[int] = set()
        spent: dict[str, list[float]] = {"unit": [], "network": []}

        def enough() -> bool:
            up = time.monotonic() > deadline and len(seen) > 0
            return up or (once and len(seen) == len(calls)) or (stop is not None and stop())

        with measuring(self.config.measure.threads):
            for window in windows_of(calls, self.meter, self.rng, should_stop=enough):
                now = time.monotonic()
                spent[subjects[window.index].kind].append(now - before)
                before = now
                seen.add(window.index)
                rows.append((subjects[window.index], window))
                if time.monotonic() > kept + _KEEP_S:
                    self.table.append(rows, self._provenance)
                    rows, kept = [], time.monotonic()
                if tick is not None:
                    tick()
        self.table.append(rows, self._provenance)
        if self.torch_device == "cuda":
            calls.clear()
            torch.cuda.empty_cache()
        for kind, seconds in spent.items():
            if seconds:
                self._window[kind] = sum(seconds) / len(seconds)
        if spent["network"]:
            self._last = [subjects[index] for index in seen if subjects[index].kind == "network"]
        return len(seen)

    def _memory_is_low(self) -> bool:
        """Whether the GPU could not take many more forwards beside those built: each CUDA graph keeps its tensors."""
        if self.torch_device != "cuda":
            return False
        free, total = torch.cuda.mem_get_info()
        return free < 0.25 * total

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _unmeasured(self) -> np.ndarray:
        """Rows of the space's units that can be measured and are not yet."""
        due = np.isfinite(self.amounts[:, 0])
        due[[self._rows[identity] for identity in self.left_out if identity in self._rows]] = False
        for what in self.table.subjects.values():
            if what.kind == "unit" and self.table.accepted(what.id) >= self.config.measure.passes:
                row = self._row_of(what)
                if row >= 0:
                    due[row] = False
        return np.flatnonzero(due)

    def choose_units(self, count: int) -> list[Subject]:
        """The units to measure next: those of which the model is least sure; at first such that all operators occur."""
        rows = self._unmeasured()
        if len(rows) > count:
            rows = rows[sample_rows(self.known.units.take(rows), max(_CANDIDATES, count), self.rng)]
            candidates = self.known.units.take(rows)
            measured = self.table.measurements("unit")
            if len(measured) < _FIRST_UNITS:
                chosen = cover(candidates.described(), count)
            else:
                chosen = np.argsort(-self._disagreement(candidates, measured), kind="stable")[:count]
            rows = rows[chosen]
        return [self.unit_subject(row) for row in rows]

    def _disagreement(self, candidates: UnitRows, measured: Mapping[str, Measurement]) -> np.ndarray:
        """How unsure one can be of each candidate after what was measured."""
        subjects = [self.table.subjects[identity] for identity in measured]
        settings = Columns.of([describe(Unit.from_plain(what.config)) for what in subjects])
        works = Columns.of([what.work for what in subjects])
        target = np.log([each.latency.ms for each in measured.values()])
        own, _ = self.works.of_all(candidates)
        wanted = np.hstack([candidates.described().select(settings.names), own.select(works.names)])
        return disagreement(np.hstack([settings.values, works.values]), target, wanted)

    def choose_networks(self, count: int, largest: float = math.inf) -> list[Subject]:
        """Networks to measure next: those begun, then random ones up to a size, a share of them drawn by size."""
        io = self.io.to_plain()
        own = [
            what
            for what in self.table.subjects.values()
            if what.kind == "network"
            and what.config["io"] == io
            and self.space.contains(Architecture.from_canonical(what.config["architecture"]))
        ]
        begun = [
            what
            for what in own
            if self.table.accepted(what.id) < self.config.measure.passes and what.id not in self.left_out
        ]
        count = min(count, self.config.max_networks - len(own) + len(begun))
        found = {what.id: what for what in begun[:count]}
        known = {what.id for what in own} | set(self.left_out)
        by_size = int(self._by_size_share * max(count - len(found), 0))

        def add(matrix: np.ndarray, work: Mapping[str, float], limit: int) -> None:
            size = self._size_of(matrix)
            # Those that are small enough as they come; where these are too few, the smallest of the others.
            matrix, size = matrix[np.isfinite(size)], size[np.isfinite(size)]
            for vector in matrix[np.argsort(np.maximum(size, largest), kind="stable")]:
                if len(found) >= limit:
                    break
                what = self.network_subject(self.space.decode(vector), work)
                if what.id not in known:
                    found.setdefault(what.id, what)

        near = {BY_SIZE: 1.0} if largest < math.inf else {}
        if near:
            add(self.space.sample_many(_SAMPLE, self.rng), near, count)
        else:
            add(self.space.sample_many(2 * max(count - by_size, 0), self.rng), {}, count - by_size)
            if by_size:
                add(draw_by_size(self.space, self._size_of, by_size, self.rng), {BY_SIZE: 1.0}, len(found) + by_size)
        if len(found) < count and self.space.size() <= _LISTED:  # what is seldom drawn
            add(self.rng.permutation(self.space.every()), near, count)
        return list(found.values())

    @property
    def _by_size_share(self) -> float:
        return self.config.by_size_share if self.space.size() > 4 * self.config.max_networks else 0.0

    @functools.cached_property
    def _size_of(self) -> Callable[[np.ndarray], np.ndarray]:
        nothing = np.empty((len(self.known.units), 0), dtype=bool)
        return SpaceTable(self.known, unit_sizes(self.amounts), nothing, np.empty((0, 0))).predict_many

    def _largest(self, count: int, seconds: float) -> float:
        """Size up to which there is time for so many random networks, by what those measured last took."""
        if not self._last:
            return math.inf
        encoded = [self.space.encode(Architecture.from_canonical(what.config["architecture"])) for what in self._last]
        taken = self._cost("network") / float(self._size_of(np.array(encoded)).mean())
        return largest_affordable(self._size_of(self.space.sample_many(_SAMPLE, self.rng)), taken, count, seconds)

    def run(
        self,
        deadline: float,
        share: float,
        tick: Callable[[], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Measure in rounds until `deadline`, until everything is measured, or until told to stop.

        Args:
            deadline: On the clock of `time.monotonic`.
            share: Of the time for whole networks.
            tick: Called after each window and round.
            should_stop: See `profile`.
        """
        rounds = 0
        while (left := deadline - time.monotonic()) > 1.0:
            if should_stop is not None and should_stop():
                return
            if rounds == 0:  # tells what things cost
                slot = left
                networks, units = self.choose_networks(2), self.choose_units(_FIRST_UNITS) if share < 1 else []
            elif rounds == 1:  # what a fit needs at least, such that there is time for it
                slot = left
                needed = max(2, self.lacking()[1])
                networks, units = self.choose_networks(needed, self._largest(needed, slot * share)), []
            else:  # then two rounds, whose passes lie far apart in time
                slot = left * (0.5 if rounds == 2 else 1.0)
                networks = self.choose_networks(max(2, int(slot * share / self._cost("network"))))
                if len(networks) * self._cost("network") < slot * share / 2:
                    share = share if networks or share == 1 else 0.0
                units = self.choose_units(max(4, int(slot * (1 - share) / self._cost("unit")))) if share < 1 else []
            subjects = [*units, *networks]
            if not subjects:
                return
            mixed = [subjects[i] for i in self.rng.permutation(len(subjects))]
            if self.measure(mixed, time.monotonic() + slot, should_stop, tick) == 0:
                return  # none of them runs here, nor would others
            rounds += 1
            if tick is not None:
                tick()

    def lacking(self) -> tuple[int, int]:
        """Units and networks that a fit needs beyond what the table has."""
        kinds = [what.kind for what in self.table.subjects.values()]
        needed = MIN_UNITS - kinds.count("unit"), self.config.fit.min_networks - kinds.count("network")
        return max(needed[0], 0), max(needed[1], 0)

    def go_on_until_fit(
        self, deadline: float, tick: Callable[[], None] | None = None, should_stop: Callable[[], bool] | None = None
    ) -> bool:
        """Measure past the budget what a fit needs at least: a busy machine may not have come so far.

        Args:
            deadline: When to give up, on the clock of `time.monotonic`.
            tick: As of `run`.
            should_stop: As of `run`.

        Returns:
            Whether there was time for all that can be measured.
        """
        while any(self.lacking()) and not (should_stop is not None and should_stop()):
            units, networks = self.lacking()
            some = self.choose_units(4 * MIN_UNITS) if units else []
            subjects = [what for what in some if what.id not in self.table.subjects][:units]
            if networks:
                # Each second is one beyond the budget: small ones.
                largest = self._largest(networks, _BEYOND * self.config.budget_s)
                some = self.choose_networks(self.config.fit.min_networks, largest)
                subjects += [what for what in some if what.id not in self.table.subjects][:networks]
            if not subjects:
                return True
            if time.monotonic() > deadline:
                return False
            log.info("beyond its budget, the profile measures %d more to have enough for a fit", len(subjects))
            if self.measure(subjects, deadline, should_stop, tick, once=True) == 0:
                return True
        return True


def profile(
    space: SearchSpace,
    io: IOSpec,
    *,
    device: str = "auto",
    runtime: str = "eager",
    directory: str | Path | None = None,
    config: ProfileConfig | None = None,
    plain: Any = None,
    report: Report = SILENT,
    should_stop: Callable[[], bool] | None = None,
) -> LatencyPredictor:
    """Measure a space on this device and fit its predictor; goes on from what the device's table holds already.

    Args:
        space: The space whose networks are to be predicted.
        io: The task's input.
        device: "auto", "cpu", "cuda" or the name of this machine's device.
        runtime: "eager", "compiled", "onnxruntime" or "graph".
        directory: Where the table and the predictor are kept; `latency.user_directory()` if not given.
        config: Budget and settings.
        plain: `{task: ..., space: ...}` as they stood in the file, so that a query of the same needs no torch.
        report: Told the seconds spent, the budget's, and how many units and networks were measured.
        should_stop: Asked between measurements; what was measured until then is kept.

    Returns:
        The predictor, which was also saved.

    Raises:
        ConfigError: Not this machine's device, a runtime that is not there, or a budget too short for a fit.
        StoppedEarly: `should_stop` said so, or there was not time enough for a fit; what was measured is kept.

    Examples:
        >>> import mixnas
        >>> from mixnas.predictors.latency.profile import ProfileConfig
        >>> space = mixnas.SearchSpace.from_dict(
        ...     {"stem": "conv", "stages": [{"width": [4, 8], "depth": [1, 2],
        ...      "block": {"mixer": ["identity", "pooling"], "channel_mixer": {"name": "mlp", "expansion": [1, 2]}}}]})
        >>> io = mixnas.IOSpec("image", (8, 8), in_features=1, num_outputs=10)
        >>> predictor = mixnas.profile(space, io, device="cpu", directory="tables", config=ProfileConfig(budget_s=3))
        >>> predictor.inputs == (io,)
        True
    """
    if not isinstance(space, SearchSpace) or not isinstance(io, IOSpec):
        given = f"{type(space).__name__} and {type(io).__name__}"
        raise ConfigError(f"profile: {given} were given. It takes a SearchSpace and the IOSpec of a task.")
    config = config or ProfileConfig()
    begun = time.monotonic()
    place = Path(directory) if directory is not None else user_directory()
    with fixed_threads(config.measure.threads):
        profiler = Profiler(space, io, device=device, runtime=runtime, directory=place, config=config, plain=plain)

        def tick() -> None:
            kinds = [what.kind for what in profiler.table.subjects.values()]
            spent = min(time.monotonic() - begun, config.budget_s)
            report(spent, config.budget_s, units=kinds.count("unit"), networks=kinds.count("network"))

        others = spaces_before(profiler.table, space, io)
        for other in others:  # the fit needs their counts, and has few seconds at the end
            for _, some in other.units.chunks():
                profiler.works.of_all(some)
        sources = sources_of(profiler.table, space, io) if runtime in ("compiled", "onnxruntime") else []
        least = MIN_NETWORKS if sources else config.fit.min_networks
        check_enough(profiler.table, space, io, least, units=not sources)
        share = 1.0 if sources else config.network_share
        # The fit takes some seconds, most of them scikit-learn's import.
        profiler.run(begun + config.budget_s - min(8.0, 0.25 * config.budget_s), share, tick, should_stop)
        in_time = True
        if not sources:
            in_time = profiler.go_on_until_fit(
                begun + max(_PATIENCE * config.budget_s, _LEAST_PATIENCE_S), tick, should_stop
            )
    if should_stop is not None and should_stop():
        raise StoppedEarly(f"profiling was stopped. What was measured is kept in {place}.")
    if not in_time:
        units, networks = profiler.lacking()
        raise StoppedEarly(
            f"in {time.monotonic() - begun:.0f} s the profile did not come so far that it can be fitted: it lacks "
            f"{units} units and {networks} networks. What was measured is kept in {place}. Give it more time: "
            "`latency.profile` of a search, --budget of nas latency profile."
        )
    kinds = [what.kind for what in profiler.table.subjects.values()]
    if sources and kinds.count("unit") < config.min_units and kinds.count("network") >= MIN_NETWORKS:
        predictor = transfer(profiler.table, nearest_source(profiler.table, sources, config.fit), config.fit)
    else:
        predictor = _fitted(profiler, [profiler.known, *others])
    predictor.save(place)
    tick()
    return predictor


def _fitted(profiler: Profiler, spaces: Sequence[SpaceUnits]) -> LatencyPredictor:
    try:
        predictor = fit(profiler.table, spaces, profiler.works, profiler.config.fit)
    except ConfigError as error:
        if not profiler.left_out:
            raise
        reason = next(iter(profiler.left_out.values()))
        raise ConfigError(f"{error} {len(profiler.left_out)} were left out, the first because: {reason}") from error
    if profiler.gpu is not None:
        predictor.meta["gpu"] = profiler.gpu.to_plain()
    return predictor
