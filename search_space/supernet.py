"""The super-network: a store of weights that every architecture of a space is a view of.

It has no operator code of its own. For each place and parameter name it holds the largest tensor that any choice needs;
a sub-network is the ordinary network whose parameters are views of the store: leading slices for channels, centre crops
for kernels, a prefix of the blocks for depth. Their gradients are views of the store's gradients too, so training a
sub-network costs what training that network costs, and nothing is copied or called functionally.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.cost import Shapes
from mixnas.search_space.enumeration import Site, check_space, cost_corner, sites_of
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import (
    Network,
    build_op,
    build_unit,
    build_units,
    checked_plan,
    nested,
    on_shapes,
    seeded,
)
from mixnas.search_space.operators.quantization.policy import adds_state
from mixnas.search_space.registry import Context
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.units import IOSpec, Unit

Rule = tuple[str, ...]

_CACHED_ARCHITECTURES = 2048
_CACHED_UNITS = 4096  # an architecture that is new has most units in common with those before it


def slicing_rules(module: nn.Module) -> Iterator[tuple[str, Tensor, Rule]]:
    """Every parameter and persistent buffer of a module with the rule by which a smaller one lies in it.

    "lead" takes the first entries of a dimension, "center" the middle ones. Dimensions from the third on are kernels
    and centred, unless the module that owns the tensor says otherwise in its `slicing`: {tensor name: (rule, ...)}.
    """
    for prefix, owner in module.named_modules():
        own = getattr(owner, "slicing", {})
        tensors = {name: p for name, p in owner.named_parameters(recurse=False)}
        tensors |= {n: b for n, b in owner.named_buffers(recurse=False) if n not in owner._non_persistent_buffers_set}
        for name, tensor in tensors.items():
            rule = own.get(name, ("lead",) * min(2, tensor.dim()) + ("center",) * (tensor.dim() - 2))
            yield f"{prefix}.{name}" if prefix else name, tensor, rule


def slice_of(tensor: Tensor, shape: tuple[int, ...], rule: Rule) -> Tensor:
    """The view of `shape` in a larger tensor."""
    for dim, (extent, how) in enumerate(zip(shape, rule, strict=True)):
        start = (tensor.shape[dim] - extent) // 2 if how == "center" else 0
        tensor = tensor.narrow(dim, start, extent)
    return tensor


class Supernet(nn.Module):
    """The store.

    Args:
        space: Which architectures it serves.
        io: What their networks read and answer.
        generator: Source of the initial weights; without one, torch's global generator is used.

    Its parameters are named as those of its sub-networks. Give the optimiser the store's parameters, and clear
    gradients with `zero_grad()` of the store, which keeps the buffers that sub-networks' gradients are views of.

    Raises:
        ConfigError: An operator of the space cannot stand where it stands.

    Examples:
        >>> import mixnas, numpy
        >>> block = {"mixer": "attention", "channel_mixer": "mlp"}
        >>> space = mixnas.SearchSpace.from_dict({"stem": "conv", "stages": [{"width": [8, 16], "block": block}]})
        >>> io = mixnas.IOSpec("image", (8, 8), in_features=3, num_outputs=10)
        >>> supernet = mixnas.Supernet(space, io)
        >>> architecture = space.sample(numpy.random.default_rng(0))
        >>> views, own = supernet.subnet(architecture), supernet.extract(architecture)
        >>> x = io.example(2)
        >>> bool((views.eval()(x) - own.eval()(x)).abs().max() < 1e-5)
        True
    """

    def __init__(self, space: SearchSpace, io: IOSpec, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if not isinstance(space, SearchSpace) or not isinstance(io, IOSpec):
            given = f"{type(space).__name__} and {type(io).__name__}"
            raise ConfigError(f"Supernet: {given} were given. It takes a SearchSpace and the IOSpec of a task.")
        check_space(space, io)
        self.space = space
        self.io = io
        self._rules: dict[str, Rule] = {}
        if generator is None:
            self._allocate()
        else:
            with seeded(generator):
                self._allocate()
        self._forget_views()

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.parameters())
        return f"Supernet({count:,} parameters for {self.space.size():,} architectures)"

    # -- the store --------------------------------------------------------------------------------------------------

    def _allocate(self) -> None:
        shapes: dict[str, list[int]] = {}
        kinds: dict[str, tuple[torch.dtype, bool]] = {}
        built: dict[Any, list[tuple[str, Tensor, Rule]]] = {}  # on shapes only, and alike at all places
        # Small variants first, so that each larger one, whose initialisation suits the store better, overwrites them.
        variants = sorted(self._variants(), key=lambda variant: variant[0].before.width * variant[0].after.width)
        for site, quant in variants:
            key = (site.axis, site.op, site.before, site.after, quant)
            if key not in built:
                with on_shapes(site.axis, site.op), torch.device("meta"), Shapes():
                    module = build_op(*key)
                built[key] = list(slicing_rules(module))
            for name, tensor, rule in built[key]:
                full = f"{prefix_of(site.unit, site.path, site.op)}.{name}"
                known, shape = shapes.setdefault(full, list(tensor.shape)), tensor.shape
                if len(known) != len(shape):
                    raise ConfigError(
                        f"{full} of {site.op} has {len(shape)} dimensions, and {len(known)} with other knobs or at "
                        "another width. One stored tensor cannot hold both: give the two different names, or the same "
                        "number of dimensions."
                    )
                shapes[full] = [max(a, b) for a, b in zip(known, shape, strict=True)]
                self._rules[full] = rule
                kinds[full] = (tensor.dtype, isinstance(tensor, nn.Parameter))
        written = {}
        for name, extents in shapes.items():
            dtype, is_parameter = kinds[name]
            tensor = torch.zeros(extents, dtype=dtype)
            written[name] = torch.zeros(extents, dtype=torch.bool)
            _register(self, name, nn.Parameter(tensor) if is_parameter else tensor)
        stored = dict(self._stored())
        with torch.no_grad():
            for site, quant in variants:
                module = build_op(site.axis, site.op, site.before, site.after, quant)
                for name, tensor, rule in slicing_rules(module):
                    full = f"{prefix_of(site.unit, site.path, site.op)}.{name}"
                    slice_of(stored[full], tuple(tensor.shape), rule).copy_(tensor)
                    slice_of(written[full], tuple(tensor.shape), rule).fill_(True)
            for name, mask in written.items():
                if not bool(mask.all()):  # a corner that no single variant covers: like the part that is covered
                    covered = stored[name][mask]
                    stored[name][~mask] = covered[torch.randint(len(covered), (int((~mask).sum()),))]

    def _variants(self) -> Iterator[tuple[Site, Op | None]]:
        """Every operator at every place, and again under each policy that adds tensors of its own to it."""
        for site in sites_of(self.space, self.io):
            yield site, None
            for quant in site.quants:
                if adds_state(quant):
                    yield site, quant

    def _stored(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters()
        yield from self.named_buffers()

    def _forget_views(self) -> None:
        # By place and policy too: a policy takes the place of an operator's layers.
        self._ops: dict[tuple[str, str, Op, Context, Context, Op | None], nn.Module] = {}
        self._units: OrderedDict[tuple[str, Unit], nn.Module] = OrderedDict()
        self._networks: OrderedDict[Architecture, Network] = OrderedDict()
        self._tensors = dict(self._stored())
        self._trained = list(self.parameters())  # walking the modules takes ten times as long as clearing the gradients
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Supernet:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._forget_views()
        return self

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zero the gradients in place. `set_to_none` is not possible: sub-networks' gradients are views of them."""
        assert not set_to_none, "the gradients of a super-network are zeroed in place"
        torch._foreach_zero_([p.grad for p in self._trained if p.grad is not None])

    # -- sub-networks -----------------------------------------------------------------------------------------------

    def _attach(self, module: nn.Module, prefix: str) -> nn.Module:
        buffers: list[tuple[nn.Module, str, Tensor]] = []
        for path, tensor, rule in list(slicing_rules(module)):
            stored = self._tensors[f"{prefix}.{path}"]
            view = slice_of(stored.detach(), tuple(tensor.shape), rule)
            owner = module.get_submodule(path.rpartition(".")[0])
            name = path.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter):
                parameter = nn.Parameter(view, requires_grad=stored.requires_grad)
                parameter.grad = slice_of(stored.grad, tuple(tensor.shape), rule)  # type: ignore[arg-type]
                parameter.stored = stored  # type: ignore[attr-defined]
                owner._parameters[name] = parameter
            else:
                owner._buffers[name] = view
                buffers.append((owner, name, view))
        if buffers:
            module.register_forward_hook(lambda *_: _write_back(buffers, prefix))
        return module

    def _unit(self, name: str, unit: Unit) -> nn.Module:
        def make(path: str, axis: str, op: Op, before: Context, after: Context, quant: Op | None) -> nn.Module:
            prefix = prefix_of(name, path, op)
            key = (prefix, axis, op, before, after, quant)
            if key not in self._ops:
                module = build_op(axis, op, before, after, quant)
                self._ops[key] = self._attach(module.to(self.device), prefix)
            return self._ops[key]

        key = name, unit
        if key not in self._units:
            self._units[key] = build_unit(unit, make)
            if len(self._units) > _CACHED_UNITS:
                self._units.popitem(last=False)
        return self._units[key]

    @property
    def device(self) -> torch.device:
        """Where the store is."""
        return next(self.parameters()).device

    def subnet(self, architecture: Architecture) -> Network:
        """The network of an architecture with the store's weights: views, gradients included.

        Modules are shared between sub-networks, so set `train()` or `eval()` on a sub-network whenever it is used.

        Raises:
            ConfigError: The architecture is not one of the space.
        """
        network = self._networks.get(architecture)
        if network is None:
            self.space.encode(architecture)
            with torch.random.fork_rng(devices=[]):  # building draws initial weights that the views replace
                units = build_units(checked_plan(architecture, self.io), self._unit)
            network = Network(architecture, self.io, units=units)
            self._networks[architecture] = network
            if len(self._networks) > _CACHED_ARCHITECTURES:
                self._networks.popitem(last=False)
        return network

    def rule_of(self, name: str) -> Rule:
        """By which smaller tensors of this name lie in the stored one; see `slicing_rules`."""
        return self._rules[name]

    def touched(self, architectures: Iterable[Architecture]) -> list[nn.Parameter]:
        """The store's parameters that the sub-networks of these architectures are views of, each once."""
        views = (view for architecture in architectures for view in self.subnet(architecture).parameters())
        return list(dict.fromkeys(view.stored for view in views))  # type: ignore[attr-defined]

    def extract(self, architecture: Architecture) -> Network:
        """The network of an architecture with copies of the store's weights: it computes what `subnet` computes."""
        with torch.random.fork_rng(devices=[]):
            network = Network(architecture, self.io)
        network.load_state_dict(
            {k: v.detach().cpu().clone() for k, v in self.subnet(architecture).state_dict().items()}
        )
        return network.to(self.device)

    def largest(self) -> Architecture:
        """The architecture with the most parameters."""
        return cost_corner(self.space, self.io, "params", largest=True).architecture

    def smallest(self) -> Architecture:
        """The architecture with the fewest parameters."""
        return cost_corner(self.space, self.io, "params", largest=False).architecture

    def forward(self, x: Tensor, architecture: Architecture) -> Any:
        """`subnet(architecture)(x)`."""
        return self.subnet(architecture)(x)


