"""Policies of whole numbers: weights of 8 or 4 bits, activations of 8 bits or as they are.

Weights are symmetric, each output channel or group with a scale of its own; the formulas stand in `affine`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mixnas.kernels.dispatch import keeping, use_triton
from mixnas.kernels.quantized_linear import epilogue, int4_linear, pack_int4, scaled_linear, unpack_int4
from mixnas.search_space.operators.quantization import products
from mixnas.search_space.operators.quantization.affine import (
    affine_parameters,
    dequantize,
    fake_rows,
    learned_step,
    quantize,
    quantize_rows,
    straight_through,
    symmetric_scale,
)
from mixnas.search_space.operators.quantization.observers import OBSERVERS, Observer
from mixnas.search_space.operators.quantization.projected import Projected, State
from mixnas.search_space.registry import Knob, register

_WHITEPAPER = "Krishnamoorthi 2018, Quantizing deep convolutional networks (arXiv 1806.08342)"


@dataclass(frozen=True)
class _Ready:
    """What an integer product needs.

    Attributes:
        weight: (N, K) int8.
        scale: (N,), of the sums.
        shift: (N,), which is added, or None.
        steps: (N,) int32, which are added to the sums, where that is done before they are scaled.
        weight_scale: (N,), without the scale of the inputs, where `scale` has it in it.
        bias: The layer's own, in whole steps, where `shift` is more.
        input_scale: Of the inputs' range, where it is known before them.
        input_zero_point: Likewise.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor | None
    steps: Tensor | None = None
    weight_scale: Tensor | None = None
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    made: dict[str, Tensor] = field(default_factory=dict)

    def packed(self, rows: int) -> Tensor:
        """The weights as oneDNN has them."""
        if "packed" not in self.made:
            self.made["packed"] = products.onednn_pack(self.weight, rows)
        return self.made["packed"]


