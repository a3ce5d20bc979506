"""What integer policies have in common: two layers that stand in a projection's place.

`Prepared` has the projection's own parameters. Where gradients are recorded it computes with fake quantization, which
passes them; otherwise, in judgement, it quantizes its weights and computes exactly as `Stored` does, which holds what
the device stores. A convolution is a product too: of its windows.
"""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels import dispatch
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.operators.layers import Conv, Linear, projections
from mixnas.search_space.operators.quantization.affine import affine_parameters, check_scales
from mixnas.search_space.operators.quantization.observers import Observer
from mixnas.search_space.operators.quantization.policy import deployed_bytes

State = dict[str, Tensor]


class Projected(ABC):
    """The policy protocol for policies that say what is stored of a weight matrix and how rows are multiplied by it.

    Whoever derives is a frozen dataclass. Weights are (N, K): outputs by inputs, of a convolution its window's.
    """

    name: ClassVar[str]
    """As it is registered."""
    shares: ClassVar[bool] = False
    """Whether what `enter` makes of an input depends on the input alone, so that q, k and v make it once."""

    flattens: ClassVar[bool] = True
    """Whether products are of (M, K) rows, rather than of tokens as they come."""

    whole: ClassVar[bool] = False
    """Whether what `enter` makes are whole numbers, so that sums of products are exact."""

    def check(self, outputs: int, inputs: int) -> str:
        """Why a layer of this size can't be stored so, and what to do; empty where it can."""
        return ""

    def covers(self, inputs: int) -> bool:
        """Whether a layer of so many inputs is taken at all; others stay as they are."""
        return True

    @abstractmethod
    def store(self, weight: Tensor) -> State:
        """What the device stores of a weight matrix, bias apart."""

    def store_learned(self, weight: Tensor, factor: Tensor) -> State:
        """`store` with steps that are `factor` (N, 1) times those which are found; of a policy that `learns`."""
        raise NotImplementedError

    def fake_learned(self, weight: Tensor, factor: Tensor) -> Tensor:
        """`fake_weight` likewise; gradients reach the factor too."""
        raise NotImplementedError

    @abstractmethod
    def ready(self, stored: State, bias: Tensor | None, inputs: int) -> Any:
        """What products need, made once from what is stored."""

    def enter(self, rows: Tensor, ready: Any) -> Any:
        """What is multiplied: (M, K) floats, or what is made of them."""
        return rows

    @abstractmethod
    def product(self, entered: Any, ready: Any) -> Tensor:
        """(M, N), bias included."""

    @abstractmethod
    def fake_weight(self, weight: Tensor) -> Tensor:
        """The weights that are stored, as floats that gradients pass."""

    def fake_input(self, rows: Tensor) -> Tensor:
        """What `enter` stands for, as floats that gradients pass."""
        return rows

    @property
    def learns(self) -> bool:
        """Whether each output channel has a step that is learned; then `store` and `fake_weight` take its factor."""
        return False

    def new_observer(self) -> Observer | None:
        """What finds the range of a layer's inputs; None where none is needed."""
        return None

    def prepare(self, module: nn.Module) -> nn.Module:
        """See `Policy`; a convolution in groups or with gaps stays as it is."""
        shared = _Shared()
        for path, layer in list(projections(module)):
            if not _covers(layer):
                continue
            outputs, inputs = layer.weight.shape[0], layer.weight[0].numel()
            if not self.covers(inputs):
                continue
            if problem := self.check(outputs, inputs):
                where = f"layer {path!r} of {type(module).__name__}" if path else f"a {type(module).__name__} layer"
                raise ConfigError(f"policy {self.name} cannot take {where}, {inputs} to {outputs}: {problem}")
            module = _put(module, path, Prepared(layer, self, shared))
        return module

    def deploy(self, module: nn.Module) -> nn.Module:
        """See `Policy`."""
        for path, layer in list(module.named_modules()):
            if isinstance(layer, Prepared):
                module = _put(module, path, Stored(layer))
        return module

    def weight_bytes(self, module: nn.Module) -> int:
        """See `Policy`: to the byte."""
        return deployed_bytes(self, module)

    @abstractmethod
    def instead(self, device: str, runtime: str) -> str:
        """See `Policy`."""

    def why_not(self, device: str, runtime: str) -> str:
        """See `Policy`: it runs everywhere, as itself or as what `instead` says."""
        return ""


