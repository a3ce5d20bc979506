"""Every kernel and every configuration of the table, compiled for sm_90."""

import pytest

from mixnas.kernels import FAMILIES, configs, dispatch
from mixnas.kernels.tools import aot

pytestmark = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton isn't installed")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_compiles_without_spills(family):
    table = configs.load()[family]["kernels"]
    wanted = {
        (kernel, gpu, index)
        for kernel, by_gpu in table.items()
        for gpu in by_gpu
        if gpu != configs.INTERPRETER
        for index in range(len(configs.rows(kernel, gpu)))
    }
    found = aot.compile_table([family])
    assert {(item.kernel, item.gpu, item.row) for item in found} == wanted
    spilled = [
        f"{item.kernel} {item.gpu}[{item.row}] {item.label}: stack of {item.stack_bytes} bytes"
        for item in found
        if (item.stack_bytes or item.instructions["local"]) and not item.spills_because
    ]
    assert not spilled
    assert all(item.shared_bytes <= 227 * 1024 for item in found)


def test_one_family_and_the_cache(tmp_path, monkeypatch):
    """Loads are 16 bytes wide, nothing is spilled, and a second compilation finds the first."""
    monkeypatch.setenv("MIXNAS_CACHE", str(tmp_path))
    first = aot.compile_table(["glu"], first_only=True)
    assert [item.kernel for item in first] == ["glu_forward", "glu_backward"]
    for item in first:
        assert not item.cached
        assert item.stack_bytes == 0
        assert item.instructions["load_16"] > 0
        assert item.instructions["load_4"] == item.instructions["load_narrow"] == 0
    second = aot.compile_table(["glu"], first_only=True)
    assert all(item.cached for item in second)
    assert [item.registers for item in second] == [item.registers for item in first]


def test_a_failing_child_says_why():
    with pytest.raises(RuntimeError, match="no_such_family"):
        aot.compile_table(["no_such_family"])
