"""What every operator keeps to. A test class inherits it and gives `axis`; the operators are those registered there."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixnas.search_space import registry
from mixnas.search_space.architecture import Op
from mixnas.search_space.cost import op_cost
from mixnas.search_space.formats.torch_export import exported
from mixnas.search_space.operators.folding import fold
from mixnas.search_space.operators.layers import projections
from mixnas.search_space.operators.quantization.policy import policy_of, stored_bytes
from mixnas.search_space.registry import BETWEEN
from mixnas.search_space.supernet import slice_of, slicing_rules

from .cases import WIDTH, Case, Whole, cases, for_each_case, grouped

EPSILON = 1e-6
"""Of a difference that stands for a derivative."""

GRIDS = ((1, 1), (5, 7), (3, 1), (1,), (13,))
"""Beside those of the cases."""


class OperatorContract:
    """See the module.

    Attributes:
        axis: Where the operators stand.
        only: Name of the one that is looked at; all that are registered there where it is empty.
        multiplied_otherwise: Operators whose form on a CPU multiplies more than is counted.
    """

    axis: str
    only: str = ""
    multiplied_otherwise: ClassVar[frozenset[str]] = frozenset()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """`case`: an operator's, with each knob at several values; `plain`: once for each kind of task. See `Group`."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", grouped(self._cases(knobs=True)), ids=str)
        if "plain" in metafunc.fixturenames:
            metafunc.parametrize("plain", grouped(self._cases(knobs=False)), ids=str)

    def _cases(self, **settings: Any) -> list[Case]:
        return [case for case in cases(self.axis, **settings) if self.only in ("", case.op.name)]

    @for_each_case
    def test_answers_in_its_shape_with_gradients_to_every_parameter(self, case: Case):
        whole = Whole(case, case.build().train())
        x = case.example(3)
        if x.is_floating_point():
            x.requires_grad_()
        y = whole(x)
        assert y.shape == (3, *case.shape) and y.dtype == torch.float32
        y.square().sum().backward()
        leaves = dict(whole.named_parameters()) | ({"its input": x} if x.requires_grad else {})
        missing = [name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.isfinite().all()]
        assert not missing, f"no finite gradient reaches {missing}"

    @for_each_case
    def test_evaluation_is_the_same_again_and_of_each_example_by_itself(self, case: Case):
        module = case.build().eval()
        whole, x = Whole(case, module), case.example(3)
        state, generator = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
        with torch.no_grad():
            first, second, alone = whole(x), whole(x), whole(x[:1])
        assert torch.equal(first, second) and torch.equal(torch.random.get_rng_state(), generator)
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
        torch.testing.assert_close(alone, first[:1], rtol=1e-5, atol=1e-6)

    @for_each_case
    def test_a_causal_one_sees_no_later_token(self, case: Case):
        one_answer = case.after.size == () or getattr(registry.get(case.axis, case.op.name).build, "one_answer", False)
        if case.before.kind != "causal" or one_answer:  # to all tokens
            return
        whole, x = Whole(case, case.build().eval()), case.example(2)
        changed = x.clone()
        changed[:, 4:] = (x[:, 4:] + 1) % case.before.width
        with torch.no_grad():
            before, after = whole(x), whole(changed)
        torch.testing.assert_close(after[:, :4], before[:, :4], rtol=1e-6, atol=1e-6)
        if self.axis != "norm":
            assert not torch.equal(after[:, 4:], before[:, 4:])

    @for_each_case
    def test_is_counted_exactly(self, case: Case):
        module = case.build().eval()
        counted = op_cost(case.axis, case.op, None, case.before, case.after, case.tokens)
        assert counted.params == sum(parameter.numel() for parameter in module.parameters())
        assert counted.weight_bytes == stored_bytes(fold(copy.deepcopy(module)))
        assert not any(hasattr(part, "own_macs") for part in module.modules())
        if case.op.name not in self.multiplied_otherwise:
            # The math backend, because torch's counter does not know the fused attention of a CPU.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
                Whole(case, module)(case.example(1))
            assert counter.get_total_flops() == 2 * counted.macs

    def test_smaller_ones_are_slices_of_one_store(self):
        """Widths and knobs of an operator share tensors in a super-network: names, dimensions and extents fit."""
        found: dict[tuple[str, str], list[Case]] = {}
        for case in [*self._cases(knobs=True), *self._cases(knobs=True, width=2 * WIDTH)]:
            found.setdefault((case.op.name, case.before.kind), []).append(case)
        for variants in found.values():
            store: dict[str, torch.Tensor] = {}
            for case in variants:
                for name, tensor, _ in slicing_rules(case.build()):
                    extents = store.get(name, tensor).shape
                    assert len(extents) == tensor.dim(), f"{case}: {name}"
                    store[name] = torch.randn([max(pair) for pair in zip(extents, tensor.shape, strict=True)])
            for case in variants:
                module = case.build()
                state = {n: slice_of(store[n], tuple(t.shape), rule) for n, t, rule in slicing_rules(module)}
                assert module.load_state_dict(state, strict=True)

    def test_its_tensors_have_the_same_names_wherever_it_stands(self):
        other = {"image": (8, 4), "sequence": (10,), "causal": (10,)}
        named: dict[str, set[str]] = {str(c): set(c.build().state_dict()) for c in self._cases(knobs=True)}
        for size in dict.fromkeys(other.values()):
            for case in self._cases(knobs=True, width=2 * WIDTH, size=size):
                assert set(case.build().state_dict()) == named.get(str(case), set(case.build().state_dict()))

    @for_each_case
    def test_gradients_are_those_of_differences(self, case: Case):
        """Along one direction through all leaves at once, in float64 and as it is trained."""
        whole = Whole(case, case.build().double().train())
        generator = torch.Generator().manual_seed(2)
        x = case.example(3) if case.tokens else case.example(3).double().requires_grad_()
        leaves = [*whole.parameters()] + ([] if case.tokens else [x])
        weights = torch.randn(3, *case.shape, dtype=torch.float64, generator=generator)
        along = [torch.randn(leaf.shape, dtype=torch.float64, generator=generator) for leaf in leaves]

        def value() -> torch.Tensor:
            return (whole(x) * weights).sum()

        grads = torch.autograd.grad(value(), leaves) if leaves else ()
        expected = sum(((g * d).sum() for g, d in zip(grads, along, strict=True)), torch.zeros(()))
        values = []
        with torch.no_grad():
            for step in (EPSILON, -2 * EPSILON):
                for leaf, direction in zip(leaves, along, strict=True):
                    leaf.add_(step * direction)
                values.append(value())
        if leaves:
            found = (values[0] - values[1]) / (2 * EPSILON)
            scale = max(1.0, *(float((g * d).abs().sum()) for g, d in zip(grads, along, strict=True)))
            assert abs(float(found - expected)) < 1e-5 * scale, f"{float(found)} by differences, {float(expected)}"

    def test_stands_on_any_grid(self):
        """Odd, prime, of one token; in its own size, with finite gradients, each example by itself."""
        if self.axis in BETWEEN:  # their own tests say which grids they halve
            return
        for size in GRIDS:
            for case in self._cases(knobs=False, size=size):
                whole = Whole(case, case.build())
                x = case.example(3).requires_grad_()
                y = whole.train()(x)
                y.square().sum().backward()
                assert y.shape == (3, *case.shape) and y.isfinite().all(), str(case)
                leaves = [x, *whole.parameters()]
                assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves), str(case)
                with torch.no_grad():
                    together, alone = whole.eval()(x), whole(x[1:2])
                torch.testing.assert_close(alone, together[1:2], rtol=1e-5, atol=1e-5, msg=str(case))

    @for_each_case
    def test_runs_in_bfloat16(self, plain: Case):
        whole, x = Whole(plain, plain.build().eval()), plain.example(2)
        with torch.no_grad():
            exact = whole(x)
            rounded = whole.bfloat16()(x if plain.tokens else x.bfloat16()).float()
        assert rounded.shape == exact.shape and rounded.isfinite().all()
        assert (rounded - exact).norm() <= 0.1 * exact.norm() + 1e-3

    @for_each_case
    def test_a_step_along_its_gradients_lowers_a_loss(self, plain: Case):
        whole, x = Whole(plain, plain.build().train()), plain.example(4)
        target = torch.randn(4, *plain.shape, generator=torch.Generator().manual_seed(3))
        parameters = list(whole.parameters())
        if not parameters:
            return
        before = (whole(x) - target).square().mean()
        grads = torch.autograd.grad(before, parameters)
        assert any(grad.abs().max() > 0 for grad in grads)
        step = 1e-3 / torch.stack([grad.norm() for grad in grads]).norm()
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.sub_(step * grad)
            assert (whole(x) - target).square().mean() < before

    @for_each_case
    def test_policies_leave_alone_what_has_no_projections(self, plain: Case):
        """What has some is in the policies' own contract."""
        module = plain.build().eval()
        if any(projections(module)) or self.axis not in ("mixer", "gate", "channel_mixer"):
            return
        x = plain.example(2)
        for name in registry.names("quant"):
            knobs = {knob: found.default for knob, found in registry.get("quant", name).knobs.items()}
            policy = policy_of(Op(name, tuple(sorted(knobs.items()))))
            treated = policy.deploy(policy.prepare(copy.deepcopy(module)))
            assert policy.weight_bytes(module) == stored_bytes(module)
            with torch.no_grad():
                assert torch.equal(Whole(plain, treated)(x), Whole(plain, module)(x)), name

    @pytest.mark.slow
    @for_each_case
    def test_is_exported_for_any_number_of_inputs(self, plain: Case):
        whole = Whole(plain, plain.build().eval())
        program = exported(whole, plain.example(2), dynamic_batch=True).module()
        for x in (plain.example(1), plain.example(5)):
            with torch.no_grad():
                torch.testing.assert_close(program(x), whole(x), rtol=1e-5, atol=1e-6)
