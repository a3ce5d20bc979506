"""What a format is: a network as a file, written, loaded in the file's own way, and compared with the network.

One file of this folder for each format, called as the format is, with "_" for "-": so the names are known without
importing anything. `get` imports the one that is asked for. `TOOLS` are the files that are no format.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mixnas.search_space.errors import ConfigError, IntegrityError, NasError, counted, nearest
from mixnas.search_space.extensions import HINT, import_extensions

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from mixnas.search_space.formats.integers import Integers
    from mixnas.search_space.network import Network

TOOLS = ("format", "apart", "blame", "checks", "integers", "marks", "program", "source", "widening")

Answer = Callable[["np.ndarray"], "np.ndarray"]
"""A loaded file: a batch of inputs to outputs, both arrays."""


class Format(Protocol):
    """A format; registered by `register`.

    It may also have `unit_outputs(path, batch)`, what each unit answers in a file as (name, array) in the order in
    which they run, to say where a wrong file goes wrong; `stored(path)`, the bytes of each tensor that a file has
    under its name in the network, so that one which was changed is found however little comes of it;
    `layer_values(path, batch)`, see `integers.compared`, where its runtime may round otherwise than torch;
    `call(path, batch, threads)`, a forward to be timed; `loads_with`, the packages that a file loads with, where they
    are not `packages`, or torch; and `runtime`, as a policy's `instead` takes it, where that is not "eager".

    Attributes:
        name: As `nas export --format` takes it.
        file_name: Of the file in an export's folder.
        beside: Names of files that are written with it, and without which it does not load.
        packages: Packages to install for writing and loading, beside those that mixnas itself needs.
        needs_mixnas: Whether loading takes this package.
    """

    name: str
    file_name: str
    beside: tuple[str, ...]
    packages: tuple[str, ...]
    needs_mixnas: bool

    def why_not(self, network: Network) -> str:
        """Why a file of this format can't hold a network, naming the part, in words; empty where it can."""

    def write(self, network: Network, path: Path, extra: Mapping[str, Any]) -> None:
        """Write a network as it stands, atomically.

        Args:
            network: In evaluation mode, on the CPU; deployed, unless it is to be trained on.
            path: Where to.
            extra: Plain data to keep in the file.

        Raises:
            NasError: The network can't be written so; the message names the part.
        """

    def weight_bytes(self, path: Path) -> int:
        """Bytes of the weights in a file."""

    @property
    def load(self) -> Callable[[str | Path], Answer]:
        """A function that needs nothing around it: `load.py` of an export holds its text. See `load`."""


_Class = TypeVar("_Class", bound=type[Format])
_formats: dict[str, Format] = {}


def register(cls: _Class) -> _Class:
    """Class decorator that registers a format.

    Raises:
        NasError: The name is taken, or the name of the file.
    """
    taken = _formats.get(cls.name)
    if taken is not None and type(taken) is not cls:
        here, there = (f"{c.__module__}.{c.__qualname__}" for c in (cls, type(taken)))
        raise NasError(f"format {cls.name!r} is registered twice: by {there} and by {here}. Rename one.")
    for other in _formats.values():
        if other.name != cls.name and other.file_name == cls.file_name:
            raise NasError(
                f"format {cls.name!r} writes {cls.file_name}, and so does {other.name!r}: in one export they would "
                "overwrite each other. Choose another file_name."
            )
    _formats[cls.name] = cls()
    return cls


def _modules() -> dict[str, str]:
    """Module of each format of this folder, by the format's name."""
    package = __name__.rpartition(".")[0]
    found = pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
    return {
        info.name.rpartition(".")[2].replace("_", "-"): info.name
        for info in found
        if info.name.rpartition(".")[2] not in TOOLS
    }


def names() -> list[str]:
    """Sorted names of all formats; imports none of the package's."""
    import_extensions()
    return sorted(_modules().keys() | _formats.keys())


def get(name: str) -> Format:
    """Look a format up.

    Raises:
        ConfigError: No such format; the message names the nearest and all there are.
    """
    if name not in _formats:
        import_extensions()
    if name not in _formats:
        module = _modules().get(name)
        if module is None:
            known = names()
            raise ConfigError(f"no format is called {name!r}.{nearest(name, known)} Allowed: {', '.join(known)}.{HINT}")
        importlib.import_module(module)
    return _formats[name]


_ONNX = {"onnx", "onnxscript", "onnxruntime"}
"""What the extra `onnx` installs, of the versions that are known to work."""


