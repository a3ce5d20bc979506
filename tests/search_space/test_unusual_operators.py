"""Operators that a stranger may write: what is not supported is refused in one sentence, all else works."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mixnas.search_space import registry
from mixnas.search_space.cost import cost
from mixnas.search_space.enumeration import check_single, check_space, cost_corner
from mixnas.search_space.errors import ConfigError, NasError
from mixnas.search_space.network import IOSpec, Network
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.registry import Context, Knob, register
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search_space.units import plan

IO = IOSpec("image", (4, 4), 3, 2)


@pytest.fixture(autouse=True)
def registered_for_one_test(monkeypatch):
    registry.load()
    monkeypatch.setattr(registry, "_operators", dict(registry._operators))


def space_of(mixer: object, **changes) -> SearchSpace:
    block = {"mixer": mixer, "channel_mixer": "none"}
    return SearchSpace.from_dict({"stem": "linear", "stages": [{"width": [4, 6], "block": block}], **changes})


def refused(space: SearchSpace, io: IOSpec = IO) -> str:
    """What is said before any work is started, and again by the store."""
    with pytest.raises(ConfigError) as before:
        cost_corner(space, io, "params", largest=True)
    with pytest.raises(ConfigError):
        Supernet(space, io)
    return str(before.value)


# -- tied weights ---------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.a, self.b = (Linear(context.width, context.width, bias=False) for _ in range(2))
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.a = Linear(context.width, context.width)
        self.b = nn.Sequential(nn.ReLU(), self.a)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class SharedConstant(nn.Module):
    """Shared are only what has no state: an activation, and a constant."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        activation = nn.GELU()
        self.body = nn.Sequential(Linear(context.width, 5), activation, Linear(5, context.width), activation)
        self.register_buffer("one", torch.ones(()), persistent=False)
        self.body.register_buffer("one", self.one, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) * self.one


@pytest.mark.parametrize(
    ("mixer", "names"), [(Tied, "a.weight and b.weight"), (Twice, "a.weight and b.1.weight")], ids=["tied", "twice"]
)
def test_tied_weights_are_refused(mixer, names):
    register("mixer", "unusual_tied", paper="-")(mixer)
    space = space_of(["identity", "unusual_tied"])
    said = refused(space)
    assert f"mixer 'unusual_tied' holds one tensor under two names, {names}." in said and "call it twice" in said
    with pytest.raises(ConfigError, match="holds one tensor under two names"):
        Network(space_of("unusual_tied").sample(np.random.default_rng(0)), IO)
    registry._operators.pop(("mixer", "unusual_tied"))


def test_what_has_no_state_may_be_shared():
    register("mixer", "unusual_shared", paper="-")(SharedConstant)
    supernet = Supernet(space_of("unusual_shared"), IO, torch.Generator().manual_seed(0))
    x = IO.example(2)
    for architecture in (supernet.smallest(), supernet.largest()):
        assert torch.equal(supernet.subnet(architecture).eval()(x), supernet.extract(architecture).eval()(x))


# -- buffers --------------------------------------------------------------------------------------------------------


