"""The latency predictor as it is used: load it, ask it. Needs NumPy only; fitting is in `fit.py`.

A predictor file is `<device>.<runtime>.npz`: plain arrays and one JSON text, with a digest of both; never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixnas.predictors.latency.gpus import GPU, GPUS
from mixnas.predictors.latency.lookup import SpaceTable, signature
from mixnas.predictors.latency.model import Composition, UnitModel
from mixnas.predictors.latency.trees import Trees
from mixnas.predictors.measuring.table import tagged
from mixnas.predictors.units import Key, describe, io_fields, key_from_plain, key_to_plain, walk
from mixnas.search_space.architecture import Architecture, Block, Op
from mixnas.search_space.errors import ConfigError, IntegrityError, nearest
from mixnas.search_space.files import atomic_create
from mixnas.search_space.grammar import BLOCK_AXES
from mixnas.search_space.registry import Context
from mixnas.search_space.space import SearchSpace

FORMAT = 2  # 1 had another sentinel
SHIPPED = Path(__file__).parents[1] / "tables"
OUTSIDE_FACTOR = 3.0
"""How much wider (on a logarithmic scale) the interval of a network is that holds a unit outside the measured range."""


def user_directory() -> Path:
    """Where profiles of this machine are kept: `$MIXNAS_TABLES`, or mixnas/tables in the user's cache directory."""
    given = os.environ.get("MIXNAS_TABLES")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixnas" / "tables"


