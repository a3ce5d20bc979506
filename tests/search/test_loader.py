"""`load.py` of an export, in this process: what it refuses, what it takes, what it prints."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import runpy
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mixnas.evaluators.tasks.preparing import Prepared
from mixnas.search.card import MANIFEST
from mixnas.search.loader import inputs_of, loader, told
from mixnas.search_space.files import digest_of, stamped, write_json
from mixnas.search_space.formats import format as formats
from mixnas.search_space.network import Network
from mixnas.search_space.units import IOSpec

from ..contracts.format import FEATURES, IOS, TOKENS, small

FILE = "model.safetensors"
NAMES = ["red\x1b[2J", "two\nlines", "\U0001f339", "it's \udcff"]
PICTURES = {"size": [8, 8], "channels": 3}
CLASSES = IOSpec("image", (8, 8), 3, 4, mean=(100.0,) * 3, std=(50.0,) * 3)
PIXELS = IOSpec("image", (8, 8), 3, 4, head="token", out_size=(8, 8), mean=(100.0,) * 3, std=(50.0,) * 3)

Made = tuple[Path, Network, ModuleType]
Make = Callable[..., Made]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes an export of a small network: its folder, the network and its `load.py` as a module."""

    def make(io: IOSpec, data: Mapping[str, Any] | None = None) -> Made:
        monkeypatch.setitem(sys.modules, "model", ModuleType("model"))  # which the file's own loader replaces
        network = small(io).deploy()
        file_format = formats.get("safetensors")
        file_format.write(network, tmp_path / FILE, {})
        (tmp_path / "load.py").write_text(loader([file_format], io, data), encoding="utf-8")
        known = {path.name: {"sha256": digest_of(path.read_bytes())} for path in tmp_path.iterdir()}
        write_json(tmp_path / MANIFEST, stamped({"format": 3, "files": known}))
        spec = importlib.util.spec_from_file_location("load", tmp_path / "load.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return tmp_path, network, module

    return make


@pytest.fixture
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return str(path)


def refused(folder: Path, load: ModuleType, name: str, says: str) -> None:
    """In one sentence that names the file; Python's exit status of such an end is 1."""
    with pytest.raises(SystemExit) as end:
        load.check(FILE)
    text = str(end.value.code)
    assert text.startswith(f"{folder / name}: ") and says in text and "\n" not in text


@pytest.mark.parametrize(
    "content", [None, b"", b'{"format": 3, "fi', b"{}", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000]
)
def test_a_manifest_that_is_none_is_named(export: Make, content: bytes | None):
    folder, _, load = export(FEATURES)
    assert load.check(FILE) == folder / FILE
    if content is None:
        (folder / MANIFEST).unlink()
        refused(folder, load, MANIFEST, "cannot be read: No such file")
    else:
        (folder / MANIFEST).write_bytes(content)
        refused(folder, load, MANIFEST, "damaged: not what was written")


def test_a_weight_that_was_changed_with_its_entry_in_the_manifest_is_noticed(export: Make):
    folder, _, load = export(FEATURES)
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(folder, load, FILE, "its SHA-256 is not that in manifest.json")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][FILE]["sha256"] = digest_of((folder / FILE).read_bytes())
    write_json(folder / MANIFEST, manifest)
    refused(folder, load, MANIFEST, "damaged: not what was written")


def test_a_file_or_an_entry_that_is_missing_is_named(export: Make):
    folder, _, load = export(FEATURES)
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["model.py"]
    write_json(folder / MANIFEST, stamped(manifest))
    refused(folder, load, "model.py", "its SHA-256 is not that in manifest.json")
    (folder / FILE).unlink()
    refused(folder, load, FILE, "cannot be read: No such file")
    with pytest.raises(SystemExit, match=rf"^model.onnx: no network's file of this export. Allowed: {FILE}\.$"):
        load.check("model.onnx")


def test_numbers_of_any_type_are_converted_and_another_shape_is_said(export: Make):
    _, network, load = export(CLASSES)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    expected = network(torch.from_numpy(pixels).float()).detach().numpy()
    answer = load.network(FILE)
    turned = pixels[:, ::-1].astype(np.float64)[:, ::-1]  # strides below 0
    for batch in (pixels, pixels.astype(np.float32), pixels.astype(np.int64), turned, pixels.tolist()):
        np.testing.assert_allclose(answer(batch), expected, rtol=1e-5, atol=1e-6)
    for wrong in (pixels[0], pixels.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=r"inputs of shape .*: the network reads \(n, 8, 8, 3\)"):
            answer(wrong)


