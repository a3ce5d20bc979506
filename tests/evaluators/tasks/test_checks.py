"""The check of a user's own task."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mixnas.evaluators.tasks.checks import check_task
from mixnas.evaluators.tasks.digits import Digits
from mixnas.evaluators.tasks.task import IGNORE, RESERVED_METRICS, Split, Task
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.units import IOSpec
from tests.evaluators.streamed import Noise, Signs


class TwoClouds(Task):
    """Two separable clouds of points, as a user would write a task."""

    name = "clouds"

    def __init__(self, *, size: int = 40, spread: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(size) % 2
        inputs = spread * torch.randn(size, 4, 3, generator=generator) + targets[:, None, None]
        self.io = IOSpec(kind="sequence", size=(4,), in_features=3, num_outputs=2)
        self.train = self.validation = self.test = Split(inputs, targets)


def changed(**attributes: object) -> Task:
    """The task with other methods or attributes, as a subclass would have them."""
    return type("Changed", (TwoClouds,), attributes)()


def with_fields(**fields: object) -> Task:
    task = TwoClouds()
    for name, value in fields.items():
        setattr(task, name, value)
    return task


def test_name_io_and_splits_are_enough() -> None:
    task = TwoClouds()
    assert check_task(task, "clouds") is task


def test_a_task_that_lacks_parts_is_refused_with_all_of_them() -> None:
    bare = SimpleNamespace(name="bare", metric="accuracy", loss=lambda outputs, targets: outputs.mean())
    expected = r"lacks io, direction, train, validation, test, training_loss\(\), new_metric\(\), augment\(\), distill"
    with pytest.raises(ConfigError, match=expected):
        check_task(bare, "bare")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"direction": "up"}, "direction is 'up'"),
        ({"metric": "params"}, "metric is 'params'"),
        ({"metric": "two words"}, "metric is 'two words'"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, it must be a share from 0 to below 1"),
        ({"label_smoothing": True}, "label_smoothing is True"),
        ({"io": (4, 3)}, "io is tuple"),
        ({"test": Split(torch.zeros(2, 4, 2), torch.zeros(2, dtype=torch.long))}, r"test: an input has shape \(4, 2\)"),
        ({"validation": Split(torch.zeros(2, 4, 3), torch.zeros(3))}, "validation has 2 inputs and 3 targets"),
        ({"train": (torch.zeros(2, 4, 3), torch.zeros(2))}, r"train is tuple. It must be .*Split\(inputs, targets\)"),
        ({"train": Split(torch.zeros(2, 4, 3, dtype=torch.long), torch.zeros(2))}, "must be floating point"),
        ({"train": Split(torch.full((2, 4, 3), torch.nan), torch.zeros(2))}, "NaN"),
        ({"train": Split(torch.zeros(2, 4, 3), torch.full((2,), 7))}, r"loss on outputs float32 \(2, 2\) .* fails: "),
        (
            {
                "io": IOSpec("causal", (4,), 9, 2, "pool", True),
                "train": Split(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)),
            },
            "inputs are torch.float32, but io says tokens, which are integers",
        ),
        (
            {"io": IOSpec("sequence", (4,), 3, 2, "token")},
            r"a target has shape \(\), .*'token' answers on the grid \(4,\)",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_task(with_fields(**fields), "clouds")


@pytest.mark.parametrize("metric", RESERVED_METRICS)
def test_no_metric_is_called_as_an_evaluators_other_results(metric: str) -> None:
    with pytest.raises(ConfigError, match=f"metric is '{metric}'"):
        check_task(with_fields(metric=metric), "clouds")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_inputs_of_another_precision_are_refused(dtype: torch.dtype) -> None:
    split = TwoClouds().validation
    with pytest.raises(ConfigError, match=rf"validation: inputs are {dtype}, they must be floating point, float32"):
        check_task(with_fields(validation=Split(split.inputs.to(dtype), split.targets)), "clouds")


def test_inputs_that_require_gradients_are_refused() -> None:
    split = TwoClouds().train
    with pytest.raises(ConfigError, match=r"train: inputs or targets require gradients.* Detach them"):
        check_task(with_fields(train=Split(split.inputs.clone().requires_grad_(), split.targets)), "clouds")


def test_tokens_are_integers_that_can_be_looked_up() -> None:
    class Tokens(TwoClouds):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.io = IOSpec("sequence", (4,), 9, 2, tokens=True)
            self.train = self.validation = self.test = Split(torch.ones(6, 4, dtype=dtype), torch.arange(6) % 2)

    for dtype in (torch.int64, torch.int32):
        check_task(Tokens(dtype), "tokens")
    for dtype in (torch.uint8, torch.int16):
        with pytest.raises(ConfigError, match="integers, int64 or int32"):
            check_task(Tokens(dtype), "tokens")


def test_examples_without_labels_are_a_task_and_none_with_labels_is_not() -> None:
    class Dense(TwoClouds):
        def __init__(self, unlabelled: slice) -> None:
            super().__init__()
            self.io = IOSpec("sequence", (4,), 3, 2, head="token")
            inputs, targets = self.train.inputs, self.train.targets[:, None].repeat(1, 4)
            targets[unlabelled] = IGNORE
            self.train = self.validation = self.test = Split(inputs, targets)

    check_task(Dense(slice(0, 2)), "dense")
    check_task(Dense(slice(0, -1)), "dense")
    with pytest.raises(ConfigError, match="train: no target is labelled, all are -100"):
        check_task(Dense(slice(None)), "dense")


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    task = TwoClouds()
    task.io = IOSpec("causal", (4,), 5, 2, "pool", True)
    task.train = task.validation = task.test = Split(torch.full((2, 4), 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="tokens range from 5 to 5, io allows 0 to 4"):
        check_task(task, "clouds")


def fails(*_: object) -> Tensor:
    raise IndexError("no such thing")


def exits(*_: object) -> Tensor:
    raise SystemExit(3)


def is_nan(self: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean() * float("nan")


class Unfinished:
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        pass


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (
            {"loss": lambda self, o, y: o},
            "loss on outputs .* gave float32 (2, 2); it must give one finite",
        ),
        ({"loss": lambda self, o, y: 0.5}, "loss on outputs .* gave float 0.5"),
        ({"loss": lambda self, o, y: o.detach().mean()}, "loss on outputs .* gave float32 "),
        ({"loss": is_nan}, "loss on outputs .* gave float32 nan"),
        ({"loss": fails}, "loss on outputs float32 (2, 2) and targets int64 (2,) fails: IndexError: no such thing"),
        ({"loss": exits}, "loss on outputs .* fails: SystemExit: 3"),
        ({"training_loss": is_nan}, "training_loss on outputs .* gave float32 nan"),
        ({"distillation": lambda self, o, t, y: o}, "distillation on outputs .* gave float32 (2, 2)"),
        ({"score": lambda self, o, y: float("nan")}, "the metric accuracy of outputs .* is nan; score or new_metric"),
        ({"score": lambda self, o, y: torch.tensor(float("inf"))}, "the metric accuracy of outputs .* is inf"),
        ({"score": lambda self, o, y: "good"}, "the metric accuracy of outputs .* fails: ValueError"),
        ({"new_metric": lambda self: 0.5}, "new_metric() gave float 0.5; it must give an object with update(outputs, "),
        ({"new_metric": lambda self: Unfinished()}, "new_metric() gave Unfinished; it must give"),
        ({"augment": lambda self, x, generator: x}, "augment(inputs, targets, generator) -> (inputs, targets)"),
        ({"augment": lambda self, x, generator: x}, "augment(x, generator) cannot be called with inputs, targets and"),
        (
            {"augment": lambda self, x, y, generator: x},
            "augment gave float32 (2, 4, 3) for (float32 ",
        ),
        ({"augment": lambda self, x, y, generator: (x[:, :2], y)}, "augment gave (float32 (2, 2, 3), int64 (2,))"),
        (
            {"augment": lambda self, x, y, generator: (x, y[:1])},
            "must give inputs of the same shape and type",
        ),
        (
            {"augment": fails},
            "augment(inputs, targets, generator) on (float32 .* fails: IndexError",
        ),
    ],
)
def test_a_method_that_gives_something_else_is_named(methods: dict[str, object], words: str) -> None:
    pattern = ".*".join(map(re.escape, words.split(".*")))
    with pytest.raises(ConfigError, match=pattern):
        check_task(changed(**methods), "clouds")


@pytest.mark.parametrize(
    "methods",
    [
        {"score": lambda self, o, y: (o.argmax(-1) == y).float().mean()},
        {"loss": lambda self, outputs, targets: outputs.square().mean()},
        {"loss": lambda self, outputs, targets, label_smoothing=0.0: outputs.square().mean() + label_smoothing},
        {"distillation": lambda self, o, t, y: None},
    ],
)
def test_what_a_task_may_give_is_accepted(methods: dict[str, object]) -> None:
    check_task(changed(**methods), "clouds")


def test_mixed_targets_are_for_the_training_loss_alone() -> None:
    """Augmentation may make other targets of classes (mixup), if `training_loss` takes them."""

    class Mixed(TwoClouds):
        def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            return inputs, torch.nn.functional.one_hot(targets, 2).float()

        def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.nn.functional.cross_entropy(outputs, targets)

    check_task(Mixed(), "mixed")


def test_gradients_that_a_loss_switches_off_are_on_again() -> None:
    def loss(self: Task, outputs: Tensor, targets: Tensor) -> Tensor:
        value = outputs.square().mean()
        torch.set_grad_enabled(False)
        return value

    with pytest.raises(ConfigError, match=r"loss on outputs .* switches gradients off for all that follows"):
        check_task(changed(loss=loss), "off")
    assert torch.is_grad_enabled()


# -- streamed splits ---------------------------------------------------------------------------------------------


class Stream:
    """A streamed split that gathers as told."""

    def __init__(self, gather: object, count: int = 9) -> None:
        self._gather, self.count = gather, count

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor) -> object:
        return self._gather(indices)


def clouds(indices: Tensor) -> tuple[Tensor, Tensor]:
    return indices.float()[:, None, None].expand(-1, 4, 3), indices % 2


class Restless:
    """Other numbers in each call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        x, y = clouds(indices)
        return x + self.calls, y


