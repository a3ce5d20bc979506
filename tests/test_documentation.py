"""The code of the documentation runs, and does what the text says."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixnas.cli.main import main
from mixnas.search.config import load_config
from mixnas.search_space.files import dump_yaml, load_yaml
from mixnas.search_space.settings import apply_overrides
from tests.evaluators.tasks.drawn import draw

ROOT = Path(__file__).parents[1]

USE = {
    "extending.md": """
import tempfile
from pathlib import Path
import numpy as np
from mixnas.evaluators.tasks.checks import check_task
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search.config import read_config
from mixnas.search.strategies import Question

io = IOSpec("image", (8, 8), 3, 4)
block = {"mixer": [{"name": "shift", "by": [1, 2]}, "identity"], "channel_mixer": "mlp", "quant": ["fp16", "fp32"]}
plain = {"stem": "conv", "stages": [{"width": [8, 16], "depth": [1, 2], "block": block}]}
space = SearchSpace.from_dict(plain)
supernet = Supernet(space, io, torch.Generator().manual_seed(0))
drawn = [space.sample(np.random.default_rng(seed)) for seed in range(12)]
assert any("shift" in str(a) for a in drawn) and any("fp16" in str(a) for a in drawn)
for architecture in drawn:
    network = supernet.extract(architecture).eval().deploy()
    stored = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    assert stored == cost(architecture, io).weight_bytes
    assert network(io.example(2)).shape == (2, 4)

check_task(Frequency(), "Frequency")

config = read_config({"search": {"strategy": {"name": "lightest", "pool": 32}}, "space": plain}, "text")
assert config.search.strategy == Lightest(pool=32)
def cheap(matrix):
    return {"params": np.array([cost(a, io).params for a in space.decode_many(matrix)])}
question = Question(space, config.parsed_objectives())
sampler = config.search.strategy.make(question, cheap, lambda a: True)
found = sampler.propose(None, 3, np.random.default_rng(0))
mean = np.mean([cost(space.sample(np.random.default_rng(s)), io).params for s in range(50)])
assert len(found) == 3 and max(cost(a, io).params for a in found) < mean

block = {"mixer": "shift", "channel_mixer": "mlp"}
fp32 = Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]})
network = Network(fp32, io).eval().deploy()
as_json = formats.get("as-json")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / as_json.file_name
    as_json.write(network, path, {})
    formats.verify(as_json, path, network, io.example(4))
    assert as_json.weight_bytes(path) == cost(fp32, io).weight_bytes
