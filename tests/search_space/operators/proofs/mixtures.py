"""Linear-time mixers over two axes, mixtures of experts, and norms."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from mixnas.search_space.operators.auxiliary import collected

from . import channels_first, channels_last, count, make, params, proof
from .coarse_attention import _drawn, _randomised


def _gated_mlp(layer, x, dim):
    """MAXIM's gMLP on the places of one axis of (..., C), by einsum over them."""
    width = (x.shape[-1],)
    n = F.layer_norm(x, width, layer.norm.weight, layer.norm.bias, 1e-6)
    kept, gate = (F.gelu(F.linear(n, p.weight, p.bias), approximate="tanh") for p in (layer.keep, layer.gate))
    gate = F.layer_norm(gate, width, layer.gate_norm.weight, layer.gate_norm.bias, 1e-6).movedim(dim, 0)
    gate = torch.einsum("qp,p...->q...", layer.mix.weight, gate).movedim(0, dim) + layer.mix.bias.view(
        [-1 if d == dim else 1 for d in range(x.dim())]
    )
    return x + F.linear(kept * (gate + 1), layer.out.weight, layer.out.bias)


@proof("mixer", "multi_axis_mlp", "formula of catalogue a, A17, cell by cell and block by block")
def multi_axis_mlp(dtype):
    """A grid of 2 x 2 cells of 3 x 4 places; blocks of 2 x 2."""
    width, size = 8, (6, 8)
    mixer = _randomised(make("mixer", "multi_axis_mlp", width, size, block=2, grid=2), dtype)
    x = _drawn(2, *size, width, dtype=dtype)
    u, v = (F.gelu(p(x), approximate="tanh") for p in (mixer.to_grid, mixer.to_block))
    across, inside = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(3):
        for j in range(4):  # one place of all four cells
            places = u[:, i::3, j::4].flatten(1, 2)
            across[:, i::3, j::4] = _gated_mlp(mixer.across, places, 1).unflatten(1, (2, 2))
    for i in range(0, 6, 2):
        for j in range(0, 8, 2):
            block = v[:, i : i + 2, j : j + 2].flatten(1, 2)
            inside[:, i : i + 2, j : j + 2] = _gated_mlp(mixer.inside, block, 1).unflatten(1, (2, 2))
    both = torch.cat([mixer.from_grid.weight, mixer.from_block.weight], dim=1)
    return mixer(x), F.linear(torch.cat([across, inside], dim=-1), both, mixer.from_grid.bias)


