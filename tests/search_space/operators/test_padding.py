"""Series of different lengths: where something is, no operator's answer changes with what lies behind the end."""

import numpy as np
import pytest
import torch
from torch import Tensor

from mixnas.evaluators.supernet.judging import SubnetJudge
from mixnas.evaluators.supernet.training import SupernetConfig, train_supernet
from mixnas.evaluators.tasks.checks import check_task
from mixnas.evaluators.tasks.task import Split, Task
from mixnas.search_space import registry
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.formats.safetensors import Safetensors, load_safetensors
from mixnas.search_space.formats.torch_export import exported_network
from mixnas.search_space.network import IOSpec, Network, check_op
from mixnas.search_space.registry import Context
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from tests.contracts.cases import WIDTH, Case, cases

LENGTHS = (9, 13)
KEPT = (9, 6, 1)  # positions that are there, of each example
AXES = ("mixer", "gate", "channel_mixer", "norm")


def _cases(axis: str) -> list[tuple[Case, Case]]:
    """Each operator with each of its knobs, on both lengths."""
    short, long = ({str(case): case for case in cases(axis, knobs=True, size=(n,))} for n in LENGTHS)
    return [(short[name], long[name]) for name in short if name in long]


def _serves(case: Case) -> bool:
    return registry.get(case.axis, case.op.name).serves_padded(case.before.kind)


def _answer(module: torch.nn.Module, case: Case, x: Tensor, valid: Tensor) -> Tensor:
    operator = registry.get(case.axis, case.op.name)
    told = {"valid": valid} if operator.takes_valid and case.before.kind != "causal" else {}
    if case.axis == "gate":
        return module(x, lambda y: 0.5 * y + 1, **told)
    return module(x, **told)


PAIRS = [pair for axis in AXES for pair in _cases(axis)]


@pytest.mark.parametrize("pair", [p for p in PAIRS if _serves(p[0])], ids=lambda p: str(p[0]))
def test_neither_what_lies_behind_the_end_nor_how_much_changes_an_answer(pair):
    short, long = pair
    module, longer = short.build().eval(), long.build().eval()
    longer.load_state_dict(module.state_dict())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(KEPT), LENGTHS[1], WIDTH, generator=generator)
    valid = torch.arange(LENGTHS[1])[None, :, None] < torch.tensor(KEPT)[:, None, None]
    other = torch.where(valid, x, 100 * torch.randn(x.shape, generator=generator))
    with torch.no_grad():
        first, second = _answer(longer, long, x, valid), _answer(longer, long, other, valid)
        third = _answer(module, short, x[:, : LENGTHS[0]], valid[:, : LENGTHS[0]])
        alone = _answer(module, short, x[:1, : LENGTHS[0]], valid[:1, : LENGTHS[0]])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(torch.where(valid, second, 0.0), torch.where(valid, first, 0.0), **close)
    torch.testing.assert_close(
        torch.where(valid, first, 0.0)[:, : LENGTHS[0]], torch.where(valid[:, : LENGTHS[0]], third, 0.0), **close
    )
    # The first fills the shorter grid: as if nobody had heard of padding.
    usual = module(x[:1, : LENGTHS[0]], lambda y: 0.5 * y + 1) if short.axis == "gate" else module(x[:1, : LENGTHS[0]])
    torch.testing.assert_close(alone, usual.detach(), **close)


def test_every_mixer_serves_or_is_refused_by_its_name():
    refused = []
    for short, _ in PAIRS:
        padded = Context(WIDTH, short.before.size, short.before.kind, padded=True)
        if _serves(short):
            check_op(short.axis, short.op, padded, "")
            continue
        refused.append(short)
        with pytest.raises(ConfigError, match=f"{short.op.name!r} cannot be told where a series ends"):
            check_op(short.axis, short.op, padded, "")
    # What sees no later position need not be told, unless its weights are of one length or positions share something.
    of_causal = {case.op.name for case in refused if case.before.kind == "causal"}
    assert of_causal == {name for axis in AXES for name in registry.names(axis) if registry.get(axis, name).one_length}
    served = {
        pair[0].op.name
        for pair in PAIRS
        if pair[0].axis == "mixer" and pair[0].before.kind == "sequence" and _serves(pair[0])
    }
    assert served >= {"identity", "pooling", "dwconv", "attention", "linear_attention", "gla", "short_conv_gate"}


