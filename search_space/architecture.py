"""An architecture: plain frozen data, one canonical form, one content hash.

An architecture file is a search-space file with every choice made, so the reader is the space's
(`mixnas.search_space.space`); what stands here is the data and its canonical form.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mixnas.search_space.files import dump_yaml, load_yaml, parse_yaml
from mixnas.search_space.registry import Value


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

    def __str__(self) -> str:
        inner = ", ".join(f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.knobs)
        return f"{self.name}({inner})" if inner else self.name


@dataclass(frozen=True)
class Block:
    """`x + gate(mixer(norm(x)))`, then `x + channel_mixer(norm(x))`; `recursion` times with one set of weights."""

    mixer: Op
    gate: Op
    channel_mixer: Op
    quant: Op
    recursion: int = 1

    def to_plain(self) -> dict[str, Any]:
        """The mapping of a canonical file."""
        return {
            "mixer": self.mixer.to_plain(),
            "gate": self.gate.to_plain(),
            "channel_mixer": self.channel_mixer.to_plain(),
            "quant": self.quant.to_plain(),
            "recursion": self.recursion,
        }


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


@dataclass(frozen=True)
class Architecture:
    """A network as data: stem, norm and stages. Equal networks are equal objects with equal `id`."""

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

    def __str__(self) -> str:
        parts = [str(self.stem)]
        for stage in self.stages:
            if stage.downsample.name != "none":
                parts.append(str(stage.downsample))
            blocks = []
            for block in stage.blocks:
                names = [block.mixer, block.gate, block.channel_mixer]
                text = "+".join(str(op) for op in names if op.name != "none")
                text += "" if block.quant.name == "fp32" else f":{block.quant}"
                blocks.append(text + (f" ×{block.recursion}" if block.recursion > 1 else ""))
            parts.append(f"{stage.width}[{', '.join(blocks)}]")
        return f"{self.norm}: " + " > ".join(parts)
