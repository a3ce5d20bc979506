"""The latency predictor as it is used: load it, ask it. Needs NumPy only; fitting is in `fit.py`.

A predictor file is `<device>.<runtime>.npz`: plain arrays and one JSON text, with a digest of both; never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixnas.predictors.latency.boundaries import boundaries_of
from mixnas.predictors.latency.gpus import GPU, sheet_of
from mixnas.predictors.latency.lookup import SpaceTable, SpaceUnits, network_input, tree_from_plain, tree_to_plain
from mixnas.predictors.latency.model import LEAST_SHARE, Columns, Composition, UnitModel
from mixnas.predictors.latency.stored import damaged, read_stored, write_stored
from mixnas.predictors.latency.trees import Trees
from mixnas.predictors.latency.unit_rows import UnitRows
from mixnas.predictors.measuring.device import nearest_device
from mixnas.predictors.measuring.table import profile_command, tagged
from mixnas.predictors.measuring.value import Latency
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.errors import ConfigError, IntegrityError, listed, shown
from mixnas.search_space.registry import BETWEEN, Context
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, Unit, describe, plan, registry_size_after

SHIPPED = Path(__file__).parents[1] / "tables"


def user_directory() -> Path:
    """Where profiles of this machine are kept: `$MIXNAS_TABLES`, or mixnas/tables in the user's cache directory."""
    given = os.environ.get("MIXNAS_TABLES")
    if given:
        return Path(given)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:  # a user that the system does not know, without HOME
        raise ConfigError("profiles: there is no home directory to keep them in. Set MIXNAS_TABLES or HOME.") from error
    return cache / "mixnas" / "tables"


