"""Compound scaling: a space for a larger or smaller budget, by the fast rule.

Multiply-accumulates grow with depth, with the square of width and with the square of resolution; activations, which
time goes by, with depth, width and the square of resolution. The fast rule therefore gives most of a factor to width.
Source: Dollar, Singh and Girshick 2021, Fast and Accurate Model Scaling (arXiv 2103.06877), section 4.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixnas.search_space.errors import ConfigError
from mixnas.search_space.grammar import read_space

FAST = 0.8
"""Share of the factor that goes to width, of the paper's fast rule ("d1_w8_r1")."""

_STEP = 8
_STEPS = (1, 2, 3, 4, 6, 8)  # times the step: what the widths are multiples of, tried in this order


@dataclass(frozen=True)
class Rule:
    """By what each dimension is multiplied, so that multiply-accumulates are multiplied by `factor`.

    Attributes:
        factor: Of multiply-accumulates.
        width_share: Share of it that goes to width, the rest to depth and resolution alike: 0.8 is the fast rule, 1
            width alone, 1/3 all three alike.
    """

    factor: float
    width_share: float = FAST

    @property
    def depth(self) -> float:
        """Of the blocks of a stage."""
        return self.factor ** ((1 - self.width_share) / 2)

    @property
    def width(self) -> float:
        """Of the channels; those of a head or group grow as much, for their number stays."""
        return self.factor ** (self.width_share / 2)

    @property
    def resolution(self) -> float:
        """Of each extent of the input."""
        return self.factor ** ((1 - self.width_share) / 4)


def to_multiple(value: float, step: int) -> int:
    """The nearest multiple of `step` from `step` on, of two equally near ones the larger."""
    return max(1, math.floor(value / step + 0.5)) * step


def width_step(plain: Mapping[str, Any]) -> int:
    """What the widths of a space are multiples of: 8, or less where they are not now."""
    widths = [w for stage in plain["stages"] for w in _listed(stage["width"])]
    return math.gcd(_STEP, *widths)


def scale_stages(plain: Mapping[str, Any], rule: Rule, step: int) -> dict[str, Any]:
    """A space with its widths and depths scaled; values that become equal are one.

    Args:
        plain: A space as its file has it.
        rule: By what.
        step: What the new widths are multiples of. Depths are rounded to the nearest from 1 on.
    """
    scaled = copy.deepcopy(dict(plain))
    for stage in scaled["stages"]:
        stage["width"] = _each(stage["width"], lambda width: to_multiple(width * rule.width, step))
        if "blocks" in stage:
            blocks = stage["blocks"]
            count = to_multiple(len(blocks) * rule.depth, 1)
            stage["blocks"] = [copy.deepcopy(blocks[i * len(blocks) // count]) for i in range(count)]
        elif "depth" in stage or to_multiple(rule.depth, 1) != 1:
            stage["depth"] = _each(stage.get("depth", 1), lambda depth: to_multiple(depth * rule.depth, 1))
    return scaled


def scale_space(plain: Any, rule: Rule, io: Any, source: str) -> dict[str, Any]:
    """A space scaled so that all of its operators can stand where they stood.

    The widths are multiples of 8 (of less where they were), or of the first multiple of that at which heads and groups
    divide them.

    Args:
        plain: A space as its file has it.
        rule: By what.
        io: What its networks read and answer, an `IOSpec`.
        source: Name for messages.

    Raises:
        ConfigError: It is no space, or no widths near the rule's fit its operators.
    """
    from mixnas.search_space.enumeration import check_space  # torch
    from mixnas.search_space.space import SearchSpace

    read_space(plain, source)
    step, problem = width_step(plain), None
    for times in _STEPS:
        scaled = scale_stages(plain, rule, times * step)
        try:
            check_space(SearchSpace.from_dict(scaled, source), io)
        except ConfigError as error:
            problem = problem or error
            continue
        return scaled
    raise ConfigError(
        f"{problem} No widths that are multiples of {', '.join(str(times * step) for times in _STEPS)} fit: scale it "
        "by another factor, or by hand."
    )


def scale_extents(size: Sequence[int], rule: Rule, stride: int) -> list[int]:
    """An input's extents, scaled to multiples of what the networks divide them by."""
    return [to_multiple(extent * rule.resolution, stride) for extent in size]


_CLOSE = 0.05
"""Share of the factor by which the result may miss it without a word."""


def missed(rule: Rule, reached: float, spaces: Sequence[Mapping[str, Any]], sizes: Sequence[Sequence[int]]) -> str:
    """By how much a scaled space misses the factor, and what of the rule was rounded away; empty where it is near.

    Args:
        rule: What was asked for.
        reached: By what the multiply-accumulates of the largest network were multiplied.
        spaces: The space before and after, as files have them.
        sizes: The input's extents before and after.
    """
    if abs(reached / rule.factor - 1) <= _CLOSE:
        return ""
    widths, depths = ([sum(of(stage) for stage in s["stages"]) for s in spaces] for of in (_widest, _deepest))
    extents = [math.prod(size) ** (1 / len(size)) for size in sizes]
    step = width_step(spaces[1])
    found = {
        f"width (to multiples of {step})": (rule.width, widths[1] / widths[0]),
        "depth (to whole blocks)": (rule.depth, depths[1] / depths[0]),
        "resolution (to what the strides divide, where the file gives a size)": (
            rule.resolution,
            extents[1] / extents[0],
        ),
    }
    told = [f"{what} x {got:.3g} instead of {asked:.3g}" for what, (asked, got) in found.items()
            if abs(got / asked - 1) > 0.005]  # fmt: skip
    why = f"after rounding: {'; '.join(told)}" if told else "stem and head do not grow as the rule has it"
    return f"the factor {rule.factor:g} is missed: macs of the largest network x {reached:.3g}; {why}"


def _widest(stage: Mapping[str, Any]) -> int:
    return max(_listed(stage["width"]))


def _deepest(stage: Mapping[str, Any]) -> int:
    return len(stage["blocks"]) if "blocks" in stage else max(_listed(stage.get("depth", 1)))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


def _each(value: Any, change: Any) -> Any:
    if isinstance(value, Sequence):
        found = list(dict.fromkeys(map(change, value)))
        return found if len(found) > 1 else found[0]
    return change(value)