print("ran")
""",
}


@pytest.mark.parametrize("name", USE)
def test_the_examples_of_a_page_run(name, tmp_path):
    text = (ROOT / "docs" / name).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    assert blocks
    for i, block in enumerate(blocks):  # each is a module, with imports of its own
        (tmp_path / f"block{i}.py").write_text(block)
    script = tmp_path / "example.py"
    script.write_text("\n".join([*(f"from block{i} import *" for i in range(len(blocks))), USE[name]]))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip().endswith("ran"), done.stderr


# -- commands --------

# What makes a search of the documentation small; its commands are run as they stand.
SMALL = ["search.trials=12", "latency.profile=2s", "latency.passes=1", "latency.final_passes=1", "supernet.seconds=1"]
SMALL += ["final.candidates=2", "final.train.epochs=1"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language; "" for those without one, which are commands."""
    fenced = page.read_text().split("```")[1::2]
    return [text.split("\n", 1)[1] for text in fenced if "\n" in text and text.split("\n", 1)[0] == language]


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page in order, as words."""
    lines = [line for block in blocks(page, "") for line in block.splitlines()]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def carry_out(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of the documentation, which has to succeed."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert rest[0] in targets
    elif program == "cd":
        monkeypatch.chdir(rest[0])
    elif program == "nas":
        if rest[0] == "resume" and "--trials" in rest:
            rest += ["--trials", "14"]  # the last one counts
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(rest)
        assert status in ((0, 3) if "--where" in rest else (0,)), f"{words}: {err.getvalue()}"
    elif program == "python":
        done = subprocess.run([sys.executable, *rest], capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    else:
        assert words[:2] == ["source", ".venv/bin/activate"] or words[:2] == ["pip", "install"], words


def make_small(path: Path) -> None:
    path.write_text(dump_yaml(apply_overrides(load_yaml(path), SMALL)[0]))


def test_the_readme_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "README.md"
    (task, python), (space,) = blocks(page, "python"), blocks(page, "yaml")
    for text in (task, space):
        (tmp_path / text.split()[1]).write_text(text)
    make_small(tmp_path / "mine.yaml")
    assert {"nas", "make", "source"} <= {words[0] for words in commands(page)}
    for words in commands(page):
        carry_out(words, monkeypatch)
    names: dict[str, object] = {}
    exec(python, names)
    assert names["network"](names["network"].io.example(2)).shape == (2, 4)


def test_the_tutorial_runs_as_it_stands(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    make_small(tmp_path / "examples" / "pictures.yaml")
    monkeypatch.chdir(tmp_path)
    found = commands(ROOT / "docs" / "tutorial.md")
    assert len(found) > 10
    for words in found:
        carry_out(words, monkeypatch)
    assert list((tmp_path / "examples" / "runs" / "pictures" / "exports").glob("*/load.py"))


def test_data_of_one_s_own_is_searched_as_its_page_says(tmp_path, monkeypatch):
    draw(tmp_path / "flowers")
    monkeypatch.chdir(tmp_path)
    found = commands(ROOT / "docs" / "data.md")
    assert [words[1] for words in found] == ["search", "search", "export"]
    for words in found:
        small = [word for text in SMALL for word in ("--set", text)] if "--data" in words else []
        carry_out([*words, *small], monkeypatch)
    (loader,) = (tmp_path / "runs" / "flowers" / "exports").glob("*/load.py")
    picture = next((tmp_path / "flowers" / "red").iterdir())
    answer = subprocess.run([sys.executable, loader, picture], capture_output=True, text=True, check=True).stdout
    assert answer.split()[2] in ("blue", "green", "red")


@pytest.mark.parametrize("name", ["series", "regression", "dense"])
def test_an_example_runs_in_small(name, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path / "examples")
    alone = ["search.evaluator=standalone", "search.trials=3", "train.steps=30", "latency.passes=1"]
    settings = [word for text in (*alone, "latency.final_passes=1") for word in ("--set", text)]
    carry_out(["nas", "search", "-c", f"{name}.yaml", "--name", name, *settings, "-q"], monkeypatch)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["front", name, "--csv"]) == 0
    assert f"test_{'mae' if name == 'regression' else 'accuracy'}_se" in out.getvalue().splitlines()[0]


def test_contributing_s_operator_is_one():
    (code,) = blocks(ROOT / "CONTRIBUTING.md", "python")
    code += """
from mixnas import Architecture, IOSpec, Network
block = {"mixer": {"name": "turn", "by": 2}, "channel_mixer": "mlp"}
plain = {"stem": "conv", "stages": [{"width": 8, "block": block}]}
io = IOSpec("image", (8, 8), 3, 4)
assert Network(Architecture.from_dict(plain), io)(io.example(2)).shape == (2, 4)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    for words in commands(ROOT / "CONTRIBUTING.md"):
        assert words[0] in ("make", "ruff", "OMP_NUM_THREADS=1"), words
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60  # one screen


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_that_ships_can_be_read(path):
    assert load_config(path).space


def test_the_grammar_s_example_is_a_configuration(tmp_path):
    (text,) = blocks(ROOT / "docs" / "architecture.md", "yaml")
    path = tmp_path / "example.yaml"
    path.write_text(text)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["search", "-c", str(path), "--dry-run", "--runs", str(tmp_path)]) == 0
        assert main(["space", "check", str(path)]) == 0
    assert "120 trials by predictor" in out.getvalue()  # what `auto` is for that many


def test_a_head_that_answers_each_token_is_set_up_as_its_page_says(tmp_path):
    (text,) = (text for text in blocks(ROOT / "docs" / "data.md", "yaml") if "offset_learning" in text)
    path = tmp_path / "example.yaml"
    path.write_text(text.replace("path: shapes, ", ""))  # shapes are drawn where there is no folder
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["search", "-c", str(path), "--dry-run", "--runs", str(tmp_path)]) == 0
    assert "segmentation" in out.getvalue()


_MADE = {"latency/", "networks/", "rungs/", "exports/"}  # in the directory of a run


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")], ids=str)
def test_what_a_page_names_is_there(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    named = set(re.findall(r"`((?:[a-z_]+/)+(?:[\w.-]+)?)`", text))
    missing = [name for name in named if not list(ROOT.glob(name.rstrip("/"))) and "runs/" not in name]
    missing = [name for name in missing if name not in _MADE]
    assert not missing, f"{page.name}: {missing}"
