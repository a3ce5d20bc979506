"""The checks of `gpu.py`'s step "right", by group: kernels in every form they run in, operators and policies."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _gpu_context import Context
from _gpu_results import CAPTURED, COMPILED
from _kernel_grid import Point, Product, grid, odd, products, tiny
from torch import Tensor, nn

from mixnas.kernels import dispatch
from mixnas.kernels.testing import Case, compare, relative_error
from mixnas.search_space import registry
from mixnas.search_space.architecture import Op
from mixnas.search_space.network import build_op
from mixnas.search_space.operators.quantization.policy import policy_of

Check = tuple[str, Callable[[], dict[str, Any]]]

# Long sums in bfloat16 on a GPU order differently; float32 products are three passes of tf32 in some kernels.
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
_OPERATOR = 5e-4  # of a whole operator in float32
_POLICY = 4e-2  # of an operator in bfloat16


def families(dry: bool) -> list[str]:
    """Families of kernels, those with the slowest references first."""
    found = dict.fromkeys(point.family for point in (tiny() if dry else grid()))
    slow = ("selective_scan", "gated_linear_attention", "neighborhood_attention", "fused_block")
    found |= dict.fromkeys(product.family for product in products(dry))
    return sorted(found, key=lambda family: slow.index(family) if family in slow else len(slow))


def checks(group: str, context: Context) -> Iterator[Check]:
    """A group's checks by name, in the order in which they should run."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if group.startswith("operators "):
        yield from list(_operators(context))[int(group.split()[1]) :: 3]
    elif group == "policies":
        yield from _policies(context)
    elif group == "sanitized":
        yield from _sanitized(context)
    elif group == Product.family:
        yield from _products(context)
    else:
        yield from _kernels(group, context)


# -- kernels -----------------------------------------------------------------------------------------------------------


def _verdict(errors: dict[str, float], allowed: float) -> dict[str, Any]:
    wrong = {name: error for name, error in errors.items() if not error <= allowed}
    found: dict[str, Any] = {"right": not wrong, "error": max(errors.values(), default=0.0), "allowed": allowed}
    return found | ({"wrong": wrong} if wrong else {})


def _kernels(family: str, context: Context) -> Iterator[Check]:
    small = [point for point in (tiny() if context.dry else odd()) if point.family == family]
    large = [point for point in grid() if point.family == family and not context.dry]
    # A dry run tries out how things are checked, of each a little: tests/kernels goes through the kernels themselves.
    for dtype in (torch.bfloat16,) if context.dry and family != "glu" else (torch.bfloat16, torch.float32):
        for point in small:
            name = f"{point.family}: {point.label}, {str(dtype)[6:]}"
            yield f"{name}, eager", functools.partial(_eager, point, dtype, context)
    for point in small[:1]:
        yield f"{point.family}: {point.label}, constant operands", functools.partial(_constant, point, context)
    if context.dry and family != "glu":
        return  # the others take other forms in the same way
    for point in small[-1:]:  # the ordinary one
        yield f"{point.family}: {point.label}{COMPILED}", functools.partial(_compiled, point, context)
        yield f"{point.family}: {point.label}{CAPTURED}", functools.partial(_in_graph, point, context)
    for point in large:
        yield f"{point.family}: {point.label}, large", functools.partial(_large, point, context)


def _products(context: Context) -> Iterator[Check]:
    for product in products(context.dry):
        name = f"{product.family}: {product.label}"
        yield f"{name}, eager", functools.partial(_product, product, "eager", context)
        if not context.dry and product.rows == 196:  # the ordinary one; in a dry run others take these forms
            yield f"{name}{COMPILED}", functools.partial(_product, product, "compiled", context)
            yield f"{name}{CAPTURED}", functools.partial(_product, product, "captured", context)


