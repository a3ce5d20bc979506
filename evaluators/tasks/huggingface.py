"""Pictures by class from a Hugging Face dataset that was saved on disk: its Arrow files, and nothing else of it.

`dataset.save_to_disk(folder)` writes streams of Arrow and descriptions in JSON. Both are read as data: no script of a
dataset is looked for, and a path that stands beside a picture's bytes is not followed. The package `datasets` is not
needed; pyarrow is, which comes with Ray.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixnas.evaluators.tasks.arrays import ArrayPictures, check_file
from mixnas.evaluators.tasks.arrow import batches, check_unpacked
from mixnas.evaluators.tasks.decoding import MAX_PIXELS, read_picture
from mixnas.evaluators.tasks.folder import SPLIT_FOLDERS, checked_size, suited
from mixnas.evaluators.tasks.options import PictureOptions, check_memory, takes_picture_options
from mixnas.search_space.errors import ConfigError, IntegrityError, listed, nearest, shown, visible
from mixnas.search_space.files import parse_json, read_bytes

INFO, STATE, PARTS = "dataset_info.json", "state.json", "dataset_dict.json"
"""What `save_to_disk` writes beside the data: of one split, of its files, and of several splits."""

_IMAGES = ("image", "img", "picture", "x")
_LABELS = ("label", "labels", "fine_label", "class", "y")
_MOST_CHANNELS = 3
_LONGEST_NAME = 1000  # characters: an array of words has room for the longest in each place
_FILE = re.compile(r"[A-Za-z0-9_.=-]+\.arrow")


@takes_picture_options(flip=False)
class HuggingFace(ArrayPictures):
    """Pictures and classes of a dataset that `save_to_disk` wrote, a `DatasetDict` or one split of it.

    Args:
        path: The folder.
        image: The column of pictures; by default the one of type Image, or called image or img.
        label: The column of classes; by default the one of type ClassLabel, or called label.
        size: Extent of what networks read, one number or [height, width]; by default as of `folder`.
        channels: 1 or 3.
        memory_gib: What the pictures may take, and what compressed files of Arrow may unpack to.
        options: See `PictureOptions`; flip is off: whether a mirrored picture is one of the same class is not known.

    Raises:
        ConfigError: pyarrow is missing; or a file is missing or damaged, a row has no picture that can be decoded or no
            class. It names the file and the row.
    """

    name = "huggingface"

    def __init__(
        self,
        *,
        path: str,
        options: PictureOptions,
        image: str | None = None,
        label: str | None = None,
        size: int | tuple[int, int] | None = None,
        channels: int = 3,
        memory_gib: float = 4.0,
    ) -> None:
        where = visible(str(path))
        check_memory(f"task {self.name}", memory_gib)
        extents = checked_size(f"task {self.name}", size)
        if channels not in (1, _MOST_CHANNELS) or isinstance(channels, bool):
            raise ConfigError(f"task {self.name}: channels is {channels!r}. Allowed: 1, 3.")
        folders = _splits(Path(path))
        columns = {split: _columns(folder, image, label) for split, folder in folders.items()}
        files = {split: _files(folder) for split, folder in folders.items()}
        check_unpacked([file for of in files.values() for file in of], memory_gib)
        rows = {split: _rows(folder, files[split], *columns[split][:2]) for split, folder in folders.items()}
        if extents is None:
            extents = (suited(_median_extent(folders, rows)),) * 2
        needed = sum(len(of) for of, _ in rows.values()) * extents[0] * extents[1] * channels
        if needed > memory_gib * 2**30:
            raise ConfigError(
                f"{where}: pictures take {needed / 2**30:.1f} GiB at {extents[0]}x{extents[1]}, and memory_gib allows "
                f"{memory_gib:g}. Raise that, or lower size."
            )
        found = {}
        for split, (pictures, labels) in rows.items():
            pixels = np.empty((len(pictures), *extents, channels), dtype=np.uint8)
            for i, encoded in enumerate(pictures):
                pixels[i] = _decoded(f"{visible(str(folders[split]))}: row {i}", encoded, extents, channels)
            found[split] = (pixels, labels)
        self.hold(where, found, columns["train"][2], options=options)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / PARTS).is_file() or (folder / STATE).is_file()


def _json(file: Path) -> Any:
    check_file(file)
    try:
        return parse_json(read_bytes(file), visible(str(file)))
    except IntegrityError as error:
        raise ConfigError(f"{error} Save the dataset again.") from error


def _splits(root: Path) -> dict[str, Path]:
    """Folders by split; one without a name is "train"."""
    where = visible(str(root))
    if not root.is_dir() or not is_saved(root):
        raise ConfigError(
            f"{where}: is no folder that save_to_disk wrote: it has no {PARTS} and no {STATE}. Write one with "
            "datasets.load_dataset(...).save_to_disk(folder)."
        )
    if (root / STATE).is_file():
        return {"train": root}
    named = _json(root / PARTS)
    names = named.get("splits") if isinstance(named, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: {PARTS} names no splits. Save the dataset again.")
    found: dict[str, Path] = {}
    for name in names:
        split = SPLIT_FOLDERS.get(name.lower())
        if split is None or split in found:
            raise ConfigError(
                f"{where}: its split {shown(name)} is none of train, validation and test, or one of them twice. "
                "Leave it out of the dataset, or rename it."
            )
        if not (root / name / STATE).is_file() or (root / name).is_symlink():
            raise ConfigError(f"{where}: {visible(name)} has no {STATE}. Save the dataset again.")
        found[split] = root / name
    if "train" not in found:
        raise ConfigError(f"{where}: has no split train: {listed(names) or 'none at all'}.")
    return found


def _columns(folder: Path, image: str | None, label: str | None) -> tuple[str, str, list[str] | None]:
    """The columns of pictures and of classes, and names of the classes where it has some."""
    where = visible(str(folder))
    info = _json(folder / INFO) if (folder / INFO).is_file() else {}
    features = info.get("features") if isinstance(info, dict) else None
    if not isinstance(features, dict) or not features:
        raise ConfigError(f"{where}: {INFO} says nothing of its columns. Save the dataset again.")
    types = {name: of.get("_type") if isinstance(of, dict) else None for name, of in features.items()}
    chosen = []
    for what, asked, kind, known in (("image", image, "Image", _IMAGES), ("label", label, "ClassLabel", _LABELS)):
        if asked is not None and asked not in types:
            raise ConfigError(f"{where}: has no column {asked!r}.{nearest(asked, types)} Its columns: {listed(types)}.")
        of_type = [name for name, found in types.items() if found == kind]
        called = [name for name in known if name in types]
        candidates = [asked] if asked else of_type or called[:1]
        if len(candidates) != 1:
            problem = f"several might be it: {listed(candidates)}" if candidates else f"its columns: {listed(types)}"
            raise ConfigError(f"{where}: which column is the {what}? {problem}. Say task.{what}=NAME.")
        chosen.append(candidates[0])
    names = features[chosen[1]].get("names") if types[chosen[1]] == "ClassLabel" else None
    return chosen[0], chosen[1], [str(name) for name in names] if isinstance(names, list) else None


def _files(folder: Path) -> list[Path]:
    """The files of Arrow of a split."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ConfigError("task huggingface: reading Arrow needs pyarrow: pip install pyarrow.") from error
    state = _json(folder / STATE)
    files = state.get("_data_files") if isinstance(state, dict) else None
    listed_files = files if isinstance(files, list) else []
    names = [str(one.get("filename")) for one in listed_files if isinstance(one, dict)]
    if not names or len(names) < len(listed_files) or not all(map(_FILE.fullmatch, names)):
        raise ConfigError(f"{visible(str(folder))}: {STATE} names no Arrow files beside it. Save the dataset again.")
    if state.get("_indices_data_files"):
        raise ConfigError(
            f"{visible(str(folder))}: is a selection of rows of other files. Save dataset.flatten_indices() of it."
        )
    return [folder / name for name in names]


