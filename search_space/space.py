"""A search space: every architecture that a file with lists stands for, without listing them.

The space is a tree of choices. Each real choice (two values or more) is a `Variable`; a variable that depends on
another's value (a knob on its operator, a block on the depth) names that parent and is inactive elsewhere. One
define-by-run walk, `_walk`, makes an architecture from any source of choices: a vector,
a generator, an Optuna or Ray trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mixnas.search_space.architecture import BLOCK_AXES, Architecture, Block, Op, Stage
from mixnas.search_space.errors import ConfigError, nearest, shown
from mixnas.search_space.files import load_yaml
from mixnas.search_space.grammar import BlockChoice, OpChoice, OpOption, SpaceTree, StageChoice, read_space
from mixnas.search_space.registry import Value

INACTIVE = -1


class Trial(Protocol):
    """What `SearchSpace.ask` needs of a trial; `optuna.Trial` has it."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of `choices`."""


@dataclass(frozen=True)
class Variable:
    """One choice.

    Attributes:
        name: The path in the file, for example "stages.0.blocks.1.mixer.dwconv.kernel_size".
        values: What may be chosen (labels of operators, numbers), two or more.
        parent: Index of the variable that it depends on, or -1.
        parent_options: Positions in the parent's values at which this variable exists.
        axis: What is chosen: "stem", "norm", "width", "downsample", "depth", "mixer", "gate", "channel_mixer", "quant",
            "channel_quant" or "recursion".
        stage: Index of its stage; None outside the stages.
        block: Index of its block; None outside the blocks, and where the blocks of a stage share their choices.
        option: Of a knob, the label of the operator that has it; else empty.
        knob: Of a knob, its name; else empty.
    """

    name: str
    values: tuple[Value, ...]
    parent: int = -1
    parent_options: frozenset[int] = frozenset()
    axis: str = ""
    stage: int | None = None
    block: int | None = None
    option: str = ""
    knob: str = ""

    @property
    def of_operator(self) -> bool:
        """Whether an operator is chosen, rather than a number or a knob."""
        return not self.knob and self.axis not in ("width", "depth", "recursion")


# Called for every choice of two or more values with its name and values; returns the position chosen.
Pick = Callable[[str, tuple[Value, ...]], int]


def _choose(pick: Pick, name: str, values: tuple[Any, ...]) -> int:
    return pick(name, values) if len(values) > 1 else 0