def test_raw_features_are_prepared_as_the_task_did_and_others_are_refused(export: Make):
    """The files of a task that standardises outside of its networks read what it prepared."""
    own = Prepared(what="pixels", low=0, high=16, mean=(0.3, 0.2, 0.1), std=(0.5, 0.25, 2.0), divided_by=16, repeated=2)
    io = replace(CLASSES, mean=None, std=None)
    _, network, load = export(io, {"prepared": own.to_plain()})
    raw = np.random.default_rng(0).integers(0, 17, (5, 4, 4, 3))
    inputs = (raw / 16 - [0.3, 0.2, 0.1]) / [0.5, 0.25, 2.0]
    inputs = inputs.repeat(2, axis=1).repeat(2, axis=2).astype(np.float32)
    expected = network(torch.from_numpy(inputs)).detach().numpy()
    np.testing.assert_allclose(load.network(FILE)(raw), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(load.prepared(raw), inputs, rtol=1e-5, atol=1e-6)
    assert "raw pixels from 0 to 16" in load.__doc__ and "raw / 16" in load.__doc__
    for wrong in (raw * 16, inputs[:, ::2, ::2]):
        with pytest.raises(ValueError, match=r"this is given raw pixels, 0 to 16, and prepares them itself"):
            load.network(FILE)(wrong)


def test_floats_are_no_tokens(export: Make):
    io = TOKENS
    _, _, load = export(io)
    tokens = io.example(2).numpy().astype(np.int32)
    assert load.network(FILE)(tokens).shape == (2, *io.grid, io.num_outputs)
    with pytest.raises(TypeError, match="Cannot cast"):
        load.network(FILE)(tokens.astype(np.float32))


@pytest.mark.parametrize("kind", IOS)
def test_inputs_are_what_an_example_is(kind: str):
    example = IOS[kind].example(1).numpy()
    assert inputs_of(IOS[kind]) == (str(example.dtype), example.shape[1:])


def test_many_pictures_are_answered_by_one_loading_and_names_are_printed_harmless(export: Make, picture: str):
    _, network, load = export(CLASSES, {"labels": NAMES, "pictures": PICTURES})
    assert load.LABELS == NAMES
    loaded = []
    load.FILES[FILE] = lambda path, own=load.FILES[FILE]: loaded.append(path) or own(path)
    pixels = torch.from_numpy(load.read_picture(picture, (8, 8), 3)[None].astype(np.float32))
    shares = network(pixels).softmax(-1)[0]
    for _ in range(3):
        label, share = load.classify(picture, FILE)
        assert label == NAMES[int(shares.argmax())] and share == pytest.approx(float(shares.max()), rel=1e-4)
    assert len(loaded) == 1
    said = [load.shown(name) for name in NAMES]
    assert said == ["red\\x1b[2J", "two\\nlines", "\U0001f339", "it's \\udcff"]
    assert load.said(picture, FILE).startswith(load.shown(label)) and load.said(picture, FILE).isprintable()


def test_a_segmentation_answers_a_picture_with_the_name_of_each_pixel_s_class(export: Make, picture: str):
    data = {"labels": NAMES, "reads": PICTURES}
    _, network, load = export(PIXELS, data)
    pixels = torch.from_numpy(load.read_picture(picture, (8, 8), 3)[None].astype(np.float32))
    expected = network(pixels).argmax(-1)[0].numpy()
    assert (load.segment(picture, FILE) == np.array(NAMES)[expected]).all()
    counts = np.bincount(expected.ravel(), minlength=4) / 64
    line = load.said(picture, FILE)
    assert line.split(", ")[0] == f"{load.shown(NAMES[int(counts.argmax())])} {counts.max():.1%}"
    assert line.isprintable() and line.count("%") == np.count_nonzero(counts)


def test_what_is_told_of_data():
    assert told({"labels": [], "reads": PICTURES, "sha256": "a", "split": {}}) == {
        "pictures": PICTURES, "data_sha256": "a",
    }  # fmt: skip
    assert told({"pictures": None, "summary": "numbers"}) == {"summary": "numbers"}


def test_tokens_beyond_those_that_there_are_are_refused(export: Make):
    _, _, load = export(TOKENS)
    good = TOKENS.example(2).numpy()
    load.network(FILE)(good)
    for wrong in (-1, TOKENS.in_features, -(1 << 40)):
        batch = good.copy()
        batch[1, -1] = wrong
        with pytest.raises(ValueError, match=rf"{wrong}.*: the network reads 0 to {TOKENS.in_features - 1}"):
            load.network(FILE)(batch)


def test_of_code_that_was_changed_the_way_on_is_said_and_works(export: Make, monkeypatch: pytest.MonkeyPatch):
    folder, network, load = export(FEATURES)
    with (folder / "model.py").open("a") as file:
        file.write("\n# changed\n")
    refused(folder, load, "model.py", "damaged or changed")
    with pytest.raises(SystemExit, match=r"without load\.py: import model; model\.load\(\)$"):
        load.check(FILE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "model")
    x = FEATURES.example(2)
    torch.testing.assert_close(importlib.import_module("model").load()(x), network(x))


def test_a_picture_that_cannot_be_read_keeps_no_other_from_its_answer(
    export: Make, picture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder, _, _ = export(CLASSES, {"labels": ["a", "b", "c", "d"], "pictures": PICTURES})
    for pictures, status in (([picture, "nowhere.png", picture], 1), ([picture], 0)):
        monkeypatch.setattr(sys, "argv", ["load.py", *pictures])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(folder / "load.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert end.value.code == status and err.count("nowhere.png: cannot be read as a picture") == status
        assert len(out.splitlines()) == pictures.count(picture)
        assert all(re.fullmatch(r".* [abcd] [01]\.\d{4}", line) for line in out.splitlines())