@pytest.mark.parametrize(
    ("split", "words"),
    [
        (Stream(clouds, 0), "validation has no examples"),
        (Stream(lambda i: clouds(i)[0]), "gather([0, 4, 8]) gave float32 (3, 4, 3); it must give two tensors"),
        (Stream(lambda i: clouds(i[:2])), "gather([0, 4, 8]) gave (float32 (2, 4, 3), int64 (2,))"),
        (Stream(fails), "gather([0, 4, 8]) fails: IndexError: no such thing"),
        (Stream(Restless()), "other examples for the same indices in another order"),
        (Stream(lambda i: (clouds(i.sort().values)[0], i % 2)), "other examples for the same indices in another order"),
        (
            Stream(lambda i: (clouds(i)[0][..., :2], i % 2)),
            "(examples 0, 4, 8 of 9 were looked at): an input",
        ),
        (Stream(lambda i: (clouds(i)[0] / 0, i % 2)), "(examples 0, 4, 8 of 9 were looked at): inputs hold NaN"),
    ],
)
def test_a_stream_is_looked_at_here_and_there(split: Stream, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_task(with_fields(validation=split), "clouds")


def test_of_a_stream_few_examples_are_gathered() -> None:
    task = Signs(train_size=10**9)
    check_task(task, "signs")
    assert isinstance(task.train, Noise)
    assert {index for indices in task.train.asked for index in indices} == {0, 1, 5 * 10**8, 10**9 - 1}


def test_a_dense_target_of_another_grid_is_refused() -> None:
    task = Signs()
    task.io = IOSpec("image", (6, 5), 1, 2, "token")
    task.test = Split(torch.zeros(3, 6, 5, 1), torch.full((3, 3, 3), IGNORE))
    with pytest.raises(ConfigError, match=r"test: a target has shape \(3, 3\), .* grid \(6, 5\)\. .*out_size"):
        check_task(task, "signs")


def test_digits_are_accepted() -> None:
    check_task(Digits(), "digits")