MIXERS = [
    "identity",
    "pooling",
    "dwconv",
    "inception_dwconv",
    "attention",
    "linear_attention",
    "gla",
    "short_conv_gate",
]


def network(kind: str, length: int, head: str = "pool") -> Network:
    blocks = [
        {"mixer": mixer, "gate": gate, "channel_mixer": "mlp"}
        for mixer, gate in zip(MIXERS, ["none", "output_sigmoid"] * 4, strict=True)
    ]
    stages = [{"width": 16, "blocks": blocks}]
    grid = {"out_size": ()} if head == "attsets" else {}
    io = IOSpec(kind, (length,), 3, 4, head=head, **grid, padded=True, mean=(1.0, 0.0, 2.0), std=(2.0, 1.0, 3.0))
    architecture = Architecture.from_dict({"stem": "linear", "norm": "layer", "stages": stages})
    return Network(architecture, io, generator=torch.Generator().manual_seed(0))


def series(length: int) -> Tensor:
    x = torch.randn(3, length, 3, generator=torch.Generator().manual_seed(2))
    there = torch.arange(length)[None, :, None] < torch.tensor(KEPT)[:, None, None]
    return torch.where(there, x, torch.nan)


@pytest.mark.parametrize("head", ["pool", "attsets", "token"])
@pytest.mark.parametrize("kind", ["sequence", "causal"])
def test_a_network_answers_to_each_series_as_to_it_alone(kind, head):
    whole, x = network(kind, LENGTHS[1], head).eval(), series(LENGTHS[1])
    with torch.no_grad():
        together = whole(x)
        for i, length in enumerate(KEPT):
            own = network(kind, length, head).eval()
            own.load_state_dict(whole.state_dict())
            found = together[i : i + 1] if head != "token" else together[i : i + 1, :length]
            torch.testing.assert_close(found, own(x[i : i + 1, :length]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sequence", "causal"])
def test_it_is_trained_without_a_nan(kind):
    whole = network(kind, LENGTHS[1]).train()
    whole(series(LENGTHS[1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in whole.parameters())


@pytest.mark.parametrize("kind", ["sequence", "causal"])
def test_it_is_exported(kind, tmp_path):
    whole, x = network(kind, LENGTHS[1]).eval(), series(LENGTHS[1])
    with torch.no_grad():
        expected = whole(x)
    torch.testing.assert_close(exported_network(whole).module()(x), expected, rtol=1e-5, atol=1e-5)
    deployed = whole.deploy()
    Safetensors().write(deployed, tmp_path / "model.safetensors", {})
    answer = load_safetensors(tmp_path / "model.safetensors")(x.numpy())
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["sequence", "causal"])
def test_a_super_network_of_them_is_trained_and_judged(kind):
    class Slopes(Task):
        name = "slopes"
        io = IOSpec(kind, (LENGTHS[1],), 3, 2, padded=True)

        def __init__(self) -> None:
            x = series(LENGTHS[1]).repeat(8, 1, 1)
            self.train = self.validation = self.test = Split(x, torch.arange(len(x)) % 2)

    task = check_task(Slopes(), "slopes")
    block = {"mixer": ["identity", "attention", "dwconv"], "channel_mixer": ["none", "mlp"]}
    space = SearchSpace.from_dict({"stem": "linear", "norm": "rms", "stages": [{"width": [8, 16], "block": block}]})
    supernet = Supernet(space, task.io, torch.Generator().manual_seed(0))
    result = train_supernet(supernet, task, SupernetConfig(steps=3, batch_size=6, samples=1), seed=0)
    assert np.isfinite(result.loss) and all(p.isfinite().all() for p in supernet.parameters())
    found = SubnetJudge(supernet, task, seed=0, probe=12)(supernet.smallest())
    assert 0 <= found["accuracy"] <= 1 and np.isfinite(found["loss"])


def test_only_sequences_of_features_are_padded():
    for wrong in ({"kind": "image", "size": (4, 4)}, {"kind": "causal", "size": (4,), "tokens": True}):
        with pytest.raises(ConfigError, match="padded"):
            IOSpec(in_features=3, num_outputs=2, padded=True, **wrong)
    io = IOSpec("sequence", (4,), 3, 2, padded=True)
    assert IOSpec.from_plain(io.to_plain()) == io and "padded" not in IOSpec("sequence", (4,), 3, 2).to_plain()
