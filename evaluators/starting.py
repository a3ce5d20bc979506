"""Beginning with the weights of a network that was trained before: the option `init` of every task.

Unit by unit: what the earlier network has at the same place with the same operators, and no larger, is taken; the rest
begins as it always does. Only tensors and their names are read: neither the earlier task nor an operator of its own is
needed, and nothing of the run is executed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixnas.search_space.errors import ConfigError, IntegrityError, listed, shown, visible
from mixnas.search_space.files import parse_json, read_bytes
from mixnas.search_space.formats.safetensors import FORMAT, load_tensors
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet, slice_of
from mixnas.search_space.units import IOSpec, is_unit

_Begins = TypeVar("_Begins", Network, Supernet)

OPTION = "init"
_RUNS = "runs"
_FILE = "model.safetensors"  # of an export
_TOLD = 8  # units that are left out, in a line


@dataclass(frozen=True, slots=True)
class Taken:
    """What a network began with.

    Attributes:
        whole: Units whose tensors all come from the earlier network.
        left: Why each other unit of either begins afresh, by its name.
    """

    whole: tuple[str, ...]
    left: Mapping[str, str]

    def __str__(self) -> str:
        text = f"{len(self.whole)} units taken ({listed(self.whole) or 'none'})"
        reasons = "; ".join(f"{name}: {why}" for name, why in list(self.left.items())[:_TOLD])
        reasons += "; and others" if len(self.left) > _TOLD else ""
        return f"{text}; {len(self.left)} not ({reasons})" if self.left else text


class Start:
    """The weights of an earlier network.

    Args:
        given: A run (its name below `runs/`, or its path), of which the most accurate network of the front is taken;
            the folder of an export with a `model.safetensors`; or such a file.
        where: For messages.

    Raises:
        ConfigError: There is no such run, export or file, or it has no trained network.
        IntegrityError: A file is damaged, or holds a weight that is not finite.

    Attributes:
        taken: What the last network or super-network took.
    """

    def __init__(self, given: Any, where: str) -> None:
        if not isinstance(given, str) or not given:
            raise ConfigError(f"{where}: {shown(given)} is no run. Give a run, or the folder of an export.")
        self.given, self.taken = given, Taken((), {})
        try:
            file = _network_of(given, where)
        except OSError as error:  # a name that no file can have, a folder that may not be entered
            reason = error.strerror or type(error).__name__
            raise ConfigError(f"{where}: {visible(given)[:200]}: {reason}. Give a run, or a path.") from error
        tensors, metadata = load_tensors(file, FORMAT)
        self._units = by_unit(tensors)
        if not any(tensor.is_floating_point() for tensor in tensors.values()):
            raise ConfigError(f"{where}: {visible(str(file))} holds no weights that are trained. Give another network.")
        _check_finite(file, self._units)
        if metadata.get("folded", "false") not in ("true", "false") or "architecture" not in metadata:
            problem = "names no architecture" if "architecture" not in metadata else "does not say what is folded"
            raise IntegrityError(f"{visible(str(file))}: its metadata {problem}; the file is damaged. Write it again.")
        self._deployed = metadata.get("folded") == "true"
        self.network = hashlib.sha256(metadata["architecture"].encode()).hexdigest()[:12]
        self.digest = hashlib.sha256(read_bytes(file)).hexdigest()
        self.file = file.name

    def record(self) -> dict[str, Any]:
        """What a run writes down of it, shapes included: what a network of the run took follows from them."""
        shapes = {
            unit: {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}
            for unit, tensors in self._units.items()
        }
        return {"from": Path(self.given).name, "file": self.file, "sha256": self.digest, "units": shapes}

    def has_weights(self, unit: str) -> bool:
        """Whether a unit of the earlier network has more than vectors and numbers: a matrix, a kernel."""
        return any(tensor.ndim > 1 for tensor in self._units.get(unit, {}).values())

    def begin(self, network: Network | Supernet) -> Taken:
        """Put what fits into a network, in place, or into the store of a super-network; `taken` says what.

        Of a super-network a unit is taken into the part that networks of its size are views of.
        """
        of_store = isinstance(network, Supernet)
        own = by_unit(network.state_dict())
        rules: Callable[[str], tuple[str, ...]] = network.rule_of if isinstance(network, Supernet) else lambda _: ()
        whole, left = [], {}
        for unit, tensors in self._units.items():
            if unit not in own:
                left[unit] = "no such unit"
                continue
            shapes = {name: tuple(tensor.shape) for name, tensor in own[unit].items()}
            if why := why_not({n: tuple(t.shape) for n, t in tensors.items()}, shapes, smaller=of_store):
                left[unit] = why + (" (its batch norms are folded)" if self._deployed else "")
                continue
            if wrong := [name for name in tensors if tensors[name].dtype != own[unit][name].dtype]:
                left[unit] = f"{wrong[0]} is stored as {str(tensors[wrong[0]].dtype).removeprefix('torch.')}"
                continue
            with torch.no_grad():
                for name, tensor in tensors.items():
                    _place(own[unit][name], tensor, rules(f"{unit}.{name}"))
            whole.append(unit)
        left |= {unit: "the earlier network has none" for unit in own if unit not in self._units}
        self.taken = Taken(tuple(whole), left)
        return self.taken


def check_fits(start: Start, space: SearchSpace, io: IOSpec) -> Taken:
    """What networks of a space can take, refused where it comes to nothing.

    Args:
        start: With what they begin.
        space, io: Of the networks.

    Returns:
        What a super-network of the space takes; one network takes what it has of it.

    Raises:
        ConfigError: Nothing fits, or nothing but the head and vectors of others, as those of norms.
    """
    taken = start.begin(Supernet(space, io, torch.Generator().manual_seed(0)))
    if not any(unit != "head" and start.has_weights(unit) for unit in taken.whole):
        raise ConfigError(
            f"task.init: nothing of {visible(start.given)[:200]} fits into networks of this space but its head and "
            f"norms, if those: {taken}. Give a network for such inputs, search a space that holds its operators, or "
            "leave init out."
        )
    return taken


def begun(network: _Begins, task: Any) -> _Begins:
    """A network, or a super-network, with what the task's earlier network has for it; as it is where there is none."""
    start: Start | None = getattr(task, "start", None)
    if start is not None:
        start.begin(network)
    return network