@dataclass(frozen=True, slots=True)
class UnitLatency:
    """One line of the breakdown: a unit's place and role, and its share of the network's latency."""

    name: str
    role: str
    latency_ms: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted latency and what it is made of.

    Attributes:
        latency: Of the whole network; its interval (90%) is calibrated on networks that the fit had not seen, and for
            units of which something was never measured on whole operators that it had not seen.
        units: The breakdown; sums to `latency.ms`.
        boundaries_ms: How much of that is the change of policy between neighbours: it stands with the later of the two.
        device: The device.
        runtime: "eager", "compiled", "onnxruntime" or "graph".
        estimate: True when the device was never measured.
    """

    latency: Latency
    units: tuple[UnitLatency, ...]
    device: str
    runtime: str
    estimate: bool = False
    boundaries_ms: float = 0.0


@dataclass(frozen=True)
class Profiled:
    """What a predictor knows of the units of the spaces that it was profiled for.

    Attributes:
        units: The units.
        alone_ms: (units,) by themselves; NaN where a unit cannot be built.
        in_network_ms: (units,) in a network: what is added up.
        measured: (units,) whether the unit itself was measured.
    """

    units: UnitRows
    alone_ms: np.ndarray
    in_network_ms: np.ndarray
    measured: np.ndarray


class _Seen(NamedTuple):
    """What is known of a unit that was asked about: its milliseconds in a network, the operators that are told by their
    presence as bits, what of it lies outside the measured range, and whether it was profiled."""

    ms: float
    operators: int
    outside: tuple[str, ...]
    profiled: bool


class LatencyPredictor:
    """Predicts latency on one device through one runtime.

    Attributes:
        meta: What it is and how it was made, plain data.
        model: Of a unit by itself.
        composition: From units to networks.
        profiled: The units that it was fitted for.
        spaces: The spaces that it was fitted for.

    Examples:
        After the example of `mixnas.profile`:

        >>> import mixnas, numpy
        >>> from mixnas.predictors.measuring.device import device_name
        >>> predictor = mixnas.LatencyPredictor.load(device_name("cpu"), directory="tables")
        >>> (known,) = predictor.spaces
        >>> answer = predictor.predict(known.space.sample(numpy.random.default_rng(0)), known.io)
        >>> answer.latency.low_ms < answer.latency.ms < answer.latency.high_ms
        True
        >>> [unit.name for unit in answer.units][0]
        'stem'
    """

    def __init__(
        self,
        meta: dict[str, Any],
        model: UnitModel,
        composition: Composition,
        profiled: Profiled,
        spaces: Sequence[SpaceUnits],
    ) -> None:
        self.meta, self.model, self.composition, self.profiled = meta, model, composition, profiled
        self.spaces = tuple(spaces)
        self.boundaries = boundaries_of(meta.get("policies", ()), composition.boundary_ms)
        self._bits = {name: 1 << i for i, name in enumerate(meta["operators"])}
        self._presence: dict[int, float] = {0: 0.0}
        self._sizes: dict[tuple[str, Op, str, tuple[int, ...]], tuple[int, ...]] = {}
        self._heads: set[Op] = set()
        self._seen: dict[Unit, _Seen] = {}
        self._inputs: tuple[IOSpec, ...] | None = None
        self._works: Any = None  # a `features.Works`, which needs torch
        self._tables: list[tuple[SpaceUnits, SpaceTable]] = []

    def __repr__(self) -> str:
        inputs = "; ".join(map(_input, self.inputs)) or "no input"
        return f"LatencyPredictor({self.device}, {self.tag}, for {inputs})"

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> str:
        """The device's name."""
        return str(self.meta["device"])

    @property
    def runtime(self) -> str:
        """The runtime."""
        return str(self.meta["runtime"])

    @property
    def tag(self) -> str:
        """The runtime as in the names of files: with the batch size, unless that is 1."""
        return tagged(self.runtime, int(self.meta["batch"]))

    @property
    def estimate(self) -> bool:
        """True when the device was never measured."""
        return bool(self.meta.get("estimate", False))

    @property
    def half_width(self) -> float:
        """Half the interval on a logarithmic scale: it is latency x exp(+-half_width)."""
        return float(self.meta["half_width"])

    @property
    def accuracy(self) -> dict[str, Any]:
        """Errors on the calibration networks, which the fit had not seen."""
        return dict(self.meta["accuracy"])

    @property
    def inputs(self) -> tuple[IOSpec, ...]:
        """The distinct inputs that it was profiled for."""
        if self._inputs is None:
            self._inputs = tuple(dict.fromkeys(space.io for space in self.spaces))
        return self._inputs

    # -- asking -------------------------------------------------------------------------------------------------------

    def size_after(self, axis: str, op: Op, before: Context) -> tuple[int, ...]:
        """The token grid behind a stem, a downsample or a head: as profiled, else as the operator says (torch)."""
        self._read_between()
        key = (axis, op, before.kind, before.size)
        if key not in self._sizes:
            self._sizes[key] = registry_size_after(axis, op, before)
        return self._sizes[key]

    def _read_between(self) -> None:
        """Once: what the profiled units say of the operators between stages."""
        if self._sizes:
            return
        units = self.profiled.units
        between = np.array([frame.role in BETWEEN for frame in units.frames])
        for unit in units.take(between[units.rows[:, 0]]):
            op = unit.op(unit.role)
            self._sizes[unit.role, op, unit.before.kind, unit.before.size] = unit.after.size
            if unit.role == "head":
                self._heads.add(op)

    def head_of(self, io: IOSpec) -> Op:
        """The head of networks with an interface: as profiled, else as the registry has it (torch)."""
        self._read_between()
        named = [op for op in self._heads if op.name == io.head and set(io.head_knobs) <= set(op.knobs)]
        return named[0] if len(named) == 1 else io.head_op

    def plan(self, architecture: Architecture, io: IOSpec) -> tuple[tuple[str, Unit], ...]:
        """`units.plan`, without torch where everything was profiled."""
        return plan(architecture, io, self.size_after, self.head_of)

    def knows(self, architecture: Architecture, io: IOSpec | None = None) -> bool:
        """Whether every unit of the architecture was among those that the predictor was profiled for."""
        return all(self.profiled.units.find(unit) >= 0 for _, unit in self.plan(architecture, self.input_of(io)))

    def input_of(self, io: IOSpec | None) -> IOSpec:
        """The input that is asked about; the only one where none is given.

        Raises:
            ConfigError: None is given, and it was profiled for none or for several.
        """
        if io is not None:
            return network_input(io)
        if len(self.inputs) != 1:
            known = "; ".join(map(_input, self.inputs)) or "none"
            raise ConfigError(
                f"{self.device}: an architecture's latency depends on its input, and the predictor was profiled for "
                f"{known}. Give `io`."
            )
        return self.inputs[0]

    def predict(self, architecture: Architecture, io: IOSpec | None = None) -> Prediction:
        """Latency of one architecture.

        Args:
            architecture: Which.
            io: The task's input; may be left out where the predictor was profiled for only one.

        Returns:
            The prediction with its interval and breakdown. A unit that was not profiled is counted and predicted by the
            model (this imports torch the first time). An input that was not profiled and a unit outside the measured
            range are reported; the interval then allows for what such guesses were off by when whole operators were
            left out of the fit, and there is none where too few were measured to tell.

        Raises:
            ConfigError: See `input_of`; or a unit can neither be found nor built.
        """
        if not isinstance(architecture, Architecture) or not isinstance(io, IOSpec | None):
            given = f"{type(architecture).__name__} and {type(io).__name__}"
            raise ConfigError(f"predict: {given} were given. It takes an Architecture and the IOSpec of a task.")
        io = self.input_of(io)
        known_input = io in self.inputs
        outside = dict.fromkeys([] if known_input else [f"input: {_input(io)} was not profiled"])
        shares: list[float] = []
        looked: list[_Seen] = []
        present = 0
        planned = self.plan(architecture, io)
        entering = list(self.boundaries.walk(planned))
        for (name, unit), behind_another in zip(planned, entering, strict=True):
            seen = self._seen.get(unit) or self._look_at(unit)
            if seen.outside:
                outside |= dict.fromkeys(f"{name}: {text}" for text in seen.outside)
            ms = seen.ms + behind_another
            if seen.operators & ~present:  # the first unit with an operator carries what its presence costs
                ms += self._presence_ms(present | seen.operators) - self._presence_ms(present)
                present |= seen.operators
            looked.append(seen)
            shares.append(ms)
        if sum(shares) < LEAST_SHARE * sum(seen.ms for seen in looked):
            shares = [LEAST_SHARE * seen.ms for seen in looked]
        total = sum(shares)
        guesses = (bool(seen.outside) or not (known_input or seen.profiled) for seen in looked)
        guessed = sum(ms for ms, guess in zip(shares, guesses, strict=True) if guess)
        units = [UnitLatency(name, unit.role, ms) for (name, unit), ms in zip(planned, shares, strict=True)]
        latency = Latency(total, *self._interval(total - guessed, guessed), "predicted", tuple(outside))
        return Prediction(latency, tuple(units), self.device, self.runtime, self.estimate, sum(entering))

    def _interval(self, known_ms: float, guessed_ms: float) -> tuple[float | None, float | None]:
        """The ends for a network of which a part lies outside the measured range; that part may be off as a whole."""
        spread, outside = math.exp(self.half_width), self.meta.get("half_width_outside")
        if guessed_ms > 0 and outside is None:
            return None, None
        off = math.exp(outside) if guessed_ms > 0 and outside is not None else 1.0
        return (known_ms + guessed_ms / off) / spread, (known_ms + guessed_ms * off) * spread

    def _look_at(self, unit: Unit) -> _Seen:
        row = self.profiled.units.find(unit)
        operators = sum(self._bits.get(f"{axis}={op.name}", 0) for axis, op in unit.choices)
        if row >= 0:
            found = _Seen(float(self.profiled.in_network_ms[row]), operators, (), True)
        else:
            self.works.of(unit)  # says why, where it cannot be built
            ms = float(self._predicted(UnitRows.of([unit]))[0])
            found = _Seen(ms, operators, tuple(self.model.outside(describe(unit))), False)
        self._seen[unit] = found
        return found

    def _presence_ms(self, operators: int) -> float:
        """What operators, as bits, add to a network once, alone and in pairs."""
        if operators not in self._presence:
            values = self.composition.presence_ms
            there = [i for i in range(len(values)) if operators >> i & 1]
            self._presence[operators] = float(values[np.ix_(there, there)].sum())
        return self._presence[operators]

    @property
    def works(self) -> Any:
        """Counts units as those were that it was fitted to, a `features.Works`; imports torch."""
        if self._works is None:
            from mixnas.predictors.latency.features import Works

            gpu = GPU(**self.meta["gpu"]) if self.meta.get("gpu") else None
            self._works = Works(int(self.meta["batch"]), gpu=gpu)
        return self._works

    def _predicted(self, units: UnitRows) -> np.ndarray:
        """Milliseconds in a network, by the model alone; NaN where a unit cannot be built."""
        result = np.empty(len(units))
        for part, some in units.chunks():
            works, buildable = self.works.of_all(some)
            settings = some.described()
            alone = self.model.predict(works, settings)
            in_network = self.composition.apply(alone, categorical(settings, self.meta["categories"]))
            result[part] = np.where(buildable, in_network, np.nan)
        return result

    def units_ms(self, units: UnitRows) -> np.ndarray:
        """(units,) what each takes in a network; NaN where it cannot be built."""
        rows = self.profiled.units.find_all(units)
        result = np.append(self.profiled.in_network_ms, np.nan)[rows]
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            result[unknown] = self._predicted(units.take(unknown))
        return result

    def table_of(self, space: SearchSpace, io: IOSpec | None = None) -> SpaceTable:
        """The look-up tables of a space, made when they are first asked for; this imports torch where the space was not
        profiled."""
        io = self.input_of(io)
        for known, table in self._tables:
            if known.is_of(space, io):
                return table
        own = (known for known in self.spaces if known.is_of(space, io))
        found = next(own, None) or SpaceUnits(space, io, size_after=self.size_after, head_of=self.head_of)
        operators = self.meta["operators"]
        has = np.empty((len(found.units), len(operators)), dtype=bool)
        for part, some in found.units.chunks():
            has[part] = some.described().select(operators) > 0
        table = SpaceTable(found, self.units_ms(found.units), has, self.composition.presence_ms, self.boundaries)
        self._tables.append((found, table))
        return table

    def predict_many(self, encoded: np.ndarray, space: SearchSpace, io: IOSpec | None = None) -> np.ndarray:
        """Latency of encoded architectures.

        Args:
            encoded: Integer matrix (rows, variables) as `space.sample_many` or `space.encode_many` gives.
            space: The space that they are encoded in.
            io: As in `predict`.

        Returns:
            (rows,) milliseconds. The interval of each is x exp(+-`half_width`).
        """
        return self.table_of(space, io).predict_many(encoded)

    def stored_space(self, plain: Any, io: IOSpec | None = None) -> SpaceUnits | None:
        """The profiled space that was written as `plain`, `{task: ..., space: ...}`, without torch; or None.

        Args:
            plain: See above.
            io: Its input; may be left out where only one of that text was profiled.
        """
        wanted = plain_digest(plain)
        own = None if io is None else network_input(io)
        found = [known for known in self.spaces if wanted in known.written_as and own in (None, known.io)]
        return found[0] if len(found) == 1 else None

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> Path:
        """Write `<device>.<runtime>.npz`, atomically; returns the path. See `table.tagged` for batches.

        Raises:
            ConfigError: It is an estimate: files are of measured devices only.
        """
        if self.estimate:
            raise ConfigError(f"{self.device}: an estimate is not kept among the measured devices.")
        model, trees = self.model, self.model.trees
        meta = {
            **self.meta,
            "units": self.profiled.units.to_plain(),
            "work_names": list(model.work_names),
            "setting_names": list(model.setting_names),
            "spread": model.spread,
            "compositions": [{"scale": c.scale, "constant_ms": c.constant_ms} for c in self.composition.chain()],
            "spaces": [
                {"tree": tree_to_plain(s.space.tree), "io": s.io.to_plain(), "written_as": list(s.written_as)}
                for s in self.spaces
            ],
        }
        arrays = {
            "coefficients": model.coefficients,
            "typical": model.typical,
            "low": model.low,
            "high": model.high,
            **trees.to_arrays("trees"),
            "units": self.profiled.units.rows,
            "alone_ms": self.profiled.alone_ms,
            "in_network_ms": self.profiled.in_network_ms,
            "measured": self.profiled.measured,
        }
        for c, composition in enumerate(self.composition.chain()):
            arrays[f"composition{c}.weights"] = composition.weights
            arrays[f"composition{c}.presence_ms"] = composition.presence_ms
            arrays[f"composition{c}.boundary_ms"] = composition.boundary_ms
        path = Path(directory) / f"{self.device}.{self.tag}.npz"
        write_stored(path, arrays, meta)
        return path

    @classmethod
    def open(cls, path: str | Path) -> LatencyPredictor:
        """Read a predictor file.

        Raises:
            IntegrityError: It is damaged, truncated, something else, or of an earlier version.
        """
        path = Path(path)
        try:
            arrays, meta = read_stored(path)
            trees = Trees.from_arrays(arrays, "trees")
            model = UnitModel(
                tuple(meta.pop("work_names")),
                arrays["coefficients"],
                arrays["typical"],
                tuple(meta.pop("setting_names")),
                trees,
                float(meta.pop("spread")),
                arrays["low"],
                arrays["high"],
            )
            composition: Composition | None = None
            for c, numbers in enumerate(meta.pop("compositions")):
                composition = Composition(
                    numbers["scale"],
                    arrays[f"composition{c}.weights"],
                    numbers["constant_ms"],
                    _presence(arrays[f"composition{c}.presence_ms"]),
                    composition,
                    arrays.get(f"composition{c}.boundary_ms", np.empty(0)),
                )
            assert composition is not None
            units = UnitRows.from_plain(meta.pop("units"), arrays["units"])
            profiled = Profiled(units, arrays["alone_ms"], arrays["in_network_ms"], arrays["measured"])
            stored = meta.pop("spaces")
            predictor = cls(meta, model, composition, profiled, ())
            predictor.spaces = tuple(
                SpaceUnits(
                    SearchSpace(tree_from_plain(plain["tree"]), "stored space"),
                    IOSpec.from_plain(plain["io"]),
                    tuple(plain["written_as"]),
                    predictor.size_after,
                    predictor.head_of,
                )
                for plain in stored
            )
            return predictor
        except IntegrityError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
            raise damaged(path, error) from error

    @classmethod
    def load(cls, device: str, runtime: str = "eager", directory: str | Path | None = None) -> LatencyPredictor:
        """The predictor of a device: from `directory`, or from the user's profiles and then those shipped.

        Args:
            device: Its name.
            runtime: As in the names of files: "eager", or "graph-b32" for batches of 32.
            directory: Where to look instead.

        Raises:
            ConfigError: Nobody measured it; the message lists the devices there are.
            IntegrityError: Its file is damaged.
        """
        there = installed(directory)
        for found_device, found_runtime, path in there:
            if (found_device, found_runtime) == (device, runtime):
                return cls.open(path)
        names = [f"{d} ({r})" for d, r, _ in there]
        raise ConfigError(
            f"no measurements of device {shown(device)} through {shown(runtime)}."
            f"{nearest_device(device, [d for d, _, _ in there])} There are: {listed(names) or 'none'}. "
            f"Measure this machine with `{profile_command(device, runtime)}`"
            f"{', or have it estimated from its data sheet with `--estimate`' if sheet_of(device) else ''}."
        )


