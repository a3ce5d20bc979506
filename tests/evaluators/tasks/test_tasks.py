"""Tasks by name, the check of a user's own task, and the digits."""

import textwrap

import pytest
import torch
from sklearn.datasets import load_digits

from mixnas.evaluators.tasks.digits import Digits, random_shift, stratified_split
from mixnas.evaluators.tasks.loading import by_name, check_task, names
from mixnas.evaluators.tasks.task import SPLITS, Split, Task
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import IOSpec


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


class TwoClouds(Task):
    """Two separable clouds of points, as a user would write a task."""

    name = "clouds"

    def __init__(self, *, size: int = 40, spread: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)
        targets = torch.arange(size) % 2
        inputs = spread * torch.randn(size, 4, 3, generator=generator) + targets[:, None, None]
        self.io = IOSpec(kind="sequence", size=(4,), in_features=3, num_outputs=2)
        self.train = self.validation = self.test = Split(inputs, targets)


def test_registered_names() -> None:
    assert names() == ["digits", "mqar"]


def test_a_mapping_carries_options() -> None:
    options = {"vocab_size": 32, "length": 16, "pairs": 2, "train_size": 8, "validation_size": 8, "test_size": 8}
    task = by_name({"name": "mqar", **options})
    assert task.train.inputs.shape == (8, 16)
    assert task.io == by_name("mqar", **options).io


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("digit", ["'digit'", "Did you mean 'digits'?", "mqar", "package.module:Class"]),
        ({"name": "mqar", "vocab": 64}, ["'vocab'", "Did you mean 'vocab_size'?", "power_a"]),
        ({"name": "digits", "seed": 1}, ["'seed'", "takes no options"]),
        ({"vocab_size": 64}, ["no name is given", "digits"]),
        (["digits"], ["not a name"]),
        ({"name": "mqar", "length": 63}, ["length is 63", "even"]),
        ({"name": "mqar", "vocab_size": 64, "length": 64}, ["vocab_size is 64", "larger than length"]),
        ({"name": "mqar", "vocab_size": 65, "length": 64, "pairs": 17}, ["pairs is 17", "at most length / 4 = 16"]),
        ({"name": "mqar", "pairs": 2.5}, ["pairs is 2.5", "whole number"]),
        ({"name": "mqar", "power_a": -1.0}, ["power_a is -1.0", "above 0"]),
        ({"name": "mqar", "random_non_queries": 1}, ["true or false"]),
        ("no_such_package.tasks:Mine", ["no module 'no_such_package'", "PYTHONPATH"]),
        ("mixnas.evaluators.tasks.digits:Digit", ["no class 'Digit'", "Did you mean 'Digits'?"]),
    ],
)
def test_what_is_wrong_is_said(spec: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        by_name(spec)
    for word in words:
        assert word in str(caught.value)


def test_a_users_class_lies_in_the_working_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_own_task.py").write_text(
        textwrap.dedent("""
            import torch
            from mixnas.evaluators.tasks.task import Split, Task
            from mixnas.search_space.network import IOSpec

            class Parity(Task):
                name = "parity"
                metric = "parity"

                def __init__(self, *, length, seed=0):
                    bits = torch.randint(2, (30, length), generator=torch.Generator().manual_seed(seed))
                    self.io = IOSpec("sequence", (length,), 2, 2, "pool", True)
                    splits = [Split(part, part.sum(1) % 2) for part in bits.split(10)]
                    self.train, self.validation, self.test = splits
        """)
    )
    monkeypatch.chdir(tmp_path)
    task = by_name({"name": "users_own_task:Parity", "length": 8})
    assert task.metric == "parity"
    with pytest.raises(ConfigError, match=r"option 'length' must be given"):
        by_name("users_own_task:Parity")


