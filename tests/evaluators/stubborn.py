"""An evaluator for the tests of workers, which must be able to import it: it fails, dies and hangs as it is told."""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mixnas.evaluators.protocol import Outcome, attempt
from mixnas.evaluators.training import DivergedError
from mixnas.search_space.network import Network
from mixnas.search_space.units import IOSpec

IO = IOSpec("image", (8, 8), 1, 10)


@dataclass(frozen=True)
class StubbornSpec:
    """`faults` says what befalls architectures of an id; `folder` counts how often each was begun."""

    folder: Path
    faults: dict[str, str]
    home: int = 0  # the only process in which it can be made, where it is not 0

    def open(self) -> Stubborn:
        if self.home not in (0, os.getpid()):
            raise LookupError("only at home")
        return Stubborn(self)


class Stubborn:
    finishing = "finish"
    device = "cpu"

    def __init__(self, spec: StubbornSpec) -> None:
        self.spec = self._told = spec

    def prepare(self, report=None, should_stop=None):
        pass

    def evaluate(self, requests):
        return [attempt(self._evaluate, request) for request in requests]

    def _evaluate(self, request):
        self._suffer(request.architecture)
        return Outcome({"pid": float(os.getpid()), "threads": float(torch.get_num_threads())})

    def finish(self, architecture, report=lambda *_: None, should_stop=None):
        self._suffer(architecture)
        report(1, 2)
        return Network(architecture, IO, generator=torch.Generator().manual_seed(7)).eval()

    def _suffer(self, architecture):
        with open(self._told.folder / architecture.id, "a") as begun:
            begun.write(f"{os.getpid()}\n")
        fault = self._told.faults.get(architecture.id)
        begun = (self._told.folder / architecture.id).read_text().count("\n")
        if fault == "diverge":
            raise DivergedError("the loss is nan", step=3)
        if fault == "die":
            os.kill(os.getpid(), signal.SIGABRT)
        if fault == "killed" or (fault == "die once" and begun == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault == "hang":
            time.sleep(3600)
