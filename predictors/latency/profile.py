"""Profiling a device: measure the units of a space and some whole networks, then fit the predictor.

The budget is spent in rounds. The first covers every operator; later ones measure the units that the model is least
sure of. Whole networks, which the fit and its calibration need, get about half of the time throughout. What is measured
is in the table within seconds, so a stopped profile goes on where it was.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixnas.predictors.latency import features
from mixnas.predictors.latency.fit import SpaceToFit, fit
from mixnas.predictors.latency.gpus import gpu_of
from mixnas.predictors.latency.lookup import SpaceTable
from mixnas.predictors.latency.model import FitConfig, matrix
from mixnas.predictors.latency.predictor import LatencyPredictor, installed, user_directory
from mixnas.predictors.latency.selection import draw_by_size, unit_sizes
from mixnas.predictors.latency.transfer import MIN_NETWORKS, nearest_source, transfer
from mixnas.predictors.latency.trees import Trees
from mixnas.predictors.measuring import runtimes
from mixnas.predictors.measuring.device import INTERPRETER, device_name, provenance
from mixnas.predictors.measuring.measure import (
    Call,
    MeasureConfig,
    Meter,
    fixed_threads,
    make_sentinel,
    measuring,
    sentinel_module,
    windows_of,
)
from mixnas.predictors.measuring.table import BY_SIZE, MeasurementTable, Subject, subject, tagged
from mixnas.predictors.units import (
    Key,
    architecture_from_canonical,
    describe,
    io_fields,
    key_from_plain,
    key_to_plain,
)
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError, StoppedEarly
from mixnas.search_space.network import IOSpec, Network
from mixnas.search_space.space import SearchSpace

log = logging.getLogger(__name__)

Progress = Callable[[float, str], None]

_KEEP_S = 15.0
"""Seconds of measurements that a kill may lose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """How a device is profiled.

    Attributes:
        budget_s: Wall-clock time for everything, the fit included.
        network_share: Share of the measuring time that goes to whole networks. All of it, where building one takes
            seconds (a compiler) and another device's or runtime's predictor can be transferred from.
        by_size_share: Share of those networks that are drawn such that small and large ones occur about equally
            (`drawing`); the others are drawn uniformly. None in a space that `max_networks` nearly covers.
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
        self.fields = io_fields(io)
        threads = config.measure.threads
        self.name = device if device == INTERPRETER else device_name(device, threads)
        here = device_name("auto", threads), device_name("cpu", threads), INTERPRETER
        if self.name not in here:
            raise ConfigError(
                f"device {device!r} is not this machine's. Allowed here: {', '.join(dict.fromkeys(here))}."
            )
        self.torch_device = "cuda" if self.name == here[0] != here[1] else "cpu"
        self.gpu = gpu_of(self.name, self.torch_device)
        runtimes.require(runtime, self.torch_device)
        self.clock = runtimes.clock_of(runtime, self.torch_device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.works: dict[Key, Mapping[str, float] | None] = {}
        self.directory = Path(directory)
        self.meter = Meter(config.measure, sentinel=self._sentinel(), clock=self.clock)
        self.table = MeasurementTable.create_or_open(
            self.directory, self.name, runtime, threads, self._reference_ms(), config.measure.batch_size
        )
        self._provenance: int | None = None
        for what in self.table.subjects.values():
            if what.kind == "unit":
                self.works[key_from_plain(what.config)] = what.work
        self.to_fit = SpaceToFit.of(space, self.fields, plain)
        self.rng = np.random.default_rng([config.seed, len(self.table.subjects)])
        self._cost = {"unit": 0.05, "network": 0.1}  # seconds per subject, corrected by what is seen

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

    def work_of(self, key: Key) -> Mapping[str, float] | None:
        """Counts of a unit; None when it cannot be built where it stands."""
        if key not in self.works:
            try:
                batch = self.config.measure.batch_size
                self.works[key] = features.work_of(key, batch, self.torch_device, self.gpu)
            except ConfigError as error:
                log.info("left out of the profile: %s", error)
                self.works[key] = None
        return self.works[key]

    def unit_subject(self, key: Key) -> Subject | None:
        """What the table calls a unit; None when it cannot be built."""
        work = self.work_of(key)
        batch = self.config.measure.batch_size
        return None if work is None else subject("unit", key_to_plain(key), work, batch)

    def network_subject(self, architecture: Architecture, work: Mapping[str, float] | None = None) -> Subject:
        """What the table calls a whole network; `work` says how it was drawn."""
        config = {"architecture": architecture.to_dict(), "io": self.fields}
        return subject("network", config, work or {}, self.config.measure.batch_size)

    def call_of(self, what: Subject) -> Call:
        """The forward of a subject through the runtime, on random inputs."""
        batch = self.config.measure.batch_size
        if what.kind == "unit":
            key = key_from_plain(what.config)
            module = features.deployed_unit(key, self.torch_device)
            inputs = features.example_input(key, batch, self.generator, self.torch_device)
        else:
            module = Network(
                architecture_from_canonical(what.config["architecture"]), self.io, generator=self.generator
            )
            module = module.eval().requires_grad_(False).deploy().to(self.torch_device)
            inputs = self.io.example(batch, generator=self.generator).to(self.torch_device)
        return runtimes.prepare(module, inputs, self.runtime, self.config.measure.threads)

    def measure(
        self,
        subjects: Sequence[Subject],
        deadline: float,
        stop: Callable[[], bool] | None = None,
        tick: Callable[[], None] | None = None,
    ) -> int:
        """Measure subjects in shuffled passes until all are done or it is `deadline` (`time.monotonic`).

        Args:
            subjects: What.
            deadline: When to end.
            stop: Asked before each window.
            tick: Called after each window.

        Returns:
            How many subjects were begun; what was built too late to be measured is left for another time.
        """
        if self._provenance is None:
            kind = "cuda" if self.torch_device == "cuda" else "cpu"
            record = provenance(kind, self.config.measure.threads) | {"device": self.name, "runtime": self.runtime}
            self._provenance = self.table.add_provenance(record)
        begun = time.monotonic()
        calls: list[Call] = []
        for what in subjects:
            # Half of the time at most for building (a compiler may take seconds a unit), the rest for measuring.
            if calls and (time.monotonic() > begun + (deadline - begun) / 2 or self._memory_is_low()):
                break
            calls.append(self.call_of(what))
        rows = []
        kept = time.monotonic()
        seen: set[int] = set()
        with measuring(self.config.measure.threads):
            for window in windows_of(
                calls,
                self.meter,
                self.rng,
                should_stop=lambda: (time.monotonic() > deadline and len(seen) > 0) or (stop is not None and stop()),
            ):
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
        taken = time.monotonic() - begun
        if seen:
            kinds = [subjects[i].kind for i in seen]
            expected = sum(self._cost[kind] for kind in kinds)
            for kind in set(kinds):
                self._cost[kind] *= taken / expected
        return len(seen)

    def _memory_is_low(self) -> bool:
        """Whether the GPU could not take many more forwards beside those built: each CUDA graph keeps its tensors."""
        if self.torch_device != "cuda":
            return False
        free, total = torch.cuda.mem_get_info()
        return free < 0.25 * total

    # -- choosing -----------------------------------------------------------------------------------------------------

    def _unmeasured(self) -> list[tuple[Key, Subject]]:
        passes = self.config.measure.passes
        result = []
        for key in self.to_fit.keys:
            what = self.unit_subject(key)
            if what is not None and self.table.accepted(what.id) < passes:
                result.append((key, what))
        return result

    def choose_units(self, count: int) -> list[Subject]:
        """The units to measure next: those of which the model is least sure; at first such that all operators occur."""
        candidates = self._unmeasured()
        if len(candidates) <= count:
            return [what for _, what in candidates]
        order = self.rng.permutation(len(candidates))
        latencies = self.table.latencies("unit")
        if len(latencies) < 24:
            return [candidates[i][1] for i in _covering([describe(candidates[i][0]) for i in order], count, order)]
        unsure = self._disagreement([key for key, _ in candidates], latencies)
        ranked = np.argsort(-unsure)
        return [candidates[i][1] for i in ranked[:count]]

    def _disagreement(self, keys: Sequence[Key], latencies: Mapping[str, Any]) -> np.ndarray:
        """Standard deviation between small models, each fitted on another part of what was measured."""
        measured = [self.table.subjects[identity] for identity in latencies]
        settings = [describe(key_from_plain(what.config)) for what in measured]
        names = sorted({name for row in settings for name in row})
        work_names = sorted({name for what in measured for name in what.work})
        known = np.hstack([matrix(settings, names), matrix([what.work for what in measured], work_names)])
        target = np.log([latency.latency_ms for latency in latencies.values()])
        wanted = np.hstack(
            [
                matrix([describe(key) for key in keys], names),
                matrix([self.works[key] or {} for key in keys], work_names),
            ]
        )
        votes = []
        for seed in range(4):
            rows = np.random.default_rng(seed).integers(0, len(target), len(target))
            votes.append(
                Trees.fit(known[rows], target[rows], num_trees=40, depth=3, rate=0.2, subsample=1.0, seed=seed).predict(
                    wanted
                )
            )
        return np.std(votes, axis=0)

    def choose_networks(self, count: int) -> list[Subject]:
        """Networks to measure next: those begun, then random ones, a share of them drawn by size."""
        passes = self.config.measure.passes
        own = [
            what
            for what in self.table.subjects.values()
            if what.kind == "network"
            and what.config["io"] == self.fields
            and self.space.contains(architecture_from_canonical(what.config["architecture"]))
        ]
        begun = [what for what in own if self.table.accepted(what.id) < passes]
        count = min(count, self.config.max_networks - len(own) + len(begun))
        found = {what.id: what for what in begun[:count]}
        known = {what.id for what in own}
        by_size = int(self._by_size_share * max(count - len(found), 0))

        def add(matrix: np.ndarray, work: Mapping[str, float], limit: int) -> None:
            for vector in matrix:
                if len(found) >= limit:
                    break
                architecture = self.space.decode(vector)
                what = self.network_subject(architecture, work)
                if what.id not in known and all(self.work_of(key) is not None for key in self._keys_of(architecture)):
                    found.setdefault(what.id, what)

        add(self.space.sample_many(2 * max(count - by_size, 0), self.rng), {}, count - by_size)
        if by_size:
            add(draw_by_size(self.space, self._size_of, by_size, self.rng), {BY_SIZE: 1.0}, len(found) + by_size)
        return list(found.values())

    @property
    def _by_size_share(self) -> float:
        return self.config.by_size_share if self.space.size() > 4 * self.config.max_networks else 0.0

    @functools.cached_property
    def _size_of(self) -> Callable[[np.ndarray], np.ndarray]:
        table = SpaceTable(self.space, self.fields, self.to_fit.parts)
        sizes = unit_sizes([self.work_of(key) for key in self.to_fit.keys])
        table.bind(sizes, [0] * len(sizes), np.empty(0))
        return table.predict_many

    def _keys_of(self, architecture: Architecture) -> list[Key]:
        from mixnas.predictors.units import registry_size_after, walk

        return [key for _, key in walk(architecture, self.fields, registry_size_after)]

    def run(
        self,
        deadline: float,
        share: float,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Measure in rounds until `deadline`, until everything is measured, or until told to stop.

        Args:
            deadline: On the clock of `time.monotonic`.
            share: Of the time for whole networks.
            progress: See `profile`.
            should_stop: See `profile`.
        """
        begun = time.monotonic()

        def tick() -> None:
            if progress is not None:
                kinds = [what.kind for what in self.table.subjects.values()]
                text = f"{kinds.count('unit')} units, {kinds.count('network')} networks measured"
                progress(min(1.0, (time.monotonic() - begun) / max(deadline - begun, 1e-9)), text)

        rounds = 0
        while (left := deadline - time.monotonic()) > 1.0:
            if should_stop is not None and should_stop():
                return
            # A short first round tells what things cost; then two long ones, whose passes lie far apart in time.
            slot = left * (0.08 if rounds == 0 else 0.5 if rounds == 1 else 1.0)
            networks = self.choose_networks(max(2, int(slot * share / self._cost["network"])))
            if len(networks) * self._cost["network"] < slot * share / 2:
                share = share if networks or share == 1 else 0.0
            units = self.choose_units(max(4, int(slot * (1 - share) / self._cost["unit"]))) if share < 1 else []
            subjects = [*units, *networks]
            if not subjects:
                return
            mixed = [subjects[i] for i in self.rng.permutation(len(subjects))]
            self.measure(mixed, time.monotonic() + slot, should_stop, tick)
            rounds += 1
            tick()


