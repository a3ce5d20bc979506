"""Runs this folder's tests in a child process that interprets Triton kernels.

Triton decides at import between compiling and interpreting, and `TRITON_INTERPRET=1` makes every CPU tensor of a
process take the kernels: neither must happen to the rest of a test session. So the first test here starts a child
`pytest` with the variable set, and each test here is handed to it and reports what the child reported. Started with
`TRITON_INTERPRET=1`, pytest runs them in its own process instead.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels.testing import KernelContract
from mixnas.kernels.tools import interpreting

_HERE = Path(__file__).parent
_PIPES = "MIXNAS_KERNEL_TESTS"  # in the child: the descriptors it reads test names from and writes reports to
_CHILD = pytest.StashKey["_Child"]()


def _rounds_as_a_gpu() -> None:
    """Round float32 to the nearest bfloat16, ties to even: the interpreter cuts bits off, which has a bias."""
    from triton.runtime import interpreter

    others = interpreter._convert_float
    float32, bfloat16 = interpreter.tl.float32, interpreter.tl.bfloat16

    def convert(values, from_type, to_type, rounding_mode):
        if (from_type, to_type) == (bfloat16, float32):
            return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
        if (from_type, to_type) != (float32, bfloat16):
            return others(values, from_type, to_type, rounding_mode)
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(bits.view(np.float32)), 0x7FC0, nearest).astype(np.uint16)

    interpreter._convert_float = convert


if dispatch.INTERPRETING:
    _rounds_as_a_gpu()
    interpreting.prepare_once()


class _Child:
    """The interpreting pytest: collects this folder, then runs what it is told to."""

    def __init__(self, config):
        orders, self._orders = os.pipe()
        self._reports, reports = os.pipe()
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill up)
        environment = os.environ | {"TRITON_INTERPRET": "1", _PIPES: f"{orders},{reports}"}
        environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", config.rootpath]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, _HERE],
            env=environment,
            cwd=config.rootpath,
            pass_fds=[orders, reports],
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )
        os.close(orders)
        os.close(reports)
        self._lines = os.fdopen(self._reports)

    def run(self, nodeid, next_nodeid):
        """Have the child run a test, and yield its reports."""
        try:
            os.write(self._orders, (json.dumps([nodeid, next_nodeid]) + "\n").encode())
            for line in self._lines:
                data = json.loads(line)
                yield data
                if data["when"] == "teardown":
                    return
        except BrokenPipeError:
            pass
        self._process.wait()
        self._output.seek(0)
        raise RuntimeError(f"the interpreting pytest ended before {nodeid}:\n{self._output.read()[-4000:]}")

    def close(self):
        os.close(self._orders)  # the child ends when there is nothing more to read
        self._process.wait()
        self._lines.close()
        self._output.close()


def pytest_runtest_protocol(item, nextitem):
    # pytest asks this hook of every folder's conftest for every test
    if not item.path.is_relative_to(_HERE) or dispatch.INTERPRETING or not dispatch.HAS_TRITON:
        return None
    stash = item.session.stash
    if _CHILD not in stash:
        stash[_CHILD] = _Child(item.config)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in stash[_CHILD].run(item.nodeid, nextitem and nextitem.nodeid):
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session):
    if _CHILD in session.stash:
        session.stash[_CHILD].close()


def _run_orders(session, orders, reports):
    """In the child: run the tests whose names come in, each with the one that comes after it."""
    config, items = session.config, {item.nodeid: item for item in session.items}

    class Reporter:
        def pytest_runtest_logreport(self, report):
            data = config.hook.pytest_report_to_serializable(config=config, report=report)
            os.write(reports, (json.dumps(data, default=str) + "\n").encode())

    config.pluginmanager.register(Reporter())
    with os.fdopen(orders) as lines:
        for line in lines:
            nodeid, next_nodeid = json.loads(line)
            item = items[nodeid]
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=items.get(next_nodeid))
    return True


def pytest_runtestloop(session):
    if _PIPES not in os.environ:
        return None
    return _run_orders(session, *map(int, os.environ[_PIPES].split(",")))


def pytest_generate_tests(metafunc):
    if metafunc.cls is not None and issubclass(metafunc.cls, KernelContract) and "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(metafunc.cls.cases.values()), ids=list(metafunc.cls.cases))


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch):
    """Fill what `torch.empty` and its kin return with NaN, so that an element no kernel wrote shows."""

    def filled(create):
        def create_filled(*args, **kwargs):
            tensor = create(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return create_filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
