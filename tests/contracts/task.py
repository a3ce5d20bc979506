"""What every task keeps to. A test class inherits it and says how its task is made.

class TestMine(TaskContract):
    def make(self) -> Task:
        return Mine()
"""

from __future__ import annotations

import pickle
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixnas.evaluators.tasks.checks import check_task
from mixnas.evaluators.tasks.task import IGNORE, SPLITS, Examples, Task

_SEEN = 24  # examples of a split, at most


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def first_indices(split: Examples) -> Tensor:
    return torch.arange(min(_SEEN, len(split)))


class TaskContract:
    """See the module. Fields that a task may override: `perfect`, for targets that are no classes."""

    make: Callable[[], Task]
    """Makes the task; twice the same one."""

    def perfect(self, task: Task, targets: Tensor) -> Tensor:
        """Outputs that answer every target rightly."""
        return 20.0 * F.one_hot(targets.clamp(min=0), task.io.num_outputs).float()

    def outputs(self, task: Task, targets: Tensor, seed: int) -> Tensor:
        """Outputs of a network that knows nothing."""
        return torch.randn(self.perfect(task, targets).shape, generator=seeded(seed)).requires_grad_()

    def measured(self, task: Task, *batches: tuple[Tensor, Tensor]) -> float:
        metric = task.new_metric()
        for outputs, targets in batches:
            metric.update(outputs, targets)
        return float(metric.result())

    def test_it_is_accepted(self) -> None:
        task = self.make()
        assert check_task(task, task.name) is task

    def test_examples_have_the_shape_that_networks_read(self) -> None:
        task = self.make()
        for name in SPLITS:
            split = getattr(task, name)
            inputs, targets = split.gather(first_indices(split))
            assert len(inputs) == len(targets) == min(_SEEN, len(split))
            assert inputs.shape[1:] == task.io.example(1).shape[1:], name
            assert inputs.dtype == task.io.example(1).dtype

    def test_an_index_is_always_the_same_example(self) -> None:
        """In any order, by itself or among others, again, and in a task made again or sent to another process."""
        task = self.make()
        others = [self.make(), pickle.loads(pickle.dumps(task))]
        for name in SPLITS:
            split = getattr(task, name)
            indices = first_indices(split)
            together = split.gather(indices)
            singly = [split.gather(index[None]) for index in indices]
            backwards = split.gather(indices.flip(0))
            for part in range(2):
                assert torch.equal(together[part], torch.cat([one[part] for one in singly])), name
                assert torch.equal(together[part], backwards[part].flip(0)), name
                for other in others:
                    assert torch.equal(together[part], getattr(other, name).gather(indices)[part]), name

    def test_no_example_is_in_two_splits(self) -> None:
        task = self.make()
        rows = [getattr(task, name).gather(first_indices(getattr(task, name)))[0].flatten(1) for name in SPLITS]
        distinct = [torch.unique(part, dim=0) for part in rows]
        assert len(torch.unique(torch.cat(distinct), dim=0)) == sum(map(len, distinct))

    def test_losses_are_finite_and_have_gradients(self) -> None:
        task = self.make()
        x, y = task.train.gather(first_indices(task.train))
        _, moved = task.augment(x, y, seeded(0))
        for loss_of, targets in ((task.loss, y), (task.training_loss, moved)):
            outputs = self.outputs(task, y, seed=1)
            loss = loss_of(outputs, targets)
            assert loss.ndim == 0 and bool(torch.isfinite(loss))
            (gradient,) = torch.autograd.grad(loss, outputs)
            assert bool(torch.isfinite(gradient).all()) and bool(gradient.any())

    def test_a_perfect_answer_is_better_than_a_random_one(self) -> None:
        task = self.make()
        _, y = task.validation.gather(first_indices(task.validation))
        perfect, random = self.perfect(task, y), self.outputs(task, y, seed=2).detach()
        assert task.loss(perfect, y) < task.loss(random, y)
        best, other = self.measured(task, (perfect, y)), self.measured(task, (random, y))
        assert best > other if task.direction == "max" else best < other

    def test_the_metric_is_of_the_split_and_not_of_its_batches(self) -> None:
        task = self.make()
        _, y = task.validation.gather(first_indices(task.validation))
        outputs = self.outputs(task, y, seed=3).detach()
        cuts = [1, len(y) // 2, len(y) - 1 - len(y) // 2]
        parts = list(zip(outputs.split(cuts), y.split(cuts), strict=True))
        assert abs(self.measured(task, (outputs, y)) - self.measured(task, *parts)) < 1e-6

    def test_augmentation_keeps_shapes_and_draws_from_its_generator_alone(self) -> None:
        task = self.make()
        x, y = task.train.gather(first_indices(task.train))
        before, state = (x.clone(), y.clone()), torch.get_rng_state()
        first, again, other = (task.augment(x, y, seeded(seed)) for seed in (5, 5, 6))
        assert torch.equal(state, torch.get_rng_state())
        assert torch.equal(x, before[0]) and torch.equal(y, before[1])
        assert first[0].shape == x.shape and first[0].dtype == x.dtype and len(first[1]) == len(y)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        if not torch.equal(first[0], x):  # it changes something: with another seed something else
            assert not torch.equal(first[0], other[0])

    def test_distillation_goes_to_the_pupil_alone(self) -> None:
        task = self.make()
        _, y = task.train.gather(first_indices(task.train))
        pupil, teacher = self.outputs(task, y, seed=7), self.outputs(task, y, seed=8)
        loss = task.distillation(pupil, teacher, y)
        if loss is not None:
            assert bool(torch.isfinite(loss))
            loss.backward()
            assert pupil.grad is not None and bool(pupil.grad.any())
            assert teacher.grad is None


class DenseTaskContract(TaskContract):
    """Of a task whose targets are a function of the inputs at each position, so that both can be compared."""

    def truth(self, inputs: Tensor) -> Tensor:
        """The targets of inputs, augmented or not; it leaves out what the task does not say (`IGNORE`)."""
        raise AssertionError(f"{type(self).__name__} says no truth")

    def test_targets_move_along_with_the_inputs(self) -> None:
        task = self.make()
        x, y = task.train.gather(first_indices(task.train))
        assert bool((y != IGNORE).any())
        for seed in (None, 9, 10):
            inputs, targets = (x, y) if seed is None else task.augment(x, y, seeded(seed))
            assert torch.equal(torch.where(targets == IGNORE, IGNORE, self.truth(inputs)), targets)