def _product(product: Product, form: str, context: Context) -> dict[str, Any]:
    """A product of few bits against float64; captured, on operands that it was not captured with."""
    operands = product.draw(context.torch_device)
    with torch.no_grad(), dispatch.backend("triton"):
        if form == "compiled":
            found = torch.compile(product.function, dynamic=False)(*operands)
        else:
            found = product.function(*operands)
        if form == "captured":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found = product.function(*operands)
            for operand, other in zip(operands, product.draw(context.torch_device, seed=1), strict=True):
                operand.copy_(other)
            graph.replay()
    return _verdict({"output": relative_error(found, product.reference(*operands))}, ALLOWED[torch.bfloat16])


def _triton(point: Point) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with dispatch.backend("triton"):
            return point.function(*args, **kwargs)

    return call


def _eager(point: Point, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    found = _verdict(compare(_triton(point), point.reference, point.case, dtype, context.torch_device), ALLOWED[dtype])
    if not found["right"] and not context.dry:
        found["with_fallback"] = _fallback(point, dtype, context)
    return found


def _fallback(point: Point, dtype: torch.dtype, context: Context) -> dict[str, Any]:
    """Whether the launches without wgmma are right, for the compiler that gets it wrong (`kernels.configs`)."""
    before = os.environ.get("MIXNAS_NO_WGMMA")
    os.environ["MIXNAS_NO_WGMMA"] = "1"
    try:
        errors = compare(_triton(point), point.reference, point.case, dtype, context.torch_device)
    finally:
        if before is None:
            del os.environ["MIXNAS_NO_WGMMA"]
        else:
            os.environ["MIXNAS_NO_WGMMA"] = before
    return _verdict(errors, ALLOWED[dtype])


def _constant(point: Point, context: Context) -> dict[str, Any]:
    """Equal operands everywhere: what is exchanged or summed twice shows as another constant."""
    prepare = {name: lambda drawn: torch.full_like(drawn, -0.5) for name in point.case.tensors}
    case = Case(tensors=point.case.tensors, options=point.case.options, prepare=prepare)
    tensors = case.draw(torch.bfloat16, context.torch_device)
    with torch.no_grad():
        got = _first(_triton(point)(**tensors, **case.options))
        with dispatch.backend("reference"):
            want = _first(point.reference(**{n: t.double() for n, t in tensors.items()}, **case.options))
    difference = (got.double() - want.double()).abs().max().item()
    return _verdict({"output": difference / max(want.abs().max().item(), 1.0)}, ALLOWED[torch.bfloat16])


def _compiled(point: Point, context: Context) -> dict[str, Any]:
    backend = "aot_eager" if context.dry else "inductor"
    with dispatch.backend("triton"):
        compiled = torch.compile(point.function, dynamic=False, backend=backend)
        errors = compare(compiled, point.reference, point.case, torch.bfloat16, context.torch_device)
    return _verdict(errors, ALLOWED[torch.bfloat16])


def _first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _step(function: Callable[..., Any], leaves: dict[str, Tensor], options: Any, cotangent: Tensor) -> list[Tensor]:
    output = _first(function(**leaves, **options))
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), cotangent)]


def _in_graph(point: Point, context: Context) -> dict[str, Any]:
    """Capture a training step, give its operands other values, replay it, and compare."""
    device, options = context.torch_device, point.case.options
    drawn = [point.case.draw(torch.bfloat16, device, seed) for seed in (0, 1)]
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in drawn[0].items()}
    with torch.no_grad():
        cotangent = torch.randn_like(_first(_triton(point)(**drawn[0], **options)))
    step = functools.partial(_step, _triton(point), leaves, options, cotangent)
    if context.dry:
        replay, outputs = (lambda: None), []
    else:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = step()
        replay = graph.replay
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(drawn[1][name])
    replay()
    outputs = outputs or step()
    right = {name: tensor.double().requires_grad_() for name, tensor in drawn[1].items()}
    with dispatch.backend("reference"):
        expected = _step(point.reference, right, options, cotangent.double())
    names = ["output", *(f"gradient of {name}" for name in leaves)]
    errors = {n: relative_error(got, want) for n, got, want in zip(names, outputs, expected, strict=True)}
    return _verdict(errors, ALLOWED[torch.bfloat16])


