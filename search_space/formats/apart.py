"""A process in which this package cannot be imported, to load the files of networks in."""

from __future__ import annotations

import contextlib
import inspect
import io
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from mixnas.search_space.errors import IntegrityError
from mixnas.search_space.formats.format import Answer, Format

_CHILD = """
from __future__ import annotations

import io
import os
import struct
import sys

sys.modules["mixnas"] = None
out = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)

import numpy as np

{functions}

def send(kind, content):
    out.write(struct.pack("<cQ", kind, len(content)) + content)
    out.flush()


answers = []
while header := sys.stdin.buffer.read(17):
    kind, which, length = struct.unpack("<cQQ", header)
    content = sys.stdin.buffer.read(length)
    try:
        if kind == b"L":
            answers.append(globals()[FUNCTIONS[which]](content.decode()))
            send(b"A", b"")
        else:
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(answers[which](np.load(io.BytesIO(content)))))
            send(b"A", buffer.getvalue())
    except Exception as error:
        send(b"E", (type(error).__name__ + ": " + str(error)).encode())
"""


class Apart:
    """Loads files and answers for them in a fresh process without this package. A context.

    Args:
        wanted: The formats of the files; none that needs this package.
    """

    def __init__(self, wanted: Sequence[Format]) -> None:
        self._functions = [file_format.load.__name__ for file_format in wanted]
        texts = [inspect.getsource(file_format.load) for file_format in wanted]
        self._script = _CHILD.replace("{functions}", "\n\n".join([*texts, f"FUNCTIONS = {self._functions!r}"]))
        self._loaded = 0

    def __enter__(self) -> Apart:
        self._errors = tempfile.TemporaryFile()
        command = [sys.executable, "-I", "-c", self._script]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        if error is not None:
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _ask(self, kind: bytes, which: int, content: bytes) -> bytes:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(struct.pack("<cQQ", kind, which, len(content)) + content)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(self._ended()) from None
        header = self._process.stdout.read(9)
        if len(header) < 9:
            raise RuntimeError(self._ended())
        answered, length = struct.unpack("<cQ", header)
        found = self._process.stdout.read(length)
        if answered == b"E":
            raise RuntimeError(found.decode())
        return found

    def _ended(self) -> str:
        """Why the process is no more."""
        status = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"the process that loads files ended with status {status}{': ' + said[-1][:300] if said else ''}"

    def load(self, file_format: Format, path: Path) -> Answer:
        """Load a file there.

        Raises:
            IntegrityError: It can't be loaded.
        """
        try:
            self._ask(b"L", self._functions.index(file_format.load.__name__), str(path.resolve()).encode())
        except RuntimeError as error:
            raise IntegrityError(f"{path}: does not load where this package is not installed: {error}") from error
        which = self._loaded
        self._loaded += 1

        def answer(batch: np.ndarray) -> np.ndarray:
            buffer = io.BytesIO()
            np.save(buffer, batch)
            found: np.ndarray = np.load(io.BytesIO(self._ask(b"A", which, buffer.getvalue())))
            return found

        return answer
