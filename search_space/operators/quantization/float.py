"""Floating-point policies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from mixnas.search_space.operators.layers import projections
from mixnas.search_space.operators.quantization.policy import deployed_bytes
from mixnas.search_space.registry import register


@register("quant", "fp32", paper="IEEE 754-2019, binary32")
@dataclass(frozen=True)
class FP32:
    """Single precision throughout."""

    def prepare(self, module: nn.Module) -> nn.Module:
        """Leave it."""
        return module

    def deploy(self, module: nn.Module) -> nn.Module:
        """Leave it."""
        return module

    def weight_bytes(self, module: nn.Module) -> int:
        """Four bytes a weight."""
        return deployed_bytes(self, module)

    def why_not(self, device: str, runtime: str) -> str:
        """It runs everywhere."""
        return ""

    def instead(self, device: str, runtime: str) -> str:
        """Nothing else."""
        return ""


@register("quant", "bf16", paper="Kalamkar et al. 2019, A Study of BFLOAT16 for Training (arXiv 1905.12322)")
@dataclass(frozen=True)
class BF16:
    """Projections stored and computed in bfloat16; norms, depthwise taps and the residual stream in float32.

    What follows a projection inside an operator computes on its bfloat16 output.
    """

    def prepare(self, module: nn.Module) -> nn.Module:
        """Have every projection compute in bfloat16."""
        for _, layer in projections(module):
            layer.compute = torch.bfloat16
        return module

    def deploy(self, module: nn.Module) -> nn.Module:
        """Store the projections in bfloat16: computing rounds them in the same way."""
        for _, layer in projections(module):
            layer.to(torch.bfloat16)
        return module

    def weight_bytes(self, module: nn.Module) -> int:
        """Two bytes for each weight of a projection, four for the others."""
        return deployed_bytes(self, module)

    def why_not(self, device: str, runtime: str) -> str:
        """It runs everywhere, as itself or as what `instead` says."""
        return ""

    def instead(self, device: str, runtime: str) -> str:
        """Float32 in ONNX Runtime, whose CPU provider has no bfloat16 kernel but the conversion (tried with 1.31).

        Torch multiplies bfloat16 on every CPU, slowly on one that has no instructions for it.
        """
        if runtime == "onnxruntime" and device == "cpu":
            return "float32: ONNX Runtime has no bfloat16 kernels for a CPU; each operation's answer is rounded to it"
        return ""
