"""`load.py` of an export: what loads the network's files without this package, and reads pictures for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mixnas.evaluators.tasks.decoding import read_picture, upright
from mixnas.evaluators.tasks.preparing import Prepared, prepare
from mixnas.search_space.formats.format import Format
from mixnas.search_space.units import IOSpec

_TOLD = ("labels", "pictures", "prepared", "target", "counts", "summary", "data_sha256")
"""What the card takes from what the run says of its data."""

_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "asimd", "asimddp", "sve")

_LOADER_HEAD = '''"""Loads the exported network: `network(FILE)` is its answer to a batch, arrays in, arrays out.

A batch is {dtype}, {read}{raw}. Before a file is loaded its SHA-256 is compared with `manifest.json`, and this CPU with
the one it was verified on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
VERIFIED_ON = {instructions}
BESIDE = {beside}
DTYPE, SHAPE = "{dtype}", {shape}  # of one input
TOKENS = {tokens}  # how many there are; None of numbers


def content(file: str) -> bytes:
    """What stands in a file of this folder."""
    try:
        return (HERE / file).read_bytes()
    except OSError as error:
        sys.exit(f"{{HERE / file}}: cannot be read: {{error.strerror}}.")


def digests() -> dict[str, str]:
    """SHA-256 of each file as it was exported, by the manifest; its own is the last entry in it."""
    try:
        manifest = json.loads(content("manifest.json"))
        stamp = manifest.pop("sha256")
        if hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest() == stamp:
            return {{file: about["sha256"] for file, about in manifest["files"].items()}}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # not what was written either
    sys.exit(f"{{HERE / 'manifest.json'}}: damaged: not what was written. Export the network again.")


def check(name: str) -> Path:
    """The path of a file, if it is as it was exported."""
    if name not in BESIDE:
        sys.exit(f"{{name}}: no network's file of this export. Allowed: {{', '.join(BESIDE)}}.")
    known = digests()
    for file in BESIDE[name]:
        if hashlib.sha256(content(file)).hexdigest() != known.get(file):
            end = ""
            if file.endswith(".py"):
                end = f" If you changed it, it is used without load.py: import {{file[:-3]}}; {{file[:-3]}}.load()"
            sys.exit(
                f"{{HERE / file}}: damaged or changed: its SHA-256 is not that in manifest.json. Export the network "
                f"again.{{end}}"
            )
    try:
        here = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:  # not Linux: it can't be told
        here = set(VERIFIED_ON)
    if missing := [name for name in VERIFIED_ON if name not in here]:
        text = f"note: verified on a CPU with {{', '.join(missing)}}, which this one lacks: outputs may differ."
        print(text, file=sys.stderr)
    return HERE / name


def converting(load):
    """What loads a file, so that the answer takes numbers of any type that `DTYPE` can hold."""

    def loaded(path):
        answer = load(path)

        def converted(batch: np.ndarray) -> np.ndarray:
            batch = np.asarray(batch)
            if batch.shape[1:] != SHAPE:
                raise ValueError(f"inputs of shape {{batch.shape}}: the network reads {read}")
            batch = batch.astype(DTYPE, order="C", casting="same_kind", copy=False)
            if TOKENS and batch.size and not 0 <= batch.min() <= batch.max() < TOKENS:
                given = f"tokens from {{batch.min()}} to {{batch.max()}}"
                raise ValueError(f"{{given}}: the network reads 0 to {{TOKENS - 1}}")
            return answer({given})

        return converted

    return loaded


@functools.cache
def network(name: str):
    """The answer of the network in a file of this folder, which is checked and loaded once."""
    return FILES[name](check(name))

'''

_OF_CLASSES = '''
def classify(picture: str, name: str) -> tuple[str, float]:
    """The class of a picture's file, and its probability, by the network in a file of this folder."""
    outputs = network(name)(read_picture(picture, SIZE, CHANNELS)[None])[0].astype(np.float64)
    shares = np.exp(outputs - outputs.max())
    best = int(outputs.argmax())
    return LABELS[best], float(shares[best] / shares.sum())


def said(picture: str, name: str) -> str:
    """That in a line."""
    label, share = classify(picture, name)
    return f"{shown(label)} {share:.4f}"
'''

_OF_MASKS = '''
def segment(picture: str, name: str) -> np.ndarray:
    """The name of each pixel's class, (height, width), of a picture's file as it is read: cut and brought to `SIZE`."""
    outputs = network(name)(read_picture(picture, SIZE, CHANNELS)[None])[0]
    return np.array(LABELS)[outputs.argmax(-1)]