def installed(directory: str | Path | None = None) -> list[tuple[str, str, Path]]:
    """Device, runtime and file of every predictor there is: the user's first, then the shipped ones not among them."""
    found: dict[tuple[str, str], Path] = {}
    for place in [Path(directory)] if directory is not None else [user_directory(), SHIPPED]:
        for path in sorted(place.glob("*.npz")):
            device, _, runtime = path.stem.rpartition(".")
            found.setdefault((device, runtime), path)
    return [(device, runtime, path) for (device, runtime), path in found.items()]


def summary(path: Path) -> dict[str, Any]:
    """What `nas latency devices` shows of a predictor file: device, runtime, accuracy, provenance, number of rows."""
    _, meta = read_stored(path)
    names = (
        "device",
        "runtime",
        "threads",
        "batch",
        "half_width",
        "half_width_outside",
        "accuracy",
        "provenance",
        "num_units",
        "num_networks",
    )
    return {name: meta.get(name) for name in names} | {"estimate": bool(meta.get("estimate", False)), "file": path.name}


def plain_digest(plain: Any) -> str:
    """Digest of a space as it was written; equal texts, equal digests, whatever their layout."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def categorical(settings: Columns, names: Sequence[str]) -> np.ndarray:
    """(units, names): the settings that the composition corrects for; widths in units of 64 channels."""
    return settings.select(names) / np.array([1.0 if "=" in name else 64.0 for name in names])


def _input(io: IOSpec) -> str:
    """An input in words."""
    size, reads = "x".join(map(str, io.size)), "tokens" if io.tokens else "features"
    return f"{io.kind} {size} of {io.in_features} {reads}, {io.num_outputs} outputs ({io.head})"


def _presence(stored: np.ndarray) -> np.ndarray:
    """See `Composition`; format 3 had the operators alone."""
    return np.diag(stored) if stored.ndim == 1 else stored
