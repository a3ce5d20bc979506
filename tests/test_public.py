"""The public names: there in any order of imports, typed, readable, with an example that runs, and checked."""

from __future__ import annotations

import doctest
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mixnas
from mixnas.predictors.latency.predictor import SHIPPED, installed
from mixnas.predictors.latency.profile import ProfileConfig
from mixnas.search.run.front import Member
from mixnas.search_space.errors import ConfigError

ROOT = Path(__file__).parents[1]

ORDERS = [
    "import mixnas",
    "import mixnas.search",
    "import mixnas; mixnas.search; import mixnas.search.job",
    "from mixnas.search.run.directory import Run; import mixnas; from mixnas import search",
    "from mixnas import *; import mixnas; assert search is mixnas.search",
    "import mixnas; dir(mixnas); import mixnas.search.study; import mixnas.search.engines",
]


@pytest.mark.parametrize("order", ORDERS)
def test_searching_is_there_whatever_was_imported_before(order: str):
    code = (
        f"{order}\nassert callable(mixnas.search), mixnas.search\nimport mixnas.search.naming\nmixnas.search.naming\n"
    )
    if "job" in order:
        code += (
            "for _ in range(2):\n    try:\n        mixnas.search('nowhere.yaml')\n"
            "    except mixnas.NasError as error:\n        assert 'nowhere.yaml' in str(error)\n"
        )
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr


def test_names_are_listed_and_imported_when_asked_for():
    code = (
        "import sys, mixnas\n"
        "assert set(mixnas.__all__) <= set(dir(mixnas))\n"
        "assert 'torch' not in sys.modules and 'optuna' not in sys.modules\n"
        "for name in mixnas.__all__: getattr(mixnas, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'serach'"):
        _ = mixnas.serach
    assert (ROOT / "py.typed").exists()
    wanted = {"IOSpec", "Split", "Task", "export", "profile", "resume", "search", "Run", "SearchSpace"}
    assert wanted <= set(mixnas.__all__)