def _large(point: Point, context: Context) -> dict[str, Any]:
    """The whole shape of the benchmark; its first and last example against float64."""
    import kernels as benchmark

    tensors = point.case.draw(torch.bfloat16, context.torch_device)
    return _verdict(benchmark.check(point, _triton(point), tensors, small=False), ALLOWED[torch.bfloat16])


def _sanitized(context: Context) -> Iterator[Check]:
    """Forward and gradients at awkward shapes, for compute-sanitizer to watch; what comes out is checked elsewhere."""

    def run(point: Point) -> dict[str, Any]:
        tensors = point.case.draw(torch.bfloat16, context.torch_device)
        leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
        output = _first(_triton(point)(**leaves, **point.case.options))
        torch.autograd.grad(output, list(leaves.values()), torch.ones_like(output))
        torch.cuda.synchronize()
        return {"right": True}

    seen: dict[str, int] = {}
    for point in odd():
        seen[point.family] = seen.get(point.family, 0) + 1
        if seen[point.family] <= 2:
            yield f"sanitized {point.family}: {point.label}", functools.partial(run, point)


# -- operators ---------------------------------------------------------------------------------------------------------

_DRY_WIDTH = 8  # in a dry run: interpreted kernels take their time
_AXES = ("stem", "norm", "downsample", "mixer", "gate", "channel_mixer", "head")


def _context(kind: str, dry: bool) -> registry.Context:
    sizes = {"image": (2, 2) if dry else (14, 14)}
    return registry.Context(_DRY_WIDTH if dry else 64, sizes.get(kind, (4,) if dry else (96,)), kind)


def _stands(axis: str, name: str, kind: str, dry: bool) -> tuple[Op, registry.Context, registry.Context] | None:
    """An operator with its defaults and the contexts it stands between; None where it cannot."""
    operator = registry.get(axis, name)
    before = _context(kind, dry)
    if axis == "stem":
        before = registry.Context(3, (16, 16) if kind == "image" else before.size, kind)
    options = {knob: value.default for knob, value in operator.knobs.items()}
    size = options.get("kernel_size", 3)
    wanted = dry or (kind != "causal" and size % 2 == 0)
    if size != 3 and wanted and operator.knobs["kernel_size"].normalise(3) is not None:
        options["kernel_size"] = 3
    if operator.check is not None and operator.check(before, options):
        return None
    op = Op(name, tuple(sorted(options.items())))
    if axis not in registry.BETWEEN:
        return op, before, before
    size = operator.build.out_size(before.size, **options)
    return op, before, registry.Context(10 if axis == "head" else 2 * before.width, size, kind)


