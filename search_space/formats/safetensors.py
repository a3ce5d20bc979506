"""A trained network in one file: safetensors, with its architecture and interface in the file's metadata. No pickle.

Version 2 of the format says whether the network is stored as deployed, its head is an operator, and its digest is that
of the metadata too; there each tensor has a check of its own (`checks`), or none where it was written before there were
any. Files of version 1 are read, and those that say nothing of batch norms have none folded.
"""

from __future__ import annotations

import hashlib
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError, shown, visible
from mixnas.search_space.files import atomic_write
from mixnas.search_space.formats import checks
from mixnas.search_space.formats.blame import raw
from mixnas.search_space.formats.checks import CHECKS
from mixnas.search_space.formats.format import Answer, register
from mixnas.search_space.network import IOSpec, Network
from mixnas.search_space.units import is_unit

if TYPE_CHECKING:
    import numpy as np

FORMAT = "mixnas-network-2"
_FORMER = "mixnas-network-1"
_DIGEST, _FORMER_DIGEST = "digest", "sha256"  # the former is of the tensors alone


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    total = hashlib.sha256()
    if metadata:
        total.update(json.dumps(dict(metadata), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(raw(tensor))
    return total.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata atomically, with a digest of both that `load_tensors` checks, and of each tensor."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    checked = {**metadata, CHECKS: checks.written({name: raw(tensor) for name, tensor in plain.items()})}
    stamped = {**checked, _DIGEST: _digest(plain, checked)}
    atomic_write(path, _in_order(save(plain, metadata=stamped)))


def _in_order(content: bytes) -> bytes:
    """The same file with its header sorted: the library writes metadata in another order each time."""
    length = int.from_bytes(content[:8], "little")
    plain = json.loads(content[8 : 8 + length])
    header = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def load_tensors(path: str | Path, *format_names: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: tensors and metadata.

    Args:
        path: The file.
        format_names: What its metadata may say under "format", the present version first.

    Raises:
        ConfigError: No such file.
        IntegrityError: Damaged, truncated, or not of this format; the message names the tensors that were changed.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        reason = visible(str(error))[:120]
        raise IntegrityError(f"{path}: damaged or not a safetensors file: {reason}. Write it again.") from error
    if metadata.get("format") not in format_names:
        given = metadata.get("format", "nothing")
        raise IntegrityError(f"{path}: its format is {shown(given)}; this needs {format_names[0]!r}.")
    if _DIGEST in metadata:
        kept = metadata.pop(_DIGEST)
        found = _digest(tensors, metadata)
    else:
        kept = metadata.pop(_FORMER_DIGEST, "")
        found = _digest(tensors, {})
    if kept != found:
        where = checks.changed({name: raw(tensor) for name, tensor in tensors.items()}, metadata)
        raise IntegrityError(
            f"{path}: the content does not match its digest; the file is damaged: {where}. Write it again."
        )
    metadata.pop(CHECKS, None)
    return tensors, metadata


def save_network(path: str | Path, network: Network, extra: Mapping[str, Any] | None = None) -> None:
    """Write a network as it stands, deployed or to be trained on: weights, architecture, interface.

    Args:
        path: Where to; written atomically.
        network: What.
        extra: Plain data to keep beside it (metrics, the task's name), returned by `read_extra`.
    """
    metadata = {
        "format": FORMAT,
        "architecture": network.architecture.to_json(),
        "io": json.dumps(network.io.to_plain()),
        "deployed": json.dumps(network.deployed),
        **({"folded": json.dumps(True)} if network.folded else {}),
        "extra": json.dumps(dict(extra or {}), allow_nan=False),
    }
    save_tensors(path, network.state_dict(), metadata)


def load_network(path: str | Path) -> Network:
    """Read a network that `save_network` or `nas export` wrote; in evaluation mode, on the CPU.

    What an export holds is deployed (`Network.deployed`): to be run, not to be trained on.

    Raises:
        ConfigError: No such file, or an operator that is not registered here.
        IntegrityError: Damaged, or not such a file.

    Examples:
        After the example of `mixnas.export`:

        >>> import mixnas, pathlib
        >>> (file,) = pathlib.Path("exported").glob("*/model.safetensors")
        >>> network = mixnas.load_network(file)
        >>> network(network.io.example(1)).shape
        torch.Size([1, 10])
    """
    tensors, metadata = load_tensors(path, FORMAT, _FORMER)
    try:
        io = IOSpec.from_plain(json.loads(metadata["io"]))
        architecture = Architecture.from_json(metadata["architecture"], f"{path}: architecture")
        network = Network(architecture, io, generator=torch.Generator().manual_seed(0))
        if metadata["format"] == _FORMER:
            tensors = {_name_now(name, io): tensor for name, tensor in tensors.items()}
        elif json.loads(metadata["deployed"]):
            network.deploy(folded=json.loads(metadata.get("folded", "false")) is True)
        types = {name: tensor.dtype for name, tensor in network.state_dict().items()}
        wrong = [name for name, tensor in tensors.items() if types.get(name, tensor.dtype) != tensor.dtype]
        if wrong:  # loading would convert it silently
            raise TypeError(f"{wrong[0]} is stored as {tensors[wrong[0]].dtype}, not as {types[wrong[0]]}")
        network.load_state_dict(tensors)
    except ConfigError:
        raise
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        reason = visible(" ".join(str(error).split()))[:150]
        raise IntegrityError(
            f"{path}: weights, architecture and interface do not belong together: {reason}."
        ) from error
    return network.eval()


def _name_now(name: str, io: IOSpec) -> str:
    """Present name of a tensor of version 1, where a head was no operator."""
    former = "head.linear."
    return f"head.output.{io.head}.linear.{name.removeprefix(former)}" if name.startswith(former) else name


def read_extra(path: str | Path) -> dict[str, Any]:
    """The plain data that was saved beside a network."""
    _, metadata = load_tensors(path, FORMAT, _FORMER)
    try:
        return dict(json.loads(metadata.get("extra", "{}")))
    except (ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{path}: damaged: what was kept beside the network cannot be read.") from error


def load_safetensors(path: str | Path) -> Answer:
    """A file of `nas export --format safetensors` with model.py beside it. Needs torch and safetensors alone."""
    import sys
    import types
    from pathlib import Path

    import torch

    code = Path(path).with_name("model.py")
    model = sys.modules["model"] = types.ModuleType("model")
    model.__file__ = str(code)
    exec(compile(code.read_text(encoding="utf-8"), code, "exec"), vars(model))
    network = vars(model)["load"](path)  # a torch module

    def answer(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(batch)).numpy()

    return answer


@register
class Safetensors:
    """Weights, architecture and interface, and beside them the network's code, plain PyTorch, in `model.py`.

    `load_network` of this package reads the weights without that code.
    """

    name = "safetensors"
    file_name = "model.safetensors"
    beside: tuple[str, ...] = ("model.py",)
    packages: tuple[str, ...] = ("safetensors",)
    loads_with = ("torch", "safetensors")
    needs_mixnas = False
    load = staticmethod(load_safetensors)

    def why_not(self, network: Network) -> str:
        """Not where the code of an operator cannot be taken, which shows when it is written."""
        return ""

    def write(self, network: Network, path: Path, extra: Mapping[str, Any]) -> None:
        """See `save_network` and `source.writing`."""
        from mixnas.search_space.formats.source.writing import source

        text = source(network, path.name)
        save_network(path, network, extra)
        atomic_write(path.with_name(self.beside[0]), text)

    def weight_bytes(self, path: Path) -> int:
        """Bytes of the tensors."""
        tensors, _ = load_tensors(path, FORMAT, _FORMER)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def stored(self, path: Path) -> dict[str, bytes]:
        """See `Format`."""
        from safetensors.torch import load_file

        return {name: raw(tensor) for name, tensor in load_file(path).items()}

    def unit_outputs(self, path: Path, batch: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """See `Format`."""
        network, found = _by_code_beside(path), []
        for name, module in network.named_modules():
            if is_unit(name):

                def told(_m: Any, _i: Any, output: Tensor, name: str = name) -> None:
                    found.append((name, output.detach().numpy()))

                module.register_forward_hook(told)
        with torch.no_grad():
            network(torch.from_numpy(batch))
        return found


def _by_code_beside(path: Path) -> nn.Module:
    code = path.with_name(Safetensors.beside[0])
    model = sys.modules["model"] = types.ModuleType("model")  # dataclasses look there
    model.__file__ = str(code)
    exec(compile(code.read_text(encoding="utf-8"), code, "exec"), vars(model))
    network: nn.Module = vars(model)["load"](path)
    return network
