"""What stands in the place of functions that look at this machine, in code that stands alone."""

from __future__ import annotations

import torch


def choose(kind: str, rows: int, inputs: int, outputs: int) -> str:
    """How a product of few bits is computed: by torch's int8 product, which is wrong with one input; or as floats."""
    if kind.startswith("weight"):
        return "widened"
    return "int_mm" if inputs > 1 else "int32"


def exporting() -> bool:
    """Whether `torch.export` puts down what is computed."""
    return torch.compiler.is_exporting()
