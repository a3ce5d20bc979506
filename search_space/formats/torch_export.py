"""A network as a program: torch's own export (`.pt2`), which torch loads alone. Operators stand in their ATen form."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixnas.kernels import dispatch
from mixnas.search_space.errors import NasError
from mixnas.search_space.files import atomic_write
from mixnas.search_space.formats import marks
from mixnas.search_space.formats.blame import raw
from mixnas.search_space.formats.format import Answer, first_line, register
from mixnas.search_space.network import Network

if TYPE_CHECKING:
    import numpy as np

EXTRA_FILE = "mixnas.json"
"""Architecture, interface and `extra` inside the file, and `_ANSWERS`."""

_ANSWERS = "answers"
"""Which node of the graph makes what a unit answers: pairs, in the order in which units run, all but the head."""

_BUILT_IN = ("aten", "prim", "prims", "quantized", "onednn", "mkldnn")  # libraries of operations that torch brings


def exported(
    module: nn.Module, inputs: Tensor, *, dynamic_batch: bool, backend: str = "aten"
) -> torch.export.ExportedProgram:
    """Trace a module into a graph of torch's own operations.

    Args:
        module: In evaluation mode, on the inputs' device.
        inputs: What it reads; at least two where the batch is dynamic.
        dynamic_batch: Whether the graph takes any number of inputs, or just so many.
        backend: See `dispatch.backend`; with "triton" the graph has this package's operations too.
    """
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    with torch.no_grad(), dispatch.backend(backend):
        return torch.export.export(module, (inputs,), dynamic_shapes=shapes, strict=False)


def exported_network(
    network: Network, also: Sequence[str] = (), *, backend: str = "aten"
) -> torch.export.ExportedProgram:
    """`exported` of a whole network, for any batch size.

    Args:
        network: In evaluation mode, on the CPU.
        also: Operations that torch does not bring and that may stand in it all the same.
        backend: See `exported`.

    Raises:
        NasError: A part can't be traced, or is an operation that torch alone does not have; the message names it.
    """
    x = network.io.example(2, generator=torch.Generator().manual_seed(0))  # it is kept in the file
    try:
        program = exported(network, x, dynamic_batch=True, backend=backend)
    except Exception as error:  # torch has no class of its own for all that may go wrong
        blamed = culprit(network, x, lambda part, given: exported(part, given, dynamic_batch=True, backend=backend))
        raise NasError(f"{blamed} cannot be exported: {first_line(error)}") from error
    allowed = (*_BUILT_IN, *(["mixnas"] if backend == "triton" else []))
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.name() in also:
            continue
        if node.target.namespace not in allowed:
            raise NasError(f"the network cannot be exported: {node.target} is no operation that torch brings.")
    return program


_HOLDERS = ("norm", "mixer", "channel_mixer", "output")
"""Of a unit: each has one operator. A gate, which is given a mixer, can't be tried by itself."""


def culprit(network: Network, x: Tensor, attempt: Callable[[nn.Module, Tensor], object]) -> str:
    """The first operator for which something fails, by its path; its unit, where all parts of that do not.

    Args:
        network: In evaluation mode.
        x: What it reads.
        attempt: What fails, given a part of the network and what that reads.
    """

    def fails(part: nn.Module, given: Tensor) -> bool:
        try:
            attempt(part, given)
        except Exception:  # why is in the whole network's error already
            return True
        return False

    for name, unit in network.units():
        holders = {f"{name}.{holder}": getattr(unit, holder) for holder in _HOLDERS if hasattr(unit, holder)}
        read: dict[nn.Module, Tensor] = {}

        def came(holder: nn.Module, given: tuple[Tensor, ...], read: dict[nn.Module, Tensor] = read) -> None:
            read[holder] = given[0]

        hooks = [holder.register_forward_pre_hook(came) for holder in holders.values()]
        with torch.no_grad():
            answer = unit(x)
        for hook in hooks:
            hook.remove()
        if fails(unit, x):
            for path, holder in holders.items():
                if holder in read and fails(holder, read[holder]):
                    return ".".join([path, *dict(holder.named_children())]) if type(holder) is nn.Sequential else path
            return name
        x = answer
    return "the network as a whole"


def load_torch_export(path: str | Path) -> Answer:
    """A file of `nas export --format torch-export`: arrays to arrays. Needs torch alone."""
    import torch

    module = torch.export.load(path).module()

    def answer(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return module(torch.from_numpy(batch)).numpy()

    return answer


_last: dict[bytes, tuple[torch.export.ExportedProgram, dict[str, Any]]] = {}


def _read(path: Path) -> tuple[torch.export.ExportedProgram, dict[str, Any]]:
    """The program of a file, which is not to be changed, and what is said beside it.

    The last one is kept, by its content: reading one takes seconds, and a verification looks into it several times.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).digest()
    if digest not in _last:
        extra = {EXTRA_FILE: ""}
        program = torch.export.load(io.BytesIO(content), extra_files=extra)
        _last.clear()
        _last[digest] = program, json.loads(extra[EXTRA_FILE] or "{}")
    return _last[digest]


@register
class TorchExport:
    """An `ExportedProgram`, dynamic in the batch."""

    name = "torch-export"
    file_name = "model.pt2"
    beside: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    needs_mixnas = False
    backend = "aten"
    load = staticmethod(load_torch_export)

    def why_not(self, network: Network) -> str:
        """It can hold whatever torch can trace, which shows when it is written."""
        return ""

    def write(self, network: Network, path: Path, extra: Mapping[str, Any]) -> None:
        """See `exported_network`."""
        with marks.marking(network):
            program = exported_network(network, also=(marks.NAME,), backend=self.backend)
        answers = list(zip(marks.marked_units(network), marks.taken(program), strict=True))
        for node in program.graph.nodes:  # where this machine keeps its files is nobody's business
            node.meta.pop("stack_trace", None)
        content = io.BytesIO()
        about: dict[str, Any] = {
            "architecture": network.architecture.to_dict(),
            "io": network.io.to_plain(),
            "extra": dict(extra),
        }
        about[_ANSWERS] = answers
        torch.export.save(program, content, extra_files={EXTRA_FILE: json.dumps(about)})
        atomic_write(path, content.getvalue())

    def weight_bytes(self, path: Path) -> int:
        """Bytes of the parameters and persistent buffers."""
        program, _ = _read(path)
        return sum(tensor.numel() * tensor.element_size() for tensor in program.state_dict.values())

    def stored(self, path: Path) -> dict[str, bytes]:
        """See `Format`."""
        program, _ = _read(path)
        return {name: raw(tensor) for name, tensor in program.state_dict.items()}

    def unit_outputs(self, path: Path, batch: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """See `Format`."""
        program, about = _read(path)
        answers = about[_ANSWERS]
        recorder = _Recorder(program.module(), {node for _, node in answers})
        with torch.no_grad():
            output = recorder.run(torch.from_numpy(batch))
        return [*((unit, recorder.found[node].numpy()) for unit, node in answers), ("head", output.numpy())]


class _Recorder(torch.fx.Interpreter):
    """Runs a program, and keeps what some of its nodes make.

    Attributes:
        found: By the node's name.
    """

    def __init__(self, module: nn.Module, wanted: Collection[str]) -> None:
        super().__init__(module)
        self._wanted = wanted
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        """See `torch.fx.Interpreter`."""
        value = super().run_node(n)
        if n.name in self._wanted:
            self.found[n.name] = value
        return value