def _silence_layout_warning() -> None:
    """Have torch's once-only warning about gradients that are views (which here is the point) said to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parameter = nn.Parameter(torch.zeros(2, 4)[:, :2].detach())
        parameter.grad = torch.zeros(2, 4)[:, :2]
        with torch.enable_grad():
            (parameter * 1).sum().backward()


_silence_layout_warning()


def prefix_of(unit: str, path: str, op: Op) -> str:
    """Where an operator's tensors lie in a network: unit, place within it, the operator's name."""
    return ".".join(part for part in (unit, path, op.name) if part)


def _write_back(buffers: Iterable[tuple[nn.Module, str, Tensor]], prefix: str) -> None:
    """Bring what an operator has put in the place of its buffers into the views of the store that stood there."""
    for owner, name, view in buffers:
        found = owner._buffers[name]
        if found is view:
            continue
        if found is None or found.shape != view.shape or found.dtype != view.dtype:
            given = "nothing" if found is None else f"{tuple(found.shape)} {found.dtype}"
            raise ConfigError(
                f"{prefix}: its forward made the buffer {name!r} {given}; it was {tuple(view.shape)} {view.dtype}. "
                "A persistent buffer keeps its shape and type, or is registered with persistent=False."
            )
        with torch.no_grad():
            view.copy_(found)
        owner._buffers[name] = view


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    *parents, last = name.split(".")
    owner = nested(root, parents)
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(last, tensor)
    else:
        owner.register_buffer(last, tensor)
