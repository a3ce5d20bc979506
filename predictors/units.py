"""The units of a network without torch: what `search_space.network.plan` gives, as plain keys.

A query must answer before torch could even be imported. All that `plan` needs torch for is how large the token grid is
behind a stem or a downsample; here that comes from a function, which a stored predictor answers from its file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mixnas.search_space.architecture import Architecture, Block, Op, Stage
from mixnas.search_space.registry import Context


class Key(NamedTuple):
    """A unit without its place; fields as in `mixnas.search_space.network.Unit`."""

    role: str
    op: Op | Block | None
    norm: Op | None
    before: Context
    after: Context
    detail: str


SizeAfter = Callable[[str, Op, Context], tuple[int, ...]]
"""`size_after(role, op, before)`: the token grid behind a stem or a downsample."""


def io_fields(io: Any) -> dict[str, Any]:
    """The fields of an `IOSpec` as plain data."""
    return {
        "kind": io.kind,
        "size": list(io.size),
        "in_features": io.in_features,
        "num_outputs": io.num_outputs,
        "head": io.head,
        "tokens": io.tokens,
    }


def registry_size_after(role: str, op: Op, before: Context) -> tuple[int, ...]:
    """`SizeAfter` from the operators themselves; imports torch."""
    from mixnas.search_space.network import after_op

    return after_op(role, op, before, 1).size


def walk(architecture: Architecture, io: Mapping[str, Any], size_after: SizeAfter) -> list[tuple[str, Key]]:
    """The units of a network by place, in the order in which they run.

    Args:
        architecture: Which.
        io: See `io_fields`.
        size_after: See `SizeAfter`.
    """
    kind = io["kind"]
    context = Context(io["in_features"], tuple(io["size"]), kind)
    units: list[tuple[str, Key]] = []
    for s, stage in enumerate(architecture.stages):
        if s == 0:
            after = Context(stage.width, size_after("stem", architecture.stem, context), kind)
            detail = "tokens" if io["tokens"] else ""
            units.append(("stem", Key("stem", architecture.stem, None, context, after, detail)))
            context = after
        if s > 0 or stage.downsample.name != "none":
            after = Context(stage.width, size_after("downsample", stage.downsample, context), kind)
            units.append((f"stages.{s}.downsample", Key("downsample", stage.downsample, None, context, after, "")))
            context = after
        for b, block in enumerate(stage.blocks):
            units.append((f"stages.{s}.blocks.{b}", Key("block", block, architecture.norm, context, context, "")))
    outputs = Context(io["num_outputs"], context.size, kind)
    units.append(("head", Key("head", None, architecture.norm, context, outputs, io["head"])))
    return units


def op_from_plain(plain: Any) -> Op:
    """An operator from the canonical form, in which every knob is written."""
    if isinstance(plain, str):
        return Op(plain)
    return Op(plain["name"], tuple(sorted((k, v) for k, v in plain.items() if k != "name")))


def block_from_plain(plain: Mapping[str, Any]) -> Block:
    """A block from the canonical form."""
    axes = {axis: op_from_plain(plain[axis]) for axis in ("mixer", "gate", "channel_mixer", "quant")}
    return Block(**axes, recursion=plain["recursion"])


def architecture_from_canonical(plain: Mapping[str, Any]) -> Architecture:
    """An architecture from its canonical form (`to_dict`), unchecked and without the registry of operators.

    Raises:
        KeyError, TypeError: It is not the canonical form: read it with `Architecture.from_dict`.
    """
    stages = []
    for stage in plain["stages"]:
        blocks = tuple(block_from_plain(block) for block in stage["blocks"])
        stages.append(Stage(stage["width"], op_from_plain(stage["downsample"]), blocks))
    return Architecture(op_from_plain(plain["stem"]), op_from_plain(plain["norm"]), tuple(stages))


def key_to_plain(key: Key) -> dict[str, Any]:
    """A key as plain data."""
    return {
        "role": key.role,
        "op": None if key.op is None else key.op.to_plain(),
        "norm": None if key.norm is None else key.norm.to_plain(),
        "kind": key.before.kind,
        "before": [key.before.width, *key.before.size],
        "after": [key.after.width, *key.after.size],
        "detail": key.detail,
    }


def key_from_plain(plain: Mapping[str, Any]) -> Key:
    """The inverse of `key_to_plain`."""
    op: Op | Block | None = None
    if plain["op"] is not None:
        op = block_from_plain(plain["op"]) if plain["role"] == "block" else op_from_plain(plain["op"])
    before, after = (Context(plain[n][0], tuple(plain[n][1:]), plain["kind"]) for n in ("before", "after"))
    norm = None if plain["norm"] is None else op_from_plain(plain["norm"])
    return Key(plain["role"], op, norm, before, after, plain["detail"])


def describe(key: Key) -> dict[str, float]:
    """A unit's own settings as numbers: its width and grid, which operators it has, and their knobs.

    Names: "role=block", "width", "tokens", "mixer=dwconv", "mixer.dwconv.kernel_size" and so on; absent ones are zero.
    """
    described: dict[str, float] = {
        f"role={key.role}": 1.0,
        "width_in": float(key.before.width),
        "width": float(key.after.width),
        "tokens": float(key.after.tokens),
        "tokens_in": float(key.before.tokens),
    }

    def add(axis: str, op: Op) -> None:
        described[f"{axis}={op.name}"] = 1.0
        for knob, value in op.knobs:
            if isinstance(value, str):
                described[f"{axis}.{op.name}.{knob}={value}"] = 1.0
            else:
                described[f"{axis}.{op.name}.{knob}"] = float(value)

    if isinstance(key.op, Block):
        for axis in ("mixer", "gate", "channel_mixer", "quant"):
            add(axis, getattr(key.op, axis))
        described["recursion"] = float(key.op.recursion)
    elif key.op is not None:
        add(key.role, key.op)
    if key.norm is not None:
        add("norm", key.norm)
    return described
