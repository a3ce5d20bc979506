"""What operators answer is contiguous: the work of one is counted without regard to what stands beside it."""

import pytest
import torch

from mixnas.search_space import registry
from mixnas.search_space.architecture import Op
from mixnas.search_space.network import build_op
from mixnas.search_space.registry import Context

SIZES = {"image": (8, 8), "sequence": (16,), "causal": (16,)}


def _settings(operator, context):
    """The defaults, and each knob once at each other choice."""
    defaults = {name: knob.default for name, knob in operator.knobs.items()}
    yield defaults
    for name, knob in operator.knobs.items():
        for value in knob.choices or ():
            changed = defaults | {name: value}
            if value != knob.default and not (operator.check and operator.check(context, changed)):
                yield changed


@torch.no_grad()
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("axis", ["norm", "mixer", "gate", "channel_mixer"])
def test_answers_are_contiguous(axis, kind):
    context = Context(16, SIZES[kind], kind)
    x = torch.randn(2, *context.size, context.width, generator=torch.Generator().manual_seed(0))
    given = (x, lambda y: 2 * y) if axis == "gate" else (x,)
    tried, wrong = 0, []
    for name in registry.names(axis):
        operator = registry.get(axis, name)
        if kind not in operator.kinds or (axis, name) == ("channel_mixer", "none"):
            continue
        for knobs in _settings(operator, context):
            if operator.check and operator.check(context, knobs):
                continue
            op = Op(name, tuple(sorted(knobs.items())))
            answer = build_op(axis, op, context, context).eval()(*given)
            tried += 1
            if not answer.is_contiguous():
                wrong.append(f"{op}: strides {answer.stride()}")
    assert tried and not wrong, "\n".join(wrong)
