"""gpu.py's checks: a check that ends or hangs its process costs that check; what is checked is all there is."""

import json
import time

import pytest
import torch

from mixnas.kernels import configs, fused_block
from mixnas.kernels.tools import resources
from mixnas.search_space import registry

# Stands for a group's process: five checks, of which some do not end well.
_WORKER = """
import json, os, signal, sys, time
arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
answers = arguments["--answers"]
skip = json.load(open(answers + ".skip"))
group = arguments["--step"].partition(":")[2]
with open(answers, "a") as file:
    def answer(**what):
        file.write(json.dumps({"group": group.split("+")[0], **what}) + "\\n")
        file.flush()
    for name in ("first", "dies", "loses", "hangs", "last"):
        key = f"{group} {name}"
        if key in skip:
            continue
        answer(check=key, begun=True)
        if name == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "loses":
            answer(check=key, right=False, why="illegal memory access", context_lost=True)
            sys.exit(3)
        if name == "hangs":
            time.sleep(3600)
        answer(check=key, right=True)
"""


def _run(tmp_path, monkeypatch, groups, seconds=3600.0, hangs=lambda worker: worker.begun.endswith("hangs")):
    """No check waits for a length of time: what hangs is known by its name."""
    import _gpu_right
    from _gpu_context import Context

    script = tmp_path / "worker.py"
    script.write_text(_WORKER)
    monkeypatch.setattr(_gpu_right, "_SCRIPT", script)
    monkeypatch.setattr(_gpu_right._Worker, "hangs", property(hangs))
    monkeypatch.setattr(_gpu_right, "groups", lambda dry: list(groups))
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    context = Context(out=out, work=work, deadline=time.monotonic() + seconds, dry=True)
    _gpu_right.run(context)
    return json.loads((out / "right.json").read_text())


def test_a_check_costs_no_other(tmp_path, monkeypatch, scripts):
    items = _run(tmp_path, monkeypatch, ["a", "b"])["items"]
    for group in "ab":
        assert items[f"{group} first"]["right"] and items[f"{group} last"]["right"]
        assert items[f"{group} dies"]["why"] == "its process ended with -9"
        assert items[f"{group} loses"]["why"] == "illegal memory access"
        assert items[f"{group} hangs"]["why"] == "no answer in 100 s"
    assert len(items) == 10


def test_what_there_was_no_time_for_is_said(tmp_path, monkeypatch, scripts):
    data = _run(tmp_path, monkeypatch, ["a", "b", "c", "d+e"], seconds=1.0, hangs=lambda worker: False)
    assert not data["complete"]
    assert data["left_out"]["d"] == data["left_out"]["e"] == "out of time", "each part by itself"


def test_a_check_hangs_after_a_while(scripts):
    import _gpu_right

    worker = _gpu_right._Worker("a+b", None, None)
    assert not worker.hangs and worker.parts_left == ["a", "b"]
    worker.since -= _gpu_right._CHECK_S
    worker.part = "b"
    assert worker.hangs and worker.parts_left == ["b"]


def _launched(points, products):
    """Kernels that the points launch, forward and backward; nothing is computed."""
    seen = set()
    with resources.watching(lambda kernel, *_: seen.add(kernel), configs.ANY_GPU, run=False):
        for point in points:
            leaves = {name: t.requires_grad_() for name, t in point.case.draw(torch.bfloat16).items()}
            output = point.function(**leaves, **point.case.options)
            output = output[0] if isinstance(output, tuple) else output
            torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output), allow_unused=True)
        for product in products:
            product.function(*product.draw())
    return seen


@pytest.mark.parametrize("points", ["odd", "tiny"])
def test_every_kernel_of_the_tables_is_checked(scripts, points, monkeypatch):
    """A new family has to be in the grid: it says here which kernels no point launches."""
    import _kernel_grid

    if points == "tiny":  # the interpreter takes one kernel for few positions too; what is only recorded does not
        monkeypatch.setattr(fused_block, "ENOUGH_POSITIONS", 1)

    products = [product for product in _kernel_grid.products(points == "tiny") if product.rows < 1000]
    # Banded products are for large maps on a GPU: none of the shapes that the interpreter gets through takes them.
    large = set(configs.load()["depthwise_banded"]["kernels"]) if points == "tiny" else set()
    assert _launched(getattr(_kernel_grid, points)(), products) == set(configs.kernels()) - large