def said(picture: str, name: str) -> str:
    """Which share of the pixels is of each class that is there, the largest first."""
    labels, counts = np.unique(segment(picture, name), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return ", ".join(f"{shown(labels[i])} {counts[i] / counts.sum():.1%}" for i in order)
'''

_SHOWN = '''

def shown(text: object) -> str:
    """Text in which nothing can move a terminal's cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))

'''

_OF_NUMBERS = '''
def in_units(outputs: np.ndarray) -> np.ndarray:
    """A network's answers in the unit of the targets: it learned (target - mean) / std."""
    return outputs * {std!r} + {mean!r}

'''

_OF_RAW = '''
def prepared(raw: np.ndarray) -> np.ndarray:
    """What the network's file reads, of raw {what} from {low:g} to {high:g}: {words}."""
    if raw.size and not {low!r} <= raw.min() <= raw.max() <= {high!r}:
        given = f"inputs from {{raw.min():g}} to {{raw.max():g}}"
        raise ValueError(f"{{given}}: this is given raw {what}, {low:g} to {high:g}, and prepares them itself")
    return prepare(raw, divided_by={divided_by!r}, mean={mean!r}, std={std!r}, repeated={repeated!r})

'''

_CALLED_WITH_PICTURES = """    unread = 0
    for picture in sys.argv[1:]:
        try:
            read_picture(picture, SIZE, CHANNELS)
        except Exception as error:  # a decoder raises whatever it meets
            print(f"{shown(picture)}: cannot be read as a picture: {shown(error)}", file=sys.stderr)
            unread = 1
            continue
        for name in FILES:
            print(shown(picture), name, said(picture, name))
    if sys.argv[1:]:
        sys.exit(unread)
"""

_LOADER_TAIL = """

FILES = {{{files}}}
{labels}{pictures}
if __name__ == "__main__":
{called}    example = np.zeros((1, *SHAPE), dtype=DTYPE)
    for name in FILES:
        print(name, "input", example.shape, "output", network(name)(example).shape)
"""


def told(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the card takes from what the task says of its data (`recorded`)."""
    every = {**data, "data_sha256": data.get("sha256")}
    every.setdefault("pictures", data.get("reads"))  # pictures with masks
    return {key: every[key] for key in _TOLD if every.get(key)}


def prepared_of(about: Mapping[str, Any]) -> Prepared | None:
    """How the task prepared its inputs, where the data or a card says it."""
    plain = about.get("prepared")
    return None if plain is None else Prepared.from_plain(plain)


def takes_pictures(about: Mapping[str, Any]) -> bool:
    """Whether `load.py` reads files of pictures, and says classes by their names."""
    return bool(about.get("labels")) and about.get("pictures", {}).get("channels") in (1, 3)


def processor() -> dict[str, Any]:
    """The CPU's instructions that a network's speed or its digits may depend on, as far as they can be told."""
    try:
        found = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        found = set()
    return {"instructions": [name for name in _INSTRUCTIONS if name in found]}


def loader(wanted: Iterable[Format], io: IOSpec, data: Mapping[str, Any] | None = None) -> str:
    """The text of `load.py`: the functions by which the files were verified.

    Args:
        wanted: Formats of the files.
        io: What the network reads and answers.
        data: What the run says of its data (`Run.data`): names of the classes, and how pictures are read.
    """
    about = told(data or {})
    wanted = list(wanted)
    beside = {f.file_name: [f.file_name, *f.beside] for f in wanted}
    dtype, shape = inputs_of(io)
    raw, own = "", prepared_of(about)
    if own is not None:
        shape = (*own.raw_size(io.size), io.in_features)
        raw = f", of raw {own.what} from {own.low:g} to {own.high:g}; it is prepared here: {own.in_words()}"
    head = _LOADER_HEAD.format(
        beside=_quoted(beside),
        instructions=_quoted(processor()["instructions"]),
        dtype=dtype,
        read=as_batch(shape),
        shape=shape,
        tokens=io.in_features if io.tokens else None,
        raw=raw,
        given="batch" if own is None else "prepared(batch)",
    )
    functions = "".join(f"\n{inspect.getsource(file_format.load)}\n" for file_format in wanted)
    files = ", ".join(f'"{f.file_name}": converting({f.load.__name__})' for f in wanted)
    labels = pictures = called = ""
    if names := about.get("labels"):  # as Python writes them: JSON has halves of a letter beyond 16 bits
        labels = "LABELS = [\n" + "".join(f"    {str(name)!r},\n" for name in names) + "]\n"
    if takes_pictures(about):
        functions += "".join(f"\n{inspect.getsource(function)}\n" for function in (upright, read_picture))
        functions += f"{_SHOWN}{_OF_MASKS if io.grid else _OF_CLASSES}\n"
        size, channels = about["pictures"]["size"], about["pictures"]["channels"]
        pictures = f"SIZE, CHANNELS = {tuple(map(int, size))}, {int(channels)}\n"
        called = _CALLED_WITH_PICTURES
    if own is not None:
        words = {"what": own.what, "low": own.low, "high": own.high, "words": own.in_words()}
        numbers = {"divided_by": own.divided_by, "mean": list(own.mean), "std": list(own.std), "repeated": own.repeated}
        functions += f"\n{inspect.getsource(prepare)}\n{_OF_RAW.format(**words, **numbers)}"
    if target := about.get("target"):
        functions += _OF_NUMBERS.format(std=float(target["std"]), mean=float(target["mean"]))
    return head + functions + _LOADER_TAIL.format(files=files, labels=labels, pictures=pictures, called=called)


def inputs_of(io: IOSpec) -> tuple[str, tuple[int, ...]]:
    """Type and shape of one input, as `IOSpec.example` makes them."""
    return ("int64", io.size) if io.tokens else ("float32", (*io.size, io.in_features))


def as_batch(shape: tuple[int, ...]) -> str:
    """The shape of a batch in words.

    >>> as_batch((24, 24, 3)), as_batch(())
    ('(n, 24, 24, 3)', '(n,)')
    """
    return f"(n, {', '.join(map(str, shape))})" if shape else "(n,)"


def _quoted(plain: Any) -> str:
    return repr(plain).replace("'", '"')
