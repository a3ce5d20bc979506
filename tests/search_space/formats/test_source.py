"""A network's code as one file: the same function, no more than is used, nothing of this package."""

from __future__ import annotations

import ast
import re
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import NasError
from mixnas.search_space.formats.source.folding import FACTS
from mixnas.search_space.formats.source.inlining import Standalone
from mixnas.search_space.formats.source.reading import Symbol
from mixnas.search_space.formats.source.writing import source
from mixnas.search_space.network import Network
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob

from ...contracts.cases import IOS, covering, once
from ...contracts.format import FEATURES, network_of, small
from ..operators.quantization import toy

HERE = __name__


def module_of(text: str, name: str = "written") -> types.ModuleType:
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = name
    exec(compile(text, name, "exec"), vars(module))
    return module


def outputs_by_source(network: Network, x: Tensor) -> tuple[str, Tensor]:
    text = source(network, "model.safetensors")
    written = module_of(text).Network()
    written.load_state_dict(network.state_dict())
    with torch.no_grad():
        return text, written.eval()(x)


@pytest.fixture
def toy_policy() -> Iterator[None]:
    with toy.registered():
        yield


@pytest.mark.usefixtures("toy_policy")
@pytest.mark.parametrize("kind", IOS)
def test_every_operator_and_policy_computes_the_same(kind):
    """To the bit: it is the same code on the same path."""
    x, quants = IOS[kind].example(3, generator=torch.Generator().manual_seed(0)), registry.names("quant")
    for architecture in [once(kind, quants), *covering(kind, quants)[:2]]:  # every policy, on some
        network = network_of(architecture, IOS[kind])
        text, found = outputs_by_source(network, x)
        with torch.no_grad():
            torch.testing.assert_close(found, network(x), rtol=0, atol=0)
        for node in ast.walk(ast.parse(text)):
            assert not isinstance(node, ast.Name) or node.id not in ("triton", "tl", "mixnas")
            imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in imported:
                top = name.partition(".")[0]
                assert top in ("torch", "safetensors", "numpy") or top in sys.stdlib_module_names, name
        assert "register(" not in text and "backend" not in text


def test_a_small_network_is_a_small_file():
    text, _ = outputs_by_source(small(FEATURES), FEATURES.example(2))
    defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    assert {"Attention", "OutputSigmoid", "MLP", "LayerNorm", "ConvStem", "Pool", "Network"} <= defined
    assert not {"LinearAttention", "SwiGLU", "RMSNorm", "BF16", "DepthwiseConv", "PatchStem"} & defined
    assert len(text.splitlines()) < 380 and "out_size" not in text and "weight_bytes" not in text


@pytest.mark.usefixtures("told")
def test_what_does_not_happen_in_inference_is_left_out():
    code = Standalone()
    code.take([Symbol(HERE, "branching")])
    text = code.text()
    written = module_of(f"{code.imports()}\n{text}", "branching_written")
    for x in (torch.tensor([-2.0, 3.0]), torch.tensor([0.5])):
        assert torch.equal(written.branching(x), branching(x))
    assert set(re.findall(r"way_\w+", text)) == {"way_taken", "way_always", "way_nested", "way_unknown", "way_else"}
    assert "# why" not in text and "grads" not in text and "# stays" in text
    assert max(len(line) - len(line.lstrip()) for line in text.splitlines()) == 8  # what was inside stands further left


def choose(*tensors: Tensor) -> str:
    return "aten"


way_taken = 2.0
way_gone = 3.0
way_dead = 5.0
way_always = 7.0
way_nested = 11.0
way_unknown = 13.0
way_else = 17.0


def branching(x: Tensor) -> Tensor:
    backend, factor = choose(x), 1.5
    if backend == "triton":
        return x * way_gone
    # why
    grads = torch.is_grad_enabled() and x.requires_grad
    # stays
    if len(x) > 1 and not grads:
        y = x * way_unknown
    elif backend == "reference":
        y = x * way_gone
    elif backend == "aten":
        y = x * way_else
    else:
        y = x * way_gone
    z = y * (way_taken if backend == "aten" else way_gone)
    # why
    if backend != "aten":
        z = z * way_gone
    else:
        if len(x) > 1:
            z = z + (way_nested)
        z = z + factor  # stays
    if grads or backend == "aten":
        return z + way_always
    return z * way_dead


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setitem(FACTS, f"{HERE}.choose", "aten")


SCALE = 3.0


def _scaled(x: Tensor) -> Tensor:
    return SCALE * x


class Mine(nn.Module):
    """An operator of somebody's own file, with a helper and a constant."""

    def __init__(self, context: Context, *, by: int) -> None:
        super().__init__()
        self.by = by
        self.out = Linear(context.width, context.width)

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        return size

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        return self.out(_scaled(x).roll(self.by, 1))


@pytest.fixture
def mixers() -> Iterator[None]:
    """Two mixers of one's own: `source-mine`, and one whose code nobody can take."""

    class Inside(Mine):
        pass

    registry.names("mixer")
    knobs = {"by": Knob(1, low=1, high=3)}
    registry.register("mixer", "source_mine", paper="none", knobs=knobs)(Mine)
    registry.register("mixer", "source_inside", paper="none", knobs=knobs)(Inside)
    yield
    for name in ("source_mine", "source_inside"):
        del registry._operators["mixer", name]


def mixing(mixer: str) -> Network:
    block = {"mixer": {"name": mixer, "by": 2}, "channel_mixer": "mlp"}
    return network_of(Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]}), FEATURES)


@pytest.mark.usefixtures("mixers")
def test_an_operator_of_ones_own_is_taken_along_or_named():
    network, x = mixing("source_mine"), FEATURES.example(2)
    text, found = outputs_by_source(network, x)
    with torch.no_grad():
        assert torch.equal(found, network(x))
    assert "SCALE = 3.0" in text and "def _scaled(" in text and "out_size" not in text
    with pytest.raises(NasError, match=r"^stages.0.blocks.0.token: mixer source_inside\(by=2\) cannot be written as"):
        source(mixing("source_inside"), "model.safetensors")
