"""An architecture: plain frozen data, one canonical form, one content hash.

An architecture file is a search-space file with every choice made, so the reader is the space's
(`mixnas.search_space.space`); what stands here is the data and its canonical form.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mixnas.search_space.errors import IntegrityError, shown
from mixnas.search_space.files import dump_yaml, load_yaml, parse_yaml
from mixnas.search_space.registry import Value

BLOCK_AXES = ("mixer", "gate", "channel_mixer", "quant")
"""What a block chooses, as its file spells it."""


@dataclass(frozen=True)
class Op:
    """An operator with every knob set; knobs are sorted by name, defaults filled in."""

    name: str
    knobs: tuple[tuple[str, Value], ...] = ()

    @property
    def options(self) -> dict[str, Value]:
        """Knobs as keyword arguments."""
        return dict(self.knobs)

    def get(self, knob: str) -> Value:
        """The value of one knob; `KeyError` when the operator has none of that name."""
        return dict(self.knobs)[knob]

    def to_plain(self) -> str | dict[str, Value]:
        """`name`, or `{name: ..., knob: value}`."""
        return {"name": self.name, **dict(self.knobs)} if self.knobs else self.name

    @classmethod
    def from_plain(cls, plain: Any) -> Op:
        """The inverse of `to_plain`, unchecked: every knob must be written."""
        if isinstance(plain, str):
            return cls(plain)
        return cls(plain["name"], tuple(sorted((k, v) for k, v in plain.items() if k != "name")))

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.knobs)
        return f"{self.name}({inner})" if inner else self.name


@dataclass(frozen=True)
class Block:
    """`x + gate(mixer(norm(x)))`, then `x + channel_mixer(norm(x))`; `recursion` times with one set of weights.

    Attributes:
        mixer: Token mixer.
        gate: Around it.
        channel_mixer: Of the second half; "none" leaves it out.
        quant: Quantization policy of the token branch.
        recursion: How often the block runs.
        channel_quant: Policy of the channel branch; that of the token branch where none is given, or there is none.
    """

    mixer: Op
    gate: Op
    channel_mixer: Op
    quant: Op
    recursion: int = 1
    channel_quant: Op = None  # type: ignore[assignment]  # set below

    def __post_init__(self) -> None:
        if self.channel_quant is None or self.channel_mixer.name == "none":
            object.__setattr__(self, "channel_quant", self.quant)

    def to_plain(self) -> dict[str, Any]:
        """The mapping of a canonical file."""
        quant: Any = self.quant.to_plain()
        if self.channel_quant != self.quant:
            quant = {"mixer": quant, "channel_mixer": self.channel_quant.to_plain()}
        return {
            "mixer": self.mixer.to_plain(),
            "gate": self.gate.to_plain(),
            "channel_mixer": self.channel_mixer.to_plain(),
            "quant": quant,
            "recursion": self.recursion,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Block:
        """The inverse of `to_plain`, unchecked."""
        quant = plain["quant"]
        both = quant if is_by_branch(quant) else {"mixer": quant, "channel_mixer": quant}
        return cls(
            mixer=Op.from_plain(plain["mixer"]),
            gate=Op.from_plain(plain["gate"]),
            channel_mixer=Op.from_plain(plain["channel_mixer"]),
            quant=Op.from_plain(both["mixer"]),
            channel_quant=Op.from_plain(both["channel_mixer"]),
            recursion=plain["recursion"],
        )


def is_by_branch(quant: Any) -> bool:
    """Whether plain data names a policy for each branch by itself: `{mixer: ..., channel_mixer: ...}`."""
    return isinstance(quant, Mapping) and "name" not in quant


@dataclass(frozen=True)
class Stage:
    """Blocks of one width; `downsample` stands before the first of them."""

    width: int
    downsample: Op
    blocks: tuple[Block, ...]

    def to_plain(self) -> dict[str, Any]:
        """The mapping of a canonical file."""
        return {
            "width": self.width,
            "downsample": self.downsample.to_plain(),
            "blocks": [block.to_plain() for block in self.blocks],
        }


@dataclass(frozen=True, repr=False)
class Architecture:
    """A network as data: stem, norm and stages. Equal networks are equal objects with equal `id`.

    Examples:
        >>> import mixnas
        >>> block = {"mixer": "attention", "channel_mixer": "mlp"}
        >>> architecture = mixnas.Architecture.from_dict({"stem": "conv", "stages": [{"width": 16, "block": block}]})
        >>> mixnas.Architecture.from_yaml(architecture.to_yaml()) == architecture
        True
        >>> len(architecture.id)
        12
    """

    stem: Op
    norm: Op
    stages: tuple[Stage, ...]

    @cached_property
    def id(self) -> str:
        """Content hash: the first 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The canonical form: plain data with every default written out and every stage's blocks spelled out."""
        return {
            "stem": self.stem.to_plain(),
            "norm": self.norm.to_plain(),
            "stages": [stage.to_plain() for stage in self.stages],
        }

    def to_json(self) -> str:
        """The canonical form on one line."""
        return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)

    def to_yaml(self) -> str:
        """The canonical form as YAML."""
        return dump_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, plain: Any, source: str = "architecture") -> Architecture:
        """Read plain data; `ConfigError` for anything unknown, impossible or still to be chosen."""
        from mixnas.search_space.space import SearchSpace

        return SearchSpace.from_dict(plain, source).single()

    @classmethod
    def from_canonical(cls, plain: Mapping[str, Any]) -> Architecture:
        """Read the canonical form (`to_dict`), unchecked and without the registry of operators, which needs torch.

        Raises:
            KeyError, TypeError: It is not the canonical form: read it with `from_dict`.
            IntegrityError: No network of this size is allowed; see `registry.STRUCTURE`.
        """
        stages = tuple(
            Stage(
                stage["width"],
                Op.from_plain(stage["downsample"]),
                tuple(Block.from_plain(block) for block in stage["blocks"]),
            )
            for stage in plain["stages"]
        )
        _check_size(stages)
        return cls(Op.from_plain(plain["stem"]), Op.from_plain(plain["norm"]), stages)

    @classmethod
    def from_yaml(cls, text: str, source: str = "<text>") -> Architecture:
        """Read YAML or JSON text."""
        return cls.from_dict(parse_yaml(text, source), source)

    from_json = from_yaml

    @classmethod
    def load(cls, path: str | Path) -> Architecture:
        """Read a file; a file with a `space:` key at the top is read from there."""
        plain = load_yaml(path)
        if isinstance(plain, dict) and "space" in plain:
            return cls.from_dict(plain["space"], f"{path}: space")
        return cls.from_dict(plain, str(path))

    def __repr__(self) -> str:
        return f"Architecture({self.id}, {self})"

    def __str__(self) -> str:
        parts = [str(self.stem)]
        for stage in self.stages:
            if stage.downsample.name != "none":
                parts.append(str(stage.downsample))
            blocks = []
            for block in stage.blocks:
                names = [block.mixer, block.gate, block.channel_mixer]
                text = "+".join(str(op) for op in names if op.name != "none")
                if block.channel_quant != block.quant:
                    text += f":{block.quant}/{block.channel_quant}"
                elif block.quant.name != "fp32":
                    text += f":{block.quant}"
                blocks.append(text + (f" ×{block.recursion}" if block.recursion > 1 else ""))
            parts.append(f"{stage.width}[{', '.join(blocks)}]")
        return f"{self.norm}: " + " > ".join(parts)


def _check_size(stages: tuple[Stage, ...]) -> None:
    """Refuse what takes for ever to count, let alone to build: a run of another's may say anything."""
    from mixnas.search_space.registry import MOST_BLOCKS, STRUCTURE

    widths = [stage.width for stage in stages]
    recursions = [block.recursion for stage in stages for block in stage.blocks]
    for name, numbers in (("width", widths), ("recursion", recursions), ("depth", [len(s.blocks) for s in stages])):
        low, high = STRUCTURE[name].low, STRUCTURE[name].high
        for number in numbers:
            if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:  # type: ignore[operator]
                raise IntegrityError(
                    f"architecture: {name} is {shown(number)}. Allowed: a whole number from {low} to {high}."
                )
    if len(recursions) > MOST_BLOCKS:
        raise IntegrityError(f"architecture: {len(recursions):,} blocks. Allowed: up to {MOST_BLOCKS:,}.")
