"""Every kernel and every configuration of the table, compiled for sm_90."""

import json
import os
import subprocess
import sys

import pytest

from mixnas.kernels import FAMILIES, configs, dispatch
from mixnas.kernels.tools import aot, resources

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton isn't installed")


_PARTS = [FAMILIES[part::3] for part in range(3)]  # each a process: starting one takes as long as some families


@pytest.mark.slow
@pytest.mark.parametrize("families", _PARTS, ids="+".join)
def test_every_row_compiles_without_spills(families):
    """And to what is committed. Everything is compiled here, once, by the Triton that runs.

    That the committed table has these launches, and is written as it stands, `tests/predictors/latency/test_gpus.py`
    shows.
    """
    tables = {family: configs.load()[family]["kernels"] for family in families}
    wanted = {
        (kernel, gpu, index)
        for table in tables.values()
        for kernel, by_gpu in table.items()
        for gpu in by_gpu
        if gpu != configs.INTERPRETER
        for index in range(len(configs.rows(kernel, gpu)))
    }
    found = aot.compile_table(families)
    assert {(item.kernel, item.gpu, item.row) for item in found} == wanted
    spilled = [
        f"{item.kernel} {item.gpu}[{item.row}] {item.label}: stack of {item.stack_bytes} bytes"
        for item in found
        if item.stack_bytes or item.instructions["local"]
    ]
    assert not spilled
    warp_groups = [item.label for item in found if item.gpu == configs.NO_WGMMA and item.instructions["wgmma"]]
    assert not warp_groups
    assert all(item.shared_bytes <= 227 * 1024 for item in found)
    committed = resources.read()
    if dispatch.triton.__version__ not in committed:
        pytest.skip(f"resources.csv is of Triton {', '.join(committed)}, here is {dispatch.triton.__version__}")
    names = ("kernel", "gpu", "registers", "stack_bytes", "shared_bytes")
    rows = [
        {"example": row["example"]} | {name: row[name] for name in names}
        for family in families
        for row in committed[dispatch.triton.__version__]
        if row["kernel"] in tables[family]
    ]
    here = [{"example": item.label} | {name: str(getattr(item, name)) for name in names} for item in found]
    assert here == rows, "write it anew with `python -m mixnas.kernels.tools.resources`"


def test_no_launch_of_any_triton_has_a_stack():
    """In the committed table, whose rows for the Triton that is here the test above compiles anew."""
    tables = resources.read()
    assert {"3.6.0", "3.7.1"} <= set(tables)
    for version, rows in tables.items():
        assert not [row for row in rows if row["stack_bytes"] != "0"], version


def test_one_family_and_the_cache(tmp_path, monkeypatch):
    """Loads are 16 bytes wide, nothing is spilled, and a second compilation finds the first."""
    monkeypatch.setenv("MIXNAS_CACHE", str(tmp_path))
    first = aot.compile_table(["epilogue"], first_only=True)
    assert [item.kernel for item in first] == ["epilogue_backward"]
    for item in first:
        assert not item.cached
        assert item.stack_bytes == 0
        assert item.instructions["load_16"] > 0
        assert item.instructions["load_4"] == item.instructions["load_narrow"] == 0
    second = aot.compile_table(["epilogue"], first_only=True)
    assert all(item.cached for item in second)
    assert [item.registers for item in second] == [item.registers for item in first]


def test_a_failing_child_says_why():
    with pytest.raises(RuntimeError, match="no_such_family"):
        aot.compile_table(["no_such_family"])


_TRITONS_OWN = """
import json
import triton.compiler
from triton.compiler import make_backend
from triton.runtime import driver
from mixnas.kernels import FAMILIES
from mixnas.kernels.tools import aot

gpu, seen = aot._PretendedGPU(), []
driver.set_active(gpu)
plain = triton.compiler.compile

class Caught(Exception):
    pass

def catch(source, target=None, options=None, **_):
    seen.append((source.hash(), make_backend(target).parse_options(dict(options)).hash()))
    raise Caught

found = {}
for family, kernel, name, index, row, example in aot._launches(FAMILIES):
    function, operands, options = aot._record(kernel, name, example)
    source, ours = aot._specialise(function, operands, options)
    function.device_caches.pop(gpu.device, None)
    triton.compiler.compile = catch
    try:
        function.warmup(*operands, grid=(1,), **options)
    except Caught:
        pass
    triton.compiler.compile = plain
    key = source.hash(), make_backend(gpu.get_current_target()).parse_options(dict(ours)).hash()
    found[f"{kernel} {example.label}"] = key == seen[-1]
print(json.dumps(found))
"""


def test_compiles_what_a_launch_would():
    """Triton's cache key, of source, types, divisibility and options: a launch finds what was compiled ahead."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _TRITONS_OWN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) > 100
    assert not [label for label, same in found.items() if not same]


_SIZES = """
import torch
from functools import partial
from mixnas.kernels import configs, norm, depthwise
from mixnas.kernels.tools import aot

def source(kernel, call):
    function, operands, options = aot._record(kernel, "any", aot.Example(label="", call=call, bytes=0, operations=0))
    return aot._specialise(function, operands, options)[0].hash()

def rows(n):
    x = torch.empty(n, 256, device="meta")
    return source("norm_forward", partial(norm.forward, x, x, x[0], x[0], 1e-5, True))

def batch(n, size=56):
    x, taps = torch.empty(n, size, size, 64, device="meta"), torch.empty(49, 64, device="meta")
    return source("depthwise_forward", partial(depthwise.convolve, x, taps, taps[0], None, "none", (7, 7, 3, 3)))

assert rows(4096) == rows(4097) == rows(1), "norm"
assert batch(32) == batch(2) == batch(3), "depthwise"  # from two images on the table has no row for a smaller size
assert batch(8, 14) == batch(2, 14) == batch(1, 14), "depthwise, few positions"
assert batch(32) != batch(1), "few positions have a row of their own: this tells sources apart"
"""


def test_sizes_that_need_no_alignment_make_no_other_code():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _SIZES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_report_ends_with_what_was_measured(tmp_path):
    """One row a point that was right, with its unit, its floor and the fastest other form."""
    from mixnas.kernels.tools import report

    floor = {"bytes_us": 6.0, "operations_us": 1.0, "special_us": 0.0, "bound_by": "bytes"}
    entry = {"same_function": True, "times": {"forward, graph, cold": {"p50_us": 12.0}}}
    slower = {"same_function": True, "times": {"forward, graph, cold": {"p50_us": 15.0}}}
    other = {"same_function": False, "times": {"forward, graph, cold": {"p50_us": 1.0}}}
    right = {"mixnas (Triton)": entry, "ATen": slower, "sdpa": other}
    items = {
        "a": {"family": "norm", "label": "8x8", "floor": floor, "implementations": right},
        "b": {"family": "norm", "label": "wrong", "floor": floor, "implementations": {"ATen": slower}},
    }
    provenance = {"torch": "2.11.0", "triton": "3.6.0", "time": "2026-12-01T00:00:00"}
    data = {"device": "nvidia-h200", "provenance": provenance, "items": items}
    (tmp_path / "gpu-nvidia-h200.fast.json").write_text(json.dumps(data))
    lines = list(report._measured(tmp_path))
    assert lines[0].startswith("## Measured on nvidia-h200")
    assert lines[3:] == ["| norm | 8x8 | 12.0 µs | 6.0 µs | bytes | 2.0 | ATen | 15.0 µs |", ""]
    assert not list(report._measured(tmp_path / "none"))
