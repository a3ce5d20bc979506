"""What every quantization policy keeps to, whatever operator it is given. A test class inherits it and gives `quant`.

The policy must be registered, for good or by a fixture of the test.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mixnas.search_space import registry
from mixnas.search_space.architecture import Op
from mixnas.search_space.cost import op_cost
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.formats.safetensors import load_tensors, save_tensors
from mixnas.search_space.operators.folding import fold
from mixnas.search_space.operators.layers import projections
from mixnas.search_space.operators.quantization.policy import policy_of, stored_bytes

from .cases import Case, Whole, cases, for_each_case, grouped, refused

BRANCH_AXES = ("mixer", "gate", "channel_mixer")


@cache
def quantizable() -> list[Case]:
    """Every operator of the branches that has projections."""
    found = itertools.chain.from_iterable(cases(axis, knobs=False) for axis in BRANCH_AXES)
    return [case for case in found if any(projections(case.build()))]


def answers(case: Case, module: nn.Module) -> Tensor:
    """In evaluation mode, on the case's example."""
    with torch.no_grad():
        return Whole(case, module.eval())(case.example(3))


class PolicyContract:
    """See the module.

    Attributes:
        quant: The policy, as an architecture names it.
        share: How far the deployed operator may be from the prepared one, as a share of the largest output.
        changes: Whether it changes what an operator computes at all.
        every_shape: Whether it takes any projection; otherwise those that it says it does not take are left out.
        every_kind: Whether each operator is tried in each kind of task that it serves, or in one.
    """

    quant: Op
    share: float = 1e-5
    changes: bool = True
    every_shape: bool = True
    every_kind: bool = True

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """`case`: those of an operator of the branches that has projections; see `Group`."""
        if "case" in metafunc.fixturenames:
            found = [case for case in quantizable() if not self._refuses(case)]
            if not metafunc.cls.every_kind:
                found = list({(case.axis, case.op.name): case for case in found}.values())
            metafunc.parametrize("case", grouped(found, together=8), ids=str)

    @classmethod
    def _refuses(cls, case: Case) -> bool:
        return cls.every_shape is False and bool(refused(case.axis, case.op, case.before, cls.quant))

    def test_what_it_refuses_is_refused_by_name(self):
        left = [case for case in quantizable() if self._refuses(case)]
        assert len(left) < len(quantizable()) / 3
        for case in left:
            with pytest.raises(ConfigError, match="cannot take"):
                policy_of(self.quant).prepare(case.build())

    @for_each_case
    def test_prepared_layers_keep_parameters_and_names(self, case: Case):
        module = case.build()
        before = dict(module.named_parameters())
        module = policy_of(self.quant).prepare(module)
        after = dict(module.named_parameters())
        assert all(after[name] is parameter for name, parameter in before.items())
        added = module.state_dict().keys() - case.build().state_dict().keys()
        assert all(self.quant.name in name.split(".") for name in added), f"not named after the policy: {added}"

    @for_each_case
    def test_gradients_flow_to_the_original_parameters(self, case: Case):
        def reached(module: nn.Module) -> set[str]:
            Whole(case, module.train())(case.example(3)).square().sum().backward()
            return {name for name, p in module.named_parameters() if p.grad is not None and p.grad.isfinite().all()}

        plain = case.build()
        assert reached(plain) == {name for name, _ in plain.named_parameters()}
        prepared = case.build(self.quant)
        assert reached(prepared) == {name for name, _ in prepared.named_parameters()}

    @for_each_case
    def test_what_is_deployed_computes_what_was_prepared(self, case: Case):
        prepared = case.build(self.quant)
        expected = answers(case, prepared)
        found = answers(case, policy_of(self.quant).deploy(copy.deepcopy(prepared)))
        assert (found - expected).abs().max() <= self.share * expected.abs().max()
        differs = not torch.equal(expected, answers(case, case.build()))
        assert differs == self.changes

    @for_each_case
    def test_only_projections_are_stored_otherwise(self, case: Case):
        inside = {f"{path}." if path else "" for path, _ in projections(case.build())}
        deployed = policy_of(self.quant).deploy(case.build(self.quant)).state_dict()
        for name, tensor in case.build().state_dict().items():
            if not name.startswith(tuple(inside)):
                assert torch.equal(deployed[name], tensor) and deployed[name].dtype == tensor.dtype

    @for_each_case
    def test_bytes_are_those_of_the_deployed_state(self, case: Case):
        policy, prepared = policy_of(self.quant), case.build(self.quant)
        before = {name: tensor.clone() for name, tensor in prepared.state_dict().items()}
        counted = policy.weight_bytes(prepared)
        assert all(torch.equal(tensor, before[name]) for name, tensor in prepared.state_dict().items())
        exported = stored_bytes(policy.deploy(fold(copy.deepcopy(prepared))))
        assert exported == op_cost(case.axis, case.op, self.quant, case.before, case.after).weight_bytes
        assert counted == stored_bytes(policy.deploy(prepared))

    @for_each_case
    def test_the_deployed_state_is_saved_and_loaded(self, case: Case, tmp_path: Path):
        policy = policy_of(self.quant)
        deployed, other = (policy.deploy(case.build(self.quant, seed)) for seed in (0, 1))
        assert not torch.equal(answers(case, deployed), answers(case, other))
        save_tensors(tmp_path / "state", deployed.state_dict(), {"format": "test"})
        tensors, _ = load_tensors(tmp_path / "state", "test")
        types = {name: tensor.dtype for name, tensor in other.state_dict().items()}
        assert types == {name: tensor.dtype for name, tensor in tensors.items()}
        other.load_state_dict(tensors, strict=True)
        assert torch.equal(answers(case, deployed), answers(case, other))

    def test_it_is_a_frozen_value_made_from_its_knobs(self):
        registered = registry.get("quant", self.quant.name)
        policy = registered.build(**self.quant.options)
        assert policy == policy_of(self.quant) and hash(policy) == hash(policy_of(self.quant))
        assert {field.name for field in dataclasses.fields(policy)} == set(registered.knobs) == set(self.quant.options)
        assert registered.build.__dataclass_params__.frozen

    def test_it_says_where_it_does_not_run(self):
        for device, runtime in itertools.product(("cpu", "cuda"), ("eager", "compiled", "onnxruntime", "graph")):
            assert isinstance(policy_of(self.quant).why_not(device, runtime), str)
            assert isinstance(policy_of(self.quant).instead(device, runtime), str)