@dataclass(frozen=True, slots=True)
class UnitLatency:
    """One line of the breakdown: a unit's place and role, and its share of the network's latency."""

    name: str
    role: str
    latency_ms: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted latency.

    Attributes:
        latency_ms: Of the whole network.
        low_ms: Lower end of the interval (90%, calibrated on networks that the fit had not seen).
        high_ms: Upper end.
        units: The breakdown; sums to `latency_ms`.
        outside: What lies outside the measured range, in words; empty when nothing does.
        device: The device.
        runtime: "eager", "compiled", "onnxruntime" or "graph".
        estimate: True when the device was never measured.
    """

    latency_ms: float
    low_ms: float
    high_ms: float
    units: tuple[UnitLatency, ...]
    outside: tuple[str, ...]
    device: str
    runtime: str
    estimate: bool = False


@dataclass(frozen=True)
class Profiled:
    """What a predictor knows of the units of the spaces that it was profiled for.

    Attributes:
        keys: The units.
        alone_ms: (units,) by themselves; NaN where a unit cannot be built.
        in_network_ms: (units,) in a network: what is added up.
        measured: (units,) whether the unit itself was measured.
    """

    keys: list[Key]
    alone_ms: np.ndarray
    in_network_ms: np.ndarray
    measured: np.ndarray


class LatencyPredictor:
    """Predicts latency on one device through one runtime."""

    def __init__(
        self,
        meta: dict[str, Any],
        model: UnitModel,
        composition: Composition,
        profiled: Profiled,
        spaces: Sequence[SpaceTable],
    ) -> None:
        self.meta, self.model, self.composition, self.profiled = meta, model, composition, profiled
        self.spaces = list(spaces)
        self._bit = {name: 1 << i for i, name in enumerate(meta["operators"])}
        self._masks = [self._mask_of(key) for key in profiled.keys]
        self._presence: dict[int, float] = {0: 0.0}
        for space in self.spaces:
            space.bind(profiled.in_network_ms, self._masks, composition.presence_ms)
        self._in_network: list[float] = profiled.in_network_ms.tolist()
        self._rows: dict[Key, int] | None = None
        self._sizes: dict[tuple[str, Op, Context], tuple[int, ...]] = {}
        self._extra: dict[Key, tuple[float, tuple[str, ...]]] = {}

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

    def _mask_of(self, key: Key) -> int:
        """The operators of a unit as bits."""
        if not isinstance(key.op, Block):
            return 0
        mask = 0
        for axis in BLOCK_AXES:
            mask |= self._bit.get(f"{axis}={getattr(key.op, axis).name}", 0)
        return mask

    def _presence_ms(self, mask: int) -> float:
        """What the operators of a mask add to a network, once."""
        found = self._presence.get(mask)
        if found is None:
            values = self.composition.presence_ms
            found = self._presence[mask] = float(sum(v for i, v in enumerate(values) if mask >> i & 1))
        return found

    # -- asking -------------------------------------------------------------------------------------------------------

    def _size_after(self, role: str, op: Op, before: Context) -> tuple[int, ...]:
        size = self._sizes.get((role, op, before))
        if size is None:
            from mixnas.predictors.units import registry_size_after

            size = self._sizes[role, op, before] = registry_size_after(role, op, before)
        return size

    def _row_of(self) -> dict[Key, int]:
        if self._rows is None:
            self._rows = {key: i for i, key in enumerate(self.profiled.keys)}
            for key in self.profiled.keys:
                if isinstance(key.op, Op):
                    self._sizes[key.role, key.op, key.before] = key.after.size
        return self._rows

    def knows(self, architecture: Architecture, io: Any = None) -> bool:
        """Whether every unit of the architecture was among those that the predictor was profiled for."""
        rows = self._row_of()
        return all(key in rows for _, key in walk(architecture, self._io(io), self._size_after))

    def _io(self, io: Any) -> Mapping[str, Any]:
        if io is None:
            if not self.spaces:
                raise ConfigError(f"{self.device}: the predictor knows no task's input; give `io`.")
            return self.spaces[0].io
        return io if isinstance(io, Mapping) else io_fields(io)

    def predict(self, architecture: Architecture, io: Any = None) -> Prediction:
        """Latency of one architecture.

        Args:
            architecture: Which.
            io: The task's `IOSpec`; that of the first profiled space if not given.

        Returns:
            The prediction with its interval and breakdown. A unit that was not profiled is counted and predicted by the
            model (this imports torch the first time); one outside the measured range is reported, the interval widened.
        """
        rows = self._row_of()
        units: list[UnitLatency] = []
        outside: list[str] = []
        total = 0.0
        seen = 0
        for name, key in walk(architecture, self._io(io), self._size_after):
            row = rows.get(key)
            if row is None:
                ms, texts = self._predict_unknown(key)
                outside += [f"{name}: {text}" for text in texts]
                mask = self._mask_of(key)
            else:
                ms, mask = self._in_network[row], self._masks[row]
            ms += self._presence_ms(mask & ~seen)  # the first unit with an operator carries what its presence costs
            seen |= mask
            units.append(UnitLatency(name, key.role, ms))
            total += ms
        half = self.half_width * (OUTSIDE_FACTOR if outside else 1.0)
        spread = math.exp(half)
        return Prediction(
            total,
            total / spread,
            total * spread,
            tuple(units),
            tuple(outside),
            self.device,
            self.runtime,
            self.estimate,
        )

    def _predict_unknown(self, key: Key) -> tuple[float, tuple[str, ...]]:
        found = self._extra.get(key)
        if found is None:
            from mixnas.predictors.latency.features import work_of

            settings = describe(key)
            gpu = GPU(**self.meta["gpu"]) if self.meta.get("gpu") else None
            alone = self.model.predict([work_of(key, int(self.meta["batch"]), gpu=gpu)], [settings])
            ms = float(self.composition.apply(alone, categorical([settings], self.meta["categories"]))[0])
            found = self._extra[key] = ms, tuple(self.model.outside(settings))
        return found

    def unit_ms(self, key: Key) -> float:
        """What one unit takes in a network; NaN where it cannot be built."""
        row = self._row_of().get(key)
        return self._in_network[row] if row is not None else self._predict_unknown(key)[0]

    def table_of(self, space: SearchSpace, io: Any = None) -> SpaceTable:
        """The look-up tables of a space; made now when the space was not profiled (this imports torch)."""
        fields = io_fields(io) if io is not None and not isinstance(io, Mapping) else io
        for table in self.spaces:
            same_input = fields is None or table.io == dict(fields)
            if same_input and (space is table.space or signature(space, table.io) == table.signature):
                return table
        from mixnas.predictors.latency.lookup import build_parts

        fields = self._io(io)
        parts, keys = build_parts(space, lambda architecture: walk(architecture, fields, self._size_after))
        ms = np.array([self.unit_ms(key) for key in keys])
        table = SpaceTable(space, fields, parts)
        table.bind(ms, [self._mask_of(key) for key in keys], self.composition.presence_ms)
        self.spaces.append(table)
        return table

    def predict_many(self, encoded: np.ndarray, space: SearchSpace, io: Any = None) -> np.ndarray:
        """Latency of encoded architectures.

        Args:
            encoded: Integer matrix (rows, variables) as `space.sample_many` or `space.encode_many` gives.
            space: The space that they are encoded in.
            io: The task's `IOSpec`; that of the profiled space if not given.

        Returns:
            (rows,) milliseconds. The interval of each is x exp(+-`half_width`).
        """
        return self.table_of(space, io).predict_many(encoded)

    def stored_space(self, plain: Any) -> SpaceTable | None:
        """The profiled space that was written as `plain` (what stands under `space:`), without torch; or None."""
        wanted = plain_digest(plain)
        for table, stored in zip(self.spaces, self.meta["spaces"], strict=False):
            if wanted in stored["written_as"]:
                return table
        return None

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> Path:
        """Write `<device>.<runtime>.npz`, atomically; returns the path. See `table.tagged` for batches.

        Raises:
            ConfigError: It is an estimate: files are of measured devices only.
        """
        if self.estimate:
            raise ConfigError(f"{self.device}: an estimate is not kept among the measured devices.")
        model, trees = self.model, self.model.trees
        stored = self.spaces[: len(self.meta["spaces"])]
        meta = {
            **self.meta,
            "format": FORMAT,
            "keys": [key_to_plain(key) for key in self.profiled.keys],
            "work_names": list(model.work_names),
            "setting_names": list(model.setting_names),
            "spread": model.spread,
            "compositions": [{"scale": c.scale, "constant_ms": c.constant_ms} for c in self.composition.chain()],
            "spaces": [
                {**table.to_plain(), "written_as": entry["written_as"]}
                for table, entry in zip(stored, self.meta["spaces"], strict=True)
            ],
        }
        arrays = {
            "coefficients": model.coefficients,
            "low": model.low,
            "high": model.high,
            **trees.to_arrays("trees"),
            "alone_ms": self.profiled.alone_ms,
            "in_network_ms": self.profiled.in_network_ms,
            "measured": self.profiled.measured,
        }
        for c, composition in enumerate(self.composition.chain()):
            arrays[f"composition{c}.weights"] = composition.weights
            arrays[f"composition{c}.presence_ms"] = composition.presence_ms
        for s, table in enumerate(stored):
            arrays |= table.to_arrays(f"space{s}")
        arrays["meta"] = np.frombuffer(json.dumps(meta, allow_nan=False).encode(), dtype=np.uint8)
        arrays["digest"] = np.frombuffer(_digest(arrays), dtype=np.uint8)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

        path = Path(directory) / f"{self.device}.{self.tag}.npz"
        atomic_create(path, write)
        return path

    @classmethod
    def open(cls, path: str | Path) -> LatencyPredictor:
        """Read a predictor file.

        Raises:
            IntegrityError: It is damaged, truncated or something else.
        """
        path = Path(path)
        try:
            arrays, meta = _read(path)
            trees = Trees.from_arrays(arrays, "trees")
            model = UnitModel(
                tuple(meta.pop("work_names")), arrays["coefficients"], tuple(meta.pop("setting_names")), trees,
                float(meta.pop("spread")), arrays["low"], arrays["high"],
            )  # fmt: skip
            composition: Composition | None = None
            for c, numbers in enumerate(meta.pop("compositions")):
                composition = Composition(
                    numbers["scale"],
                    arrays[f"composition{c}.weights"],
                    numbers["constant_ms"],
                    arrays[f"composition{c}.presence_ms"],
                    composition,
                )
            assert composition is not None
            keys = [key_from_plain(plain) for plain in meta.pop("keys")]
            profiled = Profiled(keys, arrays["alone_ms"], arrays["in_network_ms"], arrays["measured"])
            spaces = [SpaceTable.restore(plain, arrays, f"space{s}") for s, plain in enumerate(meta["spaces"])]
            return cls(meta, model, composition, profiled, spaces)
        except IntegrityError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError) as error:
            raise _damaged(path, error) from error

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
            f"no measurements of device {device!r} through {runtime!r}.{nearest(device, [d for d, _, _ in there])} "
            f"There are: {', '.join(names) or 'none'}. Measure this machine with `nas latency profile"
            f"{'' if runtime == 'eager' else f' --runtime {runtime}'}`"
            f"{', or have it estimated from its data sheet with `--estimate`' if device in GPUS else ''}."
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
    _, meta = _read(path)
    names = (
        "device",
        "runtime",
        "threads",
        "batch",
        "half_width",
        "accuracy",
        "provenance",
        "num_units",
        "num_networks",
    )
    return {name: meta[name] for name in names} | {"estimate": bool(meta.get("estimate", False)), "file": path.name}


def plain_digest(plain: Any) -> str:
    """Digest of a space as it was written; equal texts, equal digests, whatever their layout."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:16]


