"""Batches from a file of Arrow's stream format, checked before anything in them is followed.

pyarrow follows the offsets in a column without looking whether they lie in its buffer: a damaged one ends the process.
And what a compressed buffer unpacks to is allocated as it says itself. Both are looked at first here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixnas.evaluators.tasks.arrays import check_file
from mixnas.search_space.errors import ConfigError, listed, visible

_BATCHES = {"record batch": 0, "dictionary": 1}  # how deep the buffers of a message lie


def check_unpacked(files: Iterable[Path], memory_gib: float) -> None:
    """Refuse files whose compressed buffers say that they unpack to too much; nothing is unpacked.

    Args:
        files: Of Arrow's stream format.
        memory_gib: What they may unpack to, all together.

    Raises:
        ConfigError: They do; or one is a link or no file, or is damaged. It names the file.
    """
    import pyarrow

    total = 0
    for file in files:
        with _opened(file) as source:
            total += _unpacked(pyarrow, source)
        if total > memory_gib * 2**30:
            raise ConfigError(
                f"{visible(str(file))}: unpacks to {total / 2**30:,.3g} GiB, with the files before it, and memory_gib "
                f"allows {memory_gib:g}. Raise that, or give less."
            )


def batches(file: Path, columns: Sequence[str]) -> Iterator[Any]:
    """Record batches of some columns, each of which was validated in full; no other column is unpacked.

    Args:
        file: Of Arrow's stream format; see `check_unpacked`.
        columns: Their names.

    Raises:
        ConfigError: It is a link or no file, is damaged, or has no such column. It names the file.
    """
    import pyarrow

    with _opened(file) as source:
        with pyarrow.ipc.open_stream(source) as reader:
            places = [reader.schema.get_field_index(name) for name in columns]
            names = list(reader.schema.names)
        if lost := [name for name, at in zip(columns, places, strict=True) if at < 0]:
            raise ConfigError(
                f"{visible(str(file))}: has no column {visible(lost[0])}, or two of that name. Its columns: "
                f"{visible(listed(names))[:300]}. Save the dataset again."
            )
        source.seek(0)
        chosen = pyarrow.ipc.IpcReadOptions(included_fields=sorted(set(places)))
        with pyarrow.ipc.open_stream(source, options=chosen) as reader:
            for batch in reader:
                batch.validate(full=True)
                yield batch


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    import pyarrow

    where = visible(str(file))
    check_file(file)
    if file.is_symlink():
        raise ConfigError(f"{where}: is a link. Put the file there.")
    try:
        with pyarrow.memory_map(str(file)) as source:
            yield source
    except ConfigError:
        raise
    except (pyarrow.ArrowException, OSError, KeyError, ValueError, struct.error) as error:
        reason = visible(" ".join(str(error).split()))[:150]
        raise ConfigError(f"{where}: cannot be read as a stream of Arrow ({reason}). Save it again.") from error


def _unpacked(pyarrow: Any, source: Any) -> int:
    """Bytes that the compressed buffers of a stream say they unpack to; nothing is unpacked."""
    total = 0
    for message in pyarrow.ipc.MessageReader.open_stream(source):
        if message.type in _BATCHES and message.body is not None:
            total += _of_message(memoryview(message.metadata), memoryview(message.body), _BATCHES[message.type])
    return total


def _of_message(metadata: memoryview, body: memoryview, depth: int) -> int:
    """Of one message, whose metadata is a FlatBuffers table (Arrow's Message.fbs: Message, RecordBatch).

    A compressed buffer begins with the length that it unpacks to, 8 bytes; -1 where it is stored as it is.
    """
    table = _followed(metadata, 0)
    for _ in range(depth + 1):  # the header of the message; of a dictionary the batch in it
        at = _field(metadata, table, 2 if table == _followed(metadata, 0) else 1)
        if not at:
            return 0
        table = _followed(metadata, at)
    buffers, compression = _field(metadata, table, 2), _field(metadata, table, 3)
    if not compression or not buffers:
        return 0
    vector = _followed(metadata, buffers)
    (count,) = struct.unpack_from("<I", metadata, vector)
    total = 0
    for i in range(count):
        offset, length = struct.unpack_from("<qq", metadata, vector + 4 + 16 * i)
        if length >= 8 and 0 <= offset <= len(body) - 8:
            total += max(0, struct.unpack_from("<q", body, offset)[0])
    return total


def _followed(metadata: memoryview, at: int) -> int:
    """Where the offset at a place leads."""
    return int(at + struct.unpack_from("<I", metadata, at)[0])


def _field(metadata: memoryview, table: int, number: int) -> int:
    """Where a field of a table lies; 0 where it has none."""
    known = table - struct.unpack_from("<i", metadata, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", metadata, known)[0]:
        return 0
    (offset,) = struct.unpack_from("<H", metadata, known + 4 + 2 * number)
    return table + offset if offset else 0
