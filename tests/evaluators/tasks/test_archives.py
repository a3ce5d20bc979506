"""CIFAR, IDX and .npz: written here as they are published, read back, and what is damaged or means harm refused."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.tasks.choosing import task_of
from mixnas.evaluators.tasks.cifar import Cifar
from mixnas.evaluators.tasks.idx import Idx, read_idx
from mixnas.evaluators.tasks.npz import Npz
from mixnas.evaluators.tasks.pickles import unpickled
from mixnas.evaluators.tasks.pictures import PictureTask
from mixnas.evaluators.tasks.task import SPLITS, Task
from mixnas.search_space.errors import ConfigError
from tests.contracts.task import TaskContract

WORDS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pictures(n: int, seed: int, shape: tuple[int, ...] = (32, 32, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def planes(x: np.ndarray) -> np.ndarray:
    """(n, 3072): each picture plane by plane, as CIFAR has it."""
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def labels_of(n: int, classes: int = 10) -> np.ndarray:
    return np.arange(n) % classes


def all_of(task: PictureTask) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {name: getattr(task, name).gather(torch.arange(len(getattr(task, name)))) for name in SPLITS}


# -- CIFAR ---------------------------------------------------------------------------------------------------------

Files = dict[str, bytes]


def in_python_2(mapping: dict[str, Any]) -> bytes:
    """A pickle as Python 2 wrote it (protocol 2), with NumPy's names of then: strings are bytes, U and T."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def one(value: Any) -> bytes:
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, list):
            return b"](" + b"".join(map(one, value)) + b"e"
        if isinstance(value, np.ndarray):
            made = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b")
            dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
            dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
            extents = b"".join(map(number, value.shape)) + b"\x86"
            return made + b"\x87R(" + number(1) + extents + dtype + b"\x89" + text(value.tobytes()) + b"tb"
        return number(value)

    return b"\x80\x02}(" + b"".join(one(key) + one(value) for key, value in mapping.items()) + b"u."


def in_python_3(mapping: dict[str, Any]) -> bytes:
    """A pickle as Python 3 writes it, with today's NumPy."""
    return pickle.dumps(mapping, protocol=2)


