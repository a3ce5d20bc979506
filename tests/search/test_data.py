"""From somebody's own data to an answer: the configuration that is chosen, what the run and the export know of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mixnas.cli.main import main
from mixnas.search.config import read_config
from mixnas.search.data import config_for, stride_for
from mixnas.search.export import export_run
from mixnas.search.job import Job, new_run, reopen
from mixnas.search.problem import Problem
from mixnas.search.run.directory import Run
from mixnas.search.run.integrity import problems
from mixnas.search.run.progress import make_progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.formats.safetensors import load_network
from tests.evaluators.tasks.drawn import colour, draw

SMALL = ["search.evaluator=standalone", "search.trials=2", "search.strategy=random", "train.steps=60"]
SMALL += ["latency.passes=1", "latency.final_passes=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data") / "colours")


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished search on the folder."""
    config = config_for(folder, settings=SMALL)
    made = new_run(config, root=tmp_path_factory.mktemp("runs"), name="colours", source="test")
    with made:
        Job(made, config, progress=make_progress("quiet"), stop=StopSignal()).execute()
    return made


@pytest.mark.parametrize(
    ("size", "stride"),
    [((16, 16), 1), ((24, 24), 2), ((32, 32), 2), ((28, 28), 2), ((48, 48), 3), ((64, 64), 4), ((224, 224), 14)],
)
def test_the_grid_of_the_first_stage_is_small_and_even(size, stride):
    assert stride_for(size) == stride
    assert size[0] // stride <= 16 and size[0] // stride % 2 == 0


@pytest.mark.parametrize("size", [16, 24, 28, 32, 48, 50, 64, 96, 128, 224])
def test_the_embedded_space_suits_every_size(folder, size):
    """Checked as a search checks it: every operator can stand wherever it may."""
    config = config_for(folder, settings=[f"task.size={size}"])
    assert config.task.to_plain()["size"] == [size, size]
    assert Problem(config).space.size() > 1e9


def test_a_size_that_no_stride_suits_says_what_to_do(folder):
    with pytest.raises(ConfigError, match="size 257x257: no stride up to 16 divides it"):
        config_for(folder, settings=["task.size=257"])


def test_a_configuration_of_one_s_own_keeps_its_space_and_is_given_the_task(folder, tmp_path):
    path = tmp_path / "mine.yaml"
    block = "{mixer: identity, channel_mixer: mlp}"
    path.write_text(f"search: {{trials: 7}}\nspace: {{stem: conv, stages: [{{width: [8, 16], block: {block}}}]}}\n")
    config = config_for(folder, base=path, settings=["task.size=16", "search.seed=3"])
    assert (config.task.name, config.search.trials, config.search.seed) == ("folder", 7, 3)
    assert Problem(config).io.size == (16, 16) and Problem(config).space.size() == 2


