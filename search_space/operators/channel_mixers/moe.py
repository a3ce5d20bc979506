"""Mixtures of experts: tokens, or whole images, each go to a few of several feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixnas.kernels.dispatch import tracing
from mixnas.search_space.operators.auxiliary import add_loss
from mixnas.search_space.operators.channel_mixers.mlp import MLP
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, Value, register

_BALANCE = 0.01  # factor of the load-balancing loss, as in Switch Transformers (arXiv 2101.03961), section 2.2


def _sees_the_future(context: Context, knobs: Mapping[str, Value]) -> str | None:
    if knobs["form"] == "conv" and context.kind == "causal":
        return "form conv asks all tokens which expert they go to, which in a causal task would show the future"
    return None


@register(
    "channel_mixer",
    "moe",
    paper="Lepikhin et al. 2021, GShard (arXiv 2006.16668), section 2.2; Hwang et al. 2023, Tutel (arXiv 2206.03382); "
    "Zhang et al. 2023, AdvMoE (arXiv 2308.10110), convolutional experts",
    knobs={
        "experts": Knob(4, choices=(2, 4, 8), doc="how many there are"),
        "chosen": Knob(1, choices=(1, 2), doc="how many a token goes to"),
        "expansion": Knob(2.0, low=0.25, high=16, doc="hidden width of an expert over width"),
        "capacity": Knob(1.25, choices=(1.0, 1.25, 2.0), doc="tokens that an expert takes over its even share"),
        "form": Knob("mlp", choices=("mlp", "conv"), doc="tokens to feed-forward layers, or examples to convolutions"),
    },
    check=_sees_the_future,
    one_length=True,
)
class MoE(nn.Module):
    """sum over the chosen experts e of g_e expert_e(x), g = softmax(router(x)), of two renormalised to sum 1.

    Form "mlp": each token goes to the experts with its largest g. An expert takes `capacity` times its even share of an
    example's choices, in their order; what comes later is dropped, and the residual alone is left of it. Every example
    is routed by itself, and no token by later ones. Form "conv", as AdvMoE's layers: an example goes to experts as a
    whole, conv(relu(conv(x))) of extent 3, its g read from the mean of its tokens; no other is computed. There the
    gradient reaches the router straight through, here through g. Training adds GShard's loss to the task's, 0.01 times
    E sum over e of mean(g_e) share_e, share_e of first choices (`auxiliary`).
    """

    def __init__(
        self, context: Context, *, experts: int, chosen: int, expansion: float, capacity: float, form: str
    ) -> None:
        super().__init__()
        self.chosen, self.capacity, self.form = chosen, capacity, form
        self.count = experts
        self.router = Linear(context.width, experts, bias=False)
        if form == "mlp":
            self.experts = nn.ModuleList(MLP(context, expansion=expansion) for _ in range(experts))
        else:
            self.convolutions = _Convolutions(context, experts, max(1, int(context.width * expansion)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        tokens = x.flatten(1, -2)
        read = tokens if self.form == "mlp" else tokens.mean(dim=1, keepdim=True)
        exact = torch.promote_types(x.dtype, torch.float32)
        gates = self.router(read).to(exact).softmax(dim=-1)
        best, experts = gates.topk(self.chosen, dim=-1)
        if torch.is_grad_enabled() and self.training:
            self._balance(gates, experts)
        if self.chosen > 1:
            best = best / best.sum(dim=-1, keepdim=True)
        if self.form == "conv":
            y = self.convolutions(x.repeat_interleave(self.chosen, dim=0), experts.flatten())
            y = y * best.view(-1, *[1] * (x.dim() - 1)).to(y.dtype)
            return y.unflatten(0, (-1, self.chosen)).sum(dim=1)
        return self._dispatched(tokens, best, experts).view(x.shape)

    def _balance(self, gates_BNE: Tensor, experts_BNk: Tensor) -> None:
        """Add the loss to what is minimised."""
        first = experts_BNk[..., :1] == torch.arange(self.count, device=gates_BNE.device)
        shares = first.to(gates_BNE.dtype).mean(dim=(0, 1))
        add_loss(_BALANCE * self.count * (gates_BNE.mean(dim=(0, 1)) * shares).sum())

    def _dispatched(self, tokens_BNC: Tensor, best_BNk: Tensor, experts_BNk: Tensor) -> Tensor:
        (B, N, C), E = tokens_BNC.shape, self.count
        room = min(N, self.chosen * int(self.capacity * -(-N // E)))
        experts = experts_BNk.flatten(1)
        # A choice's place in its expert: how many of the same expert came before it, token by token.
        taken = (experts.unsqueeze(-1) == torch.arange(E, device=experts.device)).long()
        place = (taken.cumsum(dim=1) * taken).sum(dim=-1) - 1
        row = torch.where(place < room, experts * room + place, E * room)
        # Which token stands in each row; the last row takes what is dropped, and empty ones a token of zeros.
        token = torch.arange(N, device=row.device).repeat_interleave(self.chosen).expand(B, -1)
        source = torch.full((B, E * room + 1), N, dtype=torch.long, device=row.device).scatter(1, row, token)
        padded = F.pad(tokens_BNC, (0, 0, 0, 1))
        rows = padded.gather(1, source[:, :-1].unsqueeze(-1).expand(-1, -1, C)).unflatten(1, (E, room))
        answers = torch.cat([expert(part) for expert, part in zip(self.experts, rows.unbind(1), strict=True)], dim=1)
        answers = F.pad(answers, (0, 0, 0, 1))
        every = answers.gather(1, row.unsqueeze(-1).expand(-1, -1, C)).unflatten(1, (N, self.chosen))
        return (every * best_BNk.unsqueeze(-1).to(every.dtype)).sum(dim=2)


class _Convolutions(nn.Module):
    """conv_e(relu(conv_e(x))) of extent 3 with biases, e the expert of each example; no other is computed.

    Their weights are picked by example and not read by layers, so that policies leave them as they are.
    """

    def __init__(self, context: Context, experts: int, hidden: int) -> None:
        super().__init__()
        dims = len(context.size)
        self.slicing = {name: ("lead",) * 3 + ("center",) * dims for name in ("up", "down")}
        self.up = nn.Parameter(torch.empty(experts, hidden, context.width, *(3,) * dims))
        self.down = nn.Parameter(torch.empty(experts, context.width, hidden, *(3,) * dims))
        self.up_bias = nn.Parameter(torch.zeros(experts, hidden))
        self.down_bias = nn.Parameter(torch.zeros(experts, context.width))
        for weight in (self.up, self.down):
            bound = weight[0, 0].numel() ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def _convolved(self, x_BHWC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight, bias = weight.to(x_BHWC.dtype), bias.to(x_BHWC.dtype)
        padding = tuple(extent // 2 for extent in weight.shape[-2:])
        B, H, W = x_BHWC.shape[:3]
        channels_first = x_BHWC.permute(0, 3, 1, 2)
        if tracing():  # the number of groups is fixed in a graph, that of examples is not
            patches = F.unfold(channels_first, weight.shape[-2:], padding=padding).transpose(1, 2)
            return torch.baddbmm(bias.unsqueeze(1), patches, weight.flatten(2).mT).unflatten(1, (H, W))
        # Examples beside channels.
        beside = channels_first.reshape(1, -1, H, W)
        y = F.conv2d(beside, weight.flatten(0, 1), bias.flatten(), padding=padding, groups=B)
        return y.view(B, -1, H, W).permute(0, 2, 3, 1)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """(B, ..., C) and (B,) to (B, ..., C)."""
        grid, up, down = x, self.up[experts], self.down[experts]
        if x.dim() == 3:
            grid, up, down = x.unsqueeze(1), up.unsqueeze(-2), down.unsqueeze(-2)
        y = self._convolved(grid, up, self.up_bias[experts]).relu()
        return self._convolved(y, down, self.down_bias[experts]).reshape(x.shape).contiguous()
