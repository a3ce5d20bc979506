"""A network's code in one file of plain PyTorch, generated from its architecture: the operators that it uses, no more.

The operators' code is that of the files in which they are written (`inlining`), so that a new one needs nothing here;
an export compares the file with the network. Weights have the names that they have in `Network`.
"""

from __future__ import annotations

import functools
import json
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Op
from mixnas.search_space.errors import NasError
from mixnas.search_space.formats.source.inlining import Standalone
from mixnas.search_space.formats.source.reading import Symbol
from mixnas.search_space.network import Network, build_op, checked_plan
from mixnas.search_space.operators.folding import foldable, merges
from mixnas.search_space.operators.layers import Standardise
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.registry import BETWEEN, Context
from mixnas.search_space.units import Unit

_HEADER = '''"""{title}

Written by mixnas from architecture {identity}. Plain PyTorch: change it as you like. `load()` gives the network with
its trained weights, which lie in {weights} beside this file. Tensors are channels last, (B, H, W, C) or
(B, L, C). The operators are those that were trained, in the form that runs on any device.

Input {input}; output {output}.
"""

from __future__ import annotations

'''

_FRAME = '''
def named(**operator: nn.Module) -> nn.Sequential:
    """An operator under its name: so its weights are called in the file."""
    return nn.Sequential(OrderedDict(operator))


class TokenBranch(nn.Module):
    """x + gate(mixer(norm(x)))."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, gate: nn.Sequential) -> None:
        super().__init__()
        self.norm, self.mixer, self.gate = norm, mixer, gate

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate[0](self.norm(x), self.mixer)


class ChannelBranch(nn.Module):
    """x + channel_mixer(norm(x))."""

    def __init__(self, norm: nn.Module, channel_mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.channel_mixer = norm, channel_mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.channel_mixer(self.norm(x))


class Block(nn.Module):
    """Mixes tokens, then channels; `times` times, with the same weights."""

    def __init__(self, token: nn.Module, channel: nn.Module | None = None, times: int = 1) -> None:
        super().__init__()
        self.token, self.channel, self.times = token, channel, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.token(x)
            if self.channel is not None:
                x = self.channel(x)
        return x


class Stage(nn.Module):
    """A change of width and resolution, where there is one, then blocks."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x if self.downsample is None else self.downsample(x))


class Head(nn.Module):
    """The answers, behind a norm."""

    def __init__(self, norm: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.norm, self.output = norm, output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(x))
'''

_PADDED_FRAME = '''
def apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """Series with zeros where they have ended, which is where x is NaN, and which positions are there."""
    valid = ~x[..., :1].isnan()
    return torch.where(valid, x, 0.0), valid


def back(y: Tensor, valid: Tensor) -> Tensor:
    """NaN again where a series has ended."""
    return torch.where(valid, y, torch.nan)


class Padded(nn.Sequential):
    """Operators of each position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x, valid = apart(x)
        return back(super().forward(x), valid)


def padded(**operator: nn.Module) -> nn.Sequential:
    """An operator under its name: so its weights are called in the file."""
    return Padded(OrderedDict(operator))
'''

_OF_PADDED = (
    (
        """        return x + self.gate[0](self.norm(x), self.mixer)
""",
        """        x, valid = apart(x)
        mixer = (lambda y: self.mixer[0](y, valid=valid)) if self.told else self.mixer
        return back(x + self.gate[0](self.norm(x), mixer), valid)
""",
    ),
    (
        "mixer: nn.Module, gate: nn.Sequential) -> None:",
        "mixer: nn.Module, gate: nn.Sequential, told: bool) -> None:",
    ),
    (
        "        self.norm, self.mixer, self.gate = norm, mixer, gate\n",
        "        self.norm, self.mixer, self.gate, self.told = norm, mixer, gate, told\n",
    ),
    (
        """        return x + self.channel_mixer(self.norm(x))
""",
        """        x, valid = apart(x)
        return back(x + self.channel_mixer(self.norm(x)), valid)
""",
    ),
    (
        """        return self.output(self.norm(x))
""",
        """        x, valid = apart(x)
        return self.output[0](self.norm(x), valid) if self.told else self.output(self.norm(x))
""",
    ),
    ("norm: nn.Module, output: nn.Module) -> None:", "norm: nn.Module, output: nn.Module, told: bool) -> None:"),
    (
        "        self.norm, self.output = norm, output\n",
        "        self.norm, self.output, self.told = norm, output, told\n",
    ),
)
"""What is otherwise in the frame of a network whose series have different lengths."""


