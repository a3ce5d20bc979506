"""Compositions of channel mixers, gates and norms. A gate acts on its input as if the mixer did nothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import batch_norm, composition, depthwise, layer_norm, mean, pointwise

CHANNEL, GATE, NORM = "channel_mixer", "gate", "norm"


@composition("mlp", "torch's layers", axis=CHANNEL, first=False)
def mlp(m, x):
    return m.down(F.gelu(m.up(x)))


@composition("swiglu", "torch's layers", axis=CHANNEL, first=False)
def swiglu(m, x):
    return m.down(F.silu(m.gate(x)) * m.up(x))


@composition("star_mlp", "torch's layers", axis=CHANNEL, first=False)
def star_mlp(m, x):
    return m.down(m.scale * F.relu(m.up(x)) ** 2 + m.bias)


@composition("activator", "torch's layers and norm", axis=CHANNEL, first=False)
def activator(m, x):
    return m.down(layer_norm(F.gelu(m.gate(x)), m.norm) * layer_norm(m.up(x), m.norm))


@composition("grn_mlp", "torch's layers, the norm as its authors write it", axis=CHANNEL, first=False)
def grn_mlp(m, x):
    y = F.gelu(m.up(x))
    strength = torch.linalg.vector_norm(y, dim=tuple(range(1, y.dim() - 1)), keepdim=True)
    y = m.norm.weight * (y * (strength / (strength.mean(-1, keepdim=True) + 1e-6))) + m.norm.bias + y
    return m.down(y)


@composition("conv_glu", "torch's convolutions", axis=CHANNEL)
def conv_glu(m, x):
    return pointwise(F.gelu(depthwise(pointwise(x, m.gate), m.depthwise)) * pointwise(x, m.up), m.down)


@composition("gdfn", "torch's convolutions", axis=CHANNEL)
def gdfn(m, x):
    gate, up = depthwise(pointwise(x, m.gate), m.gate_depthwise), depthwise(pointwise(x, m.up), m.up_depthwise)
    return pointwise(F.gelu(gate) * up, m.down)


@composition("inverted_residual", "torch's convolutions", axis=CHANNEL)
def inverted_residual(m, x):
    return pointwise(F.gelu(depthwise(F.gelu(pointwise(x, m.up)), m.depthwise)), m.down)


@composition("uib", "torch's convolutions and batch norms", axis=CHANNEL)
def uib(m, x):
    y = F.relu(batch_norm(pointwise(batch_norm(depthwise(x, m.start), m.start_norm), m.up), m.up_norm))
    y = F.relu(batch_norm(depthwise(y, m.depthwise), m.depthwise_norm))
    return batch_norm(pointwise(y, m.down), m.down_norm)


@composition("moe", "a loop over the experts, each of the tokens that chose it", axis=CHANNEL, first=False)
def moe(m, x):
    tokens = x.flatten(0, -2)
    best, chosen = m.router(tokens).softmax(-1).max(-1)
    room = int(m.capacity * -(-len(tokens) // m.count))
    y = torch.zeros_like(tokens)
    for i, expert in enumerate(m.experts):
        (taken,) = torch.where(chosen == i)
        taken = taken[:room]
        y[taken] = best[taken].unsqueeze(-1) * expert.down(F.gelu(expert.up(tokens[taken])))
    return y.view(x.shape)


@composition("se", "torch's convolutions of one tap", axis=GATE)
def se(m, x):
    return x * torch.sigmoid(pointwise(F.relu(pointwise(mean(x), m.squeeze)), m.excite))


@composition("eca", "torch's convolution over channels", axis=GATE)
def eca(m, x):
    factors = F.conv1d(x.flatten(2).mean(-1).unsqueeze(1), m.weight, padding=m.kernel_size // 2)
    return x * torch.sigmoid(factors).view(x.shape[0], -1, *(1,) * (x.dim() - 2))


@composition("compact_channel_attention", "torch's convolution of one tap", axis=GATE)
def compact_channel_attention(m, x):
    return x * torch.sigmoid(pointwise(mean(x), m.linear))


@composition("output_sigmoid", "torch's layer", axis=GATE, first=False)
def output_sigmoid(m, x):
    return x * torch.sigmoid(m.linear(x))


@composition("value_gate", "torch's layer", axis=GATE, first=False)
def value_gate(m, x):
    return x * torch.sigmoid(m.linear(x))


@composition("g1_head_sigmoid", "torch's layer", axis=GATE, first=False)
def g1_head_sigmoid(m, x):
    return (x.view(*x.shape[:-1], m.heads, -1) * torch.sigmoid(m.linear(x)).unsqueeze(-1)).view(x.shape)


@composition("gated_cross", "torch's layers", axis=GATE, first=False)
def gated_cross(m, x):
    y = x
    for cross, gate in zip(m.crosses, m.gates, strict=True):
        y = x * cross(y) * torch.sigmoid(gate(y)) + y
    return y


@composition("polarized", "the authors' convolutions of one tap, products and softmaxes", axis=GATE)
def polarized(m, x):
    flat = x.flatten(2)
    gathered = pointwise(flat, m.value) @ pointwise(flat, m.key).softmax(-1).transpose(1, 2)
    channels = torch.sigmoid(pointwise(gathered, m.up))
    query = pointwise(flat, m.position_query).mean(-1, keepdim=True).transpose(1, 2)
    positions = torch.sigmoid((query @ pointwise(flat, m.position_value)).softmax(-1))
    return (flat * channels + flat * positions).view(x.shape)


@composition("layer", "torch.nn.functional.layer_norm", axis=NORM, first=False)
def layer(m, x):
    return layer_norm(x, m)


@composition("rms", "torch.nn.functional.rms_norm", axis=NORM, first=False)
def rms(m, x):
    return F.rms_norm(x, m.normalized_shape, m.weight, 1e-6)


@composition("batch", "torch.nn.functional.batch_norm", axis=NORM)
def batch(m, x):
    return batch_norm(x, m)


@composition("group", "torch.nn.functional.group_norm", axis=NORM)
def group(m, x):
    return F.group_norm(x, m.num_groups, m.weight, m.bias, m.eps)


@composition("prep_batch", "torch's batch norm, plus alpha times the input", axis=NORM)
def prep_batch(m, x):
    return batch_norm(x, m.batch) + m.alpha * x
