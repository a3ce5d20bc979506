"""The base of tasks: what a subclass may leave out, and what it may override."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.tasks.task import IGNORE, MeanScore, Split, Task, asked, distillation_loss


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain(Task):
    name = "plain"


class OwnLoss(Task):
    name = "own_loss"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.mean(-1) - targets).square().mean()


class FormerLoss(Task):
    """With the signature that a loss had when smoothing was a setting of the training."""

    name = "former_loss"

    def loss(self, outputs: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return 3 * super().loss(outputs, targets, label_smoothing)


class OwnTrainingLoss(Task):
    name = "own_training_loss"

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets) + outputs.square().mean()


OUTPUTS, TARGETS = drawn(6, 4), torch.tensor([0, 1, 2, 3, 3, IGNORE])


def test_a_classification_is_judged_without_smoothing_and_trained_with_it() -> None:
    task = Plain()
    torch.testing.assert_close(task.loss(OUTPUTS, TARGETS), F.cross_entropy(OUTPUTS, TARGETS))
    smoothed = F.cross_entropy(OUTPUTS, TARGETS, label_smoothing=0.1)
    torch.testing.assert_close(task.training_loss(OUTPUTS, TARGETS), smoothed)
    torch.testing.assert_close(
        Digits(label_smoothing=0.3).training_loss(OUTPUTS, TARGETS),
        F.cross_entropy(OUTPUTS, TARGETS, label_smoothing=0.3),
    )
    honest = Digits(label_smoothing=0)
    assert torch.equal(honest.training_loss(OUTPUTS, TARGETS), honest.loss(OUTPUTS, TARGETS))


def test_a_loss_of_ones_own_is_what_training_minimises() -> None:
    own = OwnLoss()
    assert torch.equal(own.training_loss(OUTPUTS, TARGETS), own.loss(OUTPUTS, TARGETS))
    torch.testing.assert_close(
        FormerLoss().training_loss(OUTPUTS, TARGETS), 3 * F.cross_entropy(OUTPUTS, TARGETS, label_smoothing=0.1)
    )
    torch.testing.assert_close(FormerLoss().loss(OUTPUTS, TARGETS), 3 * F.cross_entropy(OUTPUTS, TARGETS))
    task = OwnTrainingLoss()
    torch.testing.assert_close(
        task.training_loss(OUTPUTS, TARGETS), F.cross_entropy(OUTPUTS, TARGETS) + OUTPUTS.square().mean()
    )


def test_the_default_metric_averages_score_over_examples() -> None:
    class Scored(Task):
        def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs.mean()  # a tensor is a number too

    metric = Scored().new_metric()
    metric.update(torch.ones(3, 2), torch.zeros(3))
    metric.update(torch.zeros(1, 2), torch.zeros(1))
    assert metric.result() == 0.75
    assert isinstance(metric.result(), float)


def test_score_is_a_mean_over_examples_of_the_labelled_share() -> None:
    outputs = torch.zeros(2, 3, 18)
    outputs[:, :, 5] = 1.0
    targets = torch.tensor([[5, IGNORE, IGNORE], [5, 6, IGNORE]])
    assert Plain().score(outputs, targets) == 0.75
    assert MeanScore(Plain().score)._score(outputs[:, 0], targets[:, 0]) == 1.0


def test_where_nothing_is_labelled_the_loss_is_nothing() -> None:
    outputs = drawn(2, 3, 4).requires_grad_()
    for loss in (Plain().loss, Plain().training_loss):
        value = loss(outputs, torch.full((2, 3), IGNORE))
        value.backward()
        assert value.item() == 0 and outputs.grad.abs().max() == 0


def test_what_is_asked_of_a_batch() -> None:
    outputs = drawn(3, 2, 4)
    targets = torch.tensor([[1, IGNORE], [IGNORE, IGNORE], [2, 3]])
    left, answers, counts = asked(outputs, targets)
    assert torch.equal(left, outputs[[0, 2]]) and torch.equal(answers, targets[[0, 2]]) and counts == 3
    assert asked(outputs, torch.full((3, 2), IGNORE))[2] == 0
    assert asked(drawn(3, 1), torch.tensor([IGNORE, 1, 2]))[2] == 3  # a number to be met, and no class
    assert asked(drawn(3, 2, 4), drawn(3, 2, 4))[2] == 3


def test_a_split_gathers_rows_and_moves() -> None:
    split = Split(drawn(5, 2), torch.arange(5))
    inputs, targets = split.gather(torch.tensor([3, 0]))
    assert torch.equal(inputs, split.inputs[[3, 0]]) and targets.tolist() == [3, 0]
    moved = split.to("meta")
    assert (len(moved), moved.inputs.device.type, moved.targets.device.type) == (5, "meta", "meta")


def test_distillation_is_the_soft_cross_entropy_over_what_is_labelled() -> None:
    outputs, teacher = drawn(3, 5, 7, seed=1), drawn(3, 5, 7, seed=2)
    targets = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
    targets[0] = targets[2, 1:] = IGNORE
    labelled = (targets != IGNORE).flatten()
    expected = F.cross_entropy(outputs.flatten(0, 1)[labelled], teacher.flatten(0, 1)[labelled].softmax(-1))
    torch.testing.assert_close(distillation_loss(outputs, teacher, targets), expected)
    distilled = Plain().distillation(outputs, teacher, targets)
    assert distilled is not None
    torch.testing.assert_close(distilled, expected)


@pytest.mark.parametrize(
    ("outputs", "targets"),
    [
        (drawn(4, 3), drawn(4, 3)),  # numbers
        (drawn(4, 1), torch.tensor([0, 1, 1, 0])),  # one output is no distribution
        (drawn(4, 3), torch.tensor([[0, 1, 1]] * 4)),  # several labels an example
    ],
)
def test_only_classes_are_distilled(outputs: Tensor, targets: Tensor) -> None:
    assert Plain().distillation(outputs, outputs, targets) is None