def _input(axis: str, module: nn.Module, before: registry.Context, context: Context, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    batch = 1 if context.dry else 2
    if axis == "stem" and getattr(module, "takes_tokens", False):
        return torch.randint(before.width, (batch, *before.size), generator=generator).to(device)
    return torch.randn(batch, *before.size, before.width, generator=generator).to(device)


def _call(axis: str, module: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = module(x, lambda t: 0.5 * t + 0.1) if axis == "gate" else module(x)
    return out


def _operators(context: Context) -> Iterator[Check]:
    for axis in _AXES:
        for i, name in enumerate(registry.names(axis)):
            kinds = registry.get(axis, name).kinds
            for kind in (kinds[i % len(kinds)],) if context.dry else kinds:
                if (axis, name) != ("channel_mixer", "none"):
                    check = functools.partial(_operator, axis, name, kind, context)
                    yield f"operator {axis} {name}, {kind}", check


def _operator(axis: str, name: str, kind: str, context: Context) -> dict[str, Any]:
    """Output and gradients of a freshly built operator on the device against itself in float64 on ATen's forms."""
    stands = _stands(axis, name, kind, context.dry)
    if stands is None:
        return {"right": True, "why": "not checked: it does not stand in the context"}
    op, before, after = stands
    torch.manual_seed(0)
    module = build_op(axis, op, before, after).eval()
    exact = copy.deepcopy(module).double()
    module = module.to(context.torch_device)
    x = _input(axis, module, before, context, context.torch_device)
    found = _outputs(axis, module, x)
    with dispatch.backend("aten"):
        right = _outputs(axis, exact, x.cpu().double() if x.is_floating_point() else x.cpu())
    errors = _errors(found, right)
    if kind == "causal" and axis in ("mixer", "channel_mixer") and x.shape[1] > 2:
        errors["sees later tokens"] = _sees_later(axis, module, x)
    return _verdict(errors, _OPERATOR)


def _errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors; of a gradient that is next to nothing (a key's bias), relative to the largest gradient."""
    largest = max((float(t.norm()) for name, t in right.items() if name != "output"), default=0.0)
    errors = {}
    for name, want in right.items():
        own = float(want.norm())
        scale = own / max(own, 0.0 if name == "output" else 1e-3 * largest, 1e-30)
        errors[name] = relative_error(found[name], want) * (scale or 1.0)
    return errors


def _outputs(axis: str, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    output = _call(axis, module, x)
    leaves = {f"gradient of {name}": p for name, p in module.named_parameters() if p.requires_grad}
    leaves |= {"gradient of the input": x} if x.requires_grad else {}
    cotangent = torch.cos(torch.arange(output.numel(), dtype=torch.float64)).view(output.shape).to(output)
    found = {"output": output.detach()}
    if leaves and output.requires_grad:
        gradients = torch.autograd.grad(output, list(leaves.values()), cotangent, allow_unused=True)
        found |= {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
    return found


@torch.no_grad()
def _sees_later(axis: str, module: nn.Module, x: Tensor) -> float:
    half = x.shape[1] // 2
    changed = torch.cat([x[:, :half], x[:, half:] + 1.0], 1)
    before, after = (_call(axis, module, inputs)[:, :half] for inputs in (x, changed))
    return (before - after).abs().max().item()


# -- policies ----------------------------------------------------------------------------------------------------------


def _policies(context: Context) -> Iterator[Check]:
    for quant in registry.names("quant"):
        for axis in ("channel_mixer",) if context.dry else ("mixer", "gate", "channel_mixer"):
            for name in ("mlp", "swiglu") if context.dry else registry.names(axis):
                if (axis, name) == ("channel_mixer", "none"):
                    continue
                kind = registry.get(axis, name).kinds[0]
                yield f"policy {quant} of {axis} {name}", functools.partial(_policy, quant, axis, name, kind, context)


def _policy(quant: str, axis: str, name: str, kind: str, context: Context) -> dict[str, Any]:
    """A prepared and a deployed operator on the device against the same on a CPU."""
    stands = _stands(axis, name, kind, context.dry)
    if stands is None:
        return {"right": True, "why": "not checked: it does not stand in the context"}
    op, before, after = stands
    knobs = {knob: value.default for knob, value in registry.get("quant", quant).knobs.items()}
    policy = policy_of(Op(quant, tuple(sorted(knobs.items()))))
    because = policy.why_not("cuda", "eager")
    if because:
        return {"right": True, "why": f"not checked: {because}"}
    torch.manual_seed(0)
    prepared = policy.prepare(build_op(axis, op, before, after)).eval()
    x = _input(axis, prepared, before, context, "cpu")
    deployed = policy.deploy(copy.deepcopy(prepared))
    errors = {}
    for what, module in (("prepared", prepared), ("deployed", deployed)):
        with torch.no_grad():
            with dispatch.backend("aten"):
                right = _call(axis, module, x)
            there = copy.deepcopy(module).to(context.torch_device)
            errors[what] = relative_error(_call(axis, there, x.to(context.torch_device)), right)
        if not math.isfinite(errors[what]):
            errors[what] = math.inf
    return _verdict(errors, _POLICY)
