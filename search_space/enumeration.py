"""Looking at a whole space without listing its architectures: what can stand where, and its corners."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from mixnas.search_space.architecture import Architecture, Block, Op, Stage
from mixnas.search_space.cost import op_cost
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.grammar import BlockChoice, OpChoice, StageChoice
from mixnas.search_space.network import build_op, check_head, check_op, check_stem
from mixnas.search_space.operators.norms import has_running_statistics
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.operators.quantization.projected import Projected
from mixnas.search_space.registry import Context
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, registry_size_after


def ops_of(choice: OpChoice) -> list[Op]:
    """Every operator with every combination of its knobs that may stand at one place."""
    return [
        Op(option.name, tuple(zip((k for k, _ in option.knobs), values, strict=True)))
        for option in choice.options
        for values in itertools.product(*(vs for _, vs in option.knobs))
    ]


@dataclass(frozen=True)
class Site:
    """An operator at a place where it can stand.

    Attributes:
        unit: Name of the unit, as in `units.plan`.
        path: Place within the unit: "norm", "mixer", "gate", "channel_mixer", "output", or "" where it is all of it.
        axis: Its axis.
        op: The operator.
        before: Context of its input.
        after: Context of its output.
        quants: Policies that it may stand under; empty outside branches and for norms.
    """

    unit: str
    path: str
    axis: str
    op: Op
    before: Context
    after: Context
    quants: tuple[Op, ...] = ()


def entries(space: SearchSpace, io: IOSpec, s: int, befores: list[Context]) -> list[Site]:
    """Every stem (s = 0) and downsample that can lead into stage `s` from one of the contexts, checked."""
    stage = space.tree.stages[s]
    sites = []
    if s == 0:
        for op in ops_of(space.tree.stem):
            check_stem(op, io)
            size = registry_size_after("stem", op, io.before)
            sites += [
                Site("stem", "", "stem", op, io.before, Context(w, size, io.kind, io.padded)) for w in stage.width
            ]
        befores = list(dict.fromkeys(site.after for site in sites))
    name = f"stages.{s}.downsample"
    for op, before in itertools.product(ops_of(stage.downsample), befores):
        if s == 0 and op.name == "none":
            continue
        check_op("downsample", op, before, name)
        size = registry_size_after("downsample", op, before)
        widths = (before.width,) if s == 0 else stage.width  # a stem answers with the first stage's width already
        sites += [Site(name, "", "downsample", op, before, Context(w, size, io.kind, io.padded)) for w in widths]
    return sites


def _bare(choice: StageChoice) -> bool:
    """Whether a first stage may follow its stem directly."""
    return any(option.name == "none" for option in choice.downsample.options)


def contexts(space: SearchSpace, io: IOSpec) -> list[list[Context]]:
    """For each stage, every context in which its blocks can stand."""
    found: list[list[Context]] = []
    befores = [io.before]
    for s, stage in enumerate(space.tree.stages):
        leading = ("stem", "downsample") if s == 0 and _bare(stage) else ("downsample",)
        sites = entries(space, io, s, befores)
        befores = list(dict.fromkeys(site.after for site in sites if site.axis in leading))
        found.append(befores)
    return found


def branch_quants(choice: BlockChoice) -> tuple[tuple[Op, ...], tuple[Op, ...]]:
    """The policies that a block's token branch and its channel branch may have."""
    token = tuple(ops_of(choice.quant))
    return token, token if choice.channel_quant is None else tuple(ops_of(choice.channel_quant))


def sites_of(space: SearchSpace, io: IOSpec) -> Iterator[Site]:
    """Every operator at every place of the space, each once for each context that it can stand in.

    Raises:
        ConfigError: A stem or downsample cannot stand where it stands; the others are not checked here.
    """
    norms = ops_of(space.tree.norm)
    befores = [io.before]
    for s, (stage, inside) in enumerate(zip(space.tree.stages, contexts(space, io), strict=True)):
        yield from entries(space, io, s, befores)
        befores = inside
        for b in range(max(stage.depth)):
            choice = stage.blocks[b]
            token, channel = branch_quants(choice)
            name = f"stages.{s}.blocks.{b}"
            for at in inside:
                for axis in ("mixer", "gate"):
                    for op in ops_of(getattr(choice, axis)):
                        yield Site(f"{name}.token", axis, axis, op, at, at, token)
                mixers = [op for op in ops_of(choice.channel_mixer) if op.name != "none"]
                for op in mixers:
                    yield Site(f"{name}.channel", "channel_mixer", "channel_mixer", op, at, at, channel)
                for norm in norms:
                    yield Site(f"{name}.token", "norm", "norm", norm, at, at)
                    if mixers:
                        yield Site(f"{name}.channel", "norm", "norm", norm, at, at)
    for at in befores:
        for norm in norms:
            yield Site("head", "norm", "norm", norm, at, at)
        head = io.head_op
        yield Site("head", "output", "head", head, at, io.after(registry_size_after("head", head, at)))


