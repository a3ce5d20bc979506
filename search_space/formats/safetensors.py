"""A trained network in one file: safetensors, with its architecture and interface in the file's metadata. No pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.files import atomic_create
from mixnas.search_space.network import IOSpec, Network

FORMAT = "mixnas-network-1"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors atomically, with a digest that `load_tensors` checks."""
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    stamped = {**metadata, "sha256": _digest(plain)}
    atomic_create(path, lambda temporary: save_file(plain, temporary, metadata=stamped))


def load_tensors(path: str | Path, format_name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what `save_tensors` wrote: tensors and metadata.

    Raises:
        ConfigError: No such file.
        IntegrityError: Damaged, truncated, or not of this format.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise IntegrityError(f"{path}: damaged or not a safetensors file: {error}. Write it again.") from error
    if metadata.get("format") != format_name:
        given = metadata.get("format", "nothing")
        raise IntegrityError(f"{path}: its format is {given!r}; this needs {format_name!r}.")
    if metadata.get("sha256") != _digest(tensors):
        raise IntegrityError(f"{path}: the weights do not match their digest; the file is damaged. Write it again.")
    return tensors, metadata


def save_network(path: str | Path, network: Network, extra: Mapping[str, Any] | None = None) -> None:
    """Write a network: weights, architecture, interface.

    Args:
        path: Where to; written atomically.
        network: What.
        extra: Plain data to keep beside it (metrics, the task's name), returned by `read_extra`.
    """
    metadata = {
        "format": FORMAT,
        "architecture": network.architecture.to_json(),
        "io": json.dumps(dataclasses.asdict(network.io)),
        "extra": json.dumps(dict(extra or {}), allow_nan=False),
    }
    save_tensors(path, network.state_dict(), metadata)


def load_network(path: str | Path) -> Network:
    """Read a network that `save_network` or `nas export` wrote; in evaluation mode, on the CPU.

    Raises:
        ConfigError: No such file.
        IntegrityError: Damaged, or not such a file.
    """
    tensors, metadata = load_tensors(path, FORMAT)
    try:
        io = json.loads(metadata["io"])
        io["size"] = tuple(io["size"])
        architecture = Architecture.from_json(metadata["architecture"], f"{path}: architecture")
        network = Network(architecture, IOSpec(**io), generator=torch.Generator().manual_seed(0))
        network.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path}: weights, architecture and interface do not belong together: {error}.") from error
    return network.eval()


def read_extra(path: str | Path) -> dict[str, Any]:
    """The plain data that was saved beside a network."""
    _, metadata = load_tensors(path, FORMAT)
    return dict(json.loads(metadata.get("extra", "{}")))
