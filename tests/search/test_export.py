"""Taking networks away, from runs that the previous version finished (`tests/data/v1`)."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from sklearn.datasets import load_digits

from mixnas.evaluators.tasks.digits import stratified_split
from mixnas.search.export import export_run
from mixnas.search.publishing import locked
from mixnas.search.reproducing import read_export
from mixnas.search.run.directory import Run
from mixnas.search.run.integrity import export_problems, problems
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.files import stamped
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.format import NotIdentical
from mixnas.search_space.formats.safetensors import Safetensors, load_network, read_extra, save_network
from mixnas.search_space.operators.quantization import float as policies

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
        if not formats.get(name).needs_mixnas:
            found.append(name)
    return found


OWN = ["README.md", "architecture.yaml", "card.json", "load.py", "manifest.json"]


def listing(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_every_format_is_written_verified_and_described(runs, tmp_path):
    wanted = available()
    (folder,) = export_run(runs("finished"), format_names=wanted, pick=FP32[:6], licence="apache-2.0")
    assert folder == runs("finished").exports / FP32
    files = [formats.get(name).file_name for name in wanted]
    beside = [name for f in map(formats.get, wanted) for name in f.beside]
    assert listing(folder) == sorted([*files, *beside, *OWN])
    assert listing(folder.parent) == [FP32]
    card = json.loads((folder / "card.json").read_text())
    assert list(card["files"]) == files and card["id"] == FP32 and card["task"] == "digits"
    assert card["verified"]["test_accuracy"] == pytest.approx(card["metrics"]["test_accuracy"], abs=1e-9)
    for name, about in card["files"].items():
        assert about["bytes"] == (folder / name).stat().st_size
        assert about["latency"]["kind"] == "measured" and about["latency"]["low_ms"] <= about["latency"]["ms"]
        assert about["weight_bytes"] == pytest.approx(card["metrics"]["weight_bytes"], rel=0.1)
        verified = about["verified"]
        assert verified["inputs"] == 64 and 0 <= verified["difference"] <= verified["allowed"] < 1e-3
        assert verified["test_accuracy"] == card["verified"]["test_accuracy"]
    assert Architecture.from_dict(yaml.safe_load((folder / "architecture.yaml").read_text())).id == FP32
    assert read_extra(folder / "model.safetensors")["metrics"] == card["metrics"]
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert sorted([*manifest, "manifest.json"]) == listing(folder)
    for name, about in manifest.items():
        content = (folder / name).read_bytes()
        assert about == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    _describes(folder, card)
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['mixnas'] = None\n")
    command, environment = [sys.executable, folder / "load.py"], {"PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.stdout.splitlines() == [f"{name} input (1, 8, 8, 1) output (1, 10)" for name in files], answer.stderr
    assert {about["needs"][0] for about in card["files"].values()} >= {"torch"}
    images, labels = load_digits(return_X_y=True)
    test = stratified_split(labels, (0.6, 0.2, 0.2), seed=20_240_901)[2].numpy()
    np.savez(tmp_path / "raw.npz", x=images[test].reshape(-1, 8, 8, 1), y=labels[test])  # pixels as they are, 0 to 16
    judge = f"import load, numpy as np; d = np.load({str(tmp_path / 'raw.npz')!r}); "
    judge += "print((load.network('model.safetensors')(d['x']).argmax(-1) == d['y']).mean())"
    answer = subprocess.run([sys.executable, "-c", judge], capture_output=True, text=True, env=environment, cwd=folder)
    assert float(answer.stdout) == pytest.approx(card["metrics"]["test_accuracy"], abs=1e-9), answer.stderr
    assert not (runs("finished").path / "data.json").exists() and "of raw pixels, 0 to 16" in text_of(folder)
    loader = folder / "load.py"
    loader.write_text(loader.read_text().replace("VERIFIED_ON = [", 'VERIFIED_ON = ["no_such_instruction", '))
    asked = [sys.executable, "-c", "import load; load.check('model.pt2')"]
    answer = subprocess.run(asked, capture_output=True, text=True, env=environment, cwd=folder)
    assert "note: verified on a CPU with no_such_instruction, which this one lacks" in answer.stderr
    damaged = folder / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"123456789")
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode and "model.safetensors: damaged or changed" in answer.stderr


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def _describes(folder: Path, card: dict) -> None:
    """The card for people: budget, numbers, drawing; its front matter is what hubs read."""
    text = text_of(folder)
    _, front_matter, rest = text.split("---\n", 2)
    assert yaml.safe_load(front_matter)["license"] == "apache-2.0"
    assert card["budget"] == ["asked params <= 20000, it has 914: kept"] and card["budget"][0] in rest
    for said in (f"| test_accuracy | {card['metrics']['test_accuracy']:.6g} |", "stages.0.blocks.0.token", "mlp"):
        assert said in rest
    measured = card["latency"]
    assert f"| the network, in the run | {measured['ms']:.3f} | {measured['low_ms']:.3f} to " in rest
    assert card["data"] == {"split": "test", "examples": 359, "sha256": card["data"]["sha256"]}


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


def test_the_card_says_what_runs_in_a_file_in_the_place_of_a_policy(runs):
    if "onnx" not in available():
        pytest.skip("needs onnx, onnxscript and onnxruntime")
    (folder,) = export_run(runs("standalone"), format_names=["safetensors", "onnx"], pick=BF16, verify=False)
    files = json.loads((folder / "card.json").read_text())["files"]
    assert "instead" not in files["model.safetensors"]
    assert files["model.onnx"]["instead"]["bf16"].startswith("float32: ONNX Runtime has no bfloat16 kernels")
    assert files["model.onnx"]["weight_bytes"] == files["model.safetensors"]["weight_bytes"]
    verified = files["model.onnx"]["verified"]
    assert 0 < verified["difference"] <= verified["allowed"] < 0.1
    assert "model.onnx: bf16 runs as float32: ONNX Runtime has no" in (folder / "README.md").read_text()


def test_what_cannot_be_written_is_said_before_anything_is(runs, tmp_path, monkeypatch):
    output = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"no format is called 'onx'. Did you mean 'onnx'\? Allowed: onnx, "):
        export_run(runs("finished"), format_names=["safetensors", "onx"], output=str(output))
    monkeypatch.setattr(type(formats.get("onnx")), "packages", ())
    monkeypatch.setattr(policies.BF16, "why_not", lambda self, device, runtime: "not there")
    with pytest.raises(ConfigError, match=f"{BF16} cannot be exported as onnx: .*token has policy bf16: not there"):
        export_run(
            runs("standalone"),
            format_names=["safetensors", "onnx"],
            pick=BF16,
            output=str(output),
        )
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
    with pytest.raises(
        IntegrityError, match=r"its outputs differ .* up to 0\.\d+.* first unit that differs is head, by"
    ):
        export_run(
            runs("finished"),
            format_names=["torch-export", "safetensors"],
            pick=FP32,
            output=str(output),
        )
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


def test_a_second_export_adds_to_the_first_and_keeps_what_others_laid_there(runs):
    """`nas export mine --format torch-export` deleted what `nas export mine` had written."""
    run, said = runs("finished"), []
    (folder,) = export_run(run, pick=FP32, verify=False)
    (folder / "NOTES.txt").write_text("mine")
    first = {name: (folder / name).read_bytes() for name in ("model.safetensors", "model.py")}
    again = ["torch-export", "torch-export"]
    assert export_run(run, pick=FP32, verify=False, format_names=again, told=said.append) == [folder]
    assert listing(folder.parent) == [FP32]
    assert listing(folder) == sorted(["NOTES.txt", "model.pt2", "model.py", "model.safetensors", *OWN])
    assert {name: (folder / name).read_bytes() for name in first} == first and not said
    assert (folder / "NOTES.txt").read_text() == "mine"
    assert list(read_export(folder)["files"]) == ["model.safetensors", "model.pt2"]
    command, environment = [sys.executable, folder / "load.py"], {"PYTHONPATH": ""}
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert [line.split()[0] for line in answer.stdout.splitlines()] == ["model.safetensors", "model.pt2"], answer.stderr


def test_what_a_user_changed_is_never_lost(runs):
    """model.py "is yours to change", and was gone after an export of another format."""
    run, said = runs("finished"), []
    (folder,) = export_run(run, pick=FP32, verify=False)
    (folder / "model.py").write_text("# mine\n")
    export_run(run, pick=FP32, verify=False, format_names="torch-export", told=said.append)
    assert (folder / "model.py").read_text() == "# mine\n" and not said
    assert [name for name, _ in export_problems(folder)] == ["model.py"]
    (folder / "README.md").write_text("my card")
    export_run(run, pick=FP32, verify=False, told=said.append)
    kept = {name: (folder / f"{name}.bak").read_text() for name in ("model.py", "README.md")}
    assert kept == {"model.py": "# mine\n", "README.md": "my card"}
    assert len(said) == 2 and all("was not as it was exported" in text for text in said)
    (folder / "model.py").write_text("# mine again\n")
    export_run(run, pick=FP32, verify=False, told=said.append)
    assert (folder / "model.py.bak").read_text() == "# mine\n"
    assert (folder / "model.py.bak2").read_text() == "# mine again\n"
    assert list(export_problems(folder)) == []


def test_files_of_other_weights_do_not_stay(runs):
    run, said = runs("finished"), []
    (folder,) = export_run(run, pick=FP32, verify=False, told=said.append)
    trained = run.networks / f"{FP32}.safetensors"
    network = load_network(trained)
    with torch.no_grad():
        next(network.parameters()).add_(0.5)
    save_network(trained, network)
    (folder / "model.py").write_text("# mine\n")
    export_run(run, pick=FP32, verify=False, format_names="torch-export", told=said.append)
    assert listing(folder) == sorted(["model.pt2", "model.py.bak", *OWN])
    assert list(export_problems(folder)) == [] and list(read_export(folder)["files"]) == ["model.pt2"]
    assert "removed model.safetensors of an earlier export, which held other weights" in said[-1]


def test_the_formats_that_pass_are_written_though_one_is_refused(runs, monkeypatch):
    """`--format onnx,torch-export,safetensors` of a network with whole numbers left nothing."""
    run, verify = runs("finished"), formats.verify

    def rounds_otherwise(file_format, *args, **kwargs):
        if file_format.name == "torch-export":
            raise NotIdentical("not identical to the deployed network: it rounds otherwise.")
        return verify(file_format, *args, **kwargs)

    monkeypatch.setattr(formats, "verify", rounds_otherwise)
    compare = formats.compare

    def far(answer, network, inputs, what, stated=None):
        found = compare(answer, network, inputs, what, stated)
        return replace(found, difference=0.0123) if stated == math.inf else found

    monkeypatch.setattr(formats, "compare", far)
    both = ["torch-export", "safetensors"]
    with pytest.raises(NotIdentical, match=r"--tolerance 0\.02\. .* Written all the same: .*\(model\.safetensors\)"):
        export_run(run, format_names=both, pick=FP32, verify=False)
    folder = run.exports / FP32
    assert listing(folder) == sorted(["model.py", "model.safetensors", *OWN])
    shutil.rmtree(folder)
    with pytest.raises(NotIdentical, match="Nothing was written"):
        export_run(run, format_names=both[:1], pick=FP32, verify=False)
    assert not folder.exists()


def test_every_file_of_an_export_is_checked(runs):
    """Also the card, the texts and the manifest itself; what others laid there is not."""
    run = runs("finished")
    (folder,) = export_run(run, pick=FP32, verify=False)
    (folder / "notes.txt").write_text("mine")
    assert list(export_problems(folder)) == [] and read_export(folder)["id"] == FP32
    for name in [*OWN, "model.py", "model.safetensors"]:
        path = folder / name
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        assert [found for found, _ in export_problems(folder)] == [name]
        with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
            read_export(folder)
        assert f"exports/{FP32}/{name}" in dict(problems(run.path, run.manifest))
        path.unlink()
        assert dict(export_problems(folder)) == {name: "missing."}
        path.write_bytes(whole)
    plain = json.loads((folder / "manifest.json").read_text())
    outside = {**plain["files"], "../../../manifest.json": {"sha256": "0"}}
    (folder / "manifest.json").write_text(json.dumps(stamped({**plain, "files": outside})))
    assert [problem for _, problem in export_problems(folder)] == [
        "damaged: '../../../manifest.json' is no file of it."
    ]


def test_networks_that_changed_places_are_named(runs):
    run = runs("finished")
    one, other, *_ = sorted((run.path / "networks").glob("*.safetensors"))
    assert list(problems(run.path, run.manifest)) == []
    aside = one.rename(one.with_suffix(".aside"))
    other.rename(one)
    aside.rename(other)
    found = dict(problems(run.path, run.manifest))
    assert found == {
        f"networks/{path.name}": f"it holds {there.stem}, another network. Was it exchanged with that one's file?"
        for path, there in ((one, other), (other, one))
    }


def test_an_export_follows_no_link_and_clears_away_what_a_killed_one_left(runs, tmp_path):
    run = runs("finished")
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FP32).symlink_to(victim)
    with pytest.raises(ConfigError, match="is no folder of its own"):
        export_run(run, pick=FP32, verify=False, output=str(tmp_path / "out"))
    assert listing(victim) == ["thesis.txt"] and listing(tmp_path / "out") == [FP32]
    (run.exports / ".exporting-left" / FP32).mkdir(parents=True)
    export_run(run, pick=FP32, verify=False)
    assert listing(run.exports) == [FP32]


def test_what_a_killed_export_had_put_aside_comes_back_and_one_at_work_is_let_alone(runs, tmp_path):
    run, root = runs("finished"), tmp_path / "out"
    other = root / ".exporting-killed" / "another.before"
    other.mkdir(parents=True)
    (other / "NOTES.txt").write_text("mine")
    (root / ".exporting-at-work" / FP32).mkdir(parents=True)
    with locked(root / ".exporting-at-work"):
        export_run(run, pick=FP32, verify=False, output=str(root))
    assert listing(root) == sorted([".exporting-at-work", "another", FP32])
    assert (root / "another" / "NOTES.txt").read_text() == "mine"


def test_a_folder_that_was_there_stays_when_an_export_fails(runs, tmp_path, monkeypatch):
    run, root = runs("finished"), tmp_path / "out"
    root.mkdir()
    monkeypatch.setattr("mixnas.search.export.publish", lambda *_: 1 / 0)
    for folder, stays in ((root, True), (tmp_path / "new" / "out", False)):
        with pytest.raises(ZeroDivisionError):
            export_run(run, pick=FP32, verify=False, output=str(folder))
        assert folder.exists() == stays and (tmp_path / "new").exists() is False


def test_weights_are_copied_without_the_tasks_module(runs, monkeypatch):
    run = runs("finished")
    run.manifest["fixed"]["task"] = "nowhere:Task"
    with pytest.raises(ConfigError, match="nowhere"):
        export_run(run, pick=FP32)
    (folder,) = export_run(run, pick=FP32, verify=False)
    card = json.loads((folder / "card.json").read_text())
    verified = card["files"]["model.safetensors"]["verified"]
    assert verified["of"] == "random numbers" and verified["inputs"] == 64 and "data" not in card
