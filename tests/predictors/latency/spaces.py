"""Spaces and inputs that the tests of this folder share."""

from __future__ import annotations

from mixnas.search_space.units import IOSpec

IMAGE = IOSpec("image", (8, 8), 1, 10)
CAUSAL = IOSpec("causal", (16,), 20, 20, head="token", tokens=True)

# Everything that changes which unit stands where: strides, shared blocks, knobs without a choice of operator, depth.
TRICKY = {
    "stem": [{"name": "conv", "stride": [1, 2], "kernel_size": [3, 5]}, {"name": "patch", "patch_size": 2}],
    "norm": ["layer", "rms"],
    "stages": [
        {
            "width": [8, 16],
            "depth": [1, 3],
            "downsample": ["none", "conv"],
            "block": {
                "mixer": [{"name": "dwconv", "kernel_size": [3, 5]}, {"name": "attention", "heads": [1, 2, 4]}],
                "gate": ["none", {"name": "se", "reduction": [2, 4]}],
                "channel_mixer": ["none", {"name": "mlp", "expansion": [1, 2]}],
                "quant": {"mixer": ["fp32", "bf16"], "channel_mixer": ["bf16", "fp32"]},
            },
        },
        {
            "width": 16,
            "depth": [1, 2],
            "downsample": ["patch", "none"],
            "share": True,
            "block": {"mixer": ["identity", "pooling"], "channel_mixer": "none", "recursion": [1, 2]},
        },
        {
            "width": 16,
            "depth": [1, 2],
            "block": {"mixer": "identity", "channel_mixer": {"name": "mlp", "expansion": 1}},
        },
        {
            "width": [16, 24],
            "depth": [2, 3],
            "block": {
                "mixer": {"name": "dwconv", "kernel_size": [3, 5, 7]},
                "channel_mixer": [
                    {"name": "inverted_residual", "expansion": [1, 2], "kernel_size": [3, 5]},
                    {"name": "inverted_residual", "expansion": 4, "kernel_size": 3},
                ],
                "recursion": [1, 3],
            },
        },
        {"width": 16, "blocks": [{"mixer": "identity", "channel_mixer": ["none", "mlp"], "quant": ["fp32", "bf16"]}]},
        {"width": 16, "depth": [1, 2], "block": {"mixer": "identity", "channel_mixer": "mlp", "recursion": [1, 2]}},
    ],
}
TOKENS = {
    "stem": "embedding",
    "stages": [
        {
            "width": 16,
            "depth": [1, 2],
            "block": {"mixer": ["attention", "linear_attention"], "channel_mixer": ["mlp", "swiglu"]},
        }
    ],
}
FIXED = {"stem": "conv", "stages": [{"width": 8, "block": {"mixer": "identity", "channel_mixer": "mlp"}}]}
SPACES = {"tricky": (TRICKY, IOSpec("image", (32, 32), 1, 10)), "tokens": (TOKENS, CAUSAL), "fixed": (FIXED, IMAGE)}

# Few operators, each of another kind of work.
PLAIN = {
    "stem": {"name": "conv", "stride": 2},
    "stages": [
        {
            "width": [8, 64],
            "block": {
                "mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 7]}, {"name": "attention", "heads": 2}],
                "channel_mixer": [{"name": "mlp", "expansion": 2}, {"name": "swiglu", "expansion": 2}],
            },
        }
    ],
}