# What comes later uses what an earlier example has left.
EXAMPLES = ["search", "resume", "Run", "export", "load_network", "profile", "LatencyPredictor"]
EXAMPLES += [name for name in mixnas.__all__ if name not in EXAMPLES and name != "__version__"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def _object(name: str) -> object:
    return importlib.import_module("mixnas.search.job").search if name == "search" else getattr(mixnas, name)


def test_the_example_of_every_public_name_runs(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    texts = {name: inspect.getdoc(_object(name)) or "" for name in EXAMPLES} | {"mixnas": mixnas.__doc__ or ""}
    for name, text in texts.items():
        test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
        assert test.examples, f"{name} has no example"
        said: list[str] = []
        assert runner.run(test, out=said.append).failed == 0, "".join(said)


SPACE = mixnas.SearchSpace.from_dict(
    {
        "stem": "conv",
        "stages": [
            {
                "width": [8, 16],
                "block": {"mixer": ["identity", {"name": "dwconv", "kernel_size": [3, 5]}], "channel_mixer": "mlp"},
            }
        ],
    }
)
IO = mixnas.IOSpec("image", (8, 8), 1, 10)


def _architecture(mixer: object) -> mixnas.Architecture:
    stage = {"width": 8, "block": {"mixer": mixer, "channel_mixer": "mlp"}}
    return mixnas.Architecture.from_dict({"stem": "conv", "stages": [stage]})


def _predictor() -> mixnas.LatencyPredictor:
    (device, *_), *_ = installed(SHIPPED)
    return mixnas.LatencyPredictor.load(device, directory=SHIPPED)


WRONG = {
    "a knob": (
        lambda: SPACE.encode(_architecture({"name": "dwconv", "kernel_size": 9})),
        r"stages\.0\.blocks\.0\.mixer\.dwconv\.kernel_size is 9\. Allowed: 3, 5\.",
    ),
    "an operator": (
        lambda: SPACE.encode(_architecture("pooling")),
        r"stages\.0\.blocks\.0\.mixer is pooling.* Allowed: identity, dwconv\.",
    ),
    "a mapping for an architecture": (lambda: SPACE.encode({"stem": "conv"}), r"dict is no Architecture.*from_dict"),
    "a share in a vector": (lambda: SPACE.decode([0.7, 1, 1]), r"0\.7 in a vector is no position"),
    "a true in a vector": (lambda: SPACE.decode([True, 1, 1]), r"True in a vector is no position"),
    "floats in an array": (lambda: SPACE.decode(np.array([0.0, 1.0, 1.0])), r"0\.0 in a vector is no position"),
    "a short vector": (lambda: SPACE.decode([0]), r"length 1; this space has 3 variables"),
    "no vector": (lambda: SPACE.decode(None), r"None is no vector\. Give 3 whole numbers"),
    "no matrix": (lambda: SPACE.decode_many(3), r"3 is no matrix of vectors"),
    "a ragged matrix": (lambda: SPACE.decode_many([[0, 0, -1], [0]]), r"length 1; this space has 3 variables"),
    "a list for a tensor": (lambda: mixnas.Split([1], [2]), r"inputs is a list\. Give a tensor, for example torch"),
    "a number for a run": (lambda: mixnas.Run.open(3), r"3 is no name of a run"),
    "a name of no run": (lambda: mixnas.export("nowhere"), r"nowhere: no such run"),
    "a profile of data": (lambda: mixnas.profile({"stem": "conv"}, IO), r"profile: dict and IOSpec were given"),
    "a profile of a size": (lambda: mixnas.profile(SPACE, (8, 8)), r"profile: SearchSpace and tuple were given"),
    "a latency of data": (lambda: _predictor().predict({"stem": "conv"}), r"predict: dict and NoneType were given"),
    "a latency at a size": (
        lambda: _predictor().predict(_architecture("identity"), (8, 8)),
        r"predict: Architecture and tuple were given",
    ),
    "a number for an id": (lambda: mixnas.search.picking.Choice(pick=3), r"pick is 3: expected an id"),
    "one setting alone": (
        lambda: mixnas.search({"space": {}}, settings="search.trials=none"),
        r"--set search\.trials=none",
    ),
    "a seed for a generator": (lambda: SPACE.sample(0), r"0 is no source of random numbers.*default_rng"),
    "fewer than none": (lambda: SPACE.sample_many(-1, np.random.default_rng(0)), r"-1 architectures cannot be drawn"),
    "a rate above one": (
        lambda: SPACE.mutate(SPACE.sample(np.random.default_rng(0)), np.random.default_rng(0), rate=2),
        r"a rate of 2\. Allowed",
    ),
    "a kind": (lambda: mixnas.IOSpec("images", (8, 8), 1, 10), r"kind is 'images'\. Did you mean 'image'"),
    "an extent": (lambda: mixnas.IOSpec("image", (8, 0), 1, 10), r"size is \(8, 0\)\. It must be whole numbers from 1"),
    "one extent": (lambda: mixnas.IOSpec("image", (8,), 1, 10), r"Of kind 'image' it has 2 extents"),
    "no outputs": (lambda: mixnas.IOSpec("image", (8, 8), 1, 0), r"num_outputs is 0"),
    "a network of data": (lambda: mixnas.Network({"stem": "conv"}, IO), r"Network: dict and IOSpec were given"),
    "a store of data": (lambda: mixnas.Supernet({"stem": "conv"}, IO), r"Supernet: dict and IOSpec were given"),
    "a space of a word": (lambda: mixnas.SearchSpace.from_dict("conv"), r"space: expected a mapping"),
    "no such run": (lambda: mixnas.Run.open("nowhere"), r"nowhere: no such run"),
    "no such file": (lambda: mixnas.load_network("nowhere.safetensors"), r"nowhere\.safetensors"),
    "another machine": (
        lambda: mixnas.profile(SPACE, IO, device="nvidia-h200", config=ProfileConfig(budget_s=1)),
        r"device 'nvidia-h200' is not this machine's",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_given_is_checked_and_refused_with_what_is_allowed(what: str, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    call, says = WRONG[what]
    with pytest.raises(ConfigError, match=says):
        call()


def test_reprs_say_what_a_thing_is(tmp_path):
    architecture = _architecture("identity")
    assert repr(architecture) == f"Architecture({architecture.id}, {architecture})"
    assert repr(SPACE) == "SearchSpace(space: 6 architectures, 3 choices)"
    supernet = mixnas.Supernet(SPACE, IO)
    assert (
        repr(supernet) == f"Supernet({sum(p.numel() for p in supernet.parameters()):,} parameters for 6 architectures)"
    )
    split = mixnas.Split(torch.zeros(5, 8, 8, 1), torch.zeros(5, dtype=torch.long))
    assert repr(split) == "Split(5 examples, inputs (8, 8, 1) float32, targets () int64)"
    run = mixnas.Run.create(tmp_path, {"space": {}}, name="r")
    assert repr(run) == f"Run({str(tmp_path / 'r')!r}, stopped)"
    member = Member(id="ab12", trial=0, architecture={}, metrics={"accuracy": 0.75, "accuracy_se": 0.01, "params": 202})
    assert repr(member) == "Member(ab12: accuracy 0.75, params 202)"
    assert max(len(repr(thing)) for thing in (architecture, SPACE, supernet, split, run)) < 300