def check_space(space: SearchSpace, io: IOSpec) -> None:
    """Refuse a space that holds an operator which cannot stand where it stands, before any work is started.

    Raises:
        ConfigError: Kind of task, width, size, or the grid of dense targets do not fit; the message says in which file,
            where in it, and what does.
    """
    try:
        _check_sites(space, io)
    except ConfigError as error:
        raise ConfigError(f"{space.source}: {error}") from None


def _check_sites(space: SearchSpace, io: IOSpec) -> None:
    seen: set[tuple[str, Op, Context]] = set()
    counted: set[tuple[str, Op, Op, Context]] = set()
    for site in sites_of(space, io):
        if site.axis == "head":
            check_head(io, site.before)
        elif site.axis not in ("stem", "downsample"):
            for axis, op in ((site.axis, site.op), *(("quant", quant) for quant in site.quants)):
                if (axis, op, site.before) not in seen:  # the blocks of a stage mostly have the same choices
                    seen.add((axis, op, site.before))
                    check_op(axis, op, site.before, site.unit)
            for quant in site.quants:
                layers = (site.axis, site.op, quant, site.before)
                if layers not in counted and isinstance(policy_of(quant), Projected):  # others take any layer
                    counted.add(layers)
                    _check_layers(site, quant)


def _check_layers(site: Site, quant: Op) -> None:
    """Raise `ConfigError` where a policy cannot take a layer of an operator: counting one prepares each of them."""
    try:
        op_cost(site.axis, site.op, quant, site.before, site.after)
    except ConfigError as error:
        raise ConfigError(f"{site.unit}: {site.axis.replace('_', ' ')} {site.op}: {error}") from None


def check_single(space: SearchSpace, io: IOSpec, where: str) -> None:
    """Refuse a space that holds an operator which cannot be trained on one example at a time.

    A batch norm cannot, where it stands on one position: it has one value a channel.

    Args:
        space, io: As of `check_space`.
        where: What makes the batch so small, for the message.

    Raises:
        ConfigError: The message says which operator.
    """
    for site in dict.fromkeys(replace(site, unit="", path="", quants=()) for site in sites_of(space, io)):
        shape = (1, *site.before.size)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module = build_op(site.axis, site.op, site.before, site.after).train()
            if not has_running_statistics(module):
                continue
            tokens = io.tokens and site.axis == "stem"
            example = torch.zeros(shape, dtype=torch.long) if tokens else torch.zeros(*shape, site.before.width)
            try:
                module(example, lambda x: x) if site.axis == "gate" else module(example)
            except ValueError as error:
                raise ConfigError(
                    f"{where}: {site.axis.replace('_', ' ')} {site.op} on a grid of "
                    f"{'x'.join(map(str, site.before.size))} cannot be trained on one example at a time ({error}). "
                    "Use larger batches, more training examples or a norm without running statistics, as layer or rms."
                ) from None


@dataclass(frozen=True)
class Corner:
    """An extreme architecture of a space and its value."""

    architecture: Architecture
    value: float


ValueOf = Callable[[str, Op, Op | None, Context, Context, bool, int], float]
"""`value(axis, op, policy, before, after, tokens, repeats)` of one operator that runs `repeats` times."""


def corner(space: SearchSpace, io: IOSpec, value: ValueOf, *, largest: bool) -> Corner:
    """The architecture with the smallest or largest sum of `value` over its operators, exactly.

    Dynamic programming over the stages. Within a block the operators add up, so each is chosen by itself, once for each
    policy of its branch and each recursion.

    Args:
        space: The space.
        io: What its networks read and answer.
        value: See `ValueOf`.
        largest: Whether the dearest is looked for instead of the cheapest.
    """
    sign = -1.0 if largest else 1.0
    found = [_Cheapest(space, io, value, sign, norm).architecture() for norm in ops_of(space.tree.norm)]
    cheapest, architecture = min(found, key=_first)
    return Corner(architecture, sign * cheapest)


