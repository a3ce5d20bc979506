"""Taking networks away, from runs that the previous version finished (`tests/data/v1`)."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mixnas.search.export import export_run
from mixnas.search.run.directory import Run
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.safetensors import Safetensors, load_network, read_extra

FORMER = Path(__file__).parents[1] / "data" / "v1"
FP32, BF16 = "54820b57dc37", "6dd9d032a086"  # attention and mlp; the first of `finished`, the second of `standalone`


@pytest.fixture
def runs(tmp_path: Path):
    """`finished` and `standalone`, each a copy."""

    def run(name: str) -> Run:
        if not (tmp_path / "runs" / name).exists():
            shutil.copytree(FORMER / name, tmp_path / "runs" / name)
        return Run.open(name, tmp_path / "runs")

    return run


def available() -> list[str]:
    found = []
    for name in formats.names():
        try:
            formats.require(formats.get(name))
        except ConfigError:
            continue
        found.append(name)
    return found


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_every_format_is_written_verified_and_described(runs):
    wanted = available()
    (folder,) = export_run(runs("finished"), format_names=wanted, pick=FP32[:6])
    assert folder == runs("finished").exports / FP32
    files = [formats.get(name).file_name for name in wanted]
    assert listing(folder) == sorted([*files, "architecture.yaml", "card.json", "load.py"])
    assert listing(folder.parent) == [FP32]
    card = json.loads((folder / "card.json").read_text())
    assert list(card["files"]) == files and card["id"] == FP32 and card["task"] == "digits"
    assert card["verified"]["test_accuracy"] == pytest.approx(card["metrics"]["test_accuracy"], abs=1e-9)
    for name, about in card["files"].items():
        content = (folder / name).read_bytes()
        assert about["bytes"] == len(content) and about["sha256"] == hashlib.sha256(content).hexdigest()
        assert about["weight_bytes"] == pytest.approx(card["metrics"]["weight_bytes"], rel=0.1)
        verified = about["verified"]
        assert verified["inputs"] == 64 and 0 <= verified["difference"] <= verified["allowed"] < 1e-3
        assert verified["test_accuracy"] == card["verified"]["test_accuracy"]
    assert Architecture.from_dict(yaml.safe_load((folder / "architecture.yaml").read_text())).id == FP32
    assert read_extra(folder / "model.safetensors")["metrics"] == card["metrics"]
    answer = subprocess.run([sys.executable, folder / "load.py"], capture_output=True, text=True)
    assert answer.stdout.splitlines() == [f"{name} input (1, 8, 8, 1) output (1, 10)" for name in files], answer.stderr


def test_what_loads_without_this_package_has_a_loader_without_it(runs, tmp_path):
    (folder,) = export_run(runs("finished"), format_names=["torch-export"], pick=FP32, output=str(tmp_path / "out"))
    assert folder.parent == tmp_path / "out"
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['mixnas'] = None\n")
    command = [sys.executable, folder / "load.py"]
    answer = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert answer.stdout == "model.pt2 input (1, 8, 8, 1) output (1, 10)\n", answer.stderr


def test_weights_are_stored_as_the_policy_stores_them(runs):
    """Files held float32 while the card stated the bytes of the policy."""
    run = runs("standalone")
    trained = run.path / "networks" / f"{BF16}.safetensors"
    before = trained.read_bytes()
    (folder,) = export_run(run, format_names=["safetensors", "torch-export"], pick=BF16)
    card = json.loads((folder / "card.json").read_text())
    exported, network = load_network(folder / "model.safetensors"), load_network(trained)
    stated = cost(network.architecture, network.io).weight_bytes
    assert {about["weight_bytes"] for about in card["files"].values()} == {stated}
    assert stated < sum(p.numel() * p.element_size() for p in network.parameters())
    assert exported.deployed and torch.bfloat16 in {p.dtype for p in exported.parameters()}
    assert trained.read_bytes() == before and not network.deployed


def test_the_knee_and_a_filter_choose(runs):
    run = runs("finished")
    pareto = json.loads((run.path / "pareto.json").read_text())
    assert [folder.name for folder in export_run(run)] == [pareto["knee"]]
    wanted = [m["id"] for m in pareto["front"] if m["metrics"]["params"] < 900]
    assert len(wanted) > 1 and [folder.name for folder in export_run(run, where="params < 900")] == wanted
    assert listing(run.exports) == sorted({pareto["knee"], *wanted})
    for pick, where, says in (
        ("zzz", None, "'zzz' is none of the final networks"),
        ("", None, "'' stands for several networks"),
        (None, "params < 1", "no network of the front satisfies 'params < 1'"),
    ):
        with pytest.raises(ConfigError, match=says):
            export_run(run, pick=pick, where=where)


def test_what_cannot_be_written_is_said_before_anything_is(runs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"no format is called 'onx'. Did you mean 'onnx'\? Allowed: onnx, "):
        export_run(runs("finished"), format_names=["safetensors", "onx"], output=str(output))
    monkeypatch.setattr(type(formats.get("onnx")), "packages", ())
    with pytest.raises(ConfigError, match=f"{BF16} cannot be exported as onnx: .*token has policy bf16"):
        export_run(runs("standalone"), format_names=["safetensors", "onnx"], pick=BF16, output=str(output))
    monkeypatch.setattr(Safetensors, "packages", ("a_package_that_is_not_there",))
    with pytest.raises(ConfigError, match="pip install a_package_that_is_not_there"):
        export_run(runs("finished"), output=str(output))
    assert not output.exists()


@pytest.mark.parametrize("earlier", [False, True])
def test_a_file_that_is_wrong_leaves_nothing_behind(runs, tmp_path, monkeypatch, earlier):
    output = tmp_path / "out"
    if earlier:
        export_run(runs("finished"), pick=FP32, output=str(output))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    write = Safetensors.write

    def wrong(self, network, path, extra):
        with torch.no_grad():
            weight = network.get_submodule("head").linear.weight
            weight[0, 0] += 0.5
            write(self, network, path, extra)
            weight[0, 0] -= 0.5

    monkeypatch.setattr(Safetensors, "write", wrong)
    with pytest.raises(IntegrityError, match=r"safetensors: its outputs differ from the network's by up to 0\.\d+"):
        export_run(runs("finished"), format_names=["torch-export", "safetensors"], pick=FP32, output=str(output))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert output.exists() == earlier


def test_a_network_that_does_not_score_what_the_front_says_is_refused(runs):
    run = runs("finished")
    pareto = json.loads((run.path / "pareto.json").read_text())
    for member in pareto["front"]:
        member["metrics"]["test_accuracy"] += 0.01
    (run.path / "pareto.json").write_text(json.dumps(pareto))
    with pytest.raises(IntegrityError, match=rf"{FP32}: .* test accuracy is 0.1476, and the front says 0.1576"):
        export_run(run, pick=FP32)
    assert not (run.path / "exports").exists()


def test_an_export_takes_the_place_of_an_earlier_one_and_keeps_what_others_laid_there(runs):
    run = runs("finished")
    (folder,) = export_run(run, pick=FP32)
    (folder / "NOTES.txt").write_text("mine")
    (again,) = export_run(run, pick=FP32, format_names=["torch-export", "torch-export"])
    assert again == folder and listing(folder.parent) == [FP32]
    assert listing(folder) == ["NOTES.txt", "architecture.yaml", "card.json", "load.py", "model.pt2"]
    assert (folder / "NOTES.txt").read_text() == "mine"
