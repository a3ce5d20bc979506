from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.errors import IntegrityError, NasError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.onnx import to_onnx
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.float import BF16
from mixnas.search_space.operators.quantization.policy import stored_bytes, uniform
from mixnas.search_space.operators.quantization.projected import calibrating

from ...contracts.format import FEATURES, FormatContract, network_of, small


class TestOnnx(FormatContract):
    name = "onnx"


def test_it_holds_the_weights_and_what_was_said_of_it(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    network, path = small(FEATURES), tmp_path / "model.onnx"
    formats.get("onnx").write(network, path, {"note": "kept"})
    about = {entry.key: json.loads(entry.value) for entry in onnx.load(str(path)).metadata_props}
    assert about["extra"] == {"note": "kept"} and about["architecture"] == network.architecture.to_dict()
    assert formats.get("onnx").weight_bytes(path) == pytest.approx(stored_bytes(network), rel=0.05)


def test_a_policy_that_cannot_be_held_is_refused_with_its_place(monkeypatch):
    block = {"mixer": "attention", "channel_mixer": "mlp", "quant": {"mixer": "fp32", "channel_mixer": "bf16"}}
    plain = {"stem": "conv", "stages": [{"width": 8, "block": block}]}
    network = network_of(Architecture.from_dict(plain), FEATURES)
    assert formats.get("onnx").why_not(network) == ""
    monkeypatch.setattr(BF16, "why_not", lambda self, device, runtime: f"none for {device} in {runtime}")
    assert formats.get("onnx").why_not(network) == (
        "stages.0.blocks.0.channel has policy bf16: none for cpu in onnxruntime"
    )
    assert formats.get("onnx").why_not(small(FEATURES)) == ""


class Complex(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x, dim=1).cumsum(1).abs().sum() * x


def test_what_cannot_be_written_is_refused_with_the_operator_and_why(tmp_path):
    pytest.importorskip("onnxscript")
    network = small(FEATURES)
    network.get_submodule("stages.0.blocks.0.channel.channel_mixer").add_module("mlp", Complex())
    with pytest.raises(NasError) as caught:
        formats.get("onnx").write(network, tmp_path / "model.onnx", {})
    said = str(caught.value)
    assert said.startswith("stages.0.blocks.0.channel.channel_mixer.mlp cannot be written as ONNX: ")
    assert "aten.cumsum" in said and "complex" in said and len(said.splitlines()) == 1 and "\x1b" not in said
    assert not list(tmp_path.iterdir())


class Halves(torch.nn.Module):
    """Projections in bfloat16 on whole numbers, whose sums are exact: what is left to be seen is the rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Linear(24, 24).bfloat16() for _ in range(2))
        self.scale = torch.nn.Parameter(torch.full((24,), 0.3))
        generator = torch.Generator().manual_seed(0)
        for parameter in (*self.first.parameters(), *self.second.parameters()):
            parameter.data = torch.randint(-9, 10, parameter.shape, generator=generator).bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.first.weight.dtype
        y = self.first(x.to(dtype))
        left, right = (y * 1.7).chunk(2, -1)
        z = torch.cat([left + right, left - 0.1], -1).relu().type_as(y).to(dtype)
        rounded = z.div(64.0).round().clamp(-9, 9)
        return x + self.scale * self.second(rounded)


def test_bfloat16_is_rounded_where_torch_rounds_it_to_the_last_bit():
    """ONNX Runtime has no kernels for it on a CPU: only conversions are of that type in the graph."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module = Halves().eval()
    x = torch.randint(-9, 10, (50, 24), generator=torch.Generator().manual_seed(1)).float()
    content = to_onnx(module, x, dynamic_batch=False)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(["output"], {"input": x.numpy()})
    with torch.no_grad():
        expected = module(x)
        wide = Halves().float()
        assert not torch.equal(expected, wide(x))  # rounding shows
    assert torch.equal(torch.from_numpy(found), expected)
    graph = onnx.load_from_string(content).graph
    halves = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.BFLOAT16}
    halves |= {n.output[0] for n in graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.BFLOAT16}
    assert len(halves) > 4
    assert {node.op_type for node in graph.node if halves & set(node.input)} == {"Cast"}


