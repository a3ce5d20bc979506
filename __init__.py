"""mixnas: neural architecture search over token mixers, kernels, gating, depth and quantization."""

__version__ = "0.1.0"
