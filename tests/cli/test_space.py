"""`nas space ...` and `nas ops`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixnas.search_space import registry
from mixnas.search_space.files import load_yaml
from mixnas.search_space.operators.quantization.float import BF16

from .command import CONFIG, nas, ok


def test_space_verbs(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    assert ok("space", "size", path).strip() == str(2 * (6 + 36))
    shown = json.loads(ok("space", "show", path, "--json"))
    low, high = (shown["corners"]["params"][end]["value"] for end in ("smallest", "largest"))
    assert shown["size"] == 84 and low < high
    assert "stages.0.blocks.1.mixer" in ok("space", "show", path)
    sample = tmp_path / "architecture.yaml"
    sample.write_text(ok("space", "sample", path, "--seed", 3))
    assert ok("space", "size", sample).strip() == "1"
    assert "84 architectures" in ok("space", "check", path)


def test_what_cannot_stand_there_is_said_with_the_file(tmp_path: Path):
    path = tmp_path / "odd.yaml"
    path.write_text(CONFIG.replace("mixer: [identity,", "mixer: [{name: attention, heads: 3},"))
    answer = nas("space", "check", path)
    assert answer.returncode == 2 and answer.stderr.startswith(f"nas: {path}: space: "), answer.stderr


def test_a_space_whose_constraints_nothing_meets_ends_with_status_3(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    for verb in ("show", "check"):
        answer = nas("space", verb, path, "--set", "constraints=['params <= 10']")
        assert answer.returncode == 3 and "params goes from" in answer.stderr


def test_samples_are_of_the_space_and_of_their_seed(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    asked = ("space", "sample", path, "-n", 3, "--json")
    rows = json.loads(ok(*asked, "--seed", 3))
    assert rows == json.loads(ok(*asked, "--seed", 3)) != json.loads(ok(*asked, "--seed", 4))
    assert {row["stages"][0]["width"] for row in rows} <= {4, 8} and all(row["params"] > 0 for row in rows)
    printed = ok("space", "sample", path, "-n", 3, "--seed", 3)
    assert all(row["id"] in printed for row in rows)


def test_ops_lists_every_operator_axis_by_axis():
    listed = json.loads(ok("ops", "--json"))
    assert [(op["axis"], op["name"]) for op in listed] == [
        (axis, name) for axis in registry.AXES for name in registry.names(axis)
    ]
    assert {"attention", "dwconv", "swiglu", "se", "bf16"} <= {op["name"] for op in listed}
    dwconv = next(op for op in listed if op["name"] == "dwconv")
    assert dwconv["kinds"] == ["image", "sequence", "causal"] and "arXiv 2203.06717" in dwconv["paper"]
    assert dwconv["knobs"]["kernel_size"]["default"] == 7


def test_ops_by_a_pattern_of_names_or_an_axis():
    assert "arXiv" in ok("ops", "*attention*")
    gates = json.loads(ok("ops", "gate", "--json"))
    assert [op["name"] for op in gates] == registry.names("gate")
    unknown = nas("ops", "atention")
    assert unknown.returncode == 2 and "Did you mean 'attention'?" in unknown.stderr


def test_tables_that_would_not_fit_are_said_by_the_check(tmp_path: Path):
    kernels = ", ".join(str(k) for k in range(3, 32, 2))
    mixer = f"{{name: convnext, kernel_size: [{kernels}], expansion: [{', '.join(str(i / 4) for i in range(1, 65))}]}}"
    block = f"{{mixer: {mixer}, gate: {{name: se, reduction: [1, 2, 3, 4, 5, 6, 7, 8]}}, channel_mixer: mlp}}"
    widths = ", ".join(str(i) for i in range(8, 264))
    stages = f"[{{width: [{widths}], block: {block}}}]"
    path = tmp_path / "wide.yaml"
    path.write_text(f"space: {{stem: conv, norm: [layer, rms, batch], stages: {stages}}}")
    refused = nas("space", "check", path)
    assert refused.returncode == 2 and "the tables that latency is looked up in would have" in refused.stderr


def test_a_policy_that_does_not_run_there_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(BF16, "why_not", lambda self, device, runtime: "no kernels" * (runtime == "onnxruntime"))
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.replace("expansion: [1, 2]}", "expansion: [1, 2]}, quant: [fp32, bf16]"))
    assert nas("space", "check", path).returncode == 0
    asked = ("--set", "latency.runtime=onnxruntime", "--set", "device=cpu")
    for words in (("space", "check", path), ("search", "-c", path, "--runs", tmp_path / "runs")):
        refused = nas(*words, *asked)
        assert refused.returncode == 2, refused.stderr
        assert "stages[0]: quant bf16 does not run through 'onnxruntime'" in refused.stderr
        assert "Leave the policy out" in refused.stderr
    assert not (tmp_path / "runs").exists()


def test_a_sample_has_a_line_each_and_is_counted():
    assert nas("space", "sample", "-n", 0).returncode == 2
    full = ok("space", "sample", "-n", 2, "--full").splitlines()
    assert full[-1].split()[0] in "".join(full[:-2])


@pytest.mark.parametrize(
    ("setting", "status", "says"),
    [
        ("constraints=['accuracy >= 97']", 3, "For 97% write accuracy >= 0.97"),
        ("objectives={acuracy: max}", 2, "Did you mean 'accuracy'?"),
        ("device=nvidia-h1000", 2, "no measurements of device 'nvidia-h1000'"),
        ("search.evaluator=supernt", 2, "no evaluator is called 'supernt'"),
    ],
)
def test_a_check_refuses_whatever_a_search_would(setting: str, status: int, says: str):
    """It said that everything fits."""
    for words in (["space", "check"], ["search", "--dry-run"]):
        refused = nas(*words, "--set", setting)
        assert refused.returncode == status and says in refused.stderr, words


def test_scale_writes_a_file_that_can_be_searched(tmp_path: Path):
    path, larger = tmp_path / "config.yaml", tmp_path / "larger.yaml"
    path.write_text(CONFIG)
    told = ok("space", "scale", path, "--macs", "16x", "-o", larger)  # width x 3.03, depth x 1.32
    answer = json.loads(ok("space", "scale", path, "--macs", "16x", "--json"))
    plain = load_yaml(larger)
    assert plain == answer["config"] and plain["search"] == load_yaml(path)["search"]
    assert plain["space"]["stages"][0]["width"] == [12, 24] and plain["space"]["stages"][0]["depth"] == [1, 3]
    ends = answer["corners"]["macs"]["largest"]
    assert ends["after"] == json.loads(ok("space", "show", larger, "--json"))["corners"]["macs"]["largest"]["value"]
    assert f"{int(ends['before']):,} -> {int(ends['after']):,}" in told and "the input stays 8x8" in told
    alone = tmp_path / "space.yaml"
    alone.write_text("stem: conv\nstages: [{width: 8, block: {mixer: identity, channel_mixer: mlp}}]\n")
    again = tmp_path / "again.yaml"
    again.write_text(ok("space", "scale", alone, "--macs", "4x", "--width-share", "1"))
    assert load_yaml(again)["stages"][0]["width"] == 16
    assert ok("space", "size", again).strip() == "1"


@pytest.mark.parametrize("given", ["2", "twice", "-1x", "nanx", "1e9x"])
def test_scale_takes_factors_only(given: str):
    refused = nas("space", "scale", f"--macs={given}")
    assert refused.returncode == 2 and "for example 2x or 0.5x" in refused.stderr


def test_scale_scales_the_input_where_the_file_gives_its_size(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.replace("task: digits", "task: {name: digits, size: 32}"))
    plain = json.loads(ok("space", "scale", path, "--macs", "100x", "--json"))["config"]
    assert plain["task"] == {"name": "digits", "size": 40}  # x 1.26


def test_scale_overwrites_only_when_told_to(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    asked = ("space", "scale", path, "--macs", "1.1x")
    refused = nas(*asked, "-o", path)
    assert refused.returncode == 2 and "--force" in refused.stderr and path.read_text() == CONFIG
    told = ok(*asked, "-o", path, "--force")
    assert "the factor 1.1 is missed" in told and path.read_text() != CONFIG