def test_products_of_few_bits_are_checked(scripts, monkeypatch):
    import _gpu_checks
    import _kernel_grid
    from _gpu_context import Context

    context = Context(out=None, work=None, deadline=0.0, dry=True)
    names = [key for key, _ in _gpu_checks.checks("quantized_linear", context)]
    assert [name.split()[1] for name in names] == ["int8", "fp8", "int4"]
    assert "quantized_linear" in _gpu_checks.families(True) and "quantized_linear" in _gpu_checks.families(False)
    real = Context(out=None, work=None, deadline=0.0, dry=False)
    forms = [key.rpartition(", ")[2] for key, _ in _gpu_checks.checks("quantized_linear", real)]
    assert forms == [*["eager"] * 4, "compiled", "in a CUDA graph"] * 3
    for product in _kernel_grid.products(True):  # ATen's form agrees with the definition on what is drawn
        operands = product.draw()
        assert _gpu_checks.relative_error(product.function(*operands), product.reference(*operands)) < 1e-2


def test_the_grid_has_every_family_and_batch_one(scripts):
    import _kernel_grid

    grid, odd = list(_kernel_grid.grid()), list(_kernel_grid.odd())
    assert {p.family for p in grid} == {p.family for p in odd} == {p.family for p in _kernel_grid.tiny()}
    assert len({(p.family, p.label) for p in grid}) == len(grid)
    batch_one = {p.family for p in grid if p.label.startswith("1x")}
    assert batch_one >= {"depthwise_conv2d", "gated_linear_attention", "selective_scan", "fused_block"}


def test_every_operator_and_policy_is_checked(scripts):
    """They join by being registered."""
    import _gpu_checks
    from _gpu_context import Context

    context = Context(out=None, work=None, deadline=0.0, dry=False)
    names = [
        key for group in ("operators 0", "operators 1", "operators 2") for key, _ in _gpu_checks.checks(group, context)
    ]
    for axis in ("stem", "norm", "downsample", "mixer", "gate", "channel_mixer", "head"):
        for name in registry.names(axis):
            if (axis, name) != ("channel_mixer", "none"):
                for kind in registry.get(axis, name).kinds:
                    assert f"operator {axis} {name}, {kind}" in names
    policies = [key for key, _ in _gpu_checks.checks("policies", context)]
    assert {key.split()[1] for key in policies} == set(registry.names("quant"))
    assert {key.split()[4] for key in policies if " mixer " in key} == set(registry.names("mixer"))


def test_a_wrong_operator_is_found(scripts, monkeypatch):
    import _gpu_checks
    from _gpu_context import Context

    context = Context(out=None, work=None, deadline=0.0, dry=True)
    assert _gpu_checks._operator("channel_mixer", "swiglu", "causal", context)["right"]
    plain = _gpu_checks._outputs

    def spoilt(axis, module, x):
        factor = 1.0 if x.dtype == torch.float64 else 1.01
        return {name: tensor * factor for name, tensor in plain(axis, module, x).items()}

    monkeypatch.setattr(_gpu_checks, "_outputs", spoilt)
    found = _gpu_checks._operator("channel_mixer", "swiglu", "causal", context)
    assert not found["right"] and found["wrong"]["output"] == pytest.approx(0.01, rel=1e-2)


def test_memory_that_others_hold_makes_nothing_wrong(scripts, monkeypatch):
    import _gpu_right

    monkeypatch.setattr(_gpu_right, "_MEMORY_S", 0.0)
    tries = []

    def once():
        tries.append(1)
        if len(tries) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return {"right": True}

    assert _gpu_right._answered(once)["right"] is True

    def never():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    found = _gpu_right._answered(never)
    assert found["right"] is None and found["sources"] == "out of memory", "the next call asks again"
    lost = _gpu_right._answered(lambda: 1 / 0)
    assert lost["right"] is False and "ZeroDivisionError" in lost["why"]