def categorical(settings: Sequence[Mapping[str, float]], names: Sequence[str]) -> np.ndarray:
    """(units, names): the settings that the composition corrects for; widths in units of 64 channels."""
    from mixnas.predictors.latency.model import matrix

    result = matrix(settings, names)
    for i, name in enumerate(names):
        if "=" not in name:
            result[:, i] /= 64
    return result


def _digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    total = hashlib.sha256()
    for name in sorted(arrays):
        if name != "digest":
            array = np.ascontiguousarray(arrays[name])
            total.update(f"{name} {array.dtype.str} {array.shape}".encode())
            total.update(array.tobytes())
    return total.digest()


def _damaged(path: Path, reason: object) -> IntegrityError:
    return IntegrityError(
        f"{path}: damaged, truncated or not a latency predictor ({reason}). Delete it and profile again with "
        "`nas latency profile`."
    )


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise _damaged(path, "not an archive")
            arrays = {name: file[name] for name in file.files}
    except IntegrityError:
        raise
    except Exception as error:  # zlib, zipfile and NumPy each have errors of their own for a damaged file
        raise _damaged(path, error) from error
    if "digest" not in arrays or "meta" not in arrays or arrays["digest"].tobytes() != _digest(arrays):
        raise _damaged(path, "its digest does not fit")
    meta = json.loads(arrays["meta"].tobytes())
    if meta.get("format") != FORMAT:
        raise _damaged(path, f"format {meta.get('format')}, this version reads {FORMAT}")
    return arrays, meta