class Rebinds(nn.Module):
    """Keeps a running mean by putting a new tensor in the place of its buffer."""

    def __init__(self, context: Context, *, grows: bool) -> None:
        super().__init__()
        self.out, self.grows = Linear(context.width, context.width), grows
        self.register_buffer("mean", torch.zeros(context.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.grows:
            self.mean = torch.zeros(1, x.shape[-1])
        elif self.training:
            self.mean = 0.5 * self.mean + 0.5 * x.detach().flatten(0, -2).mean(0)
        return self.out(x) + self.mean


def test_a_buffer_that_is_replaced_stays_in_the_store():
    register("mixer", "unusual_rebinds", paper="-", knobs={"grows": Knob(False)})(Rebinds)
    space = space_of("unusual_rebinds")
    supernet = Supernet(space, IO, torch.Generator().manual_seed(0))
    large, small = supernet.largest(), supernet.smallest()
    for _ in range(3):
        supernet.subnet(large).train()(IO.example(4) + 1)
    (stored,) = (value for name, value in supernet.state_dict().items() if name.endswith("rebinds.mean"))
    assert stored.abs().min() > 0
    (own,) = (value for name, value in supernet.subnet(large).state_dict().items() if name.endswith("rebinds.mean"))
    (part,) = (value for name, value in supernet.subnet(small).state_dict().items() if name.endswith("rebinds.mean"))
    assert torch.equal(own, stored) and torch.equal(part, stored[:4])
    again = Supernet(space, IO, torch.Generator().manual_seed(1))
    again.load_state_dict(supernet.state_dict())
    x = IO.example(2)
    for architecture in (large, small):
        assert torch.equal(supernet.subnet(architecture).eval()(x), again.subnet(architecture).eval()(x))


def test_a_buffer_that_changes_its_shape_is_refused():
    register("mixer", "unusual_grows", paper="-", knobs={"grows": Knob(True)})(Rebinds)
    supernet = Supernet(space_of("unusual_grows"), IO)
    with pytest.raises(ConfigError, match=r"token\.mixer\.unusual_grows: its forward made the buffer 'mean' \(1, 6\)"):
        supernet.subnet(supernet.largest()).train()(IO.example(2))


# -- what cannot be stored or counted -------------------------------------------------------------------------------


class ManyDims(nn.Module):
    def __init__(self, context: Context, *, dims: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((1,) * dims))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.reshape(())


def test_a_number_of_dimensions_that_depends_on_a_knob_is_refused():
    register("mixer", "unusual_dims", paper="-", knobs={"dims": Knob(1, low=1, high=4)})(ManyDims)
    with pytest.raises(
        ConfigError, match=r"mixer\.unusual_dims\.weight of unusual_dims\(dims=2\) has 2 dimensions, and 1"
    ):
        Supernet(space_of({"name": "unusual_dims", "dims": [1, 2]}), IO)


class Reads(nn.Module):
    def __init__(self, context: Context, *, early: bool) -> None:
        super().__init__()
        self.scale = torch.linspace(0, 1, 3)[1].item() if early else 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale if x.abs().sum() > 0 else x


@pytest.mark.parametrize("early", [True, False])
def test_an_operator_that_reads_values_is_named(early):
    register("mixer", "unusual_reads", paper="-", knobs={"early": Knob(early)})(Reads)
    space = space_of("unusual_reads")
    with pytest.raises(ConfigError, match=r"mixer unusual_reads\(early=.*\) fails where .* on shapes only.*item\(\)"):
        cost_corner(space, IO, "params", largest=True)
    if early:
        with pytest.raises(ConfigError, match=r"mixer unusual_reads\(early=True\) fails"):
            Supernet(space, IO)


PRODUCTS = {
    "bilinear": (lambda s, x: s.bilinear(x, x), 16 * 3 * 4 * 4),
    "addbmm": (lambda s, x: x + torch.addbmm(s.square, x[:, 0].mT, x[:, 0]), 4 * 4 * 4),
    "addr": (lambda s, x: x + torch.addr(s.square, x[0, 0, 0], x[0, 0, 1]), 4 * 4),
    "addmm_": (lambda s, x: x + torch.zeros(4, 4).addmm_(x[0, 0], s.square), 4 * 4 * 4),
    "baddbmm_": (lambda s, x: x + torch.zeros(1, 4, 4).baddbmm_(x[0, :1], s.square[None]), 4 * 4 * 4),
    "einsum": (lambda s, x: torch.einsum("bhwc,cd->bhwd", x, s.square), 16 * 4 * 4),
}  # of one example of 4 x 4 tokens, 4 channels


class Product(nn.Module):
    def __init__(self, context: Context, *, of: str) -> None:
        super().__init__()
        self.of = of
        self.bilinear = nn.Bilinear(4, 4, 3)
        self.square = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer = PRODUCTS[self.of][0](self, x)
        return answer if answer.shape == x.shape else torch.cat([answer, answer[..., :1]], -1)


@pytest.mark.parametrize("of", PRODUCTS)
def test_every_product_is_counted(of):
    register("mixer", "unusual_product", paper="-", knobs={"of": Knob("bilinear", choices=tuple(PRODUCTS))})(Product)

    def macs(mixer: object) -> int:
        block = {"mixer": mixer, "channel_mixer": "none"}
        space = SearchSpace.from_dict({"stem": "linear", "stages": [{"width": 4, "block": block}]})
        return cost(space.single(), IO).macs

    assert macs({"name": "unusual_product", "of": of}) - macs("identity") == PRODUCTS[of][1]


# -- heads, names ---------------------------------------------------------------------------------------------------


class Finer(nn.Module):
    """A dense head whose grid depends on a knob."""

    def __init__(self, before: Context, after: Context, *, times: int, hidden: int) -> None:
        super().__init__()
        self.times = times
        self.body = nn.Sequential(Linear(before.width, hidden), nn.ReLU(), Linear(hidden, after.width))

    @staticmethod
    def out_size(size: tuple[int, ...], times: int, hidden: int) -> tuple[int, ...]:
        return tuple(times * extent for extent in size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).repeat_interleave(self.times, 1).repeat_interleave(self.times, 2)


def test_a_head_has_its_knobs_defaults():
    from mixnas.predictors.latency.lookup import SpaceUnits

    register("head", "unusual_finer", paper="-", knobs={"times": Knob(2, low=1), "hidden": Knob(5, low=1)})(Finer)
    io = IOSpec("image", (4, 4), 3, 2, head="unusual_finer", out_size=(8, 8))
    space = space_of(["identity", "pooling"])
    check_space(space, io)
    supernet = Supernet(space, io, torch.Generator().manual_seed(0))
    architecture = supernet.largest()
    x = io.example(2)
    answers = supernet.subnet(architecture).eval()(x)
    assert answers.shape == (2, 8, 8, 2) and torch.equal(answers, supernet.extract(architecture).eval()(x))
    head = plan(architecture, io)[-1][1].op("head")
    assert head.options == {"times": 2, "hidden": 5}
    assert head in {op for unit in SpaceUnits(space, io).units for _, op in unit.ops}


@pytest.mark.parametrize(
    ("axis", "name", "says"),
    [
        ("mixer", "append", "torch's modules have an attribute of that name"),
        ("mixer", "type", "attribute of that name"),
        ("gate", "update", "attribute of that name"),
        ("gate", "pop", "attribute of that name"),
        ("norm", "half", "attribute of that name"),
        ("stem", "float", "attribute of that name"),
        ("channel_mixer", "extend", "attribute of that name"),
        ("norm", "training", "attribute of that name"),
        ("mixer", "a.b", "letters, digits and underscores"),
        ("mixer", "", "letters, digits and underscores"),
        ("quant", "w4.a8", "letters, digits and underscores"),
        ("gate", "two words", "letters, digits and underscores"),
    ],
)
def test_a_name_that_no_submodule_can_have_is_refused(axis, name, says):
    with pytest.raises(NasError, match=says):
        register(axis, name, paper="-")


@pytest.mark.parametrize("knob", ["name", "two words", ""])
def test_a_knob_that_could_never_be_written_is_refused(knob):
    with pytest.raises(NasError, match=f"a knob cannot be called {knob!r}"):
        register("mixer", "unusual_knob", paper="-", knobs={knob: Knob(1)})


# -- one example at a time ------------------------------------------------------------------------------------------


def test_a_batch_norm_on_one_position_is_refused_where_a_batch_is_one_example():
    one = IOSpec("image", (1, 1), 3, 2)
    with pytest.raises(ConfigError, match=r"batch_size: norm batch on a grid of 1x1 cannot be trained on one example"):
        check_single(space_of("identity", norm=["layer", "batch"]), one, "batch_size")
    check_single(space_of("identity", norm=["layer", "rms"]), one, "batch_size")
    check_single(space_of("identity", norm="batch"), IO, "batch_size")
    shrinks = space_of("identity", norm="batch", stem={"name": "conv", "stride": 4})
    with pytest.raises(ConfigError, match="norm batch on a grid of 1x1"):
        check_single(shrinks, IO, "batch_size")
