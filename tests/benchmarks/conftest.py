"""The benchmarks are plain scripts: their folder is put on the path, as running one does."""

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The folder of the scripts, importable from."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield SCRIPTS
    for name in [name for name in sys.modules if name.startswith(("_gpu_", "_kernel_grid", "_checkout"))]:
        del sys.modules[name]
    for name in ("kernels", "gpu", "_record", "supernet", "supernet_fidelity", "engines", "_engines"):
        sys.modules.pop(name, None)
