"""Zero-cost proxies: what an untrained network says about the trained one, from one batch.

Each takes a freshly initialised network and leaves it as it was; a higher score promises a better network. They were
published for convolutional networks with ReLU and batch norm; what had to be adapted for others is said at each.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mixnas.evaluators.tasks.task import Task
from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import ConfigError, nearest
from mixnas.search_space.network import Network

Proxy = Callable[[Network, Task, int, torch.Generator], float]
"""Called with an untrained network, the task, a batch size and a generator on the CPU."""

_ACTIVATIONS = (
    torch.ops.aten.relu.default,
    torch.ops.aten.gelu.default,
    torch.ops.aten.silu.default,
    torch.ops.aten.elu.default,
    torch.ops.aten.leaky_relu.default,
    torch.ops.aten.hardswish.default,
)
_ZEN_STEP = 0.01  # size of the perturbation; their code's `mixup_gamma`


def params(network: Network, task: Task, batch_size: int, generator: torch.Generator) -> float:
    """Number of parameters; the trivial baseline."""
    return float(cost(network.architecture, network.io).params)


def macs(network: Network, task: Task, batch_size: int, generator: torch.Generator) -> float:
    """Multiply-accumulates of one example; the trivial baseline."""
    return float(cost(network.architecture, network.io).macs)


def grad_norm(network: Network, task: Task, batch_size: int, generator: torch.Generator) -> float:
    """Sum over parameters of the gradient's norm (Abdelfattah et al. 2021, arXiv 2101.08134, section 3.2)."""
    network = _copy(network).train()
    x, y = _batch(task, batch_size, generator)
    task.loss(network(x), y).backward()
    return sum(p.grad.norm().item() for p in network.parameters() if p.grad is not None)


def synflow(network: Network, task: Task, batch_size: int, generator: torch.Generator) -> float:
    """Log of the synaptic flow, the sum of w dR/dw (Tanaka et al. 2020, arXiv 2006.05467, equation 3).

    R is the sum of outputs for an input of ones, all weights made positive, in double precision. Norms are left out, as
    Abdelfattah et al. 2021 do: they would divide the flow away. Gates multiply, so without norms the flow of a deep
    gated network can pass the largest double; it then has the logarithm of that.
    """
    network = _copy(network).double().eval()
    for norm in _norms(network):
        norm.forward = _unchanged  # type: ignore[method-assign]
    with torch.no_grad():
        for p in network.parameters():
            p.abs_()
    shape = (1, *network.io.size)
    # Tokens have no ones to enter: whatever is looked up is positive.
    ones = torch.zeros(shape, dtype=torch.long) if network.io.tokens else torch.ones(*shape, network.io.in_features)
    network(ones if network.io.tokens else ones.double()).sum().backward()
    flow = sum((p * p.grad).sum().item() for p in network.parameters() if p.grad is not None)
    limits = torch.finfo(torch.float64)
    return math.log(max(flow, limits.tiny) if math.isfinite(flow) else limits.max)


def naswot(network: Network, task: Task, batch_size: int, generator: torch.Generator) -> float:
    """Log determinant of the agreement of activation codes (Mellor et al. 2021, arXiv 2006.04647, section 3).

    A code has a bit for each input of an activation function (ReLU, GELU, SiLU, ...): whether it is positive.
    """
    network = _copy(network).train()
    x, _ = _batch(task, batch_size, generator)
    with torch.no_grad(), _Codes() as codes:
        network(x)
    agreement = torch.zeros(len(x), len(x), dtype=torch.float64)
    for bits in codes.found:
        if len(bits) == len(x):
            code = bits.flatten(1).to(torch.float64)
            agreement += code @ code.T + (1 - code) @ (1 - code).T
    sign, logdet = torch.linalg.slogdet(agreement)
    return logdet.item() if sign > 0 and math.isfinite(logdet.item()) else -1e9


def zen(network: Network, task: Task, batch_size: int, generator: torch.Generator) -> float:
    """Zen-score: log of how far features move with the input (Lin et al. 2021, arXiv 2102.01063, algorithm 1).

    Weights are standard normal and inputs noise; what norms divide by is added back, averaged over positions (theirs
    are batch norms, whose deviation it is). Features are what the head reads before it pools.
    """
    network = _copy(network).train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator))
                bias = getattr(module, "bias", None)
                if isinstance(bias, Tensor):
                    bias.zero_()
    logs: list[float] = []

    def divided_by(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        logs.append(inputs[0].double().std(dim=-1).mean().clamp(min=1e-30).log().item())

    *body, _ = (module for _, module in network.units())  # the head is the last
    for module in dict.fromkeys(body):  # one that runs again is one module
        for norm in _norms(module):
            norm.register_forward_pre_hook(divided_by)

    def features(x: Tensor) -> Tensor:
        for module in body:
            x = module(x)
        return x

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    with torch.no_grad():
        shape = (batch_size, *network.io.size)
        if network.io.tokens:  # move what the stem looks up instead
            tokens = torch.randint(network.io.in_features, shape, generator=generator)
            stem, *body = body
            x = stem(tokens)
        else:
            x = noise(*shape, network.io.in_features)
        first = features(x)
        deviations = sum(logs)
        second = features(x + _ZEN_STEP * noise(*x.shape))
    moved = (first - second).flatten(1).norm(dim=1).mean().clamp(min=1e-30).log().item()
    return moved + deviations


PROXIES: dict[str, Proxy] = {
    "params": params,
    "macs": macs,
    "grad_norm": grad_norm,
    "synflow": synflow,
    "naswot": naswot,
    "zen": zen,
}


def score(
    architecture: Architecture,
    task: Task,
    names: Sequence[str] = tuple(PROXIES),
    *,
    seed: int = 0,
    batch_size: int = 64,
) -> dict[str, float]:
    """Proxies of an architecture, each from the same fresh weights and the same batch.

    Args:
        architecture: Which.
        task: Whose training examples are looked at.
        names: Which proxies.
        seed: Of weights, batch and noise.
        batch_size: Examples in the batch.

    Raises:
        ConfigError: No proxy of that name.
    """
    for name in names:
        if name not in PROXIES:
            raise ConfigError(f"no proxy is called {name!r}.{nearest(name, PROXIES)} Allowed: {', '.join(PROXIES)}.")
    network = Network(architecture, task.io, generator=torch.Generator().manual_seed(seed))
    return {name: PROXIES[name](network, task, batch_size, torch.Generator().manual_seed(seed)) for name in names}


def _batch(task: Task, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    chosen = torch.randperm(len(task.train), generator=generator)[:batch_size]
    return task.train.gather(chosen)


def _copy(network: Network) -> Network:
    """A copy with the same weights, on the CPU, that may be spoilt."""
    copied = copy.deepcopy(network).cpu()
    copied.zero_grad()
    return copied


def _norms(module: nn.Module) -> list[nn.Module]:
    kinds = tuple(registry.get("norm", name).build for name in registry.names("norm"))
    return [m for m in module.modules() if isinstance(m, kinds)]


def _unchanged(x: Tensor) -> Tensor:
    return x


class _Codes(TorchDispatchMode):
    """Records where the inputs of activation functions are positive, whichever module calls them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ACTIVATIONS:
            self.found.append(args[0] > 0)
        return func(*args, **(kwargs or {}))
