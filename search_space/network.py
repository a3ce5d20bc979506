"""From an architecture to a network: the modules of its units, one after the other."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.errors import ConfigError, NasError
from mixnas.search_space.operators.folding import fold, foldable, merges
from mixnas.search_space.operators.layers import Standardise
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.registry import BETWEEN, Context
from mixnas.search_space.units import IOSpec, Unit, plan, registry_size_after

Make = Callable[[str, str, Op, Context, Context, Op | None], nn.Module]
"""Makes the module of an operator: place within the unit, axis, operator, contexts before and after, policy. The
super-network passes one that hands out modules sharing its weights."""


def build_op(axis: str, op: Op, before: Context, after: Context, quant: Op | None = None) -> nn.Module:
    """Build an operator where it stands, freshly initialised, prepared for a policy.

    Raises:
        ConfigError: It holds one tensor under two names.
    """
    contexts = (before, after) if axis in BETWEEN else (before,)
    module: nn.Module = registry.get(axis, op.name).build(*contexts, **op.options)
    _refuse_ties(module, axis, op)
    return module if quant is None else policy_of(quant).prepare(module)


@contextlib.contextmanager
def on_shapes(axis: str, op: Op) -> Iterator[None]:
    """Within it an operator is built or run on shapes only; what is raised says which operator it was."""
    try:
        yield
    except NasError:
        raise
    except Exception as error:
        raise ConfigError(
            f'{axis.replace("_", " ")} {op} fails where it is built and run on shapes only (torch\'s "meta" device): '
            f"{type(error).__name__}: {error}. Neither its __init__ nor its forward may read a tensor's values "
            "(item(), tolist(), nonzero(), if tensor:); they are not there when an operator is counted."
        ) from error


def _refuse_ties(module: nn.Module, axis: str, op: Op) -> None:
    # A store of views, a policy that takes a layer's place and a file each know a tensor by its one name.
    names: dict[int, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first != name:
            raise ConfigError(
                f"{axis.replace('_', ' ')} {op.name!r} holds one tensor under two names, {first} and {name}. Tied "
                "weights are not supported. Keep one layer, and call it twice in forward."
            )


def _build(path: str, axis: str, op: Op, before: Context, after: Context, quant: Op | None) -> nn.Module:
    return build_op(axis, op, before, after, quant)


@lru_cache(maxsize=1 << 16)
def _check_op(axis: str, op: Op, context: Context) -> None:
    operator = registry.get(axis, op.name)
    label = axis.replace("_", " ")
    if context.kind not in operator.kinds:
        suitable = [n for n in registry.names(axis) if context.kind in registry.get(axis, n).kinds]
        raise ConfigError(
            f"{label} {op.name!r} does not serve {context.kind} tasks (it serves {', '.join(operator.kinds)}). "
            f"Allowed: {', '.join(suitable)}."
        )
    if context.padded and not operator.serves_padded(context.kind):
        able = [n for n in registry.names(axis) if _serves_padded(axis, n, context.kind)]
        raise ConfigError(
            f"{label} {op.name!r} cannot be told where a series ends: its answers would change with what stands behind "
            f"the end, or how much. The series have different lengths. Allowed for these: {', '.join(able) or 'none'}. "
            "Choose one of them, cut all series to one length (task.length), or use kind: causal."
        )
    problem = operator.check(context, op.options) if operator.check else None
    if problem:
        raise ConfigError(f"{label} {op}: {problem}. Choose other values, or another width or input size.")


def _serves_padded(axis: str, name: str, kind: str) -> bool:
    operator = registry.get(axis, name)
    return kind in operator.kinds and operator.serves_padded(kind)


def check_op(axis: str, op: Op, context: Context, where: str) -> None:
    """Raise `ConfigError`, with the place, when an operator cannot stand in a context."""
    try:
        _check_op(axis, op, context)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def check_stem(op: Op, io: IOSpec) -> None:
    """Raise `ConfigError` when a stem cannot read what the task gives."""
    check_op("stem", op, io.before, "stem")
    takes_tokens = getattr(registry.get("stem", op.name).build, "takes_tokens", False)
    if takes_tokens != io.tokens:
        given, wants = ("tokens" if flag else "features" for flag in (io.tokens, takes_tokens))
        raise ConfigError(f"stem: stem {op.name!r} reads {wants}, and the task gives {given}.")


def check_head(io: IOSpec, before: Context) -> None:
    """Raise `ConfigError` when the task's head cannot answer on the task's grid from these tokens."""
    check_op("head", io.head_op, before, "head")
    grid = registry_size_after("head", io.head_op, before)
    if grid != io.grid:
        made, wanted = ("x".join(map(str, extents)) or "one answer" for extents in (grid, io.grid))
        raise ConfigError(
            f"head: head {io.head!r} answers on {made}, and the task's targets are {wanted}: the last stage has "
            f"{'x'.join(map(str, before.size))} tokens of an input of {'x'.join(map(str, io.size))}. Change the "
            "space's strides and downsampling, or the task's own stride where it has one (task.stride); a task of your "
            "own may have targets of that size (out_size of its io) or another head."
        )


def checked_plan(architecture: Architecture, io: IOSpec) -> tuple[tuple[str, Unit], ...]:
    """The units of a network (`units.plan`), each checked.

    Raises:
        ConfigError: An operator cannot stand where it stands (kind of task, width, size); the message says which.
    """

    def size_after(axis: str, op: Op, before: Context) -> tuple[int, ...]:
        if axis == "stem":
            check_stem(op, io)
        elif axis == "head":
            check_head(io, before)
        else:
            check_op(axis, op, before, axis)
        return registry_size_after(axis, op, before)

    planned = plan(architecture, io, size_after)
    for name, unit in planned:
        for axis, op in unit.choices:
            if axis not in BETWEEN:
                check_op(axis, op, unit.before, name)
    return planned


def _named(name: str, module: nn.Module, wrap: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """The operator's name in the parameter's name: operators never share weights by accident, and files read well."""
    wrapper = wrap()
    wrapper.add_module(name, module)
    return wrapper


def padding_apart(x: Tensor) -> tuple[Tensor, Tensor]:
    """Series with zeros where they have ended, and which positions are there, (B, L, 1)."""
    valid = ~x[..., :1].isnan()
    return torch.where(valid, x, 0.0), valid


def padding_back(y: Tensor, valid: Tensor) -> Tensor:
    """With NaN where a series has ended: so the next unit is told, and no gradient comes from there."""
    return torch.where(valid, y, torch.nan)


def _is_told(axis: str, op: Op, context: Context) -> bool:
    """Whether an operator is told which positions are there; where nothing is padded, nothing is looked up."""
    return context.padded and op.name in registry.names(axis) and registry.get(axis, op.name).takes_valid


class _Padded(nn.Sequential):
    """An operator that reads series which have ended before others: as without them, each position by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, C) to (B, L, C'), NaN where there is nothing."""
        x, valid = padding_apart(x)
        return padding_back(super().forward(x), valid)


class TokenBranch(nn.Module):
    """`x + gate(mixer(norm(x)))` (MetaFormer, arXiv 2111.11418, section 3.1, with a gate)."""

    def __init__(self, unit: Unit, make: Make = _build) -> None:
        super().__init__()
        norm, mixer, gate, context = unit.op("norm"), unit.op("mixer"), unit.op("gate"), unit.before
        self.quant = unit.quant
        self.norm = _named(norm.name, make("norm", "norm", norm, context, context, None))
        self.mixer = _named(mixer.name, make("mixer", "mixer", mixer, context, context, unit.quant))
        self.gate = nn.ModuleDict({gate.name: make("gate", "gate", gate, context, context, unit.quant)})
        self._gate = gate.name
        self._padded = context.padded
        self._told = context.kind != "causal" and _is_told("mixer", mixer, context)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if self._padded:
            return self._of_padded(x)
        return x + self.gate[self._gate](self.norm(x), self.mixer)

    def _of_padded(self, x: Tensor) -> Tensor:
        x, valid = padding_apart(x)
        mixer = functools.partial(self.mixer[0], valid=valid) if self._told else self.mixer
        return padding_back(x + self.gate[self._gate](self.norm(x), mixer), valid)


class ChannelBranch(nn.Module):
    """`x + channel_mixer(norm(x))`."""

    def __init__(self, unit: Unit, make: Make = _build) -> None:
        super().__init__()
        norm, mixer, context = unit.op("norm"), unit.op("channel_mixer"), unit.before
        self.quant = unit.quant
        self.norm = _named(norm.name, make("norm", "norm", norm, context, context, None))
        module = make("channel_mixer", "channel_mixer", mixer, context, context, unit.quant)
        self.channel_mixer = _named(mixer.name, module)
        self._padded = context.padded

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., C) to the same."""
        if self._padded:
            x, valid = padding_apart(x)
            return padding_back(x + self.channel_mixer(self.norm(x)), valid)
        y: Tensor = self.channel_mixer(self.norm(x))
        return x + y


class Head(nn.Module):
    """The task's head behind a norm."""

    def __init__(self, unit: Unit, make: Make = _build) -> None:
        super().__init__()
        norm, head = unit.op("norm"), unit.op("head")
        self.norm = _named(norm.name, make("norm", "norm", norm, unit.before, unit.before, None))
        self.output = _named(head.name, make("output", "head", head, unit.before, unit.after, None))
        self._padded = unit.before.padded
        self._told = _is_told("head", head, unit.before)

    @property
    def linear(self) -> nn.Linear | None:
        """The last layer, where the head ends in one that reads `features`."""
        head = self.output[0]
        return getattr(head, "linear", None) if hasattr(head, "features") else None

    def features(self, x: Tensor) -> Tensor:
        """What `linear` reads."""
        if self._padded:
            x, valid = padding_apart(x)
            told = {"valid": valid} if self._told else {}
            return self.output[0].features(self.norm(x), **told)  # type: ignore[operator,no-any-return]
        features: Tensor = self.output[0].features(self.norm(x))  # type: ignore[operator]
        return features

    def forward(self, x: Tensor) -> Tensor:
        """(B, *size, C) to the head's answers."""
        if self._padded:
            x, valid = padding_apart(x)
            told = {"valid": valid} if self._told else {}
            return self.output[0](self.norm(x), **told)  # type: ignore[no-any-return]
        answers: Tensor = self.output(self.norm(x))
        return answers


