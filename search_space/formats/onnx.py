"""A network as an ONNX graph, which ONNX Runtime loads alone.

torch's exporter is known to write silently wrong graphs (pytorch 169178, 168224, 166797): believe none that was not
compared with the module that it was made from.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixnas.search_space.errors import NasError
from mixnas.search_space.files import atomic_write
from mixnas.search_space.formats.format import Answer, first_line, register

if TYPE_CHECKING:  # who only asks whether ONNX is there need not wait for torch
    import numpy as np
    import torch
    from torch import Tensor, nn

    from mixnas.search_space.network import Network

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def to_onnx(module: nn.Module, inputs: Tensor, dynamic_batch: bool) -> bytes:
    """The ONNX graph of a module, from "input" to "output".

    Args:
        module: In evaluation mode, on the CPU.
        inputs: What it reads; at least two where the batch is dynamic.
        dynamic_batch: Whether the graph takes any number of inputs, or just so many.
    """
    from mixnas.search_space.formats.torch_export import exported

    graph = _converted(exported(module, inputs, dynamic_batch=dynamic_batch))
    content: bytes = graph.SerializeToString()
    return content


def _converted(program: torch.export.ExportedProgram) -> Any:
    """An `onnx.ModelProto`."""
    import torch

    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about its internals
            converted = torch.onnx.export(
                program, dynamo=True, verbose=False, input_names=["input"], output_names=["output"]
            )
    finally:
        exporter.setLevel(level)
    assert converted is not None
    return converted.model_proto


def load_onnx(path: str | Path) -> Answer:
    """A file of `nas export --format onnx`: arrays to arrays. Needs onnxruntime alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def answer(batch: np.ndarray) -> np.ndarray:
        return session.run(["output"], {"input": batch})[0]

    return answer


@register
class Onnx:
    """One graph with its weights, dynamic in the batch."""

    name = "onnx"
    file_name = "model.onnx"
    packages: tuple[str, ...] = PACKAGES
    needs_mixnas = False
    notices_damage = False
    load = staticmethod(load_onnx)

    def why_not(self, network: Network) -> str:
        """Not with a policy that ONNX Runtime has no kernels for."""
        from mixnas.search_space.operators.quantization.policy import policy_of

        for name, module in network.units():
            quant = getattr(module, "quant", None)
            problem = policy_of(quant).why_not("cpu", "onnxruntime") if quant is not None else ""
            if problem:
                return f"{name} has policy {quant}: {problem}"
        return ""

    def write(self, network: Network, path: Path, extra: Mapping[str, Any]) -> None:
        """See `to_onnx`; architecture, interface and `extra` stand in the graph's metadata."""
        from mixnas.search_space.formats.torch_export import exported_network

        program = exported_network(network)
        try:
            graph = _converted(program)
        except Exception as error:  # the exporter has many
            raise NasError(f"the network cannot be written as ONNX: {first_line(error)}") from error
        about = {"architecture": network.architecture.to_dict(), "io": network.io.to_plain(), "extra": dict(extra)}
        for key, value in about.items():
            graph.metadata_props.add(key=key, value=json.dumps(value))
        atomic_write(path, graph.SerializeToString())

    def weight_bytes(self, path: Path) -> int:
        """Bytes of the graph's initial values."""
        import onnx

        tensors = onnx.load(str(path)).graph.initializer
        return sum(len(tensor.raw_data) or onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors)
