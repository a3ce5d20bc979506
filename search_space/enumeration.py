"""Looking at a whole space without listing its architectures: the units that can occur, and its corners."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mixnas.search_space.architecture import Architecture, Block, Op, Stage
from mixnas.search_space.grammar import BLOCK_AXES, BlockChoice, OpChoice, StageChoice
from mixnas.search_space.network import IOSpec, Unit, after_op, check_unit, unit_cost
from mixnas.search_space.registry import Context
from mixnas.search_space.space import SearchSpace


def ops_of(choice: OpChoice) -> list[Op]:
    """Every operator with every combination of its knobs that may stand at one place."""
    return [
        Op(option.name, tuple(zip((k for k, _ in option.knobs), values, strict=True)))
        for option in choice.options
        for values in itertools.product(*(vs for _, vs in option.knobs))
    ]


def blocks_of(choice: BlockChoice) -> Iterator[Block]:
    """Every block of a place."""
    axes = [ops_of(getattr(choice, axis)) for axis in BLOCK_AXES]
    for mixer, gate, channel_mixer, quant in itertools.product(*axes):
        for recursion in choice.recursion:
            yield Block(mixer, gate, channel_mixer, quant, recursion)


def covering_blocks(choice: BlockChoice) -> list[Block]:
    """Few blocks in which every operator with every combination of its knobs, and every recursion, occurs."""
    axes = {axis: ops_of(getattr(choice, axis)) for axis in BLOCK_AXES}
    base = Block(**{axis: ops[0] for axis, ops in axes.items()}, recursion=choice.recursion[0])
    varied = [_with(base, axis, op) for axis, ops in axes.items() for op in ops]
    varied += [replace(base, recursion=r) for r in choice.recursion]
    return list(dict.fromkeys(varied))


def _with(block: Block, axis: str, op: Op) -> Block:
    return replace(block, **{axis: op})  # type: ignore[arg-type]


def transitions(space: SearchSpace, io: IOSpec, s: int, befores: list[Context]) -> list[Unit]:
    """Every stem (s = 0) or downsample unit that can lead into stage `s` from one of the contexts."""
    stage = space.tree.stages[s]
    axis = "stem" if s == 0 else "downsample"
    choice = space.tree.stem if s == 0 else stage.downsample
    name = "stem" if s == 0 else f"stages.{s}.downsample"
    detail = "tokens" if s == 0 and io.tokens else ""
    units = []
    for op, before, width in itertools.product(ops_of(choice), befores, stage.width):
        unit = Unit(name, axis, op, None, before, before, detail)
        check_unit(unit)  # before its output size is asked for
        units.append(replace(unit, after=after_op(axis, op, before, width)))
    if s == 0:
        for unit, op in itertools.product(list(units), ops_of(stage.downsample)):
            if op.name != "none":
                check_unit(Unit("stages.0.downsample", "downsample", op, None, unit.after, unit.after))
                after = after_op("downsample", op, unit.after, unit.after.width)
                units.append(Unit("stages.0.downsample", "downsample", op, None, unit.after, after))
    return units


def contexts(space: SearchSpace, io: IOSpec) -> list[list[Context]]:
    """For each stage, every context in which its blocks can stand."""
    found: list[list[Context]] = []
    befores = [Context(io.in_features, io.size, io.kind)]
    for s in range(len(space.tree.stages)):
        befores = list(dict.fromkeys(unit.after for unit in transitions(space, io, s, befores)))
        found.append(befores)
    return found


def units_of(
    space: SearchSpace, io: IOSpec, blocks: Callable[[BlockChoice], list[Block] | Iterator[Block]] = covering_blocks
) -> Iterator[Unit]:
    """Units at all places of the space.

    Args:
        space: The space.
        io: What its networks read and answer.
        blocks: `covering_blocks` (each operator occurs, their combinations do not) or `blocks_of` (every block).
    """
    norms = ops_of(space.tree.norm)
    befores = [Context(io.in_features, io.size, io.kind)]
    for s, stage in enumerate(space.tree.stages):
        entering = transitions(space, io, s, befores)
        yield from entering
        befores = list(dict.fromkeys(unit.after for unit in entering))
        for b in range(max(stage.depth)):
            for block, norm, context in itertools.product(blocks(stage.blocks[b]), norms, befores):
                yield Unit(f"stages.{s}.blocks.{b}", "block", block, norm, context, context)
    for norm, context in itertools.product(norms, befores):
        after = Context(io.num_outputs, context.size, io.kind)
        yield Unit("head", "head", None, norm, context, after, io.head)


def check_space(space: SearchSpace, io: IOSpec) -> None:
    """Refuse a space that holds an operator which cannot stand where it stands, before any work is started.

    Raises:
        ConfigError: Kind of task, width or size do not fit; the message says where and what does.
    """
    for unit in units_of(space, io):
        check_unit(unit)


@dataclass(frozen=True)
class Corner:
    """An extreme architecture of a space and its value."""

    architecture: Architecture
    value: float


def corner(space: SearchSpace, io: IOSpec, value: Callable[[Unit], float], *, largest: bool) -> Corner:
    """The architecture with the smallest or largest sum of `value` over its units.

    Dynamic programming over the stages; within a block each axis is chosen by itself, which is exact for values that
    grow with each operator's own cost (parameters, multiply-accumulates, bytes).

    Args:
        space: The space.
        io: What its networks read and answer.
        value: The cost of a unit.
        largest: Whether the dearest is looked for instead of the cheapest.
    """
    sign = -1.0 if largest else 1.0
    best: tuple[float, Architecture] | None = None

    def best_block(choice: BlockChoice, norm: Op, context: Context) -> tuple[float, Block]:
        def total(block: Block) -> float:
            return sign * value(Unit("", "block", block, norm, context, context))

        axes = {axis: ops_of(getattr(choice, axis)) for axis in BLOCK_AXES}
        block = Block(**{axis: ops[0] for axis, ops in axes.items()}, recursion=choice.recursion[0])
        for axis, ops in axes.items():
            block = min((_with(block, axis, op) for op in ops), key=total)
        block = min((replace(block, recursion=r) for r in choice.recursion), key=total)
        return total(block), block

    def best_blocks(stage: StageChoice, norm: Op, context: Context) -> tuple[float, tuple[Block, ...]]:
        chosen = {choice: best_block(choice, norm, context) for choice in dict.fromkeys(stage.blocks)}
        options = []
        for depth in stage.depth:
            picked = [chosen[choice] for choice in stage.blocks[:depth]]
            options.append((sum(v for v, _ in picked), tuple(block for _, block in picked)))
        return min(options, key=lambda option: option[0])

    for norm in ops_of(space.tree.norm):
        states: dict[Context, tuple[float, Op, tuple[Stage, ...]]] = {}
        start = Context(io.in_features, io.size, io.kind)
        for s, stage in enumerate(space.tree.stages):
            coming: dict[Context, tuple[float, Op, tuple[Stage, ...]]] = {}
            for width in stage.width:
                entries: list[tuple[float, Context, Op, Op, tuple[Stage, ...]]] = []
                downs = ops_of(stage.downsample)
                if s == 0:
                    detail = "tokens" if io.tokens else ""
                    for stem in ops_of(space.tree.stem):
                        after = after_op("stem", stem, start, width)
                        v = sign * value(Unit("", "stem", stem, None, start, after, detail))
                        entries += [(v, after, stem, down, ()) for down in downs]
                else:
                    entries = [(v, c, stem, down, done) for c, (v, stem, done) in states.items() for down in downs]
                for v, before, stem, down, done in entries:
                    after = before
                    if s > 0 or down.name != "none":
                        after = after_op("downsample", down, before, width)
                        v += sign * value(Unit("", "downsample", down, None, before, after))
                    block_value, blocks = best_blocks(stage, norm, after)
                    total = v + block_value
                    if after not in coming or total < coming[after][0]:
                        coming[after] = (total, stem, (*done, Stage(width, down, blocks)))
            states = coming
        for context, (v, stem, stages) in states.items():
            outputs = Context(io.num_outputs, context.size, io.kind)
            v += sign * value(Unit("", "head", None, norm, context, outputs, io.head))
            if best is None or v < best[0]:
                best = (v, Architecture(stem, norm, stages))
    assert best is not None
    return Corner(best[1], sign * best[0])


def cost_corner(space: SearchSpace, io: IOSpec, metric: str, *, largest: bool) -> Corner:
    """`corner` of "params", "macs" or "weight_bytes"."""
    return corner(space, io, lambda unit: getattr(unit_cost(unit), metric), largest=largest)