def _rows(folder: Path, files: Sequence[Path], image: str, label: str) -> tuple[list[bytes], NDArray[Any]]:
    """Encoded pictures, and the classes."""
    pictures: list[bytes] = []
    labels: list[Any] = []
    for file in files:
        where = visible(str(file))
        for batch in batches(file, (image, label)):
            _check_types(where, batch.schema, image, label)
            held = batch.column(image).to_pylist(), batch.column(label).to_pylist()
            for row, (one, answer) in enumerate(zip(*held, strict=True), len(pictures)):
                encoded = one.get("bytes") if isinstance(one, dict) else one
                if not isinstance(encoded, bytes):
                    raise ConfigError(
                        f"{where}: row {row} has no picture's bytes in column {visible(image)}; a path beside "
                        "them is not followed. Save the dataset with its pictures embedded."
                    )
                if answer is None or not isinstance(answer, int | str) or answer == -1:
                    raise ConfigError(f"{where}: row {row} has no class in column {visible(label)}. Leave it out.")
                if isinstance(answer, str) and len(answer) > _LONGEST_NAME:
                    raise ConfigError(
                        f"{where}: row {row} has a class of {len(answer):,} characters in column {visible(label)}; at "
                        f"most {_LONGEST_NAME:,} are read. Shorten it."
                    )
                pictures.append(encoded)
                labels.append(answer)
    if not pictures:
        raise ConfigError(f"{visible(str(folder))}: has no rows.")
    return pictures, np.array(labels)