def python_version(dump: Callable[[dict[str, Any]], bytes], hundred: bool = False) -> Files:
    if hundred:
        x, y = pictures(200, 1), labels_of(200, 100)
        found = {"train": dump({"data": planes(x), "fine_labels": y.tolist(), "coarse_labels": (y // 5).tolist()})}
        found["test"] = dump(
            {"data": planes(x[:100]), "fine_labels": y[:100].tolist(), "coarse_labels": (y[:100] // 5).tolist()}
        )
        names = {kind: [f"{kind} {i}" for i in range(n)] for kind, n in (("fine", 100), ("coarse", 20))}
        found["meta"] = dump({f"{kind}_label_names": of for kind, of in names.items()})
        return found
    found = {}
    for i in range(5):
        found[f"data_batch_{i + 1}"] = dump({"data": planes(pictures(20, i)), "labels": labels_of(20).tolist()})
    found["test_batch"] = dump({"data": planes(pictures(20, 9)), "labels": labels_of(20).tolist()})
    found["batches.meta"] = dump({"num_cases_per_batch": 20, "label_names": WORDS, "num_vis": 3072})
    return found


def binary_version() -> Files:
    def records(seed: int) -> bytes:
        return np.hstack([labels_of(20)[:, None].astype(np.uint8), planes(pictures(20, seed))]).tobytes()

    found = {f"data_batch_{i + 1}.bin": records(i) for i in range(5)}
    return {**found, "test_batch.bin": records(9), "batches.meta.txt": "\n".join([*WORDS, ""]).encode()}


def lay(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def pack(path: Path, files: Files) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


VERSIONS = {
    "binary": binary_version,
    "python 2": lambda: python_version(in_python_2),
    "python 3": lambda: python_version(in_python_3),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("version", VERSIONS)
def test_cifar_10_is_the_same_in_every_version(version, packed, tmp_path):
    files = VERSIONS[version]()
    path = pack(tmp_path / "cifar-10.tar.gz", files) if packed else lay(tmp_path / "cifar", files)
    assert task_of(path) == {"name": "cifar", "path": str(path)}
    task = by_name({"name": "cifar", "path": str(path)})
    found = all_of(task)
    assert list(task.labels) == WORDS
    assert [len(y) for _, y in found.values()] == [90, 10, 20]
    assert torch.equal(found["test"][0], torch.from_numpy(pictures(20, 9)).float())
    assert torch.equal(found["test"][1], torch.from_numpy(labels_of(20)))
    known = np.concatenate([pictures(20, i) for i in range(5)])
    split = task.record()["split"]
    assert torch.equal(found["validation"][0], torch.from_numpy(known[split["validation"]]).float())
    assert sorted(split["train"] + split["validation"]) == list(range(100)) and split["test"] == "its own"


def test_cifar_100_has_fine_and_coarse_labels(tmp_path):
    path = lay(tmp_path / "cifar-100-python", python_version(in_python_2, hundred=True))
    assert task_of(path)["name"] == "cifar"
    fine, coarse = (Cifar(path=str(path), labels=labels) for labels in ("fine", "coarse"))
    assert (fine.io.num_outputs, coarse.io.num_outputs) == (100, 20)
    assert fine.labels[7] == "fine 7" and coarse.labels[7] == "coarse 7"
    assert torch.equal(coarse.test.targets, fine.test.targets // 5)


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["data", "labels", "alone"])
def test_nothing_in_a_pickle_is_run(where, tmp_path):
    files = python_version(in_python_3)
    harm = Harm(tmp_path / "harmed")
    plain: Any = {"data": planes(pictures(20, 0)), "labels": labels_of(20).tolist()}
    files["data_batch_1"] = pickle.dumps(harm if where == "alone" else {**plain, where: harm})
    path = lay(tmp_path / "cifar", files)
    with pytest.raises(ConfigError, match=r"data_batch_1: is no pickle .*mkdir, which is not run"):
        by_name({"name": "cifar", "path": str(path)})
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cbuiltins\neval\nU\x031+1\x85R.",
        b"cnumpy\nload\nU\x01x\x85R.",
        b"c_codecs\nencode\n}U\x08__new__\nI1\ns\x86b.",  # to change what stands for it
        b"cnumpy\ndtype\n(N}U\x01aI1\nstb.",
        b"Pid\n.",
        b"",
        b"(lp0\n.",
    ],
)
def test_a_pickle_that_names_or_changes_anything_else_is_refused(content):
    with pytest.raises(ConfigError, match=r"f: is no pickle of CIFAR's"):
        unpickled("f", content)


def test_what_stands_for_numpy_is_left_as_it_is():
    for content in (b"c_codecs\nencode\n(N}U\x01aI1\nstb.", b"cnumpy\nndarray\n(N}U\x01aI1\nstb."):
        pickletools.dis(content, io.StringIO())  # it is well formed
        with pytest.raises(ConfigError):
            unpickled("f", content)
    good = unpickled("f", in_python_3({"data": planes(pictures(2, 0))}))
    assert np.array_equal(good["data"], planes(pictures(2, 0)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"}\x8b" + struct.pack("<i", 1 << 20) + b"\1" * (1 << 20) + b"Ns.", "a step LONG4"),
        (b"}\x8a\x09" + b"\1" * 9 + b"Ns.", "more than 64 bits"),
        (b"}L" + b"9" * 1000 + b"L\nNs.", "more than 64 bits"),
        (b"}I" + b"9" * 20 + b"\nNs.", "more than 64 bits"),
        (b"}N" + b"\x85" * 1_000_000 + b"Ns.", "nests more than 3 deep"),
        (b"}N" + b"q\0h\0\x86" * 60 + b"Ns.", "nests more than 3 deep"),
        (b"}N" + b"q\0h\0\x86NN\x86b" * 60 + b"Ns.", "nests more than 3 deep"),  # filled with nothing
        (b"}(" + b"N" * 17 + b"tNs.", "one of more than 16"),
        (b"}" + b"(N\x85Nu" * 1001 + b".", "more than 1,000 tuples"),
        (b"}r\xff\xff\xff\x7f.", "keeps an object as number 2,147,483,647 after 1 steps"),
        (b"}N\x85Ns.", "a key or a name is of type tuple"),
        (b"}K\1Ns.", "a key or a name is of type int"),
        (b"c_codecs\nencode\n]\x85R.", "a key or a name is of type list"),
        (b"N" * 1_000_001 + b".", "more than 1,000,000 steps"),
        (b"}" + b"\x8f(N\x90.", "a step EMPTY_SET"),
        (b"0.", "is no pickle of CIFAR's"),
        (b"e.", "is no pickle of CIFAR's"),
    ],
    ids=range(17),
)
def test_a_pickle_that_makes_more_of_itself_than_it_may_is_refused_before_it_is_read(content, says):
    with pytest.raises(ConfigError, match=says):
        unpickled("f", content)


def header_of(kind: bytes, size: int, name: str = "././@LongLink") -> bytes:
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, size
    return entry.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "kind",
    [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE],
)
def test_a_header_of_an_archive_that_says_gigabytes_is_not_read(kind, tmp_path):
    path = tmp_path / "cifar.tar"
    path.write_bytes(header_of(kind, 1 << 32) + bytes(2048))
    with pytest.raises(ConfigError, match="a name or header says 4,294,967,296 bytes; at most 65,536 are read"):
        Cifar(path=str(path))


def test_an_archive_whose_headers_have_no_end_is_refused(tmp_path):
    path = tmp_path / "cifar.tar"
    for content, says in (
        (header_of(tarfile.GNUTYPE_SPARSE, 0, "train"), "it has a file with holes"),
        ((header_of(tarfile.GNUTYPE_LONGNAME, 2) + b"a".ljust(512, b"\0")) * 3000, "is no archive of CIFAR"),
        (header_of(tarfile.DIRTYPE, 0, "again") * 200, "more than 100 files and folders"),
    ):
        path.write_bytes(content + bytes(2048))
        with pytest.raises(ConfigError, match=says):
            Cifar(path=str(path))
    entry = tarfile.TarInfo("train")
    entry.size = 1 << 20
    entry.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    path.write_bytes(entry.tobuf(tarfile.PAX_FORMAT) + b"1" * (1 << 20))
    with pytest.raises(ConfigError, match="it has a file with holes"):
        Cifar(path=str(path))


def test_a_cifar_that_is_damaged_is_named(tmp_path):
    for version, name in (("binary", "data_batch_3.bin"), ("python 2", "data_batch_3"), ("binary", "test_batch.bin")):
        files = VERSIONS[version]()
        cut = lay(tmp_path / f"cut-{name}", {**files, name: files[name][:-100]})
        with pytest.raises(ConfigError, match=name):
            Cifar(path=str(cut))
        del files[name]
        with pytest.raises(ConfigError, match=rf"{name}: is missing"):
            Cifar(path=str(lay(tmp_path / f"gone-{name}", files)))
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(pack(tmp_path / "whole.tar.gz", binary_version()).read_bytes()[:20_000])
    with pytest.raises(ConfigError, match=r"broken.tar.gz: "):
        Cifar(path=str(broken))
    wrong = binary_version()
    wrong["data_batch_1.bin"] = bytes([200]) + wrong["data_batch_1.bin"][1:]
    with pytest.raises(ConfigError, match="labels range from 0 to 200; there are 10 classes"):
        Cifar(path=str(lay(tmp_path / "range", wrong)))
    with pytest.raises(ConfigError, match="has none of CIFAR's files"):
        Cifar(path=str(lay(tmp_path / "empty", {})))


# -- IDX -----------------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(folder: Path, zipped: bool, prefix: str = "", dash: str = "-") -> Path:
    def named(name: str) -> str:
        return prefix + name.replace("-idx", f"{dash}idx") + (".gz" if zipped else "")

    files = {}
    for split, n in (("train", 60), ("t10k", 20)):
        files[f"{split}-images-idx3-ubyte"] = idx(pictures(n, n, (28, 28)))
        files[f"{split}-labels-idx1-ubyte"] = idx(labels_of(n).astype(np.uint8))
    return lay(folder, {named(k): gzip.compress(v) if zipped else v for k, v in files.items()})


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_mnist_style_files_are_read(zipped, tmp_path):
    path = mnist(tmp_path / "mnist", zipped)
    assert task_of(path) == {"name": "idx", "path": str(path)}
    task = by_name(task_of(path))
    found = all_of(task)
    assert [len(y) for _, y in found.values()] == [50, 10, 20] and task.io.size == (28, 28) and task.io.in_features == 1
    assert torch.equal(found["test"][0][..., 0], torch.from_numpy(pictures(20, 20, (28, 28))).float())
    assert list(task.labels) == [str(i) for i in range(10)]


def test_one_of_several_sets_is_chosen_by_a_file(tmp_path):
    path = mnist(tmp_path / "emnist", True, "emnist-letters-")
    mnist(path, True, "emnist-digits-")
    with pytest.raises(ConfigError, match="holds 2 sets"):
        Idx(path=str(path))
    one = path / "emnist-letters-train-images-idx3-ubyte.gz"
    assert task_of(one)["name"] == "idx" and len(Idx(path=str(one)).test) == 20
    assert len(Idx(path=str(mnist(tmp_path / "dots", False, dash="."))).test) == 20


def test_two_files_of_the_same_are_refused(tmp_path):
    path = mnist(mnist(tmp_path / "mnist", False), True)
    plain = "train-images-idx3-ubyte"
    for place in (path, path / plain):
        with pytest.raises(ConfigError, match=rf"{plain} and {plain}.gz are both the images of train. Keep one"):
            Idx(path=str(place))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (idx(pictures(3, 0, (4, 4)))[:-1], "has 47 of the 48 bytes"),
        (idx(pictures(3, 0, (4, 4))) + b"x", "has more of the 48 bytes"),
        (b"\0\0\x0d\1\0\0\0\1\0\0\0\0", "is no IDX file of bytes"),
        (b"", "begins with nothing"),
        (b"\0\0\x08\3" + struct.pack(">3I", 1 << 30, 1 << 30, 4), "at most"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_an_idx_file_that_is_wrong_is_named(content, says, zipped, tmp_path):
    path = tmp_path / ("train-images-idx3-ubyte" + ".gz" * zipped)
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ConfigError, match=says) as caught:
        read_idx(path)
    assert str(path) in str(caught.value)
    if zipped:
        path.write_bytes(gzip.compress(content)[:-9])
        with pytest.raises(ConfigError, match=r"train-images-idx3-ubyte.gz: "):
            read_idx(path)


# -- npz -----------------------------------------------------------------------------------------------------------


class TestNpz(TaskContract):
    @pytest.fixture(autouse=True)
    def _file(self, tmp_path: Path) -> None:
        self.path = tmp_path / "data.npz"
        np.savez(self.path, x=pictures(60, 0, (12, 8, 3)), y=labels_of(60, 4))

    def make(self) -> Task:
        return Npz(path=str(self.path))


@pytest.mark.parametrize(
    "names",
    [("x_train", "y_train", "x_test", "y_test"), ("train_images", "train_labels", "test_images", "test_labels")],
)
def test_the_splits_of_an_npz_count(names, tmp_path):
    arrays = (pictures(30, 0, (8, 8)), labels_of(30, 3)[:, None], pictures(9, 1, (8, 8)), labels_of(9, 3)[:, None])
    np.savez_compressed(
        tmp_path / "d.npz", **dict(zip(names, arrays, strict=True)), class_names=np.array(["a", "b", "c"])
    )
    task = by_name(task_of(tmp_path / "d.npz"))
    assert [len(getattr(task, name)) for name in SPLITS] == [24, 6, 9] and task.labels == ("a", "b", "c")
    assert torch.equal(all_of(task)["test"][0][..., 0], torch.from_numpy(arrays[2]).float())
    assert "pictures" in task.record() and task.record()["pictures"]["size"] == [8, 8]


def test_numbers_that_are_no_bytes_and_labels_that_are_words_are_read(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 8, 8, 2))
    np.savez(tmp_path / "d.npz", images=x, labels=np.array(["cat", "dog"])[labels_of(30, 2)])
    task = by_name(task_of(tmp_path / "d.npz"))
    assert task.labels == ("cat", "dog") and abs(sum(task.io.mean)) < 0.5 and task.io.std != (1.0, 1.0)
    assert task.record()["pictures"] is None  # a picture's file is no such input


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


X, Y = pictures(30, 0, (8, 8)), labels_of(30, 3)


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": X}, "has no targets of train"),
        ({"a": X, "b": Y}, "its arrays are a, b"),
        ({"x": X, "images": X, "y": Y}, "both 'x' and 'images' are inputs of train"),
        ({"x": X, "y": Y[:20]}, "has 30 pictures and 20 labels"),
        ({"x": X, "y": Y * 0}, "all labels are '0'; there is nothing to tell apart"),
        ({"x": X, "y": Y * 0.5}, "labels of train have shape"),
        ({"x": X[:7], "y": np.array([0, 0, 0, 1, 1, 1, 2])}, "class '2' has 1 of 3"),
        ({"x": X.astype(object), "y": Y}, "holds Python objects"),
        ({"x": np.where(X < 250, X, np.nan)[..., None], "y": Y}, "hold NaN or infinity"),
        ({"x": np.full((30, 8, 8, 1), 1e200), "y": Y}, r"pictures hold 1e\+200, too large for a float32"),
        ({"x": X[:, None], "y": Y}, r"shape \(30, 1, 8, 8\), with channels first.*x\.transpose\(0, 2, 3, 1\)"),
        ({"x": pictures(30, 0, (3, 8, 6)), "y": Y}, r"shape \(30, 3, 8, 6\), with channels first"),
        ({"x": X[:, 0, 0], "y": Y}, r"pictures have shape \(30,\)"),
        ({"x": X, "y": Y, "class_names": np.array(["a", "b"])}, "labels range from 0 to 2; there are 2 classes"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :4], "y_test": Y}, "different shapes or types"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays, says, tmp_path):
    path = saved(tmp_path / "d.npz", **arrays)
    with pytest.raises(ConfigError, match=says) as caught:
        by_name({"name": "npz", "path": str(path)})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("memory_gib", [[1], "4", float("nan"), -1, True, None])
@pytest.mark.parametrize("name", ["npz", "series"])
def test_memory_that_is_no_number_is_refused(name, memory_gib, tmp_path):
    path = saved(tmp_path / "d.npz", x=X, y=Y)
    with pytest.raises(ConfigError, match=rf"task {name}: memory_gib is .*, it must be a number from 0"):
        by_name({"name": name, "path": str(path), "memory_gib": memory_gib})


@pytest.mark.parametrize("descr", ["<U0", "|S0", "|V0"])
def test_an_array_whose_values_have_no_bytes_is_refused(descr, tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("y.npy", header.getvalue())
    with pytest.raises(ConfigError, match=r"d\.npz: y is of type .*whose values have no bytes"):
        Npz(path=str(tmp_path / "d.npz"))


def test_an_npz_that_is_damaged_unpacks_to_too_much_or_lies_is_refused(tmp_path):
    path = saved(tmp_path / "d.npz", x=X, y=Y)
    whole = path.read_bytes()
    for content in (
        whole[:-200],
        whole[:100],
        b"PK\3\4",
        b"",
        b"\x93NUMPY",
        whole.replace(X.tobytes()[:8], b"12345678"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"d\.npz: "):
            Npz(path=str(path))
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match="memory_gib allows 1e-06"):
        Npz(path=str(path), memory_gib=1e-6)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 8, 8)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"few")
    with pytest.raises(ConfigError, match="x says"):
        Npz(path=str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is no file"):
        Npz(path=str(path))
