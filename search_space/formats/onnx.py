"""A network as an ONNX graph, which ONNX Runtime loads alone.

torch's exporter is known to write silently wrong graphs (pytorch 169178, 168224, 166797): believe none that was not
compared with the module that it was made from.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixnas.search_space.errors import NasError
from mixnas.search_space.files import atomic_write
from mixnas.search_space.formats.format import Answer, first_line, register
from mixnas.search_space.units import is_unit

if TYPE_CHECKING:  # who only asks whether ONNX is there need not wait for torch
    import numpy as np
    import torch
    from torch import Tensor, nn

    from mixnas.search_space.network import Network

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_UINT8, _INT8, _INT32 = 2, 3, 6  # of onnx.TensorProto.DataType
_MARK = "Sum"  # of one value: see `_of_our_own`
_TURNED = ".T"
_LAYERS = "layers"
"""Metadata of a graph with products of whole numbers: see `_layers_of`."""

# fmt: off
_EXACT = frozenset(
    (
        "Abs", "Add", "And", "Cast", "CastLike", "Clip", "Concat", "Constant", "ConstantOfShape", "DequantizeLinear",
        "Div", "Equal", "Expand", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Greater", "Identity",
        "Less", "MatMulInteger", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pad", "QuantizeLinear", "Range",
        "Reciprocal", "ReduceMax", "ReduceMin", "Relu", "Reshape", "Round", "ScatterElements", "ScatterND", "Shape",
        "Sign", "Slice", "Split", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"
    )
)
# fmt: on
"""Operations that every runtime computes alike, because IEEE 754 says what comes out, or nothing is computed."""


def to_onnx(module: nn.Module, inputs: Tensor, dynamic_batch: bool) -> bytes:
    """The ONNX graph of a module, from "input" to "output".

    Args:
        module: In evaluation mode, on the CPU.
        inputs: What it reads; at least two where the batch is dynamic.
        dynamic_batch: Whether the graph takes any number of inputs, or just so many.
    """
    from mixnas.search_space.formats.torch_export import exported
    from mixnas.search_space.operators.quantization.qdq import with_qdq

    graph = _converted(exported(with_qdq(module), inputs, dynamic_batch=dynamic_batch))
    content: bytes = graph.SerializeToString()
    return content


def _converted(program: torch.export.ExportedProgram) -> Any:
    """An `onnx.ModelProto`."""
    import torch
    from onnxscript import optimizer

    from mixnas.search_space.formats.widening import without_bfloat16

    program = without_bfloat16(program)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter's own, about its internals
            converted = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["input"],
                output_names=["output"],
                custom_translation_table=_of_our_own(),
                optimize=False,  # more than half of the time, for patterns that ONNX Runtime fuses when it loads a file
            )
        assert converted is not None
        # Weights of few bits would be widened; ONNX Runtime does so itself when it loads them.
        if all(tensor.element_size() >= 4 for tensor in program.state_dict.values()):
            optimizer.inline(converted.model)
            optimizer.fold_constants(converted.model)
            optimizer.remove_unused_nodes(converted.model)
    finally:
        exporter.setLevel(level)
    return converted.model_proto


def _of_our_own() -> dict[Any, Any]:
    """What the exporter does not know: torch's product of int8, which is one of ONNX's own operations, and our own."""
    import torch
    from onnxscript import opset18

    from mixnas.search_space.formats import marks
    from mixnas.search_space.operators.quantization import qdq  # registers its operation

    op: Any = opset18

    def int_mm(self: Any, mat2: Any) -> Any:
        return op.MatMulInteger(self, mat2)

    def qdq_linear(x: Any, scale: Any, zero_point: Any, weight: Any, weight_scale: Any, bias: Any = None) -> Any:
        zero = op.Cast(zero_point, to=_UINT8)
        inputs = op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)
        zeros = op.Mul(weight_scale, 0.0)
        transposed = op.Transpose(weight, perm=[1, 0])
        whole = op.DequantizeLinear(transposed, weight_scale, op.Cast(zeros, to=_INT8), axis=1)
        if bias is None:
            return op.MatMul(inputs, whole)
        # Without whole numbers for the bias too nothing is fused; its steps are those of the sums.
        step = op.Mul(scale, weight_scale)
        steps = op.Cast(op.Round(op.Div(bias, step)), to=_INT32)
        return op.Gemm(inputs, whole, op.DequantizeLinear(steps, step, op.Cast(zeros, to=_INT32), axis=0))

    def unit_answer(x: Any) -> Any:
        return op.Sum(x)  # of one: the value itself; unlike Identity it stays where it is until units have their names

    assert qdq.qdq_linear is not None and marks.unit_answer is not None
    return {
        torch.ops.aten._int_mm.default: int_mm,
        torch.ops.mixnas.qdq_linear.default: qdq_linear,
        torch.ops.mixnas.unit_answer.default: unit_answer,
    }


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
    beside: tuple[str, ...] = ()
    packages: tuple[str, ...] = PACKAGES
    loads_with = ("onnxruntime",)
    runtime = "onnxruntime"
    needs_mixnas = False
    load = staticmethod(load_onnx)

    def why_not(self, network: Network) -> str:
        """Not with a policy that ONNX Runtime has no kernels for."""
        from mixnas.search_space.operators.quantization.policy import policy_of

        for name, module in network.units():
            quant = getattr(module, "quant", None)
            problem = policy_of(quant).why_not("cpu", self.runtime) if quant is not None else ""
            if problem:
                return f"{name} has policy {quant}: {problem}"
        return ""

    def write(self, network: Network, path: Path, extra: Mapping[str, Any]) -> None:
        """See `to_onnx`; architecture, interface and `extra` stand in the graph's metadata."""
        import torch

        from mixnas.search_space.formats import marks
        from mixnas.search_space.formats.integers import whole_layers
        from mixnas.search_space.formats.torch_export import culprit, exported_network
        from mixnas.search_space.operators.quantization.qdq import with_qdq

        traced: Any = with_qdq(network)
        with marks.marking(traced):
            program = exported_network(traced, also=("mixnas::qdq_linear", marks.NAME))
        try:
            graph = _converted(program)
        except Exception as error:  # the exporter has many
            x = network.io.example(2, generator=torch.Generator().manual_seed(0))
            blamed = culprit(traced, x, lambda part, given: to_onnx(part, given, dynamic_batch=True))
            raise NasError(f"{blamed} cannot be written as ONNX: {first_line(_innermost(error))}") from error
        about = {"architecture": network.architecture.to_dict(), "io": network.io.to_plain(), "extra": dict(extra)}
        for key, value in about.items():
            graph.metadata_props.add(key=key, value=json.dumps(value))
        _name_units(graph.graph, marks.marked_units(network))
        _name_turned(graph.graph, network.state_dict())
        if layers := whole_layers(network):  # so that verification can look at each by itself
            graph.metadata_props.add(key=_LAYERS, value=json.dumps(_layers_of(graph.graph, layers)))
        atomic_write(path, graph.SerializeToString())

    def weight_bytes(self, path: Path) -> int:
        """Bytes of the graph's initial values."""
        return sum(map(len, self.stored(path).values()))

    def stored(self, path: Path) -> dict[str, bytes]:
        """See `Format`; what else the exporter made of a tensor has a name of its own."""
        import onnx

        found = {}
        for tensor in onnx.load(str(path)).graph.initializer:
            if tensor.name.endswith(_TURNED):
                array = onnx.numpy_helper.to_array(tensor)
                found[tensor.name.removesuffix(_TURNED)] = array.T.tobytes()
            else:
                found[tensor.name] = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
        return found

    def call(self, path: Path, batch: np.ndarray, threads: int) -> Callable[[], object]:
        """See `Format`."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda: session.run(["output"], {"input": batch})

    def unit_outputs(self, path: Path, batch: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """See `Format`."""
        import onnx

        model = onnx.load(str(path))
        made = [value for node in model.graph.node for value in node.output if is_unit(value.partition("@")[0])]
        found = _run(model, [*made, "output"], batch)
        # The head's answer keeps the graph's name for it.
        return [(value.partition("@")[0], found[value]) for value in made] + [("head", found["output"])]

    def layer_values(self, path: Path, batch: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray, str]]:
        """See `integers.compared`."""
        import onnx

        model = onnx.load(str(path))
        (text,) = (entry.value for entry in model.metadata_props if entry.key == _LAYERS)
        layers = json.loads(text)
        found = _run(model, [one[end] for one in layers for end in ("rounds", "answer")], batch)
        return [(one["name"], found[one["rounds"]], found[one["answer"]], one["before"]) for one in layers]


def _innermost(error: BaseException) -> BaseException:
    """What the exporter's errors come from: they themselves say what to do about the exporter."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def _run(model: Any, values: Iterable[str], batch: np.ndarray) -> dict[str, np.ndarray]:
    """Values inside a graph, by their names."""
    import onnxruntime

    there = {value.name for value in model.graph.output}
    inside = [value for value in dict.fromkeys(values) if value not in {"input", *there}]
    for value in inside:
        model.graph.output.add(name=value)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_mem_reuse = options.enable_mem_pattern = False  # a value inside would be written over by later ones
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [*inside, *there]
    # Copies: what a session answers may lie in its own memory, and ends with it.
    found = [array.copy() for array in session.run(names, {"input": batch})]
    return {"input": batch, **dict(zip(names, found, strict=True))}