def by_unit(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of a network by unit, and by their names below it."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        unit = next((u for u in (".".join(parts[:n]) for n in range(1, len(parts))) if is_unit(u)), "")
        found.setdefault(unit, {})[name.removeprefix(f"{unit}.")] = tensor
    return found


def why_not(earlier: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]], *, smaller: bool) -> str:
    """Why the tensors of an earlier unit do not fit into one, in words; empty where they do.

    Args:
        earlier, own: Shapes by name below the unit.
        smaller: Whether they may be a part: of a store, which has tensors of other operators too.
    """
    if missing := sorted(set(earlier) - set(own)):
        return f"it has no {missing[0]}"
    if not smaller and (more := sorted(set(own) - set(earlier))):
        return f"the earlier one has no {more[0]}"
    for name, shape in earlier.items():
        fits = len(shape) == len(own[name]) and all(a <= b for a, b in zip(shape, own[name], strict=True))
        if not fits or (shape != own[name] and not smaller):
            return f"{name} has the shape {own[name]}, and was {shape}"
    return ""


def _check_finite(file: Path, units: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse weights that are NaN or infinite: whatever begins with them stays so."""
    for unit, tensors in units.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise IntegrityError(
                    f"{visible(str(file))}: {visible(name)[:100]} of {visible(unit)[:100] or 'no unit'} is NaN or "
                    "infinite. Give a network whose training did not diverge."
                )


def _place(own: Tensor, tensor: Tensor, rule: tuple[str, ...]) -> None:
    (slice_of(own, tuple(tensor.shape), rule) if rule else own).copy_(tensor)


def _network_of(given: str, where: str) -> Path:
    """The file of a trained network."""
    place = Path(given)
    if place.is_file() and place.suffix == ".safetensors":
        return place
    for folder in (place, Path(_RUNS) / given):  # a folder of data may have the run's name
        if (folder / "pareto.json").is_file():
            return _best_of(folder, where)
        if (folder / _FILE).is_file():
            return folder / _FILE
    raise ConfigError(
        f"{where}: {visible(given)[:200]} is no run that has ended, no export with a {_FILE}, and no such file, here "
        f"or below {_RUNS}/. Give the name of a run below {_RUNS}/, or a path: of a run below another --runs too."
    )


def _best_of(run: Path, where: str) -> Path:
    front = parse_json(read_bytes(run / "pareto.json"), str(run / "pareto.json"))
    try:
        metric, members = front["metric"], front["front"]
        sign = 1 if front["objectives"].get(metric, "max") == "max" else -1
        ranked = sorted(members, key=lambda m: sign * float(m["metrics"][metric]), reverse=True)
        ids = [str(member["id"]) for member in ranked]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{visible(str(run))}: pareto.json is damaged: {error!r}.") from error
    for one in ids:
        file = run / "networks" / f"{one}.safetensors"
        if re.fullmatch(r"[0-9a-f]+", one) and file.is_file() and not file.is_symlink():
            return file
    name = visible(str(run))
    raise ConfigError(f"{where}: run {name} has no trained network on its front. Let it end: nas resume {name}")