@dataclass(frozen=True)
class _Floats:
    """What a product of floats by stored weights needs.

    Attributes:
        widen: Makes the weights, (N, K) float32.
        bias: (N,), or None.
        packed: The weights as they are stored.
        scale: Their scales.
    """

    widen: Callable[[], Tensor]
    bias: Tensor | None
    packed: Tensor
    scale: Tensor
    made: dict[str, Any] = field(default_factory=dict)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Make it once."""
        if name not in self.made:
            with keeping():
                self.made[name] = make()
        return self.made[name]

    def linear(self, rows: Tensor) -> Tensor:
        """Widened once, and multiplied as floats."""
        weight = self.kept("widened", self.widen)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        return F.linear(rows, weight.to(rows.dtype), bias)


class _DynamicRows(Projected):
    """Activations as int8, each row (token) with a scale of its own that is found when it is there."""

    shares: ClassVar[bool] = True
    whole: ClassVar[bool] = True

    def enter(self, rows: Tensor, ready: _Ready) -> tuple[Tensor, Tensor]:
        """(M, K) int8 and (M, 1) scales."""
        return quantize_rows(rows, 8)

    def product(self, entered: tuple[Tensor, Tensor], ready: _Ready) -> Tensor:
        """See `Projected`."""
        whole, scale = entered
        if use_triton(scale):
            return scaled_linear(whole, scale, ready.weight, ready.scale, ready.shift)
        path = products.choose("int8", whole.shape[0], whole.shape[1], ready.weight.shape[0])
        return epilogue(products.SUMS[path](whole, ready.weight), scale, ready.scale, ready.shift)

    def fake_input(self, rows: Tensor) -> Tensor:
        """See `Projected`."""
        return fake_rows(rows, 8)


def _channels(weight: Tensor, bits: int) -> State:
    """Weights with a scale for each output channel: (N, K) int8 and (N,) float32."""
    whole, scale = quantize_rows(weight, bits)
    return {"weight": whole, "scale": scale.squeeze(1)}


@register("quant", "w8a8", paper=f"{_WHITEPAPER}, section 3.2; each token with a scale of its own")
@dataclass(frozen=True)
class W8A8(_DynamicRows):
    """Weights int8 per output channel, activations int8 per token, found anew for each input; sums in int32."""

    name: ClassVar[str] = "w8a8"

    def store(self, weight: Tensor) -> State:
        """A byte a weight, four an output channel."""
        return _channels(weight, 8)

    def ready(self, stored: State, bias: Tensor | None, inputs: int) -> _Ready:
        """See `Projected`."""
        return _Ready(stored["weight"], stored["scale"], bias)

    def fake_weight(self, weight: Tensor) -> Tensor:
        """See `Projected`."""
        return fake_rows(weight, 8)

    def instead(self, device: str, runtime: str) -> str:
        """Nothing else: ONNX Runtime too multiplies integers (`MatMulInteger`)."""
        return ""


@register(
    "quant",
    "w4a8",
    paper=f"{_WHITEPAPER}, section 3.3 (4 bits of weights, 8 of activations); Esser et al. 2019 (arXiv 1902.08153)",
    knobs={"step": Knob("found", choices=("found", "learned"), doc="from the greatest weight, or trained with them")},
)
@dataclass(frozen=True)
class W4A8(_DynamicRows):
    """Weights of 4 bits per output channel, activations as w8a8. Weights are widened to int8 once, when loaded."""

    name: ClassVar[str] = "w4a8"

    step: str = "found"

    @property
    def learns(self) -> bool:
        """See `Projected`."""
        return self.step == "learned"

    def store(self, weight: Tensor) -> State:
        """Half a byte a weight, four an output channel."""
        whole, scale = quantize_rows(weight, 4)
        return {"weight": pack_int4(whole, whole.shape[1]), "scale": scale.squeeze(1)}

    def store_learned(self, weight: Tensor, factor: Tensor) -> State:
        """The same; what a smaller step leaves outside saturates."""
        scale = symmetric_scale(weight, 4) * factor
        whole = quantize(weight, scale, 0, -7, 7)
        return {"weight": pack_int4(whole, whole.shape[1]), "scale": scale.squeeze(1)}

    def fake_learned(self, weight: Tensor, factor: Tensor) -> Tensor:
        """See `Projected`."""
        return learned_step(weight, symmetric_scale(weight.detach(), 4) * factor, 4)

    def ready(self, stored: State, bias: Tensor | None, inputs: int) -> _Ready:
        """See `Projected`."""
        return _Ready(unpack_int4(stored["weight"], inputs, inputs), stored["scale"], bias)

    def fake_weight(self, weight: Tensor) -> Tensor:
        """See `Projected`."""
        return fake_rows(weight, 4)

    def instead(self, device: str, runtime: str) -> str:
        """The product is one of 8 bits, as w8a8's: no device here multiplies 4 by 8."""
        return "int8: its weights are widened from 4 to 8 bits once, when they are loaded"