def _frame(padded: bool) -> str:
    if not padded:
        return _FRAME
    text = _FRAME
    for usual, changed in _OF_PADDED:
        assert usual in text
        text = text.replace(usual, changed)
    return _PADDED_FRAME + "\n" + text


_QUANTIZED = '''
@torch.no_grad()
def quantized(policy: Any, operator: nn.Module) -> nn.Module:
    """The operator with its projections stored and computed as the policy says."""
    return policy.deploy(policy.prepare(operator))
'''

_FOLDED = '''
class Folded(nn.Module):
    """Where a batch norm was: the layer before it has taken it in."""

    weight = None

    def forward(self, x: Tensor) -> Tensor:
        return x


def folded(operator: nn.Module, norms: dict[str, str]) -> nn.Module:
    """The operator without these batch norms, each of which is in the weights of the layer beside it."""
    for norm, path in norms.items():
        parent, _, name = norm.rpartition(".")
        setattr(operator.get_submodule(parent), name, Folded())
        layer = operator.get_submodule(path)
        if layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))
    return operator
'''

_MERGED = '''
@torch.no_grad()
def merged(operator: nn.Module) -> nn.Module:
    """The operator in its own form for inference, which has fewer tensors."""
    for module in list(operator.modules()):
        if hasattr(module, "merge"):
            module.merge()
    return operator
'''

_NETWORK = '''
class Network(nn.Module):
    """{what}."""

    def __init__(self) -> None:
        super().__init__()
{body}
        self.requires_grad_(False)  # to be run: for weights that are trained, torch adds some sums in another order

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)))
'''

_LOAD = '''
def load(weights: str | Path = Path(__file__).with_name("{weights}")) -> Network:
    """The network with its trained weights, ready to answer. Needs torch and safetensors."""
    from safetensors.torch import load_file

    network = Network()
    network.load_state_dict(load_file(weights))
    return network.eval()


if __name__ == "__main__":
    example = {example}
    with torch.no_grad():
        print("input", tuple(example.shape), "output", tuple(load()(example).shape))
'''

_FRAME_NAMES = (
    "named",
    "apart",
    "back",
    "Padded",
    "padded",
    "TokenBranch",
    "ChannelBranch",
    "Block",
    "Stage",
    "Head",
    "quantized",
    "Folded",
    "folded",
    "merged",
    "load",
    "Network",
)


def source(network: Network, weights: str) -> str:
    """The text of the file.

    Args:
        network: Deployed.
        weights: Name of the file of its weights, as `safetensors.save_network` writes it, beside this one.

    Raises:
        NasError: An operator's code cannot be taken; the message names it and says why.
    """
    return _Writer(network).text(weights)