def _check_types(where: str, schema: Any, image: str, label: str) -> None:
    """Refuse columns whose values are no bytes, or share them: a view that comes again is a copy for each row."""
    from pyarrow import types

    kind = schema.field(image).type
    stored = kind
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        stored = kind.field("bytes").type
    if not types.is_binary(stored) and not types.is_large_binary(stored):
        raise ConfigError(
            f"{where}: column {visible(image)} is of type {visible(str(kind))[:150]}; pictures are bytes, or a struct "
            "of bytes and a path. Save the dataset with its pictures embedded."
        )
    given = schema.field(label).type
    answer = given.value_type if types.is_dictionary(given) else given
    allowed = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string, types.is_null)
    if not any(one(answer) for one in allowed):
        raise ConfigError(
            f"{where}: column {visible(label)} is of type {visible(str(given))[:150]}; classes are whole numbers or "
            "words. Choose another column with task.label=NAME."
        )


def _opened(where: str, encoded: bytes) -> tuple[int, int]:
    """Width and height, from the header."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")) as image:
            width, height = image.size
    except Exception as error:  # a decoder raises whatever it meets
        raise ConfigError(_undecodable(where, error)) from error
    if width * height > MAX_PIXELS:
        raise ConfigError(f"{where}: unpacks to {width}x{height} pixels; at most {MAX_PIXELS:,} are read.")
    return width, height


def _median_extent(folders: Mapping[str, Path], rows: Mapping[str, tuple[list[bytes], NDArray[Any]]]) -> int:
    """Of the pictures' shorter extents; every header is looked at."""
    shorter = []
    for split, (pictures, _) in rows.items():
        where = visible(str(folders[split]))
        shorter += [min(_opened(f"{where}: row {i}", one)) for i, one in enumerate(pictures)]
    return int(np.median(shorter))


def _decoded(where: str, encoded: bytes, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    _opened(where, encoded)
    try:
        return read_picture(io.BytesIO(encoded), size, channels)  # type: ignore[arg-type]
    except Exception as error:
        raise ConfigError(_undecodable(where, error)) from error


def _undecodable(where: str, error: Exception) -> str:
    reason = visible(" ".join(str(error).split()))[:150] or type(error).__name__
    return f"{where}: is no picture that can be decoded ({reason}). Leave it out."
