"""The digits."""

import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mixnas.evaluators.tasks.digits import Digits, random_shift, stratified_split
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.preparing import Prepared
from mixnas.evaluators.tasks.task import SPLITS, Task, recorded
from tests.contracts.task import TaskContract


class TestDigits(TaskContract):
    def make(self) -> Task:
        return Digits()


@pytest.fixture(scope="module")
def digits() -> Task:
    return by_name("digits")


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


@pytest.mark.parametrize("size", [8, 16])
def test_what_is_recorded_makes_the_inputs_of_raw_pixels(size: int) -> None:
    """To the last bit, by the sum as it is written in the card; a run's file holds it as JSON."""
    task = Digits(size=size)
    own = Prepared.from_plain(json.loads(json.dumps(recorded(task)["prepared"])))
    images, labels = load_digits(return_X_y=True)
    _, _, test = stratified_split(labels, (0.6, 0.2, 0.2), seed=20_240_901)
    raw = images.reshape(-1, 8, 8, 1)[test.numpy()]
    assert np.array_equal(own(raw), task.test.inputs.numpy()) and own.raw_size(task.io.size) == (8, 8)
    by_hand = (raw / 16 - own.mean[0]) / own.std[0]
    times = size // 8
    assert np.allclose(own(raw)[:, ::times, ::times], by_hand, atol=1e-5)
    assert f"(raw / 16 - {own.mean[0]:.9g}) / {own.std[0]:.9g}" in own.in_words()


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


def test_labels_stay_with_their_images(digits: Task) -> None:
    inputs, targets = digits.train.gather(torch.arange(100))
    moved, labels = digits.augment(inputs, targets, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(inputs, (0, 0, 1, 1, 1, 1), value=float(inputs.min()))
    for whole, image in zip(padded, moved, strict=True):
        assert any(torch.equal(whole[i : i + 8, j : j + 8], image) for i in range(3) for j in range(3))
    assert torch.equal(labels, targets)