def _covers(layer: nn.Module) -> bool:
    if isinstance(layer, Conv):
        return layer.groups == 1 and set(layer.dilation) == {1} and not isinstance(layer.padding, str)
    return isinstance(layer, Linear)


def _put(module: nn.Module, path: str, layer: nn.Module) -> nn.Module:
    if not path:
        return layer
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)
    return module


class _Shared:
    """The input that the layers of one operator quantized last: q, k and v are given the same, and quantize it once.

    A layer that asks again is in a later forward, where the same tensor may hold something else.
    """

    def __init__(self) -> None:
        self._forget()

    def __deepcopy__(self, memo: Any) -> _Shared:
        return _Shared()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Shared, ()

    def _forget(self, _: object = None) -> None:
        self._input: weakref.ref[Tensor] | None = None
        self._made: Any = None
        self._served: set[int] = set()

    def get(self, layer: nn.Module, x: Tensor, make: Callable[[], Any]) -> Any:
        if self._input is None or self._input() is not x or id(layer) in self._served:
            self._made, self._served = make(), set()
            self._input = weakref.ref(x, self._forget)
        self._served.add(id(layer))
        return self._made


class Ranges(nn.Module):
    """The range of a layer's inputs, found by `calibrating`: a scale and a zero point, of four standard deviations."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((), 8 / 255, device=device))
        self.register_buffer("zero_point", torch.full((), 128, dtype=torch.int32, device=device))


class Steps(nn.Module):
    """Learned steps (N outputs), each as the logarithm of a factor on the step that is found: 0 is what is found.

    As a factor, a step that was learned still suits a slice of the layer, and weights that have moved on.
    """

    def __init__(self, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(outputs, device=device))

    def factor(self) -> Tensor:
        """(N, 1)."""
        return self.log.exp().unsqueeze(1)


class _Layer(nn.Module):
    """What both layers are: rows of the input times a matrix."""

    def __init__(self, policy: Projected, shared: _Shared) -> None:
        super().__init__()
        self.policy, self.shared = policy, shared
        self.window: tuple[tuple[int, ...], ...] | None = None  # kernel size, stride and padding of a convolution

    def rows(self, x: Tensor) -> Tensor:
        """(M, K): tokens, or the windows of a convolution."""
        if self.window is None:
            return x.reshape(-1, x.shape[-1]) if x.dim() != 2 and self.policy.flattens else x
        (height, width), (down, right), (top, left) = self.window
        x = F.pad(x, (0, 0, left, left, top, top))
        windows = x.unfold(1, height, down).unfold(2, width, right)
        return windows.reshape(-1, x.shape[-1] * height * width)

    def shaped(self, y: Tensor, x: Tensor) -> Tensor:
        """The product's rows as the layer's output."""
        if self.window is None:
            return y if y.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])
        size = [
            (extent + 2 * around - kernel) // stride + 1
            for extent, kernel, stride, around in zip(x.shape[1:3], *self.window, strict=True)
        ]
        return y.view(x.shape[0], *size, y.shape[-1])

    def multiplied(self, x: Tensor, rows: Tensor, ready: Any) -> Tensor:
        """As deployed."""
        policy = self.policy
        if policy.shares and self.window is None:
            entered = self.shared.get(self, x, lambda: policy.enter(rows, ready))
        else:
            entered = policy.enter(rows, ready)
        return self.shaped(policy.product(entered, ready).to(x.dtype), x)


class Prepared(_Layer):
    """See the module.

    Attributes:
        observer: While one is there, each input is shown to it and the range is what it says.
    """

    def __init__(self, layer: Linear | Conv, policy: Projected, shared: _Shared) -> None:
        super().__init__(policy, shared)
        self.weight, self.bias = layer.weight, layer.bias
        if isinstance(layer, Conv):
            self.window = (layer.kernel_size, layer.stride, layer.padding)  # type: ignore[assignment]
        self.observer: Observer | None = None
        if policy.new_observer() is not None:
            self.add_module(policy.name, Ranges(layer.weight.device))
        elif policy.learns:
            self.add_module(policy.name, Steps(len(layer.weight), layer.weight.device))

    @property
    def steps(self) -> Steps | None:
        """Of its weights, where the policy learns them."""
        found = self._modules.get(self.policy.name)
        return found if isinstance(found, Steps) else None

    @property
    def ranges(self) -> Ranges | None:
        """Of its inputs, where the policy needs them."""
        found = self._modules.get(self.policy.name)
        return found if isinstance(found, Ranges) else None

    def stored(self) -> State:
        """What the device stores, bias apart."""
        weight = self.weight.detach().flatten(1).float()
        steps = self.steps
        stored = (
            self.policy.store(weight)
            if steps is None
            else self.policy.store_learned(weight, steps.factor().detach().float())
        )
        if self.ranges is not None:
            stored |= {"input_scale": self.ranges.scale, "input_zero_point": self.ranges.zero_point}
        return stored

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        rows, weight = self.rows(x), self.weight.flatten(1)
        if torch.is_grad_enabled():
            steps = self.steps
            fake = (
                self.policy.fake_weight(weight) if steps is None else self.policy.fake_learned(weight, steps.factor())
            )
            y = F.linear(self.policy.fake_input(rows), fake, self.bias)
            return self.shaped(y, x)
        if self.observer is not None and self.ranges is not None:
            self.observer.see(rows)
            scale, zero_point = affine_parameters(*self.observer.range(), 0, 255)
            self.ranges.scale.copy_(scale)
            self.ranges.zero_point.copy_(zero_point)
        return self.multiplied(x, rows, self.policy.ready(self.stored(), self.bias, weight.shape[1]))


class Stored(_Layer):
    """What the device stores, and the products with it."""

    def __init__(self, layer: Prepared) -> None:
        super().__init__(layer.policy, layer.shared)
        self.window = layer.window
        self.inputs = layer.weight[0].numel()
        self.bias = layer.bias
        self._names = []
        with torch.no_grad():
            for name, tensor in layer.stored().items():
                self.register_buffer(name, tensor.clone())
                self._names.append(name)
        self._check()
        self._forget()

    def _check(self) -> None:
        for name in self._names:
            if name.endswith("scale"):
                check_scales(self.get_buffer(name), f"policy {self.policy.name}, {name} of a layer")

    def _forget(self) -> None:
        self._ready: Any = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        self._forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*arguments)
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": None}  # what products need is made again, and may be what can't be copied

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if dispatch.tracing():  # what is kept is no buffer: a trace would hold it as a further constant
            ready = self._made()
        else:
            if self._ready is None:
                with dispatch.keeping():
                    self._ready = self._made()
            ready = self._ready
        return self.multiplied(x, self.rows(x), ready)

    def _made(self) -> Any:
        """What products need, of the buffers."""
        stored: Any = {name: self._buffers[name] for name in self._names}
        return self.policy.ready(stored, self.bias, self.inputs)


def calibrated_layers(module: nn.Module) -> list[Prepared]:
    """The layers inside whose inputs have a range, which belongs to the weights that it was found with."""
    return [layer for layer in module.modules() if isinstance(layer, Prepared) and layer.ranges is not None]


@contextlib.contextmanager
def calibrating(module: nn.Module) -> Iterator[None]:
    """Within it, each forward without gradients shows the layers their inputs, and their ranges are found anew.

    Layers see what reaches them through those before, already quantized.

    Raises:
        ConfigError: An input is empty, NaN or infinite.
    """
    layers = calibrated_layers(module)
    for layer in layers:
        layer.observer = layer.policy.new_observer()
    try:
        yield
    finally:
        for layer in layers:
            layer.observer = None