def test_what_is_no_data_is_refused_in_one_sentence(tmp_path, capsys):
    (tmp_path / "notes.doc").write_text("hello")
    for name, says in (("nowhere", "no such file or folder"), ("notes.doc", "no data that can be read")):
        assert main(["search", "--data", str(tmp_path / name), "--runs", str(tmp_path / "runs")]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_knows_its_data_and_is_resumed_on_no_other(run, folder, tmp_path):
    data = run.data()
    assert data["labels"] == ["blue", "green", "red"] and set(data["split"]) == {"train", "validation", "test"}
    assert not list(problems(run.path, run.manifest))
    opened, config = reopen(run.path, settings=["search.trials=3"])
    extra = folder / "red" / "99.png"
    colour("red", np.random.default_rng(9)).save(extra)
    try:
        with pytest.raises(ConfigError, match="the data has changed since the run was started"):
            Job(opened, config, progress=make_progress("quiet"), stop=StopSignal()).execute()
        with pytest.raises(ConfigError, match=r"the data has changed .*counts"):
            export_run(opened, output=str(tmp_path / "out"))
    finally:
        extra.unlink()
    assert not (tmp_path / "out").exists()
    (run.path / "data.json").write_text((run.path / "data.json").read_text().replace("green", "grass"))
    try:
        assert [name for name, _ in problems(run.path, Run.open(run.path).manifest)] == ["data.json"]
    finally:
        (run.path / "data.json").write_text((run.path / "data.json").read_text().replace("grass", "green"))


@pytest.mark.slow
def test_an_export_takes_a_raw_picture_and_answers_with_the_class_s_name(run, tmp_path):
    (exported,) = export_run(run, output=str(tmp_path / "out"), format_names=["safetensors", "torch-export"])
    card = json.loads((exported / "card.json").read_text())
    assert card["labels"] == ["blue", "green", "red"] and card["pictures"]["channels"] == 3
    text = (exported / "README.md").read_text()
    assert "blue, green, red" in text and "python load.py PICTURE" in text and "0 to 255" in text
    rng = np.random.default_rng(5)
    files = []
    for label in card["labels"]:
        files.append(tmp_path / f"{label}.png")
        colour(label, rng, (40, 30)).save(files[-1])
    command = [sys.executable, "-I", exported / "load.py", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    answers = [line.rsplit(" ", 3) for line in done.stdout.splitlines()]
    assert len(answers) == 6 and {name for _, name, _, _ in answers} == {"model.safetensors", "model.pt2"}
    assert all(Path(path).stem == label and 1 / 3 < float(share) <= 1 for path, _, label, share in answers)
    network = load_network(exported / "model.safetensors")
    assert network.io.mean == tuple(card["pictures"]["mean"]) and network(torch.zeros(1, 24, 24, 3)).shape == (1, 3)


def test_the_file_that_ships_is_for_pictures_of_32():
    from mixnas.search.data import _CONFIGS
    from mixnas.search_space.files import load_yaml

    config = read_config(load_yaml(_CONFIGS / "pictures.yaml"), "pictures.yaml")
    assert config.task.to_plain()["size"] == 32 and config.space["stem"]["stride"] == stride_for((32, 32))


def test_other_data_than_a_folder_is_searched_by_the_same_command(tmp_path, capsys):
    x = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(60) % 3)
    assert main(["search", "--data", str(tmp_path / "d.npz"), "--dry-run", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "60 pictures of 3 classes, 20 of each; 36/12/12" in said and "npz: image, input 28x28" in said


def test_a_search_on_numbers_answers_in_their_own_unit(tmp_path):
    """From a CSV to an export whose loader gives what the network says of a raw series."""
    rng = np.random.default_rng(0)
    slopes = rng.uniform(-3, 3, 40)
    x = 50 + slopes[:, None] * np.arange(8) + rng.normal(0, 0.1, (40, 8))
    lines = [",".join([*(f"t{i}" for i in range(8)), "target"])]
    lines += [",".join(f"{v:.6f}" for v in (*row, 1000 * slope)) for row, slope in zip(x, slopes, strict=True)]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    config = config_for(tmp_path / "d.csv", settings=[*SMALL, "train.steps=200"])
    assert config.objectives == {"mae": "min", "latency_ms": "min", "params": "min"}
    made = new_run(config, root=tmp_path, name="slopes", source="test")
    with made:
        front = Job(made, config, progress=make_progress("quiet"), stop=StopSignal()).execute()
    assert min(m.values["test_mae"] for m in front.members) < 0.5 * np.abs(1000 * (slopes - slopes.mean())).mean()
    (exported,) = export_run(made, output=str(tmp_path / "out"), verify=True)
    assert "in_units" in (exported / "README.md").read_text()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import numpy as np, load\n"
        "answer = load.FILES['model.safetensors'](load.check('model.safetensors'))\n"
        "x = np.array([50 + 2.0 * np.arange(8), 50 - 2.0 * np.arange(8)], dtype=np.float32)[..., None]\n"
        "high, low = load.in_units(answer(x))[:, 0]\n"
        "print(high, low)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, exported], capture_output=True, text=True, check=True)
    high, low = map(float, done.stdout.split())
    assert 500 < high < 3500 and -3500 < low < -500


def test_a_causal_series_suits_the_embedded_space(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).normal(size=(30, 24, 3)), y=np.arange(30) % 3)
    config = config_for(tmp_path / "d.npz", settings=["task.kind=causal"])
    assert Problem(config).io.kind == "causal" and Problem(config).space.size() > 1e6


@pytest.mark.parametrize(
    ("settings", "steps", "epochs"),
    [([], True, 20), (["final.train.epochs=3"], False, 3), (["final.train.lr=0.1"], True, 20)],
)
def test_a_setting_displaces_the_alternative_that_the_embedded_configuration_gives(folder, settings, steps, epochs):
    train = config_for(folder, settings=settings).final.train
    assert (train.steps is not None, train.epochs) == (steps, epochs)
    supernet = config_for(folder, settings=["supernet.steps=7"]).supernet
    assert (supernet.seconds, supernet.steps) == (None, 7)


@pytest.mark.parametrize(
    ("plain", "settings", "says"),
    [
        (
            {"train": {"steps": 5, "epochs": 2}},
            [],
            "mine.yaml: train: epochs: 2 and steps: 5 are alternatives. Give one",
        ),
        ({"final": {"train": {"steps": 5, "epochs": 2}}}, ["search.trials=3"], "final.train: epochs: 2 and steps: 5"),
        ({"supernet": {"seconds": 5, "epochs": 2}}, [], "supernet: epochs: 2 and seconds: 5"),
        ({}, ["train.steps=5", "train.epochs=2"], "--set: train: epochs: 2 and steps: 5"),
        ({}, ["train={steps: 5, epochs: 2}"], "--set: train: epochs: 2 and steps: 5"),
    ],
)
def test_two_alternatives_of_ones_own_are_refused(plain, settings, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_config(plain, "mine.yaml", settings=settings)


def test_what_a_run_wrote_out_is_read_as_it_was():
    """With the default epochs beside the steps that count."""
    config = read_config({"train": {"steps": 5}}, "mine.yaml", settings=["supernet.epochs=3", "supernet.seconds=null"])
    assert read_config(config.to_plain(), "config.yaml") == config
    assert read_config(config.to_plain(), "config.yaml", settings=["train.epochs=2"]).train.steps is None