def _covering(settings: Sequence[Mapping[str, float]], count: int, labels: np.ndarray) -> list[int]:
    """Greedy choice of `count` rows such that rare settings occur often; returns their labels."""
    seen: dict[tuple[str, float], int] = {}
    chosen: list[int] = []
    left = list(range(len(settings)))
    for _ in range(count):
        best = max(left, key=lambda i: sum(1.0 / (1 + seen.get(item, 0)) ** 2 for item in settings[i].items()))
        left.remove(best)
        chosen.append(int(labels[best]))
        for item in settings[best].items():
            seen[item] = seen.get(item, 0) + 1
    return chosen


def profile(
    space: SearchSpace,
    io: IOSpec,
    *,
    device: str = "auto",
    runtime: str = "eager",
    directory: str | Path | None = None,
    config: ProfileConfig | None = None,
    plain: Any = None,
    progress: Progress | None = None,
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
        plain: What stood under `space:` in the file, so that a query of the same text needs no torch.
        progress: Called with the share of the budget that is spent, and a text.
        should_stop: Asked between measurements; what was measured until then is kept.

    Returns:
        The predictor, which was also saved.

    Raises:
        ConfigError: Not this machine's device, a runtime that is not there, or a budget too short for a fit.
        StoppedEarly: `should_stop` said so.
    """
    config = config or ProfileConfig()
    begun = time.monotonic()
    place = Path(directory) if directory is not None else user_directory()
    with fixed_threads(config.measure.threads):
        profiler = Profiler(space, io, device=device, runtime=runtime, directory=place, config=config, plain=plain)
        others = _spaces_before(place, profiler)
        for key in (key for other in others for key in other.keys):
            profiler.work_of(key)  # the fit needs it, and has few seconds at the end
        sources = _sources(place, profiler) if runtime in ("compiled", "onnxruntime") else []
        share = 1.0 if sources else config.network_share
        # The fit takes some seconds, most of them scikit-learn's import.
        profiler.run(begun + config.budget_s - min(8.0, 0.25 * config.budget_s), share, progress, should_stop)
    if should_stop is not None and should_stop():
        raise StoppedEarly(f"profiling was stopped. What was measured is kept in {place}.")
    kinds = [what.kind for what in profiler.table.subjects.values()]
    if sources and kinds.count("unit") < config.min_units and kinds.count("network") >= MIN_NETWORKS:
        predictor = transfer(profiler.table, nearest_source(profiler.table, sources, config.fit), config.fit)
    else:
        predictor = fit(profiler.table, [profiler.to_fit, *others], profiler.work_of, config.fit)
        if profiler.gpu is not None:
            predictor.meta["gpu"] = profiler.gpu.to_plain()
    predictor.save(place)
    if progress is not None:
        progress(1.0, "fitted")
    return predictor


def _sources(directory: Path, profiler: Profiler) -> list[LatencyPredictor]:
    """The predictors there are that know this space, apart from the one that is being made."""
    found = []
    for device, runtime, path in [*installed(directory), *installed()]:
        if (device, runtime) != (profiler.name, tagged(profiler.runtime, profiler.table.batch)):
            predictor = LatencyPredictor.open(path)
            if any(t.space.tree == profiler.space.tree and t.io == profiler.fields for t in predictor.spaces):
                found.append(predictor)
    return found


def _spaces_before(directory: Path, profiler: Profiler) -> list[SpaceToFit]:
    """The spaces that the device's predictor already tabulates, apart from this one."""
    path = profiler.table.csv_path.with_suffix(".npz")
    if not path.exists():
        return []
    try:
        before = LatencyPredictor.open(path)
    except IntegrityError as error:
        log.warning("%s It is fitted anew from its table.", error)
        return []
    mine = profiler.to_fit
    found = []
    for table, entry in zip(before.spaces, before.meta["spaces"], strict=True):
        if table.io == mine.io and table.space.tree == mine.space.tree:
            continue
        found.append(SpaceToFit(table.space, table.io, table.parts, before.profiled.keys, tuple(entry["written_as"])))
    return found
