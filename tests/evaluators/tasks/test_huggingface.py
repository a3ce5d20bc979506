"""Datasets as Hugging Face's `save_to_disk` writes them: read as Arrow, and nothing else."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.tasks.choosing import task_of
from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.errors import ConfigError
from tests.contracts.task import TaskContract
from tests.evaluators.tasks.drawn import COLOURS, colour

NAMES = list(COLOURS)


def encoded(name: str, rng: np.random.Generator, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    colour(name, rng, (16, 16)).save(file, kind)
    return file.getvalue()


def save(folder: Path, rows: list[tuple[bytes | None, int | None]], files: int = 2, **state: object) -> Path:
    """What `Dataset.save_to_disk` writes (datasets 4: arrow_dataset.py)."""
    folder.mkdir(parents=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", kind), ("label", pyarrow.int64())])
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        part = rows[i::files]
        with pyarrow.OSFile(str(folder / name), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as writer:
            images = pyarrow.array([{"bytes": one, "path": "/etc/passwd"} for one, _ in part], kind)
            writer.write(pyarrow.record_batch([images, pyarrow.array([of for _, of in part])], schema=schema))
    features = {"image": {"_type": "Image"}, "label": {"names": NAMES, "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    told = {"_data_files": [{"filename": name} for name in names], "_split": "train", **state}
    (folder / "state.json").write_text(json.dumps(told))
    return folder


def rows(each: int = 10, seed: int = 0) -> list[tuple[bytes | None, int | None]]:
    rng = np.random.default_rng(seed)
    return [(encoded(name, rng, ("PNG", "JPEG")[i % 2]), NAMES.index(name)) for i in range(each) for name in NAMES]


class TestHuggingFace(TaskContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.path = save(tmp_path / "d", rows())

    def make(self) -> Task:
        return by_name(task_of(self.path))


def test_pixels_and_classes_are_those_that_were_saved(tmp_path):
    given = rows()
    task = by_name("huggingface", path=str(save(tmp_path / "d", given, files=1)), size=16)
    assert task.labels == tuple(NAMES) and task.io.size == (16, 16)
    places = task.record()["split"]["train"]
    inputs, targets = task.train.gather(torch.arange(len(places)))
    for place, pixels, target in zip(places, inputs, targets, strict=True):
        image, label = given[place]
        assert int(target) == label
        assert np.array_equal(
            pixels.numpy(), np.asarray(Image.open(io.BytesIO(image)).convert("RGB"), dtype=np.float32)
        )


def test_splits_of_a_dictionary_are_kept(tmp_path):
    for name, seed in (("train", 0), ("test", 1)):
        save(tmp_path / "d" / name, rows(8, seed))
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert task_of(tmp_path / "d")["name"] == "huggingface"
    task = by_name("huggingface", path=str(tmp_path / "d"), size=16)
    assert len(task.test) == 24 and len(task.train) + len(task.validation) == 24
    (tmp_path / "d" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "unsupervised"]}))
    with pytest.raises(ConfigError, match="its split 'unsupervised' is none of"):
        by_name("huggingface", path=str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: (f / "state.json").unlink(), "is no folder that save_to_disk wrote"),
        (lambda f: (f / "state.json").write_text("{"), r"state\.json"),
        (lambda f: (f / "dataset_info.json").write_text("{}"), r"dataset_info\.json says nothing of its columns"),
        (
            lambda f: (f / "state.json").write_text('{"_data_files": [{"filename": "../data.arrow"}]}'),
            "names no Arrow files",
        ),
        (
            lambda f: (f / "data-00000-of-00002.arrow").write_bytes(b"\x80\x04cos\nsystem\n"),
            r"00000-of-00002\.arrow: cannot",
        ),
        (lambda f: (f / "data-00001-of-00002.arrow").unlink(), r"00001-of-00002\.arrow: cannot be read"),
    ],
)
def test_a_damaged_one_is_refused_and_named(change, said, tmp_path):
    folder = save(tmp_path / "d", rows(3))
    change(folder)
    with pytest.raises(ConfigError, match=said):
        by_name("huggingface", path=str(folder))


def test_rows_that_cannot_be_used_are_named(tmp_path):
    good = rows(4)
    for number, (row, said) in enumerate(
        [
            ((None, 0), "row 5 has no picture's bytes in column image; a path beside them is not followed"),
            ((good[0][0], None), "row 5 has no class in column label"),
            ((good[0][0], -1), "row 5 has no class"),
            ((good[0][0][:60], 1), "row 5: is no picture that can be decoded"),
        ]
    ):
        folder = save(tmp_path / str(number), [*good[:5], row, *good[5:]], files=1)
        with pytest.raises(ConfigError, match=said):
            by_name("huggingface", path=str(folder))
    with pytest.raises(ConfigError, match="is a selection of rows"):
        by_name("huggingface", path=str(save(tmp_path / "s", good, _indices_data_files=[{"filename": "i.arrow"}])))
    with pytest.raises(ConfigError, match=r"has no column 'imag'\. Did you mean 'image'"):
        by_name("huggingface", path=str(tmp_path / "s"), image="imag")


@pytest.mark.parametrize(("at", "offset"), [(-1, 2**31 - 1), (5, 2**30), (3, -5000), (-1, 4000)])
def test_offsets_that_lead_out_of_a_column_are_refused(at, offset, tmp_path):
    given = rows(4)
    folder = save(tmp_path / "d", given, files=1)
    file = folder / "data-00000-of-00001.arrow"
    offsets = np.cumsum([0] + [len(image) for image, _ in given]).astype("<i4")
    content = file.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    wrong = offsets.copy()
    wrong[at] = offset
    file.write_bytes(content.replace(offsets.tobytes(), wrong.tobytes()))
    with pytest.raises(ConfigError, match=r"data-00000-of-00001\.arrow: cannot be read as a stream of Arrow"):
        by_name("huggingface", path=str(folder))


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_compressed_file_is_refused_by_what_it_would_unpack_to(codec, tmp_path):
    given = rows(4)
    folder = save(tmp_path / "d", given, files=1)

    def write(pictures: list[bytes]) -> None:
        table = pyarrow.table({"image": pictures, "label": pyarrow.array([of for _, of in given]).dictionary_encode()})
        options = pyarrow.ipc.IpcWriteOptions(compression=codec)
        file = str(folder / "data-00000-of-00001.arrow")
        with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)

    write([image for image, _ in given])
    assert by_name("huggingface", path=str(folder)).labels == tuple(NAMES)
    write([bytes(1 << 22)] * len(given))  # 48 MiB
    pyarrow.default_memory_pool().release_unused()
    before = pyarrow.total_allocated_bytes()
    with pytest.raises(ConfigError, match=r"arrow: unpacks to 0\.0469 GiB, .* memory_gib allows 0\.03"):
        by_name("huggingface", path=str(folder), memory_gib=0.03)
    assert pyarrow.total_allocated_bytes() - before < 1 << 22