def build_unit(unit: Unit, make: Make = _build) -> nn.Module:
    """The module of a unit, freshly initialised from torch's global generator, or of operators that `make` gives."""
    if unit.role == "token":
        return TokenBranch(unit, make)
    if unit.role == "channel":
        return ChannelBranch(unit, make)
    if unit.role == "head":
        return Head(unit, make)
    ((axis, op),) = unit.ops
    module = make("", axis, op, unit.before, unit.after, None)
    return _named(op.name, module, _Padded if unit.before.padded else nn.Sequential)


@torch.no_grad()
def deploy_unit(module: nn.Module, *, folded: bool = True) -> nn.Module:
    """Put a unit into inference form, in place; returns it.

    Args:
        module: The unit.
        folded: Whether batch norms are folded into the layers before them.
    """
    if folded:
        fold(module)
    if isinstance(module, TokenBranch | ChannelBranch) and module.quant is not None:
        policy = policy_of(module.quant)
        holders = (module.mixer, module.gate) if isinstance(module, TokenBranch) else (module.channel_mixer,)
        for holder in holders:
            for name, operator in list(holder.named_children()):
                setattr(holder, name, policy.deploy(operator))
    return module


def _inference_form(module: nn.Module) -> nn.Module:
    """See `Network.as_deployed`."""
    if not (foldable(module) or merges(module)):
        return module
    return deploy_unit(copy.deepcopy(module)).requires_grad_(False)


