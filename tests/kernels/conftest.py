"""Runs this folder's tests in one child process that interprets Triton kernels.

Triton decides at import between compiling and interpreting, and `TRITON_INTERPRET=1` makes every CPU tensor of a
process take the kernels: neither must happen to the rest of a test session. So the first test here starts a child
`pytest` with the variable set, on exactly the tests that were selected, and each test here reports what the child
reported for it. Started with `TRITON_INTERPRET=1`, pytest runs them in its own process instead.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mixnas.kernels import dispatch
from mixnas.kernels.testing import KernelContract

_HERE = Path(__file__).parent
_PIPE = "MIXNAS_TEST_REPORTS"
_CHILD = pytest.StashKey["_Child"]()


class _Child:
    """The interpreting pytest, and its reports as they come."""

    def __init__(self, session):
        items = [item.nodeid for item in session.items if _HERE in item.path.parents]
        reading, writing = os.pipe()
        self.output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill up and block)
        environment = os.environ | {"TRITON_INTERPRET": "1", _PIPE: str(writing)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", session.config.rootpath]
        self.process = subprocess.Popen(
            [*command, *items],
            env=environment,
            cwd=session.config.rootpath,
            pass_fds=[writing],
            stdout=self.output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        os.close(writing)
        self.reports = os.fdopen(reading)

    def of(self, nodeid):
        """Yield the reports of one test, until its teardown's."""
        for line in self.reports:
            data = json.loads(line)
            if data["nodeid"] == nodeid:
                yield data
                if data["when"] == "teardown":
                    return
        self.process.wait()
        self.output.seek(0)
        raise RuntimeError(f"the interpreting pytest ended before {nodeid}:\n{self.output.read()[-4000:]}")

    def close(self):
        self.reports.close()
        self.process.kill()
        self.process.wait()
        self.output.close()


def pytest_runtest_protocol(item):
    if dispatch.INTERPRETING or not dispatch.HAS_TRITON:
        return None
    stash = item.session.stash
    if _CHILD not in stash:
        stash[_CHILD] = _Child(item.session)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in stash[_CHILD].of(item.nodeid):
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if _CHILD in session.stash:
        session.stash[_CHILD].close()


_config = None


def pytest_configure(config):
    global _config
    _config = config


def pytest_runtest_logreport(report):
    if _PIPE in os.environ and _config is not None:
        data = _config.hook.pytest_report_to_serializable(config=_config, report=report)
        os.write(int(os.environ[_PIPE]), (json.dumps(data, default=str) + "\n").encode())


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
