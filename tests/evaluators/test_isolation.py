"""What a stranger's task changes of the process is put back: after trials, trainings, finishing and making the task."""

from __future__ import annotations

import errno
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mixnas.evaluators.isolation import undisturbed
from mixnas.evaluators.protocol import Request, guarded
from mixnas.evaluators.supernet.evaluator import SupernetEvaluator, SupernetSpec
from mixnas.evaluators.supernet.training import SupernetConfig
from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.training import TrainConfig
from mixnas.evaluators.workers import finish_all
from mixnas.search_space.errors import MachineError, NasError
from tests.evaluators.supernet.tiny import tiny_space

CHANGES: dict[str, tuple[Callable[[], object], Callable[[], Any]]] = {
    "gradients": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.is_autocast_enabled("cpu")),
    "threads": (lambda: torch.set_num_threads(7), torch.get_num_threads),
    "default type": (lambda: torch.set_default_dtype(torch.float64), lambda: torch.zeros(1).dtype),
    "default device": (lambda: torch.set_default_device("meta"), lambda: torch.zeros(1).device.type),
    "determinism": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "cudnn": (lambda: setattr(torch.backends.cudnn, "benchmark", True), lambda: torch.backends.cudnn.benchmark),
    "anomalies": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), torch.get_float32_matmul_precision),
    "denormals": (lambda: torch.set_flush_denormal(True), lambda: (torch.full((1,), 1e-30) * 1e-10).item() == 0),
    "torch's random numbers": (lambda: torch.manual_seed(1), lambda: torch.get_rng_state().tolist()),
    "NumPy's random numbers": (lambda: np.random.seed(1), lambda: np.random.get_state()[1].tolist()),
    "Python's random numbers": (lambda: random.seed(1), random.getstate),
    "NumPy's errors": (lambda: np.seterr(all="raise"), np.geterr),
    "warnings": (lambda: warnings.simplefilter("ignore"), lambda: list(warnings.filters)),
    "logging": (lambda: logging.disable(logging.CRITICAL), lambda: logging.root.manager.disable),
    "stdout": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
    "recursion": (lambda: sys.setrecursionlimit(5000), sys.getrecursionlimit),
    "garbage": (gc.disable, gc.isenabled),
    "locale": (lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"), lambda: locale.setlocale(locale.LC_ALL)),
    "environment": (lambda: os.environ.update(CARELESS="1", HOME="/nowhere"), lambda: dict(os.environ)),
    "folder": (lambda: os.chdir("/"), os.getcwd),
    "file mask": (lambda: os.umask(0o777), lambda: file_mask()),
    "Ctrl-C": (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGINT)),
    "SIGTERM": (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN), lambda: signal.getsignal(signal.SIGTERM)),
    "an alarm": (lambda: signal.alarm(600), lambda: signal.getitimer(signal.ITIMER_REAL)[0] > 0),
}


def file_mask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def state() -> dict[str, Any]:
    return {name: look() for name, (_, look) in CHANGES.items()}


@pytest.fixture(autouse=True)
def _afterwards():
    """Whatever fails here must not fail the tests that follow."""
    mask = os.umask(0o022)
    locale_before = locale.setlocale(locale.LC_ALL)
    locale.setlocale(locale.LC_ALL, "C")  # so that it can be changed
    with undisturbed():
        yield
    locale.setlocale(locale.LC_ALL, locale_before)
    os.umask(mask)


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_is_put_back(name):
    change, look = CHANGES[name]
    before = look()
    with undisturbed():
        change()
        assert look() != before  # else nothing is tried
    assert look() == before

    @undisturbed()
    def failing():
        change()
        raise ValueError

    with pytest.raises(ValueError):
        failing()
    assert look() == before


