"""What a quantization policy is: how a branch's weights are stored and its projections computed.

A policy is no module but a frozen object, made from its knobs, and knows nothing of the operator that it is given. It
takes the place of the operator's projections (`layers.projections`) twice:

- `prepare` puts layers there that compute in training and judgement as the policy will: on the same parameters under
  the same names. What a layer adds (a step size, say) lies in a submodule named as the policy is registered, so that
  two policies never share it in a super-network.
- `deploy` puts layers there that hold what is stored on the device, and compute the same.

What it does to a projection depends on that one alone, so a policy is counted layer by layer (`cost.op_cost`).
What a policy does not cover (norms, scans, depthwise taps) stays as it is, and is counted so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture, Block, Op
from mixnas.search_space.operators.layers import Conv, Linear, projections


class Policy(Protocol):
    """See the module."""

    def prepare(self, module: nn.Module) -> nn.Module:
        """Change a freshly built operator for training and judgement; returns it, or the layer in its place."""

    def deploy(self, module: nn.Module) -> nn.Module:
        """Change a prepared operator into what the device stores; returns it, or the layer in its place."""

    def weight_bytes(self, module: nn.Module) -> int:
        """Bytes of a prepared operator's state as `deploy` would leave it; the operator stays as it is."""

    def why_not(self, device: str, runtime: str) -> str:
        """Why it can't run there at all, in words; empty where it does.

        Args:
            device: "cpu" or "cuda".
            runtime: "eager", "compiled", "onnxruntime" or "graph".
        """

    def instead(self, device: str, runtime: str) -> str:
        """What runs there in its place, in words, where products are not those that its name says; else empty.

        Latency measured there is that of what runs.

        Args:
            device: See `why_not`.
            runtime: Likewise.
        """


def replace_projections(module: nn.Module, make: Callable[[Linear | Conv], nn.Module]) -> nn.Module:
    """Put `make(layer)` in the place of every projection inside; returns the module, or what took its place."""
    for path, layer in list(projections(module)):
        if not path:
            return make(layer)
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, make(layer))
    return module


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's state: its parameters and persistent buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def deployed_bytes(policy: Policy, module: nn.Module) -> int:
    """`Policy.weight_bytes` by deploying a copy that holds no data."""
    return stored_bytes(policy.deploy(copy.deepcopy(module).to("meta")))


@lru_cache(maxsize=4096)
def policy_of(op: Op) -> Policy:
    """The policy that an architecture names."""
    policy: Policy = registry.get("quant", op.name).build(**op.options)
    return policy


def uniform(architecture: Architecture, quant: Op) -> Architecture:
    """The same architecture with one policy throughout."""

    def block(one: Block) -> Block:
        return replace(one, quant=quant, channel_quant=quant)

    stages = (replace(stage, blocks=tuple(map(block, stage.blocks))) for stage in architecture.stages)
    return replace(architecture, stages=tuple(stages))


def with_policies(architecture: Architecture, policies: Mapping[str, Op]) -> Architecture:
    """The same architecture with other policies of some branches.

    Args:
        architecture: Whose branches without a policy here keep their own.
        policies: By the names of branches, as in `units.plan`: "stages.0.blocks.1.token".
    """
    stages = []
    for s, stage in enumerate(architecture.stages):
        blocks = []
        for b, block in enumerate(stage.blocks):
            name = f"stages.{s}.blocks.{b}"
            quant = policies.get(f"{name}.token", block.quant)
            channel_quant = policies.get(f"{name}.channel", block.channel_quant)
            blocks.append(replace(block, quant=quant, channel_quant=channel_quant))
        stages.append(replace(stage, blocks=tuple(blocks)))
    return replace(architecture, stages=tuple(stages))


@lru_cache(maxsize=4096)
def prunes(op: Op) -> bool:
    """Whether a policy leaves weights out, so that training under it leaves them untrained: its `prunes`."""
    return bool(getattr(policy_of(op), "prunes", False))


@lru_cache(maxsize=4096)
def adds_state(op: Op) -> bool:
    """Whether a policy's prepared layers have parameters or persistent buffers beside those of the layers."""
    with torch.device("meta"):
        sample = nn.Sequential(Linear(8, 8), Conv(8, 8, 1))
    before = set(sample.state_dict())
    return set(policy_of(op).prepare(sample).state_dict()) != before
