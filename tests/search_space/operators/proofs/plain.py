"""Operators that other tests look at more closely, here against torch's own functions: the page has them all."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixnas.search_space import registry
from mixnas.search_space.registry import Context

from . import channels_first, channels_last, make, proof
from .frames import between


def _drawn(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _heads(x: Tensor, layer, count: int) -> Tensor:
    """(B, heads, N, d)."""
    return F.linear(x, layer.weight, layer.bias).unflatten(-1, (count, -1)).transpose(1, 2)


def _joined(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(-2)


# -- mixers -----------------------------------------------------------------------------------------------------------


@proof("mixer", "identity", "the input")
def identity(dtype):
    x = _drawn(dtype, 2, 5, 7, 8)
    return make("mixer", "identity", 8, (5, 7))(x), x.clone()


@proof("mixer", "pooling", "its definition: the mean of each window's tokens, minus the token")
def pooling(dtype):
    x = _drawn(dtype, 2, 5, 7, 8)
    means = torch.stack(
        [x[:, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].mean((1, 2)) for i in range(5) for j in range(7)], dim=1
    )
    return make("mixer", "pooling", 8, (5, 7))(x), means.view(x.shape) - x


@proof("mixer", "convnext", "torch's Conv2d, LayerNorm, Linear and GELU in the paper's order")
def convnext(dtype):
    mixer, x = make("mixer", "convnext", 8, (9, 7)).to(dtype), _drawn(dtype, 2, 9, 7, 8)
    y = F.conv2d(channels_first(x), mixer.conv.weight, mixer.conv.bias, padding=3, groups=8)
    y = F.layer_norm(channels_last(y), (8,), mixer.norm.weight, mixer.norm.bias, 1e-6)
    y = F.linear(F.gelu(F.linear(y, mixer.up.weight, mixer.up.bias)), mixer.down.weight, mixer.down.bias)
    return mixer(x), y


@proof("mixer", "linear_attention", "equation 8 of the paper, token by token, causal")
def linear_attention(dtype):
    mixer, x = make("mixer", "linear_attention", 12, (70,), "causal", heads=3).to(dtype), _drawn(dtype, 2, 70, 12)
    q, k, v = (_heads(x, layer, 3) for layer in (mixer.query, mixer.key, mixer.value))
    q, k = F.elu(q) + 1, F.elu(k) + 1
    weights = torch.einsum("bhid,bhjd->bhij", q, k).tril()
    y = torch.einsum("bhij,bhjd->bhid", weights, v) / (weights.sum(-1, keepdim=True) + 1e-6)
    return mixer(x), F.linear(_joined(y), mixer.out.weight, mixer.out.bias)


@proof("mixer", "neighborhood_attention", "softmax over all pairs of tokens, of which a mask leaves the nearest 3 x 3")
def neighborhood_attention(dtype):
    size, window = (5, 7), 3
    mixer = make("mixer", "neighborhood_attention", 12, size, heads=3, window=window).to(dtype)
    x, near = _drawn(dtype, 2, 35, 12), []
    for extent in size:
        begin = (torch.arange(extent) - window // 2).clamp(0, extent - window).unsqueeze(1)
        near.append((torch.arange(extent) >= begin) & (torch.arange(extent) < begin + window))
    mask = (near[0][:, None, :, None] & near[1][None, :, None, :]).flatten(2).flatten(0, 1)
    q, k, v = (_heads(x, layer, 3) for layer in (mixer.query, mixer.key, mixer.value))
    logits = (q @ k.mT / 4**0.5).masked_fill(~mask, float("-inf"))
    y = F.linear(_joined(logits.softmax(-1) @ v), mixer.out.weight, mixer.out.bias)
    return mixer(x.view(2, *size, 12)).flatten(1, 2), y


@proof("mixer", "gla", "the paper's recurrence, token by token, causal")
def gla(dtype):
    mixer, x = make("mixer", "gla", 16, (37,), "causal", heads=2).to(dtype), _drawn(dtype, 2, 37, 16)
    q, k, v = (_heads(x, layer, 2) for layer in (mixer.query, mixer.key, mixer.value))
    low = F.linear(x, mixer.decay_low.weight)
    decay = F.logsigmoid(F.linear(low, mixer.decay.weight, mixer.decay.bias)) / 16
    decay = decay.unflatten(-1, (2, -1)).transpose(1, 2).exp()
    state, answers = torch.zeros(2, 2, 4, 8, dtype=dtype), []
    for t in range(37):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        answers.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state) * 4**-0.5)
    y = F.rms_norm(torch.stack(answers, dim=1), (8,), mixer.norm.weight, 1e-5).flatten(-2)
    return mixer(x), F.linear(y * F.silu(F.linear(x, mixer.gate.weight)), mixer.out.weight)


@proof("mixer", "ssm", "Mamba's recurrence, token by token, causal")
def ssm(dtype):
    mixer = make("mixer", "ssm", 8, (19,), "causal", kernel_size=4, state=8).scan.to(dtype)
    x = _drawn(dtype, 2, 19, 8)
    z, gate = F.linear(x, mixer.input.weight), F.linear(x, mixer.gate.weight)
    padded = F.pad(z.mT, (3, 0))
    u = F.silu(F.conv1d(padded, mixer.conv.weight, mixer.conv.bias, groups=16)).mT
    step = F.linear(F.linear(u, mixer.step_low.weight), mixer.step.weight)
    step = F.softplus(step + mixer.step_bias)
    b, c, a = F.linear(u, mixer.b.weight), F.linear(u, mixer.c.weight), -mixer.log_decay.exp()
    state, answers = torch.zeros(2, 16, 8, dtype=dtype), []
    for t in range(19):
        state = torch.exp(step[:, t, :, None] * a) * state + (step[:, t] * u[:, t])[..., None] * b[:, t, None]
        answers.append((state * c[:, t, None]).sum(-1) + mixer.skip * u[:, t])
    y = torch.stack(answers, dim=1) * F.silu(gate)
    return mixer(x), F.linear(y, mixer.out.weight)


# -- gates and channel mixers -----------------------------------------------------------------------------------------


@proof("gate", "none", "the mixer's answer")
def no_gate(dtype):
    x = _drawn(dtype, 2, 5, 8)
    return make("gate", "none", 8, (5,))(x, torch.sin), torch.sin(x)


@proof("gate", "output_sigmoid", "its definition, by torch's functions")
def output_sigmoid(dtype):
    gate, x = make("gate", "output_sigmoid", 8, (5, 7)).to(dtype), _drawn(dtype, 2, 5, 7, 8)
    return gate(x, torch.sin), torch.sin(x) * torch.sigmoid(F.linear(x, gate.linear.weight, gate.linear.bias))


@proof("channel_mixer", "swiglu", "equation 6 of the paper, by torch's functions")
def swiglu(dtype):
    mixer, x = make("channel_mixer", "swiglu", 8, (11,)).to(dtype), _drawn(dtype, 2, 11, 8)
    hidden = F.silu(x @ mixer.gate.weight.T) * (x @ mixer.up.weight.T)
    return mixer(x), hidden @ mixer.down.weight.T


@proof("channel_mixer", "inverted_residual", "torch's convolutions and GELU, channels first")
def inverted_residual(dtype):
    mixer, x = make("channel_mixer", "inverted_residual", 8, (5, 7)).to(dtype), _drawn(dtype, 2, 5, 7, 8)
    y = F.gelu(F.conv2d(channels_first(x), mixer.up.weight[..., None, None], mixer.up.bias))
    y = F.gelu(F.conv2d(y, mixer.depthwise.weight, mixer.depthwise.bias, padding=1, groups=32))
    return mixer(x), channels_last(F.conv2d(y, mixer.down.weight[..., None, None], mixer.down.bias))


# -- norms ------------------------------------------------------------------------------------------------------------


def _with_numbers(norm: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(1)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand(tensor.shape, generator=generator))
    return norm.to(dtype)


@proof("norm", "layer", "its definition, from means and variances")
def layer(dtype):
    norm, x = _with_numbers(make("norm", "layer", 8, (5, 7)), dtype), _drawn(dtype, 2, 5, 7, 8)
    centred = x - x.mean(-1, keepdim=True)
    return norm(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight + norm.bias


@proof("norm", "rms", "its definition, from mean squares")
def rms(dtype):
    norm, x = _with_numbers(make("norm", "rms", 8, (11,), "causal"), dtype), _drawn(dtype, 2, 11, 8)
    return norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


@proof("norm", "batch", "torch.nn.BatchNorm2d, channels first")
def batch(dtype):
    norm, x = _with_numbers(make("norm", "batch", 8, (5, 7)), dtype), _drawn(dtype, 2, 5, 7, 8)
    theirs = torch.nn.BatchNorm2d(8).to(dtype).eval()
    theirs.load_state_dict(norm.state_dict())
    return norm(x), channels_last(theirs(channels_first(x)))


# -- stems, downsampling, heads ---------------------------------------------------------------------------------------


@proof("stem", "conv", "torch.nn.functional.conv2d, kernel 3, stride 2")
def conv_stem(dtype):
    stem, x = between("stem", "conv", 3, 8, (8, 12), stride=2).to(dtype), _drawn(dtype, 2, 8, 12, 3)
    return stem(x), channels_last(F.conv2d(channels_first(x), stem.conv.weight, stem.conv.bias, 2, 1))


@proof("stem", "linear", "one product, and the positions")
def linear_stem(dtype):
    stem, x = between("stem", "linear", 3, 8, (7,), position="learned").to(dtype), _drawn(dtype, 2, 7, 3)
    return stem(x), x @ stem.linear.weight.T + stem.linear.bias + stem.position


@proof("stem", "embedding", "a product with ones at the tokens' places")
def embedding(dtype):
    stem = between("stem", "embedding", 11, 8, (7,), position="learned").to(dtype)
    tokens = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))
    (table,) = (p for name, p in stem.named_parameters() if name != "position")
    return stem(tokens), F.one_hot(tokens, 11).to(dtype) @ table + stem.position


@proof("downsample", "none", "one product")
def no_downsample(dtype):
    module, x = between("downsample", "none", 8, 12, (5, 7)).to(dtype), _drawn(dtype, 2, 5, 7, 8)
    return module(x), x @ module.linear.weight.T + module.linear.bias


@proof("head", "pool", "torch's adaptive_avg_pool2d, and one product")
def pool(dtype):
    head = registry.get("head", "pool").build(Context(6, (3, 5), "image"), Context(4, (), "image")).to(dtype)
    x = _drawn(dtype, 2, 3, 5, 6)
    means = F.adaptive_avg_pool2d(channels_first(x), 1).flatten(1)
    return head(x), means @ head.linear.weight.T + head.linear.bias


@proof("head", "token", "torch's convolution of one tap")
def token(dtype):
    head, x = between("head", "token", 6, 4, (3, 5)).to(dtype), _drawn(dtype, 2, 3, 5, 6)
    return head(x), channels_last(F.conv2d(channels_first(x), head.linear.weight[..., None, None], head.linear.bias))


@proof("head", "unrolled", "its definition, position by position")
def unrolled(dtype):
    head, x = between("head", "unrolled", 6, 4, (9,)).to(dtype), _drawn(dtype, 2, 9, 6)

    def norm(y: Tensor, layer: torch.nn.Module) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight

    answers = []
    for t in range(9):
        angles = t * 10_000.0 ** -(torch.arange(3, dtype=torch.float64) / 2)
        y = x[:, -1] + torch.cat([angles.sin(), angles.cos()]).to(dtype)
        y = norm(F.gelu(F.linear(y, head.first.weight, head.first.bias)), head.middle_norm)
        y = norm(F.gelu(F.linear(y, head.second.weight, head.second.bias)), head.norm)
        answers.append(F.linear(y, head.linear.weight, head.linear.bias))
    return head(x), torch.stack(answers, dim=1)
