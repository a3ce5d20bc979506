"""Pictures by class: what is read, how it is split, and what is refused before anything is trained."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from mixnas.evaluators.tasks import by_name, decoding
from mixnas.evaluators.tasks.decoding import read_picture
from mixnas.evaluators.tasks.folder import Folder, list_pictures, suited
from mixnas.evaluators.tasks.task import SPLITS, Task
from mixnas.search_space.errors import ConfigError
from tests.contracts.task import TaskContract
from tests.evaluators.tasks.drawn import COLOURS, colour, draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data") / "colours")


class TestFolder(TaskContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folder: Path) -> None:
        self.path = str(folder)

    def make(self) -> Task:
        return Folder(path=self.path, size=16)


class TestDecodedAtEachStep(TestFolder):
    def make(self) -> Task:
        return Folder(path=self.path, size=16, memory_gib=0, weighted=True)


def test_the_split_is_stratified_written_down_and_of_its_seed(folder):
    task = by_name({"name": "folder", "path": str(folder)})
    record = json.loads(json.dumps(task.record()))
    assert record["labels"] == list(COLOURS) == list(task.labels)
    assert record["counts"] == {"train": [6, 6, 6], "validation": [2, 2, 2], "test": [2, 2, 2]}
    listed = [record["split"][name] for name in SPLITS]
    assert sorted(file for files in listed for file in files) == sorted(list_pictures(folder).files)
    for name in SPLITS:
        _, targets = getattr(task, name).gather(torch.arange(len(getattr(task, name))))
        assert [file.partition("/")[0] for file in record["split"][name]] == [task.labels[t] for t in targets]
    assert Folder(path=str(folder)).record() == task.record()
    assert Folder(path=str(folder), seed=1).record()["split"] != record["split"]


def test_pictures_that_change_or_change_places_are_told_though_sizes_and_times_are_the_same(tmp_path):
    folder = tmp_path / "d"
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (50 * i, 100, 200 * (label == "b"))).save(folder / label / f"{i}.bmp")
            os.utime(folder / label / f"{i}.bmp", (1, 1))
    known = Folder(path=str(folder)).record()
    assert Folder(path=str(folder)).record() == known
    one, other = folder / "a" / "0.bmp", folder / "b" / "0.bmp"
    one.rename(folder / "aside")
    other.rename(one)
    (folder / "aside").rename(other)
    swapped = Folder(path=str(folder)).record()
    assert swapped["split"] == known["split"] and swapped["sha256"] != known["sha256"]
    content = one.read_bytes()
    one.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(one, (1, 1))
    assert Folder(path=str(folder)).record()["sha256"] not in (known["sha256"], swapped["sha256"])


def test_what_is_read_is_pillow_s_picture_and_the_network_s_mean_is_that_of_the_training_split(folder):
    task = Folder(path=str(folder), size=[16, 12])
    x, _ = task.train.gather(torch.arange(len(task.train)))
    for i, file in enumerate(task.record()["split"]["train"]):
        if file.endswith(".png"):
            with Image.open(folder / file) as image:
                expected = ImageOps.fit(image.convert("RGB"), (12, 16), Image.Resampling.BILINEAR)
            assert np.array_equal(x[i].numpy(), np.asarray(expected))
    assert torch.allclose(torch.tensor(task.io.mean), x.mean((0, 1, 2)), atol=1e-3)
    assert torch.allclose(torch.tensor(task.io.std), x.std((0, 1, 2), correction=0), atol=1e-3)


def test_the_size_is_that_of_the_pictures_within_bounds(folder, tmp_path):
    assert Folder(path=str(folder)).io.size == (24, 24)
    assert [suited(n) for n in (3, 18, 30, 60, 4000)] == [16, 16, 32, 64, 64]
    big = draw(tmp_path / "big", each=3, size=(200, 300))
    assert Folder(path=str(big)).io.size == (64, 64)
    assert "read as 64x64 colour" in Folder(path=str(big)).summary()


def deep_png_of(pixels: np.ndarray, clear: tuple[int, ...]) -> bytes:
    """A PNG of 16 bits, grey or RGB, with a transparent colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = (
        (b"IHDR", head),
        (b"tRNS", np.array(clear, ">u2").tobytes()),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
def test_a_transparent_colour_of_sixteen_bits_is_white_too(shape, tmp_path):
    pixels = np.full(shape, 40 * 257, dtype=np.uint16)
    pixels[:8] = 3000
    (tmp_path / "deep.png").write_bytes(deep_png_of(pixels, (3000,) * (1 if len(shape) == 2 else 3)))
    found = read_picture(tmp_path / "deep.png", (16, 16), 1)[..., 0]
    assert (found[:8] == 255).all() and (found[8:] == 40).all()
    assert np.array_equal(decoding.decode_whole(tmp_path / "deep.png")[..., 0], found)


def test_a_picture_that_is_read_whole_is_read_as_one_that_is_brought_to_size(tmp_path):
    """16 bits, transparency and colours alike; numbers of another scale are refused."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 65536, (16, 16), dtype=np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(rng.integers(0, 256, (16, 16, 4), dtype=np.uint8)).save(tmp_path / "b.png")
    colour("red", rng, (16, 16)).quantize(16).save(tmp_path / "c.gif")
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(decoding.decode_whole(path), read_picture(path, (16, 16), 3)), path.name
    Image.fromarray(rng.random((16, 16), dtype=np.float32)).save(tmp_path / "d.tif")
    with pytest.raises(ConfigError, match=r"d\.tif: .*mode F"):
        decoding.decode_whole(tmp_path / "d.tif")


def test_grey_sixteen_bits_transparent_turned_and_palette_pictures_are_read(tmp_path):
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (16, 16), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_picture(tmp_path / "deep.png", (16, 16), 1)[..., 0], deep // 257)
    clear = np.zeros((16, 16, 4), dtype=np.uint8)
    clear[:8, :, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    on_white = read_picture(tmp_path / "clear.png", (16, 16), 3)
    assert (on_white[:8] == 0).all() and (on_white[8:] == 255).all()
    turned = Image.fromarray(clear[..., :3] + np.arange(16, dtype=np.uint8)[:, None, None])
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = read_picture(tmp_path / "turned.png", (16, 16), 3)
    assert np.array_equal(upright, np.asarray(turned.rotate(-90)))
    colour("red", rng, (16, 16)).quantize(16).save(tmp_path / "palette.gif")
    assert abs(read_picture(tmp_path / "palette.gif", (16, 16), 3).mean((0, 1)) - COLOURS["red"]).max() < 25


def test_grey_pictures_have_one_channel(tmp_path):
    for name in ("dark", "light"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("L", (16, 16), 40 + i + 150 * (name == "light")).save(tmp_path / name / f"{i}.png")
    task = Folder(path=str(tmp_path))
    assert task.io.in_features == 1 and "grey" in task.summary()
    assert Folder(path=str(tmp_path), channels=3).io.in_features == 3


def test_a_folder_s_own_splits_count_and_the_rest_is_cut_from_train(folder, tmp_path):
    draw(tmp_path / "own" / "train", each=8)
    draw(tmp_path / "own" / "Test", each=4, seed=1)
    record = Folder(path=str(tmp_path / "own")).record()
    assert record["counts"] == {"train": [6, 6, 6], "validation": [2, 2, 2], "test": [4, 4, 4]}
    assert all(file.startswith("Test/") for file in record["split"]["test"])
    assert all(file.startswith("train/") for file in record["split"]["validation"])
    draw(tmp_path / "own" / "val", each=1, seed=2)
    assert Folder(path=str(tmp_path / "own")).record()["counts"]["train"] == [8, 8, 8]


def test_uneven_classes_are_told_and_weighted_like_torch_does(tmp_path):
    draw(tmp_path / "few", each=12)
    for i in range(4, 12):
        next((tmp_path / "few" / "green").glob(f"{i:02}.*")).unlink()
    plain, weighted = (Folder(path=str(tmp_path / "few"), weighted=flag) for flag in (False, True))
    assert "Uneven: 'green' has 4, 'blue' 12; weighted: true makes up for it" in plain.summary()
    assert "training is weighted" in weighted.summary()
    outputs = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(30) % 3
    counts = torch.tensor(weighted.counts["train"]).double()
    of_each = torch.stack([weighted.training_loss(outputs[targets == c], targets[targets == c]) for c in range(3)])
    plain_each = torch.stack([plain.training_loss(outputs[targets == c], targets[targets == c]) for c in range(3)])
    weights = 1 / counts
    smoothed = F.cross_entropy(
        outputs.double(), targets, weight=weights, label_smoothing=plain.label_smoothing, reduction="mean"
    )
    assert torch.isclose(weighted.training_loss(outputs, targets).double(), smoothed)
    assert torch.isclose(plain.training_loss(outputs, targets), plain_each.mean())
    assert not torch.isclose(of_each, plain_each).all()


# -- what is refused -----------------------------------------------------------------------------------------------


def refused(path: Path, **options: object) -> str:
    with pytest.raises(ConfigError) as caught:
        by_name({"name": "folder", "path": str(path), **options})
    return str(caught.value)


def test_what_is_no_folder_of_classes_is_refused(tmp_path):
    assert "nowhere: is no folder" in refused(tmp_path / "nowhere")
    (tmp_path / "labels.csv").write_text("a.png,cat\n")
    (tmp_path / "a.png").write_bytes(b"")
    assert "Labels are not read from labels.csv" in refused(tmp_path)
    (tmp_path / "cats").mkdir()
    assert f"{tmp_path}/a.png: lies in no class" in refused(tmp_path)
    (tmp_path / "a.png").unlink()
    assert f"{tmp_path}/cats: has no pictures" in refused(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "cats" / "1.png")
    assert "has one class, 'cats'" in refused(tmp_path)


def test_a_class_needs_a_picture_in_each_split(tmp_path):
    draw(tmp_path / "d", each=4)
    for name in ("00.jpg", "01.png"):
        (tmp_path / "d" / "red" / name).unlink()
    assert "class 'red' has 2 of 3 pictures that it needs at least" in refused(tmp_path / "d")
    draw(tmp_path / "own" / "train", each=4)
    draw(tmp_path / "own" / "test", each=1)
    (tmp_path / "own" / "test" / "red" / "00.jpg").rename(tmp_path / "own" / "test" / "blue" / "01.jpg")
    os.rmdir(tmp_path / "own" / "test" / "red")
    assert "class 'red' has no picture in test" in refused(tmp_path / "own")
    draw(tmp_path / "own" / "extra", each=1)
    assert "extra: beside" in refused(tmp_path / "own")


def test_the_file_that_is_wrong_is_named(folder, tmp_path):
    """Truncated, empty, another kind of file under a picture's name, a mode that is no picture's, no file at all."""
    whole = (folder / "red" / "01.png").read_bytes()
    jpeg = (folder / "red" / "00.jpg").read_bytes()
    wrong = {
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.png": b"",
        "page.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "text.jpg": b"hello",
    }
    for name, content in wrong.items():
        data = draw(tmp_path / name, each=3)
        (data / "red" / name).write_bytes(content)
        said = refused(data)
        assert f"{data}/red/{name}: is no picture that can be decoded" in said, said
    data = draw(tmp_path / "float", each=3)
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(data / "red" / "float.tiff")
    assert "float.tiff" in refused(data) and "mode F" in refused(data)
    Image.fromarray(np.full((8, 8), 1000, dtype=np.int32)).save(data / "red" / "deep.pgm")
    (data / "red" / "float.tiff").unlink()
    assert "deep.pgm" in refused(data) and "8 bits can be read, 16 of PNG or TIFF: save it so" in refused(data)
    data = draw(tmp_path / "labels", each=3)
    (data / "red" / "labels.json").write_text("{}")
    assert f"{data}/red/labels.json: is no picture" in refused(data)
    data = draw(tmp_path / "pipe", each=3)
    os.mkfifo(data / "red" / "pipe.png")
    assert f"{data}/red/pipe.png: is no file" in refused(data)
    (data / "red" / "pipe.png").unlink()
    (data / "red" / ".hidden").write_text("")
    (data / "red" / "Thumbs.db").write_text("")
    assert len(Folder(path=str(data)).train) == 3


def test_a_link_that_leads_out_is_not_followed(folder, tmp_path):
    data = draw(tmp_path / "d", each=3)
    (data / "red" / "other.png").symlink_to(data / "red" / "01.png")
    assert len(list_pictures(data).files) == 10
    (data / "red" / "out.png").symlink_to(folder / "red" / "01.png")
    assert f"{data}/red/out.png: is a link that leads out" in refused(data)
    (data / "red" / "out.png").unlink()
    (data / "round").symlink_to(data / "red")
    assert f"{data}/round: is a link" in refused(data)
    (data / "round").unlink()
    (data / "red" / "gone.png").symlink_to(data / "red" / "none.png")
    assert "gone.png: is a link" in refused(data)


def png_of(width: int, height: int) -> bytes:
    """A PNG that says these extents and holds next to nothing."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


@pytest.mark.parametrize("extent", [9000, 12_000, 60_000])
def test_a_picture_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path, extent, monkeypatch):
    data = draw(tmp_path / "d", each=3)
    (data / "red" / "bomb.png").write_bytes(png_of(extent, extent))
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("it was decoded"))
    assert f"{data}/red/bomb.png: unpacks to" in refused(data)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"size": 2}, "size is 2"),
        ({"size": [16]}, "size is [16]"),
        ({"channels": 4}, "channels is 4"),
        ({"validation": 0}, "validation is 0"),
        ({"validation": 0.5, "test": 0.5}, "some must be left to train"),
        ({"flip": 1}, "flip is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"memory_gib": -1}, "memory_gib is -1"),
        ({"shuffle": True}, "no option 'shuffle'"),
    ],
)
def test_options_that_cannot_be_are_refused(folder, options, says):
    assert says in refused(folder, **options)