class _Writer:
    def __init__(self, network: Network) -> None:
        self._network = network
        self._units = dict(checked_plan(network.architecture, network.io))
        self._code = Standalone([*_FRAME_NAMES, "torch", "nn", "Tensor", "Any", "Path", "OrderedDict"])
        self._code.take([Symbol.of(Context)])
        if network.io.mean is not None:
            self._code.take([Symbol.of(Standardise)])
        for name, unit in self._units.items():
            for axis, op in unit.choices:
                self._take(name, axis, op, unit)
        self._context = self._code.names[Symbol.of(Context)]

    def _take(self, name: str, axis: str, op: Op, unit: Unit) -> None:
        if axis == "quant" and not self._quantized(unit):
            return
        try:
            self._code.take([Symbol.of(registry.get(axis, op.name).build)])
        except NasError as error:
            raise NasError(
                f"{name}: {axis.replace('_', ' ')} {op} cannot be written as plain PyTorch: {error}"
            ) from error

    # -- the operators ------------------------------------------------------------------------------------------------

    def _quantized(self, unit: Unit) -> bool:
        """Whether the unit's policy changes any of its operators."""
        if unit.quant is None:
            return False
        return any(_is_changed(unit.quant, axis, op, unit.before) for axis, op in unit.ops if axis != "norm")

    def _folds(self, axis: str, op: Op, unit: Unit) -> dict[str, str]:
        """The batch norms that an operator's layers have taken in, each with its layer."""
        if not self._network.folded:
            return {}
        quant = None if axis == "norm" else unit.quant
        return dict(_foldable(quant, axis, op, unit.before, unit.after if axis in BETWEEN else unit.before))

    def _is_merged(self, axis: str, op: Op, unit: Unit) -> bool:
        return self._network.folded and _merges(axis, op, unit.before, unit.after if axis in BETWEEN else unit.before)

    def _op(self, axis: str, op: Op, unit: Unit) -> str:
        """The expression that makes an operator under its name."""
        contexts = [unit.before, unit.after] if axis in BETWEEN else [unit.before]
        arguments = [*map(self._at, contexts), *_settings(op)]
        made = _call(self._code.names[Symbol.of(registry.get(axis, op.name).build)], arguments)
        if norms := self._folds(axis, op, unit):
            made = _call("folded", [made, json.dumps(norms)])
        if self._is_merged(axis, op, unit):
            made = _call("merged", [made])
        quant = None if axis in ("norm", *BETWEEN) else unit.quant
        if quant is not None and _is_changed(quant, axis, op, unit.before):
            policy = self._code.names[Symbol.of(registry.get("quant", quant.name).build)]
            made = _call("quantized", [_call(policy, _settings(quant)), made])
        named = [f"{op.name}={made}"]
        if axis == "stem" and self._network.io.mean is not None:
            of = [repr(self._network.io.mean), repr(self._network.io.std)]
            named.insert(0, f"standardise={_call(self._code.names[Symbol.of(Standardise)], of)}")
        return _call("padded" if unit.before.padded and axis in ("stem", "downsample") else "named", named)

    def _at(self, context: Context) -> str:
        return f"{self._context}({context.width}, {context.size!r}, {context.kind!r})".replace("'", '"')

    def _unit(self, name: str) -> str:
        unit = self._units[name]
        if unit.role in ("stem", "downsample"):
            ((axis, op),) = unit.ops
            return self._op(axis, op, unit)
        build = {"token": "TokenBranch", "channel": "ChannelBranch", "head": "Head"}[unit.role]
        arguments = [f"{'output' if axis == 'head' else axis}={self._op(axis, op, unit)}" for axis, op in unit.ops]
        if unit.before.padded and unit.role in ("token", "head"):
            arguments.append(f"told={self._told(unit)}")
        return _call(build, arguments)

    def _told(self, unit: Unit) -> bool:
        """Whether the operator that looks at several positions is told which of them are there."""
        axis = "mixer" if unit.role == "token" else "head"
        operator = registry.get(axis, unit.op(axis).name)
        return operator.takes_valid and (axis == "head" or unit.before.kind != "causal")

    # -- the network --------------------------------------------------------------------------------------------------

    def _stages(self) -> Iterator[str]:
        for s, stage in enumerate(self._network.architecture.stages):
            blocks = []
            for b, block in enumerate(stage.blocks):
                branches = [f"stages.{s}.blocks.{b}.{branch}" for branch in ("token", "channel")]
                arguments = [self._unit(name) for name in branches if name in self._units]
                if block.recursion > 1:
                    arguments.append(f"times={block.recursion}")
                blocks.append(_call("Block", arguments))
            arguments = [_list(blocks)]
            if (name := f"stages.{s}.downsample") in self._units:
                arguments.append(f"downsample={self._unit(name)}")
            yield _call("Stage", arguments)

    def _class(self) -> str:
        lines = [f"self.stem = {self._unit('stem')}", f"self.stages = {_call('nn.Sequential', list(self._stages()))}"]
        lines.append(f"self.head = {self._unit('head')}")
        body = textwrap.indent("\n".join(lines), " " * 8)
        what = f"{_shape(self._network.io.example(1))} to {_shape(self._answer())}"
        return _NETWORK.format(what=what, body=body)

    @torch.no_grad()
    def _answer(self) -> torch.Tensor:
        answer: torch.Tensor = self._network(self._network.io.example(1))
        return answer

    def text(self, weights: str) -> str:
        """The whole file."""
        io, architecture = self._network.io, self._network.architecture
        example = self._network.io.example(1)
        made = f"torch.zeros({tuple(example.shape)}, dtype={example.dtype})"
        any_quantized = any(map(self._quantized, self._units.values()))
        every = [(axis, op, unit) for unit in self._units.values() for axis, op in unit.ops]
        any_folded, any_merged = any(self._folds(*one) for one in every), any(self._is_merged(*one) for one in every)
        needed: list[tuple[str, tuple[str, str | None]]] = [
            ("OrderedDict", ("collections", "OrderedDict")),
            ("Path", ("pathlib", "Path")),
            ("torch", ("torch", None)),
            ("Tensor", ("torch", "Tensor")),
            ("nn", ("torch", "nn")),
        ]
        if any_quantized:
            needed.append(("Any", ("typing", "Any")))
        about = {
            "title": f"A network for {io.kind} tasks: {len(architecture.stages)} stages, "
            f"{sum(len(stage.blocks) for stage in architecture.stages)} blocks.",
            "identity": architecture.id,
            "weights": weights,
            "input": _shape(example) + (" of integers" if io.tokens else ""),
            "output": _shape(self._answer()),
        }
        parts = [
            self._code.text(),
            *([_QUANTIZED] if any_quantized else []),
            *([_FOLDED] if any_folded else []),
            *([_MERGED] if any_merged else []),
            _frame(io.padded),
            self._class(),
            _LOAD.format(weights=weights, example=made),
        ]
        text = "\n\n".join(part.strip("\n") + "\n" for part in parts)
        return _HEADER.format(**about) + self._code.imports(needed) + "\n\n\n" + text


