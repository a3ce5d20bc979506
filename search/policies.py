"""Quantization policies of a run: candidates with one policy throughout, and what a policy comes to on its device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

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
    missing = [name for name in instead if name not in here]
    if front.final and front.members and missing:
        lines.append(f"On no network of the front, as {front.latency} here: {', '.join(missing)}.")
    return lines