def _layers_of(graph: Any, layers: Collection[str]) -> list[dict[str, str]]:
    """Where layers that multiply whole numbers stand: name, values that they round and answer, what comes before.

    A layer is known by its weights: in which module a node stands the exporter does not always say rightly.

    Args:
        graph: An `onnx.GraphProto`.
        layers: Their names.
    """
    made = {value: node for node in graph.node for value in node.output}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for value in node.input:
            users.setdefault(value, []).append(node)
    known = {tensor.name for tensor in graph.initializer}

    def behind(values: Iterable[str], end: Collection[str] = ()) -> set[str]:
        """Values that others are computed from, themselves among them."""
        found, rest = set(), list(values)
        while rest:
            value = rest.pop()
            if value not in found:
                found.add(value)
                rest += made[value].input if value in made and value not in end else ()
        return found

    found: list[dict[str, str]] = []
    for node in graph.node:
        rounded = _rounded(node, made)
        of = {v.rpartition(".")[0] for v in behind(node.input[1:2]) & known} & set(layers) if rounded else set()
        if rounded is None or len(of) != 1:
            continue
        (name,), before = of, behind([rounded], [one["answer"] for one in found])
        inexact = [
            n for n in graph.node if n.op_type not in _EXACT and before & set(n.output) - {o["answer"] for o in found}
        ]
        said = ", ".join(dict.fromkeys(_label(n, known) for n in inexact))
        answer = _answer(node, users, {f"{name}.scale", f"{name}.bias"} & known)
        found.append({"name": name, "rounds": rounded, "answer": answer, "before": said})
    return found


