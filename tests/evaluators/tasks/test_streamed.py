"""A streamed task with dense targets keeps the contract; one whose targets stay behind does not."""

import pytest
import torch
from torch import Tensor

from mixnas.evaluators.tasks.task import Task
from tests.contracts.task import DenseTaskContract
from tests.evaluators.streamed import HalfFlipped, Signs


class TestSigns(DenseTaskContract):
    def make(self) -> Task:
        return Signs()

    def truth(self, inputs: Tensor) -> Tensor:
        return (inputs[..., 0] > 0).long()


def test_targets_that_stay_behind_are_caught(monkeypatch) -> None:
    contract = TestSigns()
    contract.test_targets_move_along_with_the_inputs()
    monkeypatch.setattr(contract, "make", HalfFlipped, raising=False)
    with pytest.raises(AssertionError):
        contract.test_targets_move_along_with_the_inputs()


def test_the_metric_is_the_mean_overlap_of_all_positions() -> None:
    metric = Signs().new_metric()
    outputs = torch.tensor([[[0.0, 1], [1, 0]], [[1, 0], [1, 0]]])  # 1 0, 0 0
    for i, targets in enumerate(([[1, 1]], [[0, 0]])):
        metric.update(outputs[i : i + 1], torch.tensor(targets))
    assert metric.result() == pytest.approx((2 / 3 + 1 / 2) / 2)