def require(file_format: Format) -> None:
    """Raise `ConfigError` that says what to install, where something that a format needs is missing."""
    if any(importlib.util.find_spec(package) is None for package in file_format.packages):
        extra = 'pip install ".[onnx]", in the folder of mixnas' if set(file_format.packages) <= _ONNX else ""
        advice = extra or f"pip install {' '.join(file_format.packages)}"
        raise ConfigError(f"format {file_format.name!r} is not available: {advice}")


def load(file_format: Format, path: str | Path) -> Answer:
    """Load a file in its own way.

    Raises:
        ConfigError: No such file, or a package is missing.
        IntegrityError: It can't be loaded: damaged, or of another format.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file.")
    require(file_format)
    try:
        return file_format.load(path)
    except NasError:
        raise
    except Exception as error:
        raise IntegrityError(
            f"{path}: damaged, or no file of format {file_format.name!r}: {first_line(error)}"
        ) from error


def loads_with(file_format: Format) -> tuple[str, ...]:
    """Packages that a file loads with."""
    found: tuple[str, ...] = getattr(file_format, "loads_with", file_format.packages or ("torch",))
    return found


def call(file_format: Format, path: Path, batch: np.ndarray, threads: int) -> Callable[[], object]:
    """A forward of a file in its own runtime, to be timed.

    Args:
        file_format: Of the file.
        path: The file.
        batch: What it reads.
        threads: Threads inside an operator, where the runtime has a setting of its own.
    """
    own = getattr(file_format, "call", None)
    if own is not None:
        made: Callable[[], object] = own(path, batch, threads)
        return made
    answer = load(file_format, path)
    return lambda: answer(batch)


def first_line(error: BaseException) -> str:
    """What went wrong, on one line: other packages' messages run to pages."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a file's outputs were from the network's.

    Attributes:
        inputs: Number of inputs compared.
        difference: The largest difference of two outputs.
        allowed: How large it may be.
        scale: The largest output.
        identical: Whether all outputs are the same to the last bit.
        integers: What became of whole numbers, where the network multiplies some and not all is identical.
    """

    inputs: int
    difference: float
    allowed: float
    scale: float
    identical: bool
    integers: Integers | None = None


class NotIdentical(IntegrityError):  # noqa: N818 - the file is as good as its runtime
    """A file is no copy to the last whole number: its runtime rounds otherwise. The message says where, and why."""


_WRONG = "The file is wrong: do not use it."
_PASSED_ON = (
    "each unit by itself answers as the network's does, and what bfloat16 rounds otherwise in one moves whole numbers "
    "in those behind it"
)
_FLOAT32 = 1e-4
"""Another order of a sum changes the last digits."""


def tolerance(network: torch.nn.Module, *, floats_alone: bool = False) -> float:
    """Largest difference allowed between two ways of computing a network, as a share of its largest output.

    It follows from the coarsest type that is computed with; weights of few bits that are widened are float32.

    Args:
        network: Deployed.
        floats_alone: Of what is between products of whole numbers.
    """
    import torch

    from mixnas.search_space.operators.quantization.projected import Stored

    shares = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float8_e4m3fn: 2e-2}
    if not floats_alone:
        shares |= {torch.int8: 2e-2, torch.uint8: 2e-2}
    widened = {
        id(tensor)
        for layer in network.modules()
        if isinstance(layer, Stored) and not layer.policy.whole
        for tensor in layer.buffers(recurse=False)
        if tensor.dtype in (torch.int8, torch.uint8, torch.bfloat16)
    }
    tensors = [*network.parameters(), *network.buffers()]
    return max((shares.get(t.dtype, _FLOAT32) for t in tensors if id(t) not in widened), default=_FLOAT32)


_AS_ROUGH = 2.0
"""Two roundings of the same network, in other orders, are no farther apart in size than this."""


def as_rough(answer: Answer, network: Network, inputs: Tensor) -> float:
    """How far outputs of a file may differ from a network's, by what rounding does to it: to bfloat16, or to float32.

    A rounding is passed on by all that follows, so that `tolerance`, a share of the outputs, is too little for some
    networks. What decides then is how far torch's own outputs, of all inputs at once and of each by itself, are from
    those of the same weights in a finer type: float32 in bfloat16's place, float64 where all is float32.

    Returns:
        The difference that is allowed; 0 where the file is farther from the finer type than twice what torch is, where
        something computes in another type, or where an operator does not compute in float64.
    """
    import torch

    exact, given = copy.deepcopy(network), inputs
    rough = [layer for layer in exact.modules() if getattr(layer, "compute", None) == torch.bfloat16]
    for layer in rough:
        layer.float()
        layer.compute = torch.float32  # type: ignore[assignment]  # as its class says, which a module cannot
    if not rough:
        if tolerance(network) != _FLOAT32:
            return 0.0
        exact, given = exact.double(), inputs.double() if inputs.is_floating_point() else inputs
    distances = from_finer(answer, network, inputs, exact, given)
    if distances is None:
        return 0.0
    file, own = distances
    return file + own if file <= _AS_ROUGH * own else 0.0


def from_finer(
    answer: Answer, network: Network, inputs: Tensor, exact: Network, given: Tensor
) -> tuple[float, float] | None:
    """How far a file, and torch, are from a network's answers in a finer type: the farthest of each.

    Torch is asked for all inputs at once and for each by itself, which adds in other orders.

    Args:
        answer: The file.
        network: What it was written from.
        inputs: (n, ...).
        exact: The same network in the finer type.
        given: The same inputs as that reads them.

    Returns:
        None where an operator does not compute in that type.
    """
    import torch

    with torch.no_grad():
        try:
            precise = exact(given).double()
        except RuntimeError:  # types that do not go together
            return None
        torchs = [network(inputs), torch.cat([network(one) for one in inputs.split(1)])]
    found = torch.from_numpy(answer(inputs.numpy()))
    file, *own = ((one.double() - precise).abs().max().item() for one in (found, *torchs))
    return file, max(own)


def compare(
    answer: Answer, network: torch.nn.Module, inputs: Tensor, what: str | Path, stated: float | None = None
) -> Agreement:
    """Compare a loaded file's outputs with a network's, on all inputs at once and on the first by itself.

    What torch computes fastest on this machine may be another operation than a file can hold, with other last digits:
    the network is asked by those of a file too, and the file is compared with the nearer.

    Args:
        answer: The loaded file.
        network: What it was written from, in evaluation mode, on the CPU.
        inputs: (n, ...), at least two: a file with a fixed batch size shows.
        what: The file, for messages.
        stated: The largest difference that is allowed, where `tolerance` does not decide.

    Raises:
        IntegrityError: They differ by more than that; the message says by how much.
    """
    import torch

    from mixnas.kernels import dispatch

    worst = Agreement(len(inputs), 0.0, 0.0, 0.0, True)
    for batch in (inputs, inputs[:1]):
        with torch.no_grad():
            expected = network(batch)
        if not expected.isfinite().all():
            raise IntegrityError(
                f"{what}: cannot be compared: the network itself answers NaN or infinity, in eager mode, to some of "
                f"{counted(len(batch), 'input')}. Look at its weights, and at what it reads."
            )
        try:
            found = torch.from_numpy(answer(batch.numpy()))
        except Exception as error:
            raise IntegrityError(f"{what}: fails on {counted(len(batch), 'input')}: {first_line(error)}") from error
        if found.shape != expected.shape:
            shapes = tuple(found.shape), tuple(expected.shape)
            raise IntegrityError(
                f"{what}: answers {shapes[0]} to {counted(len(batch), 'input')}, and the network {shapes[1]}."
            )
        scale = expected.abs().max().item()
        allowed = tolerance(network) * (scale or 1.0) if stated is None else stated
        difference = (found.double() - expected.double()).abs().max().item()
        if difference > 0:
            with torch.no_grad(), dispatch.as_traced():
                difference = min(difference, (found.double() - network(batch).double()).abs().max().item())
        if not difference <= allowed:  # or it is NaN
            raise IntegrityError(
                f"{what}: its outputs differ from the network's by up to {difference:.3g}, where {allowed:.3g} is "
                f"allowed (the outputs reach {scale:.3g}; {counted(len(batch), 'input')}). {_WRONG}"
            )
        if difference >= worst.difference:
            worst = Agreement(len(inputs), difference, allowed, scale, difference == 0)
    return worst


def verify(
    file_format: Format,
    path: str | Path,
    network: Network,
    inputs: Tensor,
    answer: Answer | None = None,
    *,
    stated: float | None = None,
) -> Agreement:
    """`compare` a file with the network that it was written from; where it differs, say which unit is the first to.

    Weights have to be the network's to the last bit, also where what comes of another one is less than is allowed. A
    network that multiplies whole numbers has to have all of them in the file, to the last one, unless it is stated how
    far outputs may differ.

    Args:
        file_format: Of the file.
        path: The file.
        network: What it was written from, in evaluation mode, on the CPU.
        inputs: (n, ...), at least two.
        answer: The file, loaded elsewhere; loaded here if not given.
        stated: See `compare`.

    Raises:
        NotIdentical: A whole number is another one there, and nothing but the order of sums is why.
        IntegrityError: It can't be loaded, fails, or differs.
    """
    from mixnas.search_space.formats import blame, integers

    path = Path(path)
    try:
        found = compare(answer or load(file_format, path), network, inputs, path, stated)
    except IntegrityError as error:
        return _rough(error, file_format, path, network, inputs, answer, stated)
    if (other := blame.other_weight(file_format, path, network)) is not None:
        blamed = blame.first_divergence(file_format, path, network, inputs, other)
        raise IntegrityError(
            f"{path}: its outputs differ from the network's by up to {found.difference:.3g}, less than the "
            f"{found.allowed:.3g} that are allowed, but its weights are not the network's. {_WRONG} {blamed}"
        )
    if found.identical or not integers.whole_layers(network):
        return found
    whole = integers.compared(file_format, path, network, inputs)
    differs = f"outputs differ by up to {found.difference:.3g} (they reach {found.scale:.3g}; {found.inputs} inputs)"
    if stated is None and whole is not None and not whole.ties:
        alone = blame.first_divergence(file_format, path, network, inputs) == blame.NONE_ALONE
        rough = as_rough(answer or load(file_format, path), network, inputs) if alone else 0.0
        if whole.alike < whole.layers or not found.difference <= rough:
            raise IntegrityError(f"{path}: {differs}; {whole}. {_WRONG}")
        raise NotIdentical(f"not identical to the deployed network: {differs}; {_PASSED_ON}.")
    if stated is None and (whole is None or whole.why):
        why = str(whole) if whole is not None else "its whole numbers cannot be looked into"
        if whole is None and (first := blame.first_inexact(file_format, path, network, inputs)):
            why = f"{why}, but {first}"
        raise NotIdentical(f"not identical to the deployed network: {differs}; {why}.")
    if stated is None and found.difference > _FLOAT32 * (found.scale or 1.0):
        raise NotIdentical(f"not identical to the deployed network: {differs}, and yet {whole}.")
    return replace(found, integers=whole)


def _rough(
    error: IntegrityError,
    file_format: Format,
    path: Path,
    network: Network,
    inputs: Tensor,
    answer: Answer | None,
    stated: float | None,
) -> Agreement:
    """What a file is whose outputs differ by more than `tolerance`: as good as its types allow, or wrong.

    Raises:
        NotIdentical: Nothing but numbers that are rounded otherwise are why, in words.
        IntegrityError: The file is wrong; it names the first unit that differs.
    """
    from mixnas.search_space.formats import blame, integers

    other = blame.other_weight(file_format, path, network)
    differs = str(error).replace(f"{path}: ", "").replace(_WRONG, "").rstrip(" .")
    excusable = stated is None and other is None
    if excusable and (moved := _moved_alone(file_format, path, network, inputs)):
        raise NotIdentical(f"not identical to the deployed network: {differs}; {moved}.") from error
    blamed = blame.first_divergence(file_format, path, network, inputs, other)
    if excusable and (blamed == blame.NONE_ALONE or tolerance(network) == _FLOAT32):  # one unit may be as rough
        found = _excused(answer or load(file_format, path), network, inputs, path)
        if found is not None and integers.whole_layers(network):
            raise NotIdentical(f"not identical to the deployed network: {differs}; {_PASSED_ON}.") from error
        if found is not None:
            return found
    raise IntegrityError(f"{error} {blamed}".rstrip()) from error


def _excused(answer: Answer, network: Network, inputs: Tensor, path: Path) -> Agreement | None:
    """What a file is that differs by no more than `as_rough` allows; None where it differs by more, or fails."""
    try:
        found = compare(answer, network, inputs, path, math.inf)
    except IntegrityError:
        return None
    allowed = as_rough(answer, network, inputs)
    return replace(found, allowed=allowed) if found.difference <= allowed else None


def _moved_alone(file_format: Format, path: Path, network: Network, inputs: Tensor) -> str:
    """That whole numbers which are rounded the other way are all that differs, in words; empty where it is not.

    Behind one that moves outputs may differ by more than is allowed: where floats are bfloat16 before it, say.
    """
    from mixnas.search_space.formats import integers

    if not integers.whole_layers(network):
        return ""
    try:
        whole = integers.compared(file_format, path, network, inputs)
    except Exception:  # the file is wrong already: it may be in any way
        return ""
    return str(whole) if whole is not None and whole.ties and whole.moved else ""