def test_a_handler_that_goes_takes_its_alarm_with_it():
    """Left behind, an alarm that nobody hears ends the process."""
    with undisturbed():
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 600)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_a_child_that_a_trial_forked_does_not_go_on_with_the_search(tmp_path):
    """It would be a second writer of the journal."""
    child = 0
    with undisturbed():
        child = os.fork()
        if not child:
            raise SystemExit(0)
    (tmp_path / str(os.getpid())).touch()  # whoever comes here
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert os.listdir(tmp_path) == [str(os.getpid())]


def test_beside_the_main_thread_signals_are_left_alone():
    found = []

    def work():
        with undisturbed():
            os.environ["CARELESS"] = "1"
        found.append(os.environ.get("CARELESS"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


def test_a_folder_that_was_removed_meanwhile_hides_no_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    with pytest.raises(ValueError, match="the task's"), undisturbed():
        os.chdir("..")
        os.rmdir("gone")
        raise ValueError("the task's own")


class Careless(Digits):
    """Changes all that can be changed without ending a training, whenever it is asked for a loss."""

    name = "careless"
    harmless = sorted(
        CHANGES.keys() - {"gradients", "autocast", "default type", "default device", "stdout", "file mask"}
    )

    def __init__(self, at: str = "loss", then: str = "") -> None:
        super().__init__()
        self.at, self.then, self.calls = at, then, 0
        if at == "making":
            self.be_careless(sorted(CHANGES))

    def be_careless(self, names):
        for name in names:
            CHANGES[name][0]()

    def training_loss(self, outputs, targets):
        self.calls += 1
        if self.at == "loss":
            self.be_careless(self.harmless)
            if self.then and self.calls == 3:
                torch.set_default_dtype(torch.float64)
                torch.set_grad_enabled(False)
                {"raise": self._raise, "exit": lambda: sys.exit(3), "full": self._full}[self.then]()
        return super().training_loss(outputs, targets)

    def _raise(self):
        raise ValueError("deep inside\n\x1b[31m the task")

    def _full(self):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def opened(task: Careless) -> SupernetEvaluator:
    space = tiny_space()
    spec = SupernetSpec(
        task="digits",
        space={},
        supernet=SupernetConfig(steps=4, batch_size=16, samples=1),
        final=TrainConfig(steps=6, batch_size=16),
        device="cpu",
    )
    return SupernetEvaluator(spec, task=task, space=space)


def test_making_a_task_changes_nothing():
    before = state()
    task = by_name(f"{__name__}:Careless", at="making")
    assert task.at == "making" and state() == before


def test_training_a_super_network_and_finishing_a_candidate_change_nothing():
    before = state()
    evaluator = opened(Careless())
    evaluator.prepare()
    assert evaluator.task.calls >= 4 and state() == before
    architecture = evaluator.space.decode([0] * len(evaluator.space.variables))
    for then, failure in (("", ""), ("raise", "ValueError: deep inside"), ("exit", "SystemExit: 3")):
        evaluator.task.calls, evaluator.task.then = 0, then
        ((_, outcome),) = finish_all(evaluator, [Request(architecture)], total=1)
        assert outcome.failure.startswith(failure) and bool(outcome.network) is not bool(then)
        assert evaluator.task.calls >= 3 and state() == before


@pytest.mark.parametrize(
    ("then", "kind", "says"),
    [
        ("raise", NasError, r"^training the super-network failed: ValueError: deep inside \\x1b\[31m the task\. Mend"),
        ("exit", NasError, r"^training the super-network failed: SystemExit: 3\. Mend"),
        ("full", MachineError, r"^training the super-network: No space left on device\. Make room\.$"),
    ],
)
def test_a_task_that_fails_in_the_training_of_a_super_network_is_one_sentence(then, kind, says):
    before = state()
    evaluator = opened(Careless(then=then))
    with pytest.raises(kind, match=says) as caught:
        evaluator.prepare()
    assert type(caught.value) is kind and str(caught.value).isprintable()
    assert state() == before


def test_what_is_said_on_purpose_is_said_as_it_is():
    with pytest.raises(MachineError, match=r"^full\.$"), guarded("anything"):
        raise MachineError("full.")