def test_a_unit_by_itself_with_a_fixed_batch():
    """As it is measured."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network = small(FEATURES)
    unit, x = network.get_submodule("stages.0.blocks.0.token"), torch.randn(3, 4, 8, 8)
    session = onnxruntime.InferenceSession(to_onnx(unit, x, dynamic_batch=False), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [3, 4, 8, 8]
    (found,) = session.run(["output"], {"input": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), unit(x), rtol=1e-4, atol=1e-5)


def test_asking_whether_it_is_there_imports_nothing_heavy():
    code = (
        "import sys; from mixnas.search_space.formats.onnx import PACKAGES; "
        "heavy = {'torch', *PACKAGES} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("quant", ["w8a8", "w8a8_static", "w4a16", "bf16"])
def test_policies_of_few_bits_keep_their_bytes_and_multiply_integers(quant, tmp_path):
    onnx = pytest.importorskip("onnx")
    block = {"mixer": "attention", "channel_mixer": "mlp", "quant": quant}
    plain = {"stem": {"name": "conv", "stride": 2}, "norm": "layer", "stages": [{"width": 32, "blocks": [block]}]}
    network = network_of(Architecture.from_dict(plain), FEATURES)
    file_format, path = formats.get("onnx"), tmp_path / "model.onnx"
    file_format.write(network, path, {})
    x = FEATURES.example(4, generator=torch.Generator().manual_seed(1))
    # How many whole numbers a runtime rounds otherwise depends on the CPU that it runs on; see test_integers.
    found = formats.verify(file_format, path, network, x, stated=None if quant in ("w4a16", "bf16") else 0.01)
    assert found.integers is None or found.integers.moved < 0.01 * found.integers.numbers
    assert file_format.weight_bytes(path) == stored_bytes(network)
    operations = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert operations.count("MatMulInteger") == (6 if quant == "w8a8" else 0)
    assert operations.count("QuantizeLinear") == (6 if quant == "w8a8_static" else 0)


def test_bfloat16_is_held_to_what_its_rounding_does_to_the_network(tmp_path, monkeypatch):
    """Also where that is more than the share of the outputs: each unit is right, and none farther off than torch."""
    pytest.importorskip("onnxscript")
    block = {"mixer": "attention", "channel_mixer": "mlp", "quant": "bf16"}
    plain = {"stem": {"name": "conv", "stride": 2}, "norm": "layer", "stages": [{"width": 32, "blocks": [block] * 2}]}
    network = network_of(Architecture.from_dict(plain), FEATURES)
    file_format, path = formats.get("onnx"), tmp_path / "model.onnx"
    file_format.write(network, path, {})
    x = FEATURES.example(8, generator=torch.Generator().manual_seed(1))
    answer, share = formats.load(file_format, path), formats.tolerance(network)
    assert 0 < formats.as_rough(answer, network, x) < share * network(x).abs().max()
    assert formats.as_rough(lambda batch: answer(batch) * (1 + share), network, x) == 0
    assert formats.as_rough(answer, network_of(uniform(network.architecture, Op("fp32")), FEATURES), x) == 0
    monkeypatch.setattr(formats, "tolerance", lambda network, **_: 1e-6)
    found = formats.verify(file_format, path, network, x)
    assert 1e-6 * found.scale < found.difference <= found.allowed < share * found.scale
    with pytest.raises(IntegrityError, match="Each unit by itself"):
        formats.verify(file_format, path, network, x, lambda batch: answer(batch) * (1 + share))


def test_static_integers_are_what_onnxruntime_fuses(tmp_path):
    """A layer is one product of integers there, not ten operations on floats; from our own scales."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    block = {"mixer": "attention", "channel_mixer": "mlp", "quant": "w8a8_static"}
    plain = {"stem": {"name": "conv", "stride": 2}, "norm": "layer", "stages": [{"width": 32, "blocks": [block]}]}
    network = Network(Architecture.from_dict(plain), FEATURES, generator=torch.Generator().manual_seed(0)).eval()
    x = FEATURES.example(4, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), calibrating(network):
        network(x)
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    formats.get("onnx").write(network.deploy(), path, {})
    formats.verify(formats.get("onnx"), path, network, x)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimized)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(str(optimized)).graph.node]
    assert fused.count("QGemm") == 6 and fused.count("Gemm") == 1, fused  # the head stays float32
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer]
    ours = {value.item() for name, value in network.state_dict().items() if name.endswith("input_scale")}
    assert len(ours) > 1 and ours <= {array.item() for array in arrays if array.size == 1}