class Network(nn.Module):
    """The network of an architecture.

    Args:
        architecture: Which.
        io: What it reads and answers.
        generator: Source of the initial weights' seed; without one, torch's global generator is used.
        units: (name, module) in the order in which they run, to use instead of building them (the super-network shares
            weights so); a name that comes again is the same module.

    Shape:
        Input (B, *size, in_features), or (B, L) integers; output as the task's head says.

    Raises:
        ConfigError: See `checked_plan`.

    Examples:
        >>> import mixnas
        >>> block = {"mixer": "attention", "channel_mixer": "mlp"}
        >>> architecture = mixnas.Architecture.from_dict({"stem": "conv", "stages": [{"width": 16, "block": block}]})
        >>> io = mixnas.IOSpec("image", (8, 8), in_features=3, num_outputs=10)
        >>> network = mixnas.Network(architecture, io)
        >>> network(io.example(4)).shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        architecture: Architecture,
        io: IOSpec,
        *,
        generator: torch.Generator | None = None,
        units: Sequence[tuple[str, nn.Module]] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(architecture, Architecture) or not isinstance(io, IOSpec):
            given = f"{type(architecture).__name__} and {type(io).__name__}"
            raise ConfigError(f"Network: {given} were given. It takes an Architecture and the IOSpec of a task.")
        self.architecture = architecture
        self.io = io
        self.deployed = self.folded = False
        self.shared = units is not None
        if units is None:
            planned = checked_plan(architecture, io)
            with contextlib.nullcontext() if generator is None else seeded(generator):
                units = build_units(planned, lambda _, unit: build_unit(unit))
        if io.mean is not None:
            units = [(name, _reading(module, io) if name == "stem" else module) for name, module in units]
        for name, module in dict(units).items():
            *parents, last = name.split(".")
            nested(self, parents).add_module(last, module)
        self._order = [name for name, _ in units]
        self._sequence = [module for _, module in units]
        self._every: tuple[nn.Module, ...] | None = None

    def train(self, mode: bool = True) -> Network:
        """As of any module. A sub-network's modules are mostly in that mode already: to look is quicker than to set."""
        if not self.shared:
            return super().train(mode)
        if self._every is None:
            self._every = tuple(self.modules())
        for module in self._every:
            if module.training is not mode:
                module.training = mode
        return self

    def units(self) -> list[tuple[str, nn.Module]]:
        """The modules in the order in which they run, by name; those of a block with recursion come again."""
        return list(zip(self._order, self._sequence, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        for module in self._sequence:
            x = module(x)
        return x

    @contextlib.contextmanager
    def as_deployed(self) -> Iterator[list[tuple[str, nn.Module]]]:
        """Within it, the units as they compute once the network is deployed, to the last bit.

        Where batch norms are folded or parts merged then, last digits change, and with a few bits behind them more than
        those: such a unit is a deployed copy; all others are the modules themselves. No parameter wants a gradient
        meanwhile: the products of ATen take another way, and round otherwise, for a weight that does, also where
        gradients are switched off. The network is in evaluation mode.
        """
        wanting = [parameter for parameter in self.parameters() if parameter.requires_grad]
        try:
            for parameter in wanting:
                parameter.requires_grad_(False)
            forms = {name: _inference_form(module) for name, module in self.units()}
            yield [(name, forms[name]) for name in self._order]
        finally:
            for parameter in wanting:
                parameter.requires_grad_(True)

    def deploy(self, *, folded: bool = True) -> Network:
        """Store weights as each branch's quantization policy stores them on the device, in place; returns itself.

        Args:
            folded: Whether batch norms are folded into the layers before them, where those are stored as they stand.

        Raises:
            NasError: The weights belong to a super-network.
        """
        if self.shared:
            raise NasError("a sub-network's weights are the super-network's: deploy what Supernet.extract gives.")
        if not self.deployed:
            for module in dict(self.units()).values():
                deploy_unit(module, folded=folded)
            self.folded = folded
            self.requires_grad_(False)  # what is deployed is not trained
            self.deployed = True
        return self


def _reading(stem: nn.Module, io: IOSpec) -> nn.Module:
    """A stem that first standardises what it reads: part of the network, not of its unit: nobody counts it."""
    assert io.mean is not None and io.std is not None
    wrapper = _Padded() if io.padded else nn.Sequential()
    wrapper.add_module("standardise", Standardise(io.mean, io.std).to(next(stem.parameters()).device))
    for name, operator in stem.named_children():
        wrapper.add_module(name, operator)
    return wrapper


def build_units(
    planned: Sequence[tuple[str, Unit]], build: Callable[[str, Unit], nn.Module]
) -> list[tuple[str, nn.Module]]:
    """The modules of a plan, one for each name, in the order in which they run."""
    built: dict[str, nn.Module] = {}
    for name, unit in planned:
        if name not in built:
            built[name] = build(name, unit)
    return [(name, built[name]) for name, _ in planned]


def nested(root: nn.Module, parents: Sequence[str]) -> nn.Module:
    """The module at a path below `root`; empty modules are made on the way."""
    for part in parents:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


class seeded:  # noqa: N801 - a context manager, used like a function
    """Within it, torch's global CPU generator is seeded from `generator`; afterwards it is as it was."""

    def __init__(self, generator: torch.Generator) -> None:
        self._seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))

    def __enter__(self) -> None:
        self._state = torch.random.get_rng_state()
        torch.random.default_generator.manual_seed(self._seed)

    def __exit__(self, *_: object) -> None:
        torch.random.set_rng_state(self._state)