def _shape(tensor: torch.Tensor) -> str:
    return f"(B, {', '.join(map(str, tensor.shape[1:]))})"


def _settings(op: Op) -> list[str]:
    """Its knobs as keyword arguments."""
    return [f"{knob}={json.dumps(value) if isinstance(value, str) else value}" for knob, value in op.options.items()]


def _call(function: str, arguments: list[str]) -> str:
    """A call, on one line where it is short."""
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= 72 and "\n" not in line:
        return line
    return f"{function}(\n" + "".join(textwrap.indent(argument, "    ") + ",\n" for argument in arguments) + ")"


def _list(items: list[str]) -> str:
    return "[\n" + "".join(textwrap.indent(item, "    ") + ",\n" for item in items) + "]"


@functools.lru_cache(maxsize=4096)
def _is_changed(quant: Op, axis: str, op: Op, context: Context) -> bool:
    """Whether a policy makes anything else of an operator than it is."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        plain, deployed = build_op(axis, op, context, context), build_op(axis, op, context, context, quant)
        deployed = policy_of(quant).deploy(deployed)
    return _described(plain) != _described(deployed)


@functools.lru_cache(maxsize=4096)
def _foldable(quant: Op | None, axis: str, op: Op, before: Context, after: Context) -> tuple[tuple[str, str], ...]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return tuple(foldable(build_op(axis, op, before, after, quant)).items())


@functools.lru_cache(maxsize=4096)
def _merges(axis: str, op: Op, before: Context, after: Context) -> bool:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return merges(build_op(axis, op, before, after))


def _described(module: nn.Module) -> list[Any]:
    """What a module and those inside it are, without the values of their tensors."""
    state = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in module.state_dict().items()]
    settings = [
        (path, type(inner), {k: v for k, v in vars(inner).items() if not k.startswith("_") and not callable(v)})
        for path, inner in module.named_modules()
    ]
    return [state, settings]
