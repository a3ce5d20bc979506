"""Which task reads what lies under a path: told by names and first bytes, without torch and without reading it all."""

from __future__ import annotations

import math
import re
from itertools import islice
from pathlib import Path

from mixnas.evaluators.tasks.decoding import SUFFIXES
from mixnas.search_space.errors import ConfigError, visible

_IDX = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?$")
_CIFAR_100 = {"train", "test", "meta"}
_TEXTS = (".txt", ".md", ".rst", ".py", ".tex", ".html")
_LOOKED_AT = 1000  # entries of a folder, whether there are texts in it

READS = (
    "a folder with a folder of pictures for each class (or train/, val/ and test/ of such)",
    "an .npz file of pictures or series",
    "a .csv or .parquet file of series",
    "CIFAR's archive or its folder",
    "the folder of MNIST-style IDX files",
    "a folder that Hugging Face's save_to_disk wrote",
    "a folder with pictures in images/ and their masks in masks/",
    "a text file (.txt, .md, .py) or a folder of them",
)
"""What may be given as data, in words."""


def task_of(path: str | Path) -> dict[str, str]:
    """The task for somebody's data, as a configuration has it: its name and the path.

    Raises:
        ConfigError: Nothing is there, or nothing that a task reads.
    """
    place = Path(path)
    try:
        there = place.exists()
    except (OSError, ValueError):  # a NUL, a name that is too long
        there = False
    if not there:
        raise ConfigError(f"{visible(str(path))[:200]}: no such file or folder. Give {'; '.join(READS)}.")
    name = _of_folder(place) if place.is_dir() else _of_file(place)
    if name is None:
        raise ConfigError(f"{visible(str(path))}: is no data that can be read. Give {'; '.join(READS)}.")
    return {"name": name, "path": str(path)}


def _of_folder(place: Path) -> str:
    names = {entry.name for entry in place.iterdir() if entry.is_file()}
    if any(map(_IDX.search, names)):
        return "idx"
    if {"data_batch_1.bin", "data_batch_1"} & names or {"train.bin", "test.bin"} <= names or names >= _CIFAR_100:
        return "cifar"
    if {"state.json", "dataset_dict.json"} & names:
        return "huggingface"
    folders = {entry.name.lower() for entry in place.iterdir() if entry.is_dir()}
    if {"images", "masks"} <= folders or _has_pairs(place):
        return "segmentation"
    kinds = {path.suffix.lower() for path in islice(place.rglob("*"), _LOOKED_AT)}
    if kinds & set(_TEXTS) and not kinds & set(SUFFIXES):
        return "bytes"
    return "folder"


def _has_pairs(place: Path) -> bool:
    """Whether the folder of the training split has pictures and masks."""
    train = place / "train"
    return (train / "images").is_dir() and (train / "masks").is_dir()


def _of_file(place: Path) -> str | None:
    name = place.name.lower()
    if _IDX.search(name):
        return "idx"
    if name.endswith((".csv", ".tsv", ".parquet")):
        return "series"
    if name.endswith(".npz"):
        from mixnas.evaluators.tasks.npz import NpzFile, holds_pictures

        return "npz" if holds_pictures(NpzFile(place, math.inf).inputs()) else "series"
    if name.endswith((".tar.gz", ".tgz", ".tar")):
        return "cifar"
    if name.endswith(_TEXTS):
        return "bytes"
    return None