def test_an_error_inside_a_users_module_is_told_apart(tmp_path, monkeypatch) -> None:
    (tmp_path / "users_broken_task.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="importing users_broken_task failed: No module named 'a_module_that_is_not"):
        by_name("users_broken_task:Task")


def test_a_task_that_lacks_parts_is_refused_with_all_of_them() -> None:
    class Bare:
        name = "bare"
        metric = "accuracy"

    with pytest.raises(
        ConfigError, match=r"lacks io, direction, train, validation, test, loss\(\), score\(\), augment"
    ):
        check_task(Bare(), "bare")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"direction": "up"}, "direction is 'up'"),
        ({"metric": "params"}, "metric is 'params'"),
        ({"io": (4, 3)}, "io is tuple"),
        ({"test": Split(torch.zeros(2, 4, 2), torch.zeros(2, dtype=torch.long))}, r"test: an input has shape \(4, 2\)"),
        ({"validation": Split(torch.zeros(2, 4, 3), torch.zeros(3))}, "validation has 2 inputs and 3 targets"),
        ({"train": Split(torch.zeros(2, 4, 3, dtype=torch.long), torch.zeros(2))}, "must be floating point"),
        ({"train": Split(torch.full((2, 4, 3), torch.nan), torch.zeros(2))}, "NaN"),
        ({"train": Split(torch.zeros(2, 4, 3), torch.full((2,), 7))}, "loss or score fails on outputs of shape"),
        ({"loss": lambda outputs, targets, smoothing: outputs}, "loss must be one finite differentiable number"),
        ({"io": IOSpec("causal", (4, 3), 9, 2, "pool", True)}, "integers"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change: dict[str, object], words: str) -> None:
    task = TwoClouds()
    for name, value in change.items():
        setattr(task, name, value)
    with pytest.raises(ConfigError, match=words):
        check_task(task, "clouds")


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    task = TwoClouds()
    task.io = IOSpec("causal", (4,), 5, 2, "pool", True)
    task.train = task.validation = task.test = Split(torch.full((2, 4), 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="tokens range from 5 to 5, io allows 0 to 4"):
        check_task(task, "clouds")


def test_digits_split_is_disjoint_whole_and_stratified(digits: Task) -> None:
    sizes = [len(getattr(digits, name)) for name in SPLITS]
    assert sizes == [1078, 360, 359]
    images = torch.cat([getattr(digits, name).inputs for name in SPLITS]).flatten(1)
    assert len(torch.unique(images, dim=0)) == 1797  # the data has no two equal images
    for name in SPLITS:
        counts = torch.bincount(getattr(digits, name).targets, minlength=10) / len(getattr(digits, name))
        assert counts.min() > 0.09
        assert counts.max() < 0.11


def test_digits_split_never_changes(digits: Task) -> None:
    again = Digits()
    for name in SPLITS:
        assert torch.equal(getattr(digits, name).inputs, getattr(again, name).inputs)
    labels = load_digits().target
    train, validation, test = stratified_split(labels, (0.6, 0.2, 0.2), seed=20_240_901)
    assert train[:8].tolist() == [0, 2, 6, 8, 11, 12, 14, 16]
    assert validation[:8].tolist() == [4, 5, 7, 9, 13, 21, 27, 30]
    assert test[:8].tolist() == [1, 3, 10, 15, 17, 24, 26, 33]
    assert digits.test.targets.tolist() == labels[test].tolist()


def test_digits_are_standardised_by_the_training_pixels(digits: Task) -> None:
    assert digits.train.inputs.mean().abs() < 1e-5
    assert digits.train.inputs.std(unbiased=False) == pytest.approx(1, abs=1e-5)
    assert digits.train.inputs.dtype == torch.float32


def test_stratified_split_of_awkward_sizes() -> None:
    labels = torch.tensor([0] * 7 + [1] * 3 + [2]).numpy()
    parts = stratified_split(labels, (0.5, 0.25, 0.25), seed=3)
    assert torch.cat(parts).sort().values.tolist() == list(range(11))


def test_random_shift_moves_each_image_as_a_whole() -> None:
    x = torch.rand(500, 5, 4, 2, generator=torch.Generator().manual_seed(0))
    moved = random_shift(x, 1, -7.0, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1), value=-7.0)
    shifts = []
    for before, after in zip(padded, moved, strict=True):
        windows = {(i, j): before[i : i + 5, j : j + 4] for i in range(3) for j in range(3)}
        shifts += [shift for shift, window in windows.items() if torch.equal(window, after)]
    assert len(shifts) == 500
    assert len(set(shifts)) == 9


def test_score_is_a_mean_over_examples_of_the_labelled_share() -> None:
    task = by_name("mqar", vocab_size=18, length=16, pairs=1, train_size=2, validation_size=1, test_size=1)
    outputs = torch.zeros(2, 3, 18)
    outputs[:, :, 5] = 1.0
    targets = torch.tensor([[5, -100, -100], [5, 6, -100]])
    assert task.score(outputs, targets) == 0.75