class SearchSpace:
    """See the module. Vectors are integer arrays over `variables`; an inactive position is -1.

    Examples:
        >>> import mixnas, numpy
        >>> space = mixnas.SearchSpace.from_dict({"stem": "conv", "stages": [
        ...     {"width": [8, 16], "block": {"mixer": [{"name": "dwconv", "kernel_size": [3, 5]}, "pooling"],
        ...                                  "channel_mixer": "mlp"}}]})
        >>> space.size(), [variable.name for variable in space.variables]
        (6, ['stages.0.width', 'stages.0.blocks.0.mixer', 'stages.0.blocks.0.mixer.dwconv.kernel_size'])
        >>> architecture = space.sample(numpy.random.default_rng(0))
        >>> space.decode(space.encode(architecture)) == architecture
        True
    """

    def __init__(self, tree: SpaceTree, source: str = "space") -> None:
        self.tree = tree
        self.source = source
        self._set_variables(tuple(_variables(tree)))

    def _set_variables(self, variables: tuple[Variable, ...]) -> None:
        self.variables = variables
        self._index = {variable.name: i for i, variable in enumerate(self.variables)}
        self._counts = np.array([len(v.values) for v in self.variables], dtype=np.int64)
        self._allowed: list[np.ndarray] = []
        for variable in self.variables:
            options = len(self.variables[variable.parent].values) if variable.parent >= 0 else 1
            self._allowed.append(np.array([i in variable.parent_options for i in range(options)]))

    def __repr__(self) -> str:
        return f"SearchSpace({self.source}: {self.size():,} architectures, {len(self.variables)} choices)"

    @classmethod
    def from_dict(cls, plain: Any, source: str = "space") -> SearchSpace:
        """Read plain data (what stands under `space:`); `ConfigError` says what is wrong and where."""
        return cls(read_space(plain, source), source)

    @classmethod
    def load(cls, path: str | Path) -> SearchSpace:
        """Read a file: a whole configuration (its `space:`) or a space alone."""
        plain = load_yaml(path)
        if isinstance(plain, dict) and "space" in plain:
            return cls.from_dict(plain["space"], f"{path}: space")
        return cls.from_dict(plain, str(path))

    # -- counting ---------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """The exact number of architectures."""

        def op(choice: OpChoice) -> int:
            return sum(prod(len(values) for _, values in option.knobs) for option in choice.options)

        def block(choice: BlockChoice) -> int:
            shared = op(choice.mixer) * op(choice.gate) * op(choice.quant) * len(choice.recursion)
            if choice.channel_quant is None:
                return shared * op(choice.channel_mixer)
            none = len(_without_branch(choice.channel_mixer))
            return shared * (none + (op(choice.channel_mixer) - none) * op(choice.channel_quant))

        total = op(self.tree.stem) * op(self.tree.norm)
        for stage in self.tree.stages:
            per_depth = (
                block(stage.blocks[0]) if stage.shared else prod(map(block, stage.blocks[:d])) for d in stage.depth
            )
            total *= len(stage.width) * op(stage.downsample) * sum(per_depth)
        return total

    def single(self) -> Architecture:
        """The one architecture of a space with every choice made; `ConfigError` names what is still open."""
        if self.variables:
            open_choices = ", ".join(f"{v.name} {list(v.values)}" for v in self.variables[:3])
            raise ConfigError(
                f"{self.source}: this is a space with {len(self.variables)} open choices, not one architecture: "
                f"{open_choices}{', ...' if len(self.variables) > 3 else ''}. Choose one value for each."
            )
        return self._walk(lambda name, values: 0)

    # -- one architecture from choices, and back --------------------------------------------------------------------

    def _walk(self, pick: Pick) -> Architecture:
        def op(choice: OpChoice, path: str) -> Op:
            i = _choose(pick, path, choice.labels)
            option = choice.options[i]
            prefix = f"{path}.{choice.labels[i]}"
            return Op(option.name, tuple((k, vs[_choose(pick, f"{prefix}.{k}", vs)]) for k, vs in option.knobs))

        def block(choice: BlockChoice, path: str) -> Block:
            ops = {axis: op(getattr(choice, axis), f"{path}.{place}") for axis, place in _places(choice)}
            if choice.channel_quant is not None and ops["channel_mixer"].name != "none":
                ops["channel_quant"] = op(choice.channel_quant, f"{path}.{_CHANNEL_QUANT}")
            return Block(**ops, recursion=choice.recursion[_choose(pick, f"{path}.recursion", choice.recursion)])

        def stage(choice: StageChoice, path: str) -> Stage:
            width = choice.width[_choose(pick, f"{path}.width", choice.width)]
            downsample = op(choice.downsample, f"{path}.downsample")
            depth = choice.depth[_choose(pick, f"{path}.depth", choice.depth)]
            if choice.shared:
                blocks = (block(choice.blocks[0], f"{path}.block"),) * depth
            else:
                blocks = tuple(block(choice.blocks[b], f"{path}.blocks.{b}") for b in range(depth))
            return Stage(width, downsample, blocks)

        return Architecture(
            stem=op(self.tree.stem, "stem"),
            norm=op(self.tree.norm, "norm"),
            stages=tuple(stage(choice, f"stages.{s}") for s, choice in enumerate(self.tree.stages)),
        )

    def walk(self, pick: Callable[[Variable], int]) -> Architecture:
        """The architecture whose active choices `pick(variable)` makes: it returns a position in `variable.values`."""
        return self._walk(lambda name, values: pick(self.variables[self._index[name]]))

    def decode(self, vector: Sequence[int] | np.ndarray) -> Architecture:
        """The architecture of an integer vector; inactive positions are not read.

        Raises:
            ConfigError: Wrong length, a value that is no whole number, or an active position outside its variable's
                values.
        """
        row = vector.tolist() if isinstance(vector, np.ndarray) else vector
        if not isinstance(row, list | tuple):
            raise ConfigError(
                f"{self.source}: {shown(vector)} is no vector. Give {len(self.variables)} whole numbers, as `encode`."
            )
        for value in row:
            if type(value) is not int and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise ConfigError(
                    f"{self.source}: {value!r} in a vector is no position among a variable's values. Give whole "
                    "numbers, as `encode` does."
                )
        if len(row) != len(self.variables):
            raise ConfigError(
                f"{self.source}: a vector of length {len(row)}; this space has {len(self.variables)} variables."
            )

        def pick(name: str, values: tuple[Value, ...]) -> int:
            position = row[self._index[name]]
            if not 0 <= position < len(values):
                raise ConfigError(f"{self.source}: position {position} of {name} is outside 0 to {len(values) - 1}.")
            return position

        return self._walk(pick)

    def decode_many(self, matrix: np.ndarray) -> list[Architecture]:
        """`decode` for every row."""
        if not isinstance(matrix, np.ndarray | list | tuple):
            raise ConfigError(f"{self.source}: {shown(matrix)} is no matrix of vectors, as `encode_many` gives.")
        return [self.decode(row) for row in matrix]

    def encode(self, architecture: Architecture) -> np.ndarray:
        """Integer vector (num_variables,), int64, inactive positions -1.

        Raises:
            ConfigError: The architecture is not in this space; the message says at which place, and what is allowed.
        """
        if not isinstance(architecture, Architecture):
            raise ConfigError(
                f"{self.source}: {type(architecture).__name__} is no Architecture. Read plain data with "
                "Architecture.from_dict."
            )
        vector = np.full(len(self.variables), INACTIVE, dtype=np.int64)
        for name, position in self._positions(architecture):
            vector[self._index[name]] = position
        return vector

    def encode_many(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Integer matrix (num_architectures, num_variables)."""
        if not len(architectures):
            return np.empty((0, len(self.variables)), dtype=np.int64)
        return np.stack([self.encode(architecture) for architecture in architectures])

    def contains(self, architecture: Architecture) -> bool:
        """Whether the architecture is one of this space."""
        try:
            self.encode(architecture)
        except ConfigError:
            return False
        return True

    def _positions(self, architecture: Architecture) -> Iterator[tuple[str, int]]:
        def at(path: str, values: Sequence[Any], value: Any) -> Iterator[tuple[str, int]]:
            if value not in values:
                raise ConfigError(
                    f"{self.source}: not in this space: {path} is {value!r}. Allowed: {', '.join(map(str, values))}."
                )
            if len(values) > 1:
                yield path, values.index(value)

        def fits(option: OpOption, chosen: Op) -> bool:
            same = option.name == chosen.name and len(option.knobs) == len(chosen.knobs)
            return same and all(dict(chosen.knobs).get(k) in vs for k, vs in option.knobs)

        def op(choice: OpChoice, path: str, chosen: Op) -> Iterator[tuple[str, int]]:
            i = next((i for i, option in enumerate(choice.options) if fits(option, chosen)), None)
            if i is None:
                raise ConfigError(f"{self.source}: not in this space: {_why_not(choice, path, chosen)}")
            if len(choice.options) > 1:
                yield path, i
            for k, vs in choice.options[i].knobs:
                yield from at(f"{path}.{choice.labels[i]}.{k}", vs, chosen.get(k))

        def block(choice: BlockChoice, path: str, chosen: Block) -> Iterator[tuple[str, int]]:
            for axis, place in _places(choice):
                yield from op(getattr(choice, axis), f"{path}.{place}", getattr(chosen, axis))
            if choice.channel_quant is None:
                yield from at(f"{path}.{_CHANNEL_QUANT}", (chosen.quant,), chosen.channel_quant)
            elif chosen.channel_mixer.name != "none":
                yield from op(choice.channel_quant, f"{path}.{_CHANNEL_QUANT}", chosen.channel_quant)
            yield from at(f"{path}.recursion", choice.recursion, chosen.recursion)

        yield from op(self.tree.stem, "stem", architecture.stem)
        yield from op(self.tree.norm, "norm", architecture.norm)
        yield from at("number of stages", (len(self.tree.stages),), len(architecture.stages))
        for s, (choice, stage) in enumerate(zip(self.tree.stages, architecture.stages, strict=True)):
            path = f"stages.{s}"
            yield from at(f"{path}.width", choice.width, stage.width)
            yield from op(choice.downsample, f"{path}.downsample", stage.downsample)
            yield from at(f"{path}.depth", choice.depth, len(stage.blocks))
            if choice.shared:
                if len(set(stage.blocks)) != 1:
                    raise ConfigError(
                        f"{self.source}: not in this space: the blocks of {path} differ, and it has share: true."
                    )
                yield from block(choice.blocks[0], f"{path}.block", stage.blocks[0])
            else:
                for b, chosen in enumerate(stage.blocks):
                    yield from block(choice.blocks[b], f"{path}.blocks.{b}", chosen)

    def ask(self, trial: Trial) -> Architecture:
        """Ask a trial for the active choices only, and return the architecture (define-by-run; Optuna and Ray Tune)."""
        return self._walk(lambda name, values: values.index(trial.suggest_categorical(name, values)))

    def params_of(self, architecture: Architecture) -> dict[str, Value]:
        """The active choices by name: what a trial of this architecture holds."""
        return {name: self.variables[self._index[name]].values[i] for name, i in self._positions(architecture)}

    def from_params(self, params: Mapping[str, Value]) -> Architecture:
        """The inverse of `params_of`; names of inactive variables are ignored, missing ones a `ConfigError`."""

        def pick(name: str, values: tuple[Value, ...]) -> int:
            if name not in params or params[name] not in values:
                raise ConfigError(
                    f"{self.source}: {name} is {params.get(name)!r}. Allowed: {', '.join(map(str, values))}."
                )
            return values.index(params[name])

        return self._walk(pick)

    # -- many at once -----------------------------------------------------------------------------------------------

    def active(self, matrix: np.ndarray) -> np.ndarray:
        """Boolean matrix: which positions of integer vectors exist, given the values of their parents."""
        matrix = np.asarray(matrix)
        active = np.ones(matrix.shape, dtype=bool)
        for i, variable in enumerate(self.variables):
            if variable.parent >= 0:
                chosen = np.maximum(matrix[..., variable.parent], 0)  # an inactive parent is ruled out just below
                active[..., i] = active[..., variable.parent] & self._allowed[i][chosen]
        return active

    def sample_many(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random integer vectors (count, num_variables): every choice uniform among its values.

        That is not uniform over architectures: those of few choices (a small depth) come as often as those of many.

        Raises:
            ConfigError: `count` is no whole number from 0, or `rng` no `numpy.random.Generator`.
        """
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 0:
            raise ConfigError(f"{self.source}: {count!r} architectures cannot be drawn. Give a whole number from 0.")
        _check_generator(rng)
        matrix = rng.integers(0, self._counts, size=(count, len(self.variables)))
        return np.where(self.active(matrix), matrix, INACTIVE)

    def every(self) -> np.ndarray:
        """Every architecture once, as integer vectors (size, num_variables): of small spaces, see `size`."""
        matrix = np.full((1, len(self.variables)), INACTIVE, dtype=np.int64)
        for i, count in enumerate(self._counts):  # parents come first
            active = self.active(matrix)[:, i]
            each = np.where(active, count, 1)
            position = np.arange(each.sum()) - (np.cumsum(each) - each).repeat(each)
            matrix = matrix.repeat(each, axis=0)
            matrix[:, i] = np.where(active.repeat(each), position, INACTIVE)
        return matrix

    def sample(self, rng: np.random.Generator) -> Architecture:
        """One random architecture: every choice uniform among its values."""
        return self.decode(self.sample_many(1, rng)[0])

    def complete(self, matrix: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Fill positions that have become active (-1 so far) at random, and forget those no longer active."""
        filled = np.where(matrix >= 0, matrix, rng.integers(0, self._counts, size=matrix.shape))
        return np.where(self.active(filled), filled, INACTIVE)

    def mutate(self, architecture: Architecture, rng: np.random.Generator, rate: float | None = None) -> Architecture:
        """Change each active choice with probability `rate` (default: one on average), at least one.

        A choice that becomes active by it is drawn at random. A space of one architecture returns it unchanged.

        Raises:
            ConfigError: The architecture is not in this space, or `rate` no share from 0 to 1.
        """
        _check_generator(rng)
        if rate is not None and not 0 <= rate <= 1:
            raise ConfigError(f"{self.source}: a rate of {rate!r}. Allowed: a share from 0 to 1.")
        vector = self.encode(architecture)
        where = np.flatnonzero(vector >= 0)
        if not len(where):
            return architecture
        chosen = where[rng.random(len(where)) < (1 / len(where) if rate is None else rate)]
        if not len(chosen):
            chosen = rng.choice(where, size=1)
        for i in chosen:
            vector[i] = (vector[i] + rng.integers(1, self._counts[i])) % self._counts[i]
        return self.decode(self.complete(vector, rng))

    def crossover(self, first: Architecture, second: Architecture, rng: np.random.Generator) -> Architecture:
        """Uniform crossover: each choice from either parent, where only one has it from that one."""
        _check_generator(rng)
        a, b = self.encode(first), self.encode(second)
        child = np.where(rng.random(len(a)) < 0.5, a, b)
        return self.decode(self.complete(np.where(child >= 0, child, np.maximum(a, b)), rng))

    def neighbours(self, architecture: Architecture) -> Iterator[Architecture]:
        """Every architecture that differs by one changed choice.

        Choices that become active by it take their first value; an added block repeats the last one.
        """
        for vector in self.neighbour_vectors(self.encode(architecture)):
            yield self.decode(vector)

    def neighbour_vectors(self, vector: np.ndarray) -> np.ndarray:
        """`neighbours` of an integer vector (num_variables,), as integer vectors (count, num_variables)."""
        found = []
        for i in np.flatnonzero(vector >= 0):
            changed = vector.copy()
            if self.variables[i].axis == "depth":
                self._repeat_last_block(changed, int(i))
            for value in range(self._counts[i]):
                if value != vector[i]:
                    changed[i] = value
                    found.append(changed.copy())
        matrix = np.array(found, dtype=np.int64).reshape(len(found), len(self.variables))
        filled = np.maximum(matrix, 0)
        return np.where(self.active(filled), filled, INACTIVE)

    def _repeat_last_block(self, vector: np.ndarray, depth: int) -> None:
        """Choices of absent blocks become those of the last one; `depth` is the index of the stage's depth."""
        variable = self.variables[depth]
        last = int(variable.values[vector[depth]]) - 1
        inside = [(i, v) for i, v in enumerate(self.variables) if v.stage == variable.stage and v.block is not None]
        source = {(v.axis, v.option, v.knob): vector[i] for i, v in inside if v.block == last}
        for i, v in inside:
            if vector[i] < 0:
                vector[i] = source.get((v.axis, v.option, v.knob), INACTIVE)


def _why_not(choice: OpChoice, path: str, chosen: Op) -> str:
    """Why an operator is none of a place's: its name, or of the option that is nearest to it one knob."""
    found: list[list[str]] = []
    for option, label in zip(choice.options, choice.labels, strict=True):
        if option.name == chosen.name:
            place, own, given = f"{path}.{label}", dict(option.knobs), dict(chosen.knobs)
            found.append(
                [
                    *(
                        f"{place}.{k} is {given[k]!r}. Allowed: {', '.join(map(str, vs))}."
                        for k, vs in own.items()
                        if k in given and given[k] not in vs
                    ),
                    *(
                        f"{place} has no knob {k!r}. Allowed: {', '.join(own) or 'none'}."
                        for k in given
                        if k not in own
                    ),
                    *(f"{place} lacks the knob {k!r}." for k in own if k not in given),
                ]
            )
    if found:
        return min(found, key=len)[0]
    allowed = list(dict.fromkeys(option.name for option in choice.options))
    return f"{path} is {chosen}.{nearest(chosen.name, allowed)} Allowed: {', '.join(allowed)}."


def _check_generator(rng: Any) -> None:
    if not isinstance(rng, np.random.Generator):
        raise ConfigError(f"{rng!r} is no source of random numbers. Give numpy.random.default_rng(seed).")


_CHANNEL_QUANT = "quant.channel_mixer"  # where a block's two branches have policies of their own


def _places(choice: BlockChoice) -> Iterator[tuple[str, str]]:
    """What every block of a place chooses, and where that stands in its file."""
    for axis in BLOCK_AXES:
        yield axis, "quant.mixer" if axis == "quant" and choice.channel_quant is not None else axis


def _without_branch(channel_mixer: OpChoice) -> list[int]:
    """The options that leave the channel branch out; it then has no policy to choose."""
    return [i for i, option in enumerate(channel_mixer.options) if option.name == "none"]


def _variables(tree: SpaceTree) -> Iterator[Variable]:
    count = 0
    place: tuple[int | None, int | None] = (None, None)  # stage and block

    def add(
        name: str, values: tuple[Any, ...], parent: int, options: frozenset[int], axis: str, *knob: str
    ) -> Iterator[Variable]:
        nonlocal count
        if len(values) > 1:
            count += 1
            yield Variable(name, values, parent, options, axis, *place, *knob)

    def op(choice: OpChoice, path: str, axis: str, parent: int, options: frozenset[int]) -> Iterator[Variable]:
        own = count
        yield from add(path, choice.labels, parent, options, axis)
        for i, option in enumerate(choice.options):
            label = choice.labels[i]
            under = (own, frozenset({i})) if len(choice.options) > 1 else (parent, options)
            for knob, values in option.knobs:
                yield from add(f"{path}.{label}.{knob}", values, *under, axis, label, knob)

    def block(choice: BlockChoice, path: str, parent: int, options: frozenset[int]) -> Iterator[Variable]:
        under: tuple[int, frozenset[int]] | None = (parent, options)  # of the channel branch's policy
        for axis, place in _places(choice):
            if axis == "channel_mixer" and (none := _without_branch(choice.channel_mixer)):
                number = len(choice.channel_mixer.options)
                under = (count, frozenset(range(number)) - set(none)) if number > 1 else None
            yield from op(getattr(choice, axis), f"{path}.{place}", axis, parent, options)
        if choice.channel_quant is not None and under is not None:
            yield from op(choice.channel_quant, f"{path}.{_CHANNEL_QUANT}", "channel_quant", *under)
        yield from add(f"{path}.recursion", choice.recursion, parent, options, "recursion")

    free: tuple[int, frozenset[int]] = (-1, frozenset())
    yield from op(tree.stem, "stem", "stem", *free)
    yield from op(tree.norm, "norm", "norm", *free)
    for s, stage in enumerate(tree.stages):
        path = f"stages.{s}"
        place = (s, None)
        yield from add(f"{path}.width", stage.width, *free, "width")
        yield from op(stage.downsample, f"{path}.downsample", "downsample", *free)
        own = count
        yield from add(f"{path}.depth", stage.depth, *free, "depth")
        if stage.shared:
            yield from block(stage.blocks[0], f"{path}.block", *free)
            continue
        for b, choice in enumerate(stage.blocks):
            place = (s, b)
            deep_enough = frozenset(i for i, depth in enumerate(stage.depth) if depth > b)
            always = len(deep_enough) == len(stage.depth)
            yield from block(choice, f"{path}.blocks.{b}", *(free if always else (own, deep_enough)))
