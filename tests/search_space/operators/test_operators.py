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
    # It counts the pairs that attend; the CPU form multiplies whole boxes and masks.
    multiplied_otherwise = frozenset({"neighborhood_attention"})


class TestGate(OperatorContract):
    axis = "gate"


class TestChannelMixer(OperatorContract):
    axis = "channel_mixer"


class TestHead(OperatorContract):
    axis = "head"