@register(
    "quant",
    "w8a8_static",
    paper=f"{_WHITEPAPER}, sections 2.1 and 3.1",
    knobs={"observer": Knob("minmax", choices=tuple(OBSERVERS), doc="how the range of activations is found")},
)
@dataclass(frozen=True)
class W8A8Static(Projected):
    """Weights int8 per output channel, activations uint8 of one scale and zero point a layer: from calibration."""

    name: ClassVar[str] = "w8a8_static"
    whole: ClassVar[bool] = True

    observer: str = "minmax"

    def store(self, weight: Tensor) -> State:
        """A byte a weight, four an output channel; and eight a layer for its inputs' range."""
        return _channels(weight, 8)

    def ready(self, stored: State, bias: Tensor | None, inputs: int) -> _Ready:
        """With the scale of the inputs in that of the outputs, and their zero point in what is added.

        The bias is as many whole steps of the sums as are nearest to it (Jacob et al. 2018, arXiv 1712.05877, section
        2.4): what a runtime fuses into its product, so that all compute the same.
        """
        weight, scale, zero_point = stored["weight"], stored["input_scale"], stored["input_zero_point"]
        both = stored["scale"] * scale
        if use_triton(both):  # kernels multiply int8 by int8
            zero_point = zero_point - 128
        steps = weight.sum(1, dtype=torch.int32) * -zero_point
        if bias is not None:
            whole = (bias / both).round()
            steps, bias = steps + whole.to(torch.int32), whole * both
        return _Ready(weight, both, steps * both, steps, stored["scale"], bias, scale, zero_point)

    def enter(self, rows: Tensor, ready: _Ready) -> Tensor:
        """(M, K) uint8, or int8 for a kernel."""
        assert ready.input_scale is not None and ready.input_zero_point is not None
        low, high = (-128, 127) if use_triton(ready.scale) else (0, 255)
        # Divided, not multiplied by a reciprocal as `quantize` does: so QuantizeLinear of ONNX is defined.
        whole = (rows.float() / ready.input_scale).round_().add_(ready.input_zero_point).clamp_(low, high)
        return whole.to(torch.int8 if low < 0 else torch.uint8)

    def product(self, entered: Tensor, ready: _Ready) -> Tensor:
        """See `Projected`."""
        if use_triton(ready.scale):
            return scaled_linear(entered, None, ready.weight, ready.scale, ready.shift)
        rows, inputs = entered.shape
        path = products.choose("int8_static", rows, inputs, len(ready.weight))
        if path == "onednn":
            assert ready.input_scale is not None and ready.input_zero_point is not None
            ranges = ready.input_scale, ready.input_zero_point
            scale = ready.weight_scale if ready.weight_scale is not None else ready.scale
            return products.onednn_linear(entered, *ranges, ready.packed(rows), scale, ready.bias)
        assert ready.steps is not None
        sums = products.SUMS[path](entered, ready.weight).to(torch.int32)
        return epilogue(sums + ready.steps, None, ready.scale, None)

    def fake_weight(self, weight: Tensor) -> Tensor:
        """See `Projected`."""
        return fake_rows(weight, 8)

    def fake_input(self, rows: Tensor) -> Tensor:
        """Of the range of the batch at hand, which calibration replaces when the weights are final."""
        scale, zero_point = affine_parameters(*torch.aminmax(rows.detach()), 0, 255)
        whole = quantize(rows.detach(), scale, zero_point, 0, 255)
        return straight_through(rows, dequantize(whole, scale, zero_point))

    def new_observer(self) -> Observer:
        """See `Projected`."""
        return OBSERVERS[self.observer]()

    def instead(self, device: str, runtime: str) -> str:
        """Nothing else; ONNX Runtime fuses what `qdq` writes into products of integers."""
        return ""


class _WeightOnly(Projected):
    """Activations stay floats."""

    flattens: ClassVar[bool] = False

    def fake_input(self, rows: Tensor) -> Tensor:
        """As they are."""
        return rows