@count("mixer", "multi_axis_mlp", "MAXIM S-1", 6_108_515)
def maxim():
    """A U-Net of three scales: two gated layers and two convolutions at each, cross gating between its halves."""

    def conv(before, width, extent=1):
        return extent**2 * before * width + width

    def excited(width):
        return conv(width, width // 4) + conv(width // 4, width)

    def mixed(width, extent):  # behind a norm
        return 2 * width + params("mixer", "multi_axis_mlp", width, (64, 64), block=extent, grid=extent)

    def block(before, width, extent):
        residual = 2 * width + 2 * conv(width, width, 3) + excited(width)
        return conv(before, width) + 2 * (mixed(width, extent) + residual)

    def crossed(before, width, extent):
        tokens = extent**2
        gates = 2 * width + conv(width, 2 * width) + 2 * conv(tokens, tokens) + conv(2 * width, width)
        each = 2 * width + conv(width, width) + gates + conv(width, width)
        return conv(before, width, 2) + conv(3 * width, width) + conv(width, width) + 2 * each

    widths, extents = (32, 64, 128), (16, 16, 8)
    total = conv(3, 32, 3) + conv(32, 3, 3)
    for i, (width, extent) in enumerate(zip(widths, extents, strict=True)):
        finer, coarser = (64, 32, 64)[i], (64, 128, 128)[i]
        total += block(finer, width, extent) + conv(width, width, 4)
        total += 2 * sum(conv(other, width) for other in widths)  # every scale is read by both halves
        total += crossed(coarser, width, extent)
        total += conv(coarser, width, 2) + block(4 * width, width, extent)
    bottleneck = 2 * 128 + 2 * conv(128, 128) + excited(128)
    return total + 2 * (conv(128, 128) + 2 * (mixed(128, 8) + bottleneck))


def _kv_gated(dtype, *, form, gates):
    """Over all pairs of tokens, without the state that makes it linear."""
    size, width, heads = (5, 7), 12, 3
    mixer = make("mixer", "kv_gated_linear", width, size, heads=heads, form=form, gates=gates)
    mixer = _randomised(mixer, dtype)
    x = _drawn(2, *size, width, dtype=dtype)
    tokens = x.flatten(1, 2)
    q, k, v = (p(tokens).chunk(heads, dim=-1) for p in (mixer.query, mixer.key, mixer.value))
    outputs = []
    for h in range(heads):
        row = h if gates == "heads" else 0
        a, b = F.relu(q[h]) + 1e-6, (F.relu(k[h]) + 1e-6) * mixer.key_gate[row][:, None]
        c = v[h] * mixer.value_gate[row][:, None]
        weights = torch.einsum("bqd,bkd->bqk", a, b) / 35
        if form == "division":
            outputs.append(weights @ c / (weights.sum(-1, keepdim=True) + 1e-6))
        else:
            weights = weights * 4**-0.5
            outputs.append((weights + (1 - weights.sum(-1, keepdim=True)) / 35) @ c)
    window = F.conv2d(channels_first(x), mixer.window.weight, mixer.window.bias, padding=2, groups=width)
    return mixer(x).flatten(1, 2), mixer.out(torch.cat(outputs, dim=-1) + channels_last(window).flatten(1, 2))


for _form, _gates in (("division", "heads"), ("subtraction", "shared")):
    proof("mixer", "kv_gated_linear", "formula of catalogue a, A8, over all pairs of tokens")(
        functools.partial(_kv_gated, form=_form, gates=_gates)
    )


def _routed(dtype, *, chosen, kind):
    """Token by token, with a count of what each expert has taken."""
    width, experts, tokens = 8, 4, 14
    size = (2, 7) if kind == "image" else (tokens,)
    module = make("channel_mixer", "moe", width, size, kind, chosen=chosen, capacity=1.0).to(dtype)
    module.router.weight.copy_(2 * _drawn(experts, width, dtype=dtype))
    x = _drawn(3, *size, width, dtype=dtype)
    expected, room, dropped = torch.zeros(3, tokens, width, dtype=dtype), chosen * 4, 0
    for rows, answers in zip(x.flatten(1, -2), expected, strict=True):
        taken = [0] * experts
        for t, row in enumerate(rows):
            gates = torch.softmax(module.router.weight @ row, dim=0)
            best = sorted(range(experts), key=lambda e: -float(gates[e]))[:chosen]
            total = sum(gates[e] for e in best) if chosen > 1 else 1
            for e in best:
                if taken[e] < room:
                    answers[t] += gates[e] / total * module.experts[e](row)
                taken[e] += 1
        dropped += sum(max(0, n - room) for n in taken)
    assert dropped
    return module(x).flatten(1, -2), expected


for _chosen, _kind in ((1, "image"), (2, "causal")):
    proof("channel_mixer", "moe", "formula of catalogue a, A22 (Tutel), token by token, some dropped")(
        functools.partial(_routed, chosen=_chosen, kind=_kind)
    )


@proof("channel_mixer", "moe", "formula of catalogue a, A20 (AdvMoE), example by example, from torch's convolutions")
def convolutional_experts(dtype):
    width, size = 6, (5, 4)
    module = _randomised(make("channel_mixer", "moe", width, size, form="conv"), dtype)
    module.router.weight.copy_(20 * _drawn(4, width, dtype=dtype))
    x = _drawn(5, *size, width, dtype=dtype)
    expected, used = [], set()
    for example in x:
        gates = torch.softmax(module.router.weight @ example.mean((0, 1)), dim=0)
        e = int(gates.argmax())
        used.add(e)
        inner = module.convolutions
        y = F.conv2d(channels_first(example[None]), inner.up[e], inner.up_bias[e], padding=1).relu()
        expected.append(gates[e] * channels_last(F.conv2d(y, inner.down[e], inner.down_bias[e], padding=1)))
    assert len(used) > 1
    return module(x), torch.cat(expected)


@proof("channel_mixer", "moe", "GShard's load-balancing loss, from its definition")
def balance(dtype):
    module = make("channel_mixer", "moe", 8, (3, 5)).to(dtype).train()
    x = _drawn(4, 3, 5, 8, dtype=dtype)
    with torch.enable_grad(), collected() as losses:
        module(x)
    gates = torch.softmax(F.linear(x.flatten(0, 2), module.router.weight), dim=-1)
    shares = [(gates.argmax(-1) == e).to(dtype).mean() * gates[:, e].mean() for e in range(4)]
    return torch.stack(losses), 0.01 * 4 * sum(shares).reshape(1)


@proof("norm", "group", "torch's GroupNorm, channels first")
def group(dtype):
    module = _randomised(make("norm", "group", 12, (5, 7), groups=3), dtype)
    x = _drawn(2, 5, 7, 12, dtype=dtype)
    oracle = torch.nn.GroupNorm(3, 12, eps=1e-6).to(dtype)
    oracle.load_state_dict(module.state_dict())
    return module(x), channels_last(oracle(channels_first(x)))


def _prep_batch(dtype, *, step):
    """As it is trained at its third of four steps, and as it is afterwards."""
    module = _randomised(make("norm", "prep_batch", 12, (5, 7), steps=4), dtype)
    x = _drawn(3, 5, 7, 12, dtype=dtype)
    tokens, batch, layer = x.flatten(0, 2), module.batch, module.layer
    mean, var = (None, None) if step is not None else (batch.running_mean, batch.running_var)
    by_batch = F.batch_norm(tokens, mean, var, batch.weight, batch.bias, step is not None) + module.alpha * tokens
    by_layer = F.layer_norm(tokens, (12,), layer.weight, layer.bias, 1e-6)
    share = 0.0 if step is None else 1 - step / 4
    module.train(step is not None)
    with torch.enable_grad():
        answers = [module(x) for _ in range(1 if step is None else step + 1)]
    return answers[-1].flatten(0, 2), share * by_layer + (1 - share) * by_batch


for _step in (0, 2, None):
    _when = "afterwards" if _step is None else f"at step {_step} of 4"
    proof("norm", "prep_batch", f"formula of catalogue c, D17, from torch's norms, {_when}")(
        functools.partial(_prep_batch, step=_step)
    )