class _Cheapest:
    """The cheapest architecture with one norm, by a value times a sign."""

    def __init__(self, space: SearchSpace, io: IOSpec, value: ValueOf, sign: float, norm: Op) -> None:
        self.space, self.io, self.value, self.sign, self.norm = space, io, value, sign, norm

    def of(self, axis: str, op: Op, quant: Op | None, before: Context, after: Context, repeats: int = 1) -> float:
        tokens = self.io.tokens and axis == "stem"
        return self.sign * self.value(axis, op, quant, before, after, tokens, repeats)

    def best_op(self, axis: str, ops: list[Op], quant: Op, at: Context, repeats: int) -> tuple[float, Op]:
        return min(((self.of(axis, op, quant, at, at, repeats), op) for op in ops), key=_first)

    def best_block(self, choice: BlockChoice, at: Context) -> tuple[float, Block]:
        mixers, gates, channels = (ops_of(getattr(choice, axis)) for axis in ("mixer", "gate", "channel_mixer"))
        absent = [op for op in channels if op.name == "none"]
        present = [op for op in channels if op.name != "none"]
        token_quants, channel_quants = branch_quants(choice)
        found: list[tuple[float, Block]] = []
        for repeats in choice.recursion:
            norm = self.of("norm", self.norm, None, at, at, repeats)
            halves: dict[Op, tuple[float, Op]] = {}  # the cheapest channel branch of each policy
            for quant in dict.fromkeys((*token_quants, *channel_quants)):
                options = [(0.0, op) for op in absent]
                if present:
                    own, op = self.best_op("channel_mixer", present, quant, at, repeats)
                    options.append((norm + own, op))
                halves[quant] = min(options, key=_first)
            for quant in token_quants:
                mixer, gate = (self.best_op(a, o, quant, at, repeats) for a, o in (("mixer", mixers), ("gate", gates)))
                for other in (quant,) if choice.channel_quant is None else channel_quants:
                    half, channel = halves[other]
                    block = Block(mixer[1], gate[1], channel, quant, repeats, other)
                    found.append((norm + mixer[0] + gate[0] + half, block))
        return min(found, key=_first)

    def best_blocks(self, stage: StageChoice, at: Context) -> tuple[float, tuple[Block, ...]]:
        chosen = {choice: self.best_block(choice, at) for choice in dict.fromkeys(stage.blocks)}
        options = []
        for depth in stage.depth:
            picked = [chosen[choice] for choice in stage.blocks[:depth]]
            options.append((sum(v for v, _ in picked), tuple(block for _, block in picked)))
        return min(options, key=_first)

    def architecture(self) -> tuple[float, Architecture]:
        states: dict[Context, tuple[float, tuple[Op, tuple[Stage, ...]]]] = {}  # the cheapest way to each context
        for s, stage in enumerate(self.space.tree.stages):
            ways: dict[Context, tuple[float, tuple[Op, Op, tuple[Stage, ...]]]] = {}  # with the downsample
            sites = entries(self.space, self.io, s, list(states))
            for site in sites:
                own = self.of(site.axis, site.op, None, site.before, site.after)
                if site.axis == "stem":
                    _keep(states, site.after, (own, (site.op, ())))
                else:
                    before, (stem, done) = states[site.before]
                    _keep(ways, site.after, (before + own, (stem, site.op, done)))
            if s == 0 and _bare(stage):
                for at, (before, (stem, done)) in states.items():
                    _keep(ways, at, (before, (stem, Op("none"), done)))
            states = {}
            for at, (before, (stem, down, done)) in ways.items():
                own, blocks = self.best_blocks(stage, at)
                states[at] = (before + own, (stem, (*done, Stage(at.width, down, blocks))))
        head = self.io.head_op
        found = []
        for at, (before, (stem, stages)) in states.items():
            after = self.io.after(registry_size_after("head", head, at))
            own = self.of("norm", self.norm, None, at, at) + self.of("head", head, None, at, after)
            found.append((before + own, Architecture(stem, self.norm, stages)))
        return min(found, key=_first)


def _first(found: tuple[float, Any]) -> float:
    return found[0]


def _keep(best: dict[Context, tuple[float, Any]], at: Context, found: tuple[float, Any]) -> None:
    """Keep the cheaper of what is there and what was found."""
    if at not in best or found[0] < best[at][0]:
        best[at] = found


def cost_corner(space: SearchSpace, io: IOSpec, metric: str, *, largest: bool) -> Corner:
    """`corner` of "params", "macs" or "weight_bytes"."""

    def value(axis: str, op: Op, quant: Op | None, before: Context, after: Context, tokens: bool, runs: int) -> float:
        own: int = getattr(op_cost(axis, op, quant, before, after, tokens), metric)
        return own * (runs if metric == "macs" else 1)

    return corner(space, io, value, largest=largest)


def weighted_corner(space: SearchSpace, io: IOSpec, weights: Mapping[str, float]) -> Corner:
    """`corner` of the least sum of "params", "macs" and "weight_bytes", each times its weight, of either sign."""
    of = [weights.get(metric, 0.0) for metric in ("params", "macs", "weight_bytes")]

    def value(axis: str, op: Op, quant: Op | None, before: Context, after: Context, tokens: bool, runs: int) -> float:
        own = op_cost(axis, op, quant, before, after, tokens)
        each = (own.params, own.macs * runs, own.weight_bytes)
        return sum(weight * cost for weight, cost in zip(of, each, strict=True))

    return corner(space, io, value, largest=False)
