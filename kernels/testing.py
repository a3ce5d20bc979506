"""The contract of an operator family, written once: outputs and gradients against the float64 reference.

Tests inherit `KernelContract` and supply `cases`; the benchmarks use `compare` before they print a figure.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mixnas.kernels import dispatch

# Relative error of the norm, ||out - reference|| / ||reference||, by the dtype of the operands.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape and set of options of an operator.

    Attributes:
        tensors: Shape of each tensor operand by its argument's name; drawn from a normal distribution.
        options: The other arguments.
        prepare: Turns the drawn tensor of a name into a valid operand (a decay into (0, 1), say), in float32.
    """

    tensors: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)

    def draw(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
        """Draw the operands, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {}
        for name, shape in self.tensors.items():
            values = torch.randn(shape, generator=generator)
            drawn[name] = self.prepare.get(name, lambda same: same)(values).to(dtype).to(device)
        return drawn


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ||actual - expected|| / ||expected|| in float64; infinite where `actual` is not finite."""
    difference = actual.detach().double().cpu() - expected.detach().double().cpu()
    if not torch.isfinite(difference).all():
        return float("inf")
    scale = expected.detach().double().norm().item()
    return difference.norm().item() / scale if scale else difference.norm().item()


def _run(
    function: Callable[..., Any], tensors: dict[str, torch.Tensor], options: Mapping[str, Any], seed: int
) -> dict[str, torch.Tensor]:
    """Return outputs and gradients (under a random cotangent) by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    # Drawn in float32 and rounded to bfloat16, so that each dtype multiplies by the same cotangent.
    cotangents = [
        torch.randn(output.shape, generator=generator).bfloat16().to(device=output.device, dtype=output.dtype)
        for output in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return found | {f"gradient of {name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def compare(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, float]:
    """Return the relative error of each output and gradient of `function` against `reference` in float64.

    Both get the same operands, drawn and rounded to `dtype`, and the same random cotangents.
    """
    tensors = case.draw(dtype, device, seed)
    actual = _run(function, tensors, case.options, seed + 1)
    with dispatch.backend("reference"):
        expected = _run(reference, {name: t.double() for name, t in tensors.items()}, case.options, seed + 1)
    for name, value in actual.items():
        assert value.shape == expected[name].shape, f"{name}: {tuple(value.shape)}, not {tuple(expected[name].shape)}"
    return {name: relative_error(value, expected[name]) for name, value in actual.items()}


class KernelContract:
    """What every operator family must satisfy; inherit as `TestX` and set the attributes.

    Attributes:
        function: The public function (wrapped in `staticmethod`).
        reference: Its plain PyTorch truth (wrapped in `staticmethod`).
        operator: Full name of the forward operator, such as "mixnas::glu".
        cases: The shapes, by a short name.
        registered: The shape whose registration is checked: each kernel runs a dozen times. None: the first case.
        limits: Overrides of `LIMITS` for named results: `{"gradient of weight": 2.0}` is a factor on the limit.
    """

    function: Callable[..., Any]
    reference: Callable[..., Any]
    operator: str
    cases: Mapping[str, Case]
    registered: Case | None = None
    limits: Mapping[str, float] = {}

    def _check(self, case: Case, dtype: torch.dtype, implementation: str) -> None:
        with dispatch.backend(implementation):
            errors = compare(self.function, self.reference, case, dtype)
        allowed = {name: LIMITS[dtype] * self.limits.get(name, 1.0) for name in errors}
        wrong = {name: error for name, error in errors.items() if not error <= allowed[name]}
        assert not wrong, f"{implementation} in {dtype}: {wrong}, allowed {allowed}"

    def test_triton_float32(self, case: Case) -> None:
        self._check(case, torch.float32, "triton")

    def test_triton_bfloat16(self, case: Case) -> None:
        self._check(case, torch.bfloat16, "triton")

    def test_aten_float32(self, case: Case) -> None:
        self._check(case, torch.float32, "aten")

    def test_operator_registration(self) -> None:
        """The schema, the fake and the autograd agree with what the operator does (`torch.library.opcheck`)."""
        case = self.registered or next(iter(self.cases.values()))
        recorded: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                if func.namespace == "mixnas":
                    recorded.append((func, args, kwargs or {}))
                return func(*args, **(kwargs or {}))

        with dispatch.backend("triton"):
            leaves = {name: tensor.requires_grad_() for name, tensor in case.draw(torch.float32).items()}
            with Recorder():
                outputs = self.function(**leaves, **case.options)
                assert [func.name() for func, _, _ in recorded] == [self.operator]
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(output) for output in outputs])
            for func, args, kwargs in recorded[1:]:
                torch.library.opcheck(func, args, kwargs, test_utils="test_faketensor")
            func, args, kwargs = recorded[0]
            operands = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in args]
            tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
            torch.library.opcheck(func, tuple(operands), kwargs, test_utils=tests)

    def test_export_sees_one_operator(self) -> None:
        case = next(iter(self.cases.values()))
        tensors, function = case.draw(torch.float32), self.function

        class Call(torch.nn.Module):
            def forward(self, **operands: torch.Tensor) -> Any:
                return function(**operands, **case.options)

        with dispatch.backend("triton"), torch.no_grad():
            program = torch.export.export(Call(), (), tensors)
            calls = [str(node.target) for node in program.graph.nodes if "mixnas" in str(node.target)]
            assert calls == [f"{self.operator.replace('::', '.')}.default"]
            exported, eager = program.module()(**tensors), function(**tensors, **case.options)
            torch.testing.assert_close(exported, eager)
