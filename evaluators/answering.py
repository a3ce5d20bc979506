"""What a worker does, whoever started it and wherever it runs: it answers requests; and with which code it does so."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mixnas.evaluators.protocol import Evaluator, EvaluatorSpec, Outcome, Request
from mixnas.search_space.errors import NasError
from mixnas.search_space.extensions import name_extensions

_ROOT = Path(__file__).resolve().parents[1]
_FOLDERS = ("kernels", "search_space", "predictors", "evaluators")  # what an evaluation may depend on
_PACKAGES = ("torch", "numpy")


@functools.cache
def code_version() -> str:
    """Of the code that evaluates: processes that give the same text evaluate alike, wherever they run.

    The version of the package, a digest of its sources, and the packages that compute; not how those were built.
    """
    digest = hashlib.sha256()
    for folder in _FOLDERS:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(_ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    others = (f"{name} {_version(name)}" for name in _PACKAGES)
    return f"mixnas {_version('mixnas')} (code {digest.hexdigest()[:12]}), {', '.join(others)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def answered(evaluator: Evaluator, requests: Sequence[Request]) -> list[Outcome] | NasError:
    """The outcomes of requests, in order, or what ends the search: an error that crosses to another process whole."""
    try:
        outcomes = evaluator.evaluate(requests)
    except NasError as error:
        kind = type(error) if type(error).__module__ == NasError.__module__ else NasError
        return kind(str(error))
    except Exception as error:
        return NasError(f"the evaluator {type(evaluator).__name__} raised {type(error).__name__}: {error}")
    if len(outcomes) != len(requests):
        return NasError(
            f"the evaluator {type(evaluator).__name__} gave {len(outcomes)} outcomes for {len(requests)} requests. "
            "evaluate(requests) gives one for each, in their order."
        )
    return outcomes


@dataclass(frozen=True, slots=True)
class Where:
    """Which process a worker is.

    Attributes:
        host: Its machine's name.
        pid: Its number there.
        code: See `code_version`.
    """

    host: str
    pid: int
    code: str


def this_process() -> Where:
    """Which process this is."""
    return Where(socket.gethostname(), os.getpid(), code_version())


class Answerer:
    """A worker that makes its evaluator once and then answers batches of requests.

    Args:
        extensions: Modules of the user's own that register operators, tasks and the like.
        threads: Inside an operator.
    """

    def __init__(self, extensions: Sequence[str] = (), threads: int = 1) -> None:
        name_extensions(extensions)
        self._threads = threads
        self._evaluator: Evaluator | None = None

    def where(self) -> Where:
        """Which process this is; asked before `open`, so that other code is never run on a spec of this one's."""
        return this_process()

    def open(self, spec: EvaluatorSpec) -> str:
        """Make the evaluator; returns why it cannot, or nothing."""
        try:
            set_threads(self._threads)
            self._evaluator = spec.open()
            self._evaluator.prepare()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def answer(self, requests: Sequence[Request], *states: bytes | None) -> list[Outcome] | NasError:
        """See `answered`.

        Args:
            requests: Of which architectures.
            states: Of trainings that are gone on with, for each request; none where no request has one.
        """
        if self._evaluator is None:
            raise RuntimeError("open comes first")
        if any(state is not None for state in states):
            requests = [_with_state(request, state) for request, state in zip(requests, states, strict=True)]
        return answered(self._evaluator, requests)


def _with_state(request: Request, state: bytes | None) -> Request:
    return request if request.part is None else replace(request, part=replace(request.part, state=state))


def set_threads(threads: int) -> None:
    """How many threads torch takes inside an operator, whether it is imported already or will be."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)
