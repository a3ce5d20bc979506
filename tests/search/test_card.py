"""What stands beside an exported network, as far as it takes no export to see it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from mixnas.predictors.measuring.value import Latency
from mixnas.search.card import budget, drawing, readme
from mixnas.search.loader import loader
from mixnas.search.run.front import Front, Member
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.cost import cost
from mixnas.search_space.formats import format as formats
from mixnas.search_space.operators.quantization import products
from mixnas.search_space.operators.quantization.ran import products_that_ran

from ..contracts.format import FEATURES, TOKENS, network_of, small

LATENCY = Latency(0.166, 0.165, 0.167, "measured")
MEMBER = Member(id="a", trial=0, architecture={}, metrics={"latency_ms": 0.166, "params": 914}, latency=LATENCY)
FRONT = Front(
    run="r", task="digits", metric="accuracy", objectives={"accuracy": "max"}, constraints=("latency_ms <= 0.2",),
    evaluator="supernet", device="d", latency="measured", trials={}, hypervolume=None, reference=None, final=True,
    members=(MEMBER,), others=(), knee="a", searched_front=(),
)  # fmt: skip


def test_a_budget_is_kept_or_missed_in_one_line():
    assert budget(FRONT, MEMBER) == ["asked latency_ms <= 0.2 ms, measured 0.166 (0.165 to 0.167): kept"]
    missed = replace(MEMBER, metrics={"latency_ms": 0.3}, latency=Latency(0.3, None, None, "predicted"))
    assert budget(FRONT, missed) == ["asked latency_ms <= 0.2 ms, predicted 0.300: missed"]
    several = replace(FRONT, constraints=("params <= 500", "energy_mj < 2"))
    assert budget(several, MEMBER) == ["asked params <= 500, it has 914: missed", "asked energy_mj < 2: not known"]


def test_the_drawing_adds_up():
    network = small(FEATURES)
    header, entry, *units = drawing(network).splitlines()
    assert header.split() == ["unit", "operators", "answers", "parameters", "bytes"] and "4x8x3" in entry
    assert [line.split()[0] for line in units] == [name for name, _ in network.units()]
    params, stored = (sum(int(line.split()[i].replace(",", "")) for line in units) for i in (-2, -1))
    known = cost(network.architecture, FEATURES)
    assert (params, stored) == (known.params, known.weight_bytes)


def test_a_card_says_which_products_ran():
    block = {"mixer": "attention", "channel_mixer": "mlp", "quant": "w8a8"}
    network = network_of(Architecture.from_dict({"stem": "conv", "stages": [{"width": 8, "block": block}]}), FEATURES)
    verified = {"inputs": 64, "of": "the test split", "difference": 0.0, "allowed": 1e-4}
    about = {"format": "onnx", "needs": ["onnxruntime"], "bytes": 9, "weight_bytes": 4, "verified": verified}
    plain = {
        "id": "a", "run": "r", "task": "digits", "metric": "accuracy", "licence": "mit", "budget": [], "device": "d",
        "metrics": {"accuracy": 0.5, "accuracy_se": 0.01}, "files": {"model.onnx": about},
        "ran": [one.to_plain() for one in products_that_ran(network, FEATURES.example(1))],
    }  # fmt: skip
    text = readme(plain, network)
    with products.only(int8="float32"):  # the integer path turned off
        ran = [one.to_plain() for one in products_that_ran(network, FEATURES.example(1))]
    assert "| int8 |" not in readme(plain | {"ran": ran}, network)
    assert "w8a8 does not run as itself here: float32" in readme(plain | {"instead": {"w8a8": "float32"}}, network)
    assert "| int8 | " in text and "| accuracy | 0.5 ± 0.01 (one standard error) |" in text and "[w8a8]" in text
    assert "## Products" not in readme({key: value for key, value in plain.items() if key != "ran"}, network)


def test_a_card_says_how_to_call_the_network_and_names_stay_in_their_line():
    network = small(FEATURES)
    verified = {"inputs": 64, "of": "the test split", "difference": 0.0, "allowed": 1e-4}
    about = {"format": "onnx", "needs": ["onnxruntime"], "bytes": 9, "weight_bytes": 4, "verified": verified}
    plain = {
        "id": "a", "run": "r", "task": "digits", "metric": "accuracy", "licence": "mit", "budget": [], "device": "d",
        "metrics": {"accuracy": 0.5}, "files": {"model.onnx": about},
    }  # fmt: skip
    names = ["red\x1b[2J", "two\n# lines"]
    pictures = {"size": [4, 8], "channels": 3}
    text = readme(plain | {"labels": names, "pictures": pictures, "summary": "of\nred\x1b[2J"}, network)
    assert "Inputs: float32, (n, 4, 8, 3), channels last: height, width, channels. " in text
    assert f"Outputs: (n, {FEATURES.num_outputs})." in text and 'answer = network("model.onnx")' in text
    assert r"outputs: red\x1b[2J, two\n# lines." in text and r"Data: of\nred\x1b[2J." in text and "\x1b" not in text
    assert "prints the class of a picture's file" in text
    masks = small(replace(FEATURES, head="token", mean=(1.0,) * 3, std=(2.0,) * 3))
    text = readme(plain | {"labels": ["a", "b"], "pictures": pictures}, masks)
    assert f"Outputs: (n, 4, 8, {FEATURES.num_outputs})." in text and "raw pixels, 0 to 255" in text
    assert "`python load.py PICTURE` prints the shares of the classes" in text
    assert "Inputs: int64, (n, " in readme(plain, small(TOKENS))
    assert "It reads what the task digits gives" in readme(plain, network)
    assert "It reads" not in readme(plain, small(TOKENS))


def test_a_loader_is_python_with_the_functions_that_verified():
    text = loader([formats.get(name) for name in ("onnx", "safetensors", "torch-export")], FEATURES)
    compile(text, "load.py", "exec")
    assert "def load_onnx(" in text and "def load_safetensors(" in text and '"model.py"' in text
    assert "import mixnas" not in text and "from mixnas" not in text


def test_a_loader_says_in_one_sentence_which_picture_it_cannot_read(tmp_path):
    data = {"labels": ["a", "b"], "pictures": {"size": [8, 8], "channels": 3}}
    file = tmp_path / "load.py"
    file.write_text(loader([formats.get("safetensors")], FEATURES, data))
    (tmp_path / "text.png").write_text("no picture")
    for name, why in (("nowhere.png", "No such file or directory"), ("text.png", "cannot identify image file")):
        command = [sys.executable, "-I", file, name]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{name}: cannot be read as a picture: ") and why in done.stderr