def _rounded(product: Any, made: Mapping[str, Any]) -> str | None:
    """The floats that a product's first factor was rounded from; None where it is no product of whole numbers."""
    if product.op_type == "MatMulInteger":
        cast = made[product.input[0]]
        scaled = made[made[cast.input[0]].input[0]]  # what Round is given
        return str(scaled.input[0])
    back = made.get(product.input[0]) if product.op_type in ("Gemm", "MatMul") else None
    if back is None or back.op_type != "DequantizeLinear":
        return None
    quantized = made.get(back.input[0])
    return None if quantized is None else str(quantized.input[0])


def _answer(product: Any, users: Mapping[str, Sequence[Any]], constants: set[str]) -> str:
    """The value behind a product that has been scaled and had its bias added; a fused one has already."""
    value, left = str(product.output[0]), constants if product.op_type == "MatMulInteger" else set()
    while left:
        following = next(user for user in users[value] if user.op_type in ("Cast", "Mul", "Add"))
        left, value = left - set(following.input), str(following.output[0])
    return value


def _label(node: Any, known: Collection[str]) -> str:
    """An operation, and whose weights it has."""
    own = [value.rpartition(".")[0] for value in node.input if value in known and "." in value]
    return f"{node.op_type} ({own[0]})" if own else str(node.op_type)


def _is_mark(node: Any) -> bool:
    return node.op_type == _MARK and len(node.input) == 1


def _name_units(graph: Any, order: Sequence[str]) -> None:
    """Call the value that a unit answers as the unit is called, and forget the marks and where the exporter ran.

    Args:
        graph: An `onnx.GraphProto` of a network that was traced within `marks.marking`, changed in place.
        order: `marks.marked_units`; "@1" and so on is added where one runs again.
    """
    given = {value.name for value in (*graph.input, *graph.initializer)}
    found = [node for node in graph.node if _is_mark(node)]
    called: dict[str, str] = {}
    times: Counter[str] = Counter()
    for unit, mark in zip(order, found, strict=True):
        (value,), (answer,) = mark.input, mark.output
        again, times[unit] = times[unit], times[unit] + 1
        if value in called or value in given:  # a unit that answers what it is given
            mark.op_type = "Identity"
        else:
            called[value] = called[answer] = f"{unit}@{again}" if again else unit
    kept = [node for node in graph.node if not _is_mark(node)]
    _rename(kept, called)
    del graph.node[:]
    graph.node.extend(kept)
    described = {called.get(value.name, value.name): value for value in graph.value_info}
    for name, value in described.items():
        value.name = name
        del value.metadata_props[:]
    described_once = list(described.values())
    del graph.value_info[:]
    graph.value_info.extend(described_once)


def _name_turned(graph: Any, state: Mapping[str, Tensor]) -> None:
    """Call a matrix that the exporter has transposed as it is called in the network, and ".T".

    Args:
        graph: An `onnx.GraphProto`, changed in place.
        state: The network's tensors.
    """
    from mixnas.search_space.formats.blame import raw

    left = state.keys() - {tensor.name for tensor in graph.initializer}
    turned = {raw(state[name].T): name for name in sorted(left) if state[name].dim() == 2}
    called = {}
    for tensor in graph.initializer:
        if tensor.name not in state and len(tensor.dims) == 2 and (name := turned.pop(tensor.raw_data, "")):
            called[tensor.name] = f"{name}{_TURNED}"
            tensor.name = called[tensor.name]
    _rename(graph.node, called)
    for value in graph.value_info:
        value.name = called.get(value.name, value.name)


def _rename(nodes: Iterable[Any], called: Mapping[str, str]) -> None:
    """Call values by other names, also where a graph inside a node reads them."""
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = called.get(name, name)
        del node.metadata_props[:]
        for attribute in node.attribute:
            _rename(attribute.g.node, called)
