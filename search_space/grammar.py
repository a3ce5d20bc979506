"""Reading the architecture grammar: plain data to the tree of choices, with errors that say where.

Any value may be a list of choices; only `stages`, and `blocks` where they are spelled out, are lists by structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from mixnas.search_space import registry
from mixnas.search_space.architecture import BLOCK_AXES, is_by_branch
from mixnas.search_space.errors import ConfigError, nearest, shown
from mixnas.search_space.registry import Value


@dataclass(frozen=True)
class OpOption:
    """One operator that may be chosen, with the values that each of its knobs may take (one or more)."""

    name: str
    knobs: tuple[tuple[str, tuple[Value, ...]], ...]


@dataclass(frozen=True)
class OpChoice:
    """The operators that may stand at one place, and a label for each that is unique there."""

    options: tuple[OpOption, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class BlockChoice:
    """The choices of one block; without `channel_quant`, that of `quant` holds for both branches."""

    mixer: OpChoice
    gate: OpChoice
    channel_mixer: OpChoice
    quant: OpChoice
    recursion: tuple[int, ...]
    channel_quant: OpChoice | None = None


_BLOCK_DEFAULTS = {"gate": "none", "quant": "fp32"}
_BRANCHES = ("mixer", "channel_mixer")  # under `quant`, where each has a policy of its own


@dataclass(frozen=True)
class StageChoice:
    """The choices of one stage: `blocks` has the greatest depth; `shared` blocks all make the same choice."""

    width: tuple[int, ...]
    downsample: OpChoice
    depth: tuple[int, ...]
    blocks: tuple[BlockChoice, ...]
    shared: bool


@dataclass(frozen=True)
class SpaceTree:
    """A whole space as it was written."""

    stem: OpChoice
    norm: OpChoice
    stages: tuple[StageChoice, ...]


def _require_mapping(plain: Any, where: str, allowed: tuple[str, ...], required: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(plain, dict):
        raise ConfigError(f"{where}: expected a mapping with {', '.join(allowed)}; got {shown(plain)}.")
    for key in plain:
        if key not in allowed:
            raise ConfigError(
                f"{where}: unknown key {shown(key)}.{nearest(key, allowed)} Allowed: {', '.join(allowed)}."
            )
    for key in required:
        if key not in plain:
            raise ConfigError(f"{where}: {key!r} is missing. Required: {', '.join(required)}.")
    return plain


def _as_list(value: Any, where: str) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    if not items:
        raise ConfigError(f"{where}: the list of choices is empty. Give at least one.")
    if len(items) > registry.MOST_CHOICES:
        raise ConfigError(f"{where}: {len(items):,} choices. Allowed: up to {registry.MOST_CHOICES} in one list.")
    return items


def _integers(value: Any, where: str) -> tuple[int, ...]:
    knob = registry.STRUCTURE[where.rpartition(".")[2]]
    items = _as_list(value, where)
    for item in items:
        if not isinstance(item, int) or knob.normalise(item) is None:
            raise ConfigError(f"{where}: {shown(item)} is not allowed. Allowed: {knob.describe()}.")
    _refuse_duplicates(items, where)
    return tuple(items)


def _refuse_duplicates(items: list[Any], where: str) -> None:
    seen: list[Any] = []
    for item in items:
        if item in seen:
            raise ConfigError(f"{where}: {shown(item)} stands twice among the choices. Keep one.")
        seen.append(item)


def _op_option(axis: str, plain: Any, where: str) -> OpOption:
    if isinstance(plain, str):
        plain = {"name": plain}
    if not isinstance(plain, dict) or not isinstance(plain.get("name"), str):
        raise ConfigError(f"{where}: expected a name or {{name: ..., knob: value}}; got {shown(plain)}.")
    try:
        operator = registry.get(axis, plain["name"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    knobs: list[tuple[str, tuple[Value, ...]]] = []
    for key in plain:
        if key != "name" and key not in operator.knobs:
            allowed = ", ".join(operator.knobs) or "none"
            raise ConfigError(
                f"{where}: {axis.replace('_', ' ')} {operator.name!r} has no knob {shown(key)}."
                f"{nearest(key, operator.knobs)} Its knobs: {allowed}."
            )
    for key in sorted(operator.knobs):
        knob = operator.knobs[key]
        values: list[Value] = []
        for value in _as_list(plain.get(key, knob.default), f"{where}.{key}"):
            normal = knob.normalise(value)
            if normal is None:
                raise ConfigError(f"{where}.{key}: {shown(value)} is not allowed. Allowed: {knob.describe()}.")
            values.append(normal)
        _refuse_duplicates(values, f"{where}.{key}")
        knobs.append((key, tuple(values)))
    combinations = prod(len(values) for _, values in knobs)
    if combinations > registry.MOST_COMBINATIONS:
        raise ConfigError(
            f"{where}: {combinations:,} combinations of the knobs of {operator.name!r}. "
            f"Allowed: up to {registry.MOST_COMBINATIONS:,}."
        )
    return OpOption(operator.name, tuple(knobs))


def _op_choice(axis: str, plain: Any, where: str) -> OpChoice:
    items = _as_list(plain, where)
    many = isinstance(plain, list) and len(items) > 1
    options = [_op_option(axis, item, f"{where}[{i}]" if many else where) for i, item in enumerate(items)]
    labels: list[str] = []
    for i, option in enumerate(options):
        same = [other for other in options[:i] if other.name == option.name]
        for other in same:
            if all(set(mine) & set(dict(other.knobs)[key]) for key, mine in option.knobs):
                raise ConfigError(
                    f"{where}: {option.name!r} stands twice with knobs in common, so one network could be written in "
                    "two ways. Write one entry with lists for its knobs, or make the two disjoint."
                )
        labels.append(f"{option.name}-{len(same) + 1}" if same else option.name)
    return OpChoice(tuple(options), tuple(labels))


def _block(plain: Any, where: str) -> BlockChoice:
    plain = _require_mapping(plain, where, (*BLOCK_AXES, "recursion"), ("mixer", "channel_mixer"))
    values = {axis: plain.get(axis, _BLOCK_DEFAULTS.get(axis)) for axis in BLOCK_AXES}
    recursion = _integers(plain.get("recursion", 1), f"{where}.recursion")
    if not is_by_branch(values["quant"]):
        ops = {axis: _op_choice(axis, value, f"{where}.{axis}") for axis, value in values.items()}
        return BlockChoice(**ops, recursion=recursion)
    branches = _require_mapping(values.pop("quant"), f"{where}.quant", _BRANCHES, _BRANCHES)
    ops = {axis: _op_choice(axis, value, f"{where}.{axis}") for axis, value in values.items()}
    quant, channel_quant = (_op_choice("quant", branches[name], f"{where}.quant.{name}") for name in _BRANCHES)
    return BlockChoice(**ops, quant=quant, recursion=recursion, channel_quant=channel_quant)


def _stage(plain: Any, where: str) -> StageChoice:
    allowed = ("width", "depth", "downsample", "block", "blocks", "share")
    plain = _require_mapping(plain, where, allowed, ("width",))
    share = plain.get("share", False)
    if not isinstance(share, bool):
        raise ConfigError(f"{where}.share: {shown(share)} is not allowed. Allowed: true or false.")
    if ("block" in plain) == ("blocks" in plain):
        raise ConfigError(
            f"{where}: give either 'block' (with 'depth') or 'blocks', a list with one mapping per block."
        )
    if "blocks" in plain:
        if "depth" in plain or share:
            raise ConfigError(f"{where}: 'blocks' spells every block out; it does not go with 'depth' or 'share'.")
        if isinstance(plain["blocks"], list):
            _check_number(len(plain["blocks"]), registry.STRUCTURE["depth"].high, f"{where}.blocks", "blocks")
        if not isinstance(plain["blocks"], list) or not plain["blocks"]:
            raise ConfigError(f"{where}.blocks: expected a list of blocks; got {shown(plain['blocks'])}.")
        blocks = tuple(_block(b, f"{where}.blocks[{i}]") for i, b in enumerate(plain["blocks"]))
        depth: tuple[int, ...] = (len(blocks),)
    else:
        depth = _integers(plain.get("depth", 1), f"{where}.depth")
        blocks = (_block(plain["block"], f"{where}.block"),) * max(depth)
    return StageChoice(
        width=_integers(plain["width"], f"{where}.width"),
        downsample=_op_choice("downsample", plain.get("downsample", "none"), f"{where}.downsample"),
        depth=depth,
        blocks=blocks,
        shared=share,
    )


def read_space(plain: Any, source: str) -> SpaceTree:
    """Read plain data into the tree of choices.

    Args:
        plain: What a file's `space:` holds (`stem`, `norm`, `stages`).
        source: Name for messages.

    Raises:
        ConfigError: Anything unknown, missing, duplicated or not allowed; the message says where and what is.
    """
    plain = _require_mapping(plain, source, ("stem", "norm", "stages"), ("stem", "stages"))
    if not isinstance(plain["stages"], list) or not plain["stages"]:
        raise ConfigError(f"{source}.stages: expected a list of stages; got {shown(plain['stages'])}.")
    _check_number(len(plain["stages"]), registry.MOST_STAGES, f"{source}.stages", "stages")
    tree = SpaceTree(
        stem=_op_choice("stem", plain["stem"], f"{source}.stem"),
        norm=_op_choice("norm", plain.get("norm", "layer"), f"{source}.norm"),
        stages=tuple(_stage(stage, f"{source}.stages[{i}]") for i, stage in enumerate(plain["stages"])),
    )
    _check_number(sum(len(s.blocks) for s in tree.stages), registry.MOST_BLOCKS, f"{source}.stages", "blocks in all")
    _check_number(_variables(tree), registry.MOST_VARIABLES, f"{source}.stages", "choices in all")
    return tree


def _check_number(number: int, most: float | None, where: str, what: str) -> None:
    if most is not None and number > most:
        raise ConfigError(f"{where}: {number:,} {what}. Allowed: up to {most:,g}.")


def _variables(tree: SpaceTree) -> int:
    """At most so many choices: every operator's and every knob's."""

    def op(choice: OpChoice) -> int:
        return (len(choice.options) > 1) + sum(len(vs) > 1 for option in choice.options for _, vs in option.knobs)

    def block(choice: BlockChoice) -> int:
        ops = [getattr(choice, axis) for axis in BLOCK_AXES]
        ops += [] if choice.channel_quant is None else [choice.channel_quant]
        return sum(map(op, ops)) + (len(choice.recursion) > 1)

    found = 0
    for stage in tree.stages:
        counts = {choice: block(choice) for choice in dict.fromkeys(stage.blocks)}
        own = (stage.blocks[0],) if stage.shared else stage.blocks
        found += op(stage.downsample) + 2 + sum(counts[choice] for choice in own)
    return found