@register("quant", "w8a16", paper=f"{_WHITEPAPER}, section 3.1.1 (weights alone)")
@dataclass(frozen=True)
class W8A16(_WeightOnly):
    """Weights int8 per output channel; activations and products in floating point, of the input's type."""

    name: ClassVar[str] = "w8a16"

    def store(self, weight: Tensor) -> State:
        """A byte a weight, four an output channel."""
        return _channels(weight, 8)

    def ready(self, stored: State, bias: Tensor | None, inputs: int) -> _Floats:
        """See `Projected`."""
        weight, scale = stored["weight"], stored["scale"]
        return _Floats(lambda: dequantize(weight, scale.unsqueeze(1)), bias, weight, scale)

    def product(self, entered: Tensor, ready: _Floats) -> Tensor:
        """See `Projected`."""
        inputs = entered.shape[-1]
        path = products.choose("weight_int8", entered.numel() // inputs, inputs, len(ready.packed))
        if path == "int8pack" and entered.device.type == "cpu":
            rows = entered.reshape(-1, inputs)
            y = torch._weight_int8pack_mm(rows, ready.packed, ready.scale.to(entered.dtype))
            return y if ready.bias is None else y + ready.bias
        return ready.linear(entered)

    def fake_weight(self, weight: Tensor) -> Tensor:
        """See `Projected`."""
        return fake_rows(weight, 8)

    def instead(self, device: str, runtime: str) -> str:
        """Where weights are widened."""
        if device == "cpu" and runtime == "eager":
            return _widened("weight_int8")
        return _WIDENED


@register(
    "quant",
    "w4a16",
    paper="Frantar et al. 2022, GPTQ (arXiv 2210.17323), section 4 for groups; rounded to nearest",
    knobs={"group": Knob(32, choices=(16, 32, 64, 128), doc="inputs that share a scale")},
)
@dataclass(frozen=True)
class W4A16(_WeightOnly):
    """Weights of 4 bits, symmetric, with a bfloat16 scale for each group of inputs; activations stay floats.

    A layer with no more inputs than a group has one group.
    """

    name: ClassVar[str] = "w4a16"

    group: int = 32

    def of(self, inputs: int) -> int:
        """Inputs of a group of a layer."""
        return min(self.group, inputs)

    def check(self, outputs: int, inputs: int) -> str:
        """Groups must divide the inputs."""
        if inputs % self.of(inputs) == 0:
            return ""
        fitting = [str(group) for group in (16, 32, 64, 128) if group >= inputs or inputs % group == 0]
        others = f"Groups of {', '.join(fitting)} do. " if fitting else ""
        return (
            f"groups of {self.group} do not divide {inputs} inputs. {others}Choose another group, width or expansion, "
            "or another policy for this branch."
        )

    def store(self, weight: Tensor) -> State:
        """Half a byte a weight, two a group of an output channel."""
        grouped = weight.reshape(-1, self.of(weight.shape[1]))
        scale = symmetric_scale(grouped, 4).bfloat16()
        whole = quantize(grouped, scale.float(), 0, -8, 7).view(weight.shape)
        return {
            "weight": pack_int4(whole, self.of(weight.shape[1])),
            "scale": scale.view(len(weight), -1),
        }

    def ready(self, stored: State, bias: Tensor | None, inputs: int) -> _Floats:
        """See `Projected`."""
        packed, scale, group = stored["weight"], stored["scale"], self.of(inputs)

        def widened() -> Tensor:
            whole = unpack_int4(packed, inputs, group).view(*scale.shape, group)
            return dequantize(whole, scale.float().unsqueeze(-1)).flatten(1)

        return _Floats(widened, bias, packed, scale)

    def product(self, entered: Tensor, ready: _Floats) -> Tensor:
        """See `Projected`."""
        inputs = entered.shape[-1]
        outputs, groups = ready.scale.shape
        group, count = inputs // groups, entered.numel() // inputs
        if use_triton(entered) and products.kernel_takes_group(group):
            return int4_linear(entered.reshape(-1, inputs), ready.packed, ready.scale, ready.bias)
        if products.choose("weight_int4", count, inputs, outputs) == "int4pack" and products.int4pack_takes(group):
            rows = entered.reshape(-1, inputs)
            packed, scales = ready.kept("int4pack", lambda: products.int4_pack(ready.packed, ready.scale, inputs))
            y = torch._weight_int4pack_mm_for_cpu(rows, packed, group, scales)[:, :outputs]
            return y if ready.bias is None else y + ready.bias
        return ready.linear(entered)

    def fake_weight(self, weight: Tensor) -> Tensor:
        """See `Projected`."""
        grouped = weight.reshape(-1, self.of(weight.shape[1]))
        scale = symmetric_scale(grouped.detach().float(), 4).bfloat16().float()
        whole = quantize(grouped.detach(), scale, 0, -8, 7)
        return straight_through(weight, dequantize(whole, scale).view(weight.shape))

    def instead(self, device: str, runtime: str) -> str:
        """Where weights are widened."""
        if device == "cuda" and runtime in ("eager", "graph") and products.kernel_takes_group(self.group):
            return ""
        if device == "cpu" and runtime == "eager":
            return _widened("weight_int4")
        return _WIDENED


_WIDENED = "float32: its weights are widened when they are loaded, and products are those of floats"


def _widened(kind: str) -> str:
    paths = products.paths_of(kind)
    if paths == {"widened"}:
        return _WIDENED
    return f"{_WIDENED}, at the shapes where that is faster" if "widened" in paths else ""
