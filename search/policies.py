"""Quantization policies of a run: candidates with one policy throughout, mixed ones by sensitivity, and what a policy
comes to on its device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mixnas.search.run.front import Front
from mixnas.search_space.architecture import Architecture, Block, Op
from mixnas.search_space.space import SearchSpace


def policies_of(space: SearchSpace) -> tuple[Op, ...]:
    """Every policy that some branch of a space may have, with every setting of its knobs."""
    found: dict[Op, None] = {}
    for stage in space.tree.stages:
        for choice in (choice for block in stage.blocks for choice in (block.quant, block.channel_quant)):
            for option in choice.options if choice is not None else ():
                names = [name for name, _ in option.knobs]
                for values in itertools.product(*(values for _, values in option.knobs)):
                    found[Op(option.name, tuple(zip(names, values, strict=True)))] = None
    return tuple(found)


def with_one_policy(space: SearchSpace, architectures: Iterable[Architecture]) -> list[Architecture]:
    """Each architecture under each policy of the space throughout, where the space has that; itself left out.

    A search that has judged these has no mixed answer that a uniform one beats.
    """
    from mixnas.search_space.operators.quantization.policy import uniform  # needs torch, which a table does not

    policies = policies_of(space)
    if len(policies) < 2:
        return []
    own = list(architectures)
    found = dict.fromkeys(uniform(architecture, policy) for architecture in own for policy in policies)
    return [architecture for architecture in found if architecture not in set(own) and space.contains(architecture)]


def structure(architecture: Architecture) -> Architecture:
    """What architectures that differ in policies alone have in common."""
    from mixnas.search_space.operators.quantization.policy import uniform

    return uniform(architecture, Op("fp32"))


@dataclass(frozen=True, slots=True)
class Place:
    """Branches that have one policy together, and what it may be.

    Attributes:
        branches: Their names, as in `units.plan`.
        options: Policies.
    """

    branches: tuple[str, ...]
    options: tuple[Op, ...]


def places_of(space: SearchSpace, architecture: Architecture) -> list[Place]:
    """Where an architecture of a space may have other policies: places with two options or more."""
    from mixnas.search_space.enumeration import ops_of  # needs torch, which a table does not

    found = []
    for s, (choice, stage) in enumerate(zip(space.tree.stages, architecture.stages, strict=True)):
        each = [[b] for b in range(len(stage.blocks))]
        for numbers in [list(range(len(stage.blocks)))] if choice.shared else each:
            of = choice.blocks[numbers[0]]
            token = tuple(f"stages.{s}.blocks.{b}.token" for b in numbers)
            channel = tuple(f"stages.{s}.blocks.{b}.channel" for b in numbers)
            if stage.blocks[numbers[0]].channel_mixer.name == "none":
                channel = ()
            if of.channel_quant is None:
                found.append(Place(token + channel, tuple(ops_of(of.quant))))
            else:
                found.append(Place(token, tuple(ops_of(of.quant))))
                found += [Place(channel, tuple(ops_of(of.channel_quant)))] if channel else []
    return [place for place in found if len(place.options) > 1]


def policies_at(architecture: Architecture) -> dict[str, Op]:
    """The policy of each branch by its name, as in `units.plan`."""
    found = {}
    for s, stage in enumerate(architecture.stages):
        for b, block in enumerate(stage.blocks):
            found[f"stages.{s}.blocks.{b}.token"] = block.quant
            found[f"stages.{s}.blocks.{b}.channel"] = block.channel_quant
    return found


def with_options(architecture: Architecture, places: Sequence[Place], picked: Sequence[Op | None]) -> Architecture:
    """The architecture with a policy for each place; None keeps its own."""
    from mixnas.search_space.operators.quantization.policy import with_policies

    pairs = zip(places, picked, strict=True)
    return with_policies(architecture, {name: op for place, op in pairs if op is not None for name in place.branches})


def swapped(architecture: Architecture, places: Sequence[Place]) -> list[Architecture]:
    """The architecture with one option of one place, for each option of each place, one after the other."""
    return [
        with_options(architecture, places, [op if place is one else None for one in places])
        for place in places
        for op in place.options
    ]


def by_place(places: Sequence[Place], values: Iterable[float]) -> list[list[float]]:
    """Values of what `swapped` gives, by place and option."""
    each = iter(values)
    return [[float(next(each)) for _ in place.options] for place in places]


def cheapest_loss(rises: Sequence[Sequence[float]], spent: Sequence[Sequence[float]], budget: float) -> list[int]:
    """Which option each place has, for the least sum of rises whose spending keeps a budget; of equals, the cheaper.

    An integer programme, as of HAWQ-V3 (Yao et al. 2021, section 3.4): one of each place's options.

    Args:
        rises: Of the loss, by place and option; an infinite one is no option.
        spent: Likewise, of what the budget is of.
        budget: Of the sum of what is spent; at least the least possible.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes a second

    rise, cost = np.array([r for row in rises for r in row]), np.array([c for row in spent for c in row])
    allowed = np.isfinite(rise)
    scaled = np.where(allowed, rise, 0.0) / max(rise[allowed].max(initial=0.0), 1e-12)
    ends = np.cumsum([len(row) for row in rises])
    one_each = np.zeros((len(ends), len(rise)))
    for i, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        one_each[i, begin:end] = 1
    solved = milp(
        scaled + 1e-5 * cost / max(np.abs(cost).max(), 1e-12),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost[None], -np.inf, budget)],
        integrality=np.ones(len(rise)),
        bounds=Bounds(0, allowed.astype(float)),
        options={"mip_rel_gap": 0.0},
    )
    assert solved.x is not None, solved.message
    return [int(np.argmax(part)) for part in np.split(solved.x, ends[:-1])]


def used(plain: Mapping[str, Any]) -> list[str]:
    """The policies of an architecture's branches as text, each once, in the order in which they stand."""
    blocks = [Block.from_plain(block) for stage in plain["stages"] for block in stage["blocks"]]
    return list(dict.fromkeys(str(quant) for block in blocks for quant in (block.quant, block.channel_quant)))


def remarks(instead: Mapping[str, str], front: Front) -> list[str]:
    """What a reader of a front has to know of the policies: which did not run as themselves, and which are not on it.

    Args:
        instead: What runs on the run's device in the place of each policy of its space, as in the run's manifest; ""
            where it runs itself.
        front: The answer.
    """
    here = {name for member in front.members for name in used(member.architecture)}
    lines = [
        f"{name} does not run as itself on this device. What runs is {text}." for name, text in instead.items() if text
    ]
    made = [member for member in front.members if member.weights_from]
    if made:
        told = ", ".join(f"{member.id} (of {member.weights_from})" for member in made)
        lines.append(f"With another finished network's weights, trained on under other policies: {told}.")
    missing = [name for name in instead if name not in here]
    if front.final and front.members and missing:
        lines.append(f"On no network of the front, as {front.latency} here: {', '.join(missing)}.")
    return lines
