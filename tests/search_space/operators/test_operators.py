"""The contract of every operator there is, axis by axis."""

from __future__ import annotations

from ...contracts.operator import OperatorContract


class TestStem(OperatorContract):
    axis = "stem"


class TestNorm(OperatorContract):
    axis = "norm"


class TestDownsample(OperatorContract):
    axis = "downsample"


class TestMixer(OperatorContract):
    axis = "mixer"
    # One counts the pairs that attend, and multiplies whole boxes and masks on a CPU; the other makes its taps when it
    # first runs, and multiplies no more than it counts from then on.
    multiplied_otherwise = frozenset({"neighborhood_attention", "tv_conv"})


class TestGate(OperatorContract):
    axis = "gate"


class TestChannelMixer(OperatorContract):
    axis = "channel_mixer"


class TestHead(OperatorContract):
    axis = "head"
