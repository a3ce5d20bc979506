"""Changes of training pictures, against what they are said to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.tasks.augmenting import erased, jittered, mirrored, mixed
from mixnas.evaluators.tasks.task import Task
from mixnas.search_space.errors import ConfigError
from tests.contracts.task import TaskContract

from .drawn import draw


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 16, 12, 3, generator=seeded(seed)) * 255


class TestMixed(TaskContract):
    """Everything at once."""

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.path = str(draw(tmp_path / "d"))

    def make(self) -> Task:
        return by_name("folder", path=self.path, size=16, mixup=0.4, cutmix=1.0, jitter=0.2, erase=0.5, weighted=True)


def test_half_are_mirrored():
    x = pictures(400)
    y = mirrored(x, seeded())
    same, turned = ((y == other).flatten(1).all(1) for other in (x, x.flip(2)))
    assert bool((same ^ turned).all()) and 150 < int(turned.sum()) < 250


def test_jitter_changes_mean_and_spread_by_factors_within_bounds():
    x = pictures(300)
    y = jittered(x, 0.25, seeded())
    bright = y.mean((1, 2, 3)) / x.mean((1, 2, 3))
    contrast = y.std((1, 2, 3)) / x.std((1, 2, 3))
    for factor in (bright, contrast):
        assert 0.75 <= float(factor.min()) < 0.8 and 1.2 < float(factor.max()) <= 1.2501
    assert abs(np.corrcoef(bright, contrast)[0, 1]) < 0.2
    torch.testing.assert_close(jittered(x, 0.0, seeded()), x)


def test_a_share_of_the_pictures_loses_a_rectangle():
    x = pictures(500)
    y = erased(x, 0.4, -1.0, seeded())
    gone = (y == -1).all(-1)
    assert torch.equal(y[~gone], x[~gone])
    hit = gone.flatten(1).any(1)
    assert 0.33 < float(hit.float().mean()) < 0.47
    for mask in gone[hit][:50]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert bool(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())  # a rectangle
    share = gone[hit].flatten(1).float().mean(1)
    assert float(share.max()) < 0.4 and 0.1 < float(share.mean()) < 0.25


def test_mixup_mixes_pictures_and_targets_alike():
    """Of pictures that are their class all over, the mixed ones are the mixed targets."""
    y = torch.arange(60) % 3
    x = F.one_hot(y, 3).float()[:, None, None, :].expand(60, 8, 8, 3)
    for mixup, cutmix in ((0.3, 0.0), (0.0, 1.0), (0.4, 1.0)):
        a, shares = mixed(x, y, 3, mixup, cutmix, seeded(1))
        torch.testing.assert_close(a.mean((1, 2)), shares)
        torch.testing.assert_close(shares.sum(1), torch.ones(60))
        assert float(shares.max(1).values.min()) < 0.9
        cut = ((a == 0) | (a == 1)).flatten(1).all(1)  # no pixel is of both
        if not mixup:
            assert bool(cut.all())
        elif not cutmix:
            assert not bool(cut[shares.max(1).values < 0.999].any())


def test_the_share_of_mixup_is_beta():
    """Beta(0.5, 0.5) has mean 1/2 and variance 1/8."""
    y = torch.arange(20_000) % 2
    x = y.float()[:, None, None, None]
    _, shares = mixed(x, y, 2, 0.5, 0.0, seeded(3))
    lam = shares[:, 1]  # pairs of both classes, and pairs of one: those stay
    other = (lam > 0) & (lam < 1)
    assert float(lam[other].mean()) == pytest.approx(0.5, abs=0.02)
    assert float(lam[other].var()) == pytest.approx(0.125, abs=0.01)


def test_the_loss_of_shares_is_that_of_classes_where_they_are_whole(tmp_path):
    draw(tmp_path / "d")
    for weighted in (False, True):
        task = by_name("folder", path=str(tmp_path / "d"), size=16, weighted=weighted, label_smoothing=0.2)
        outputs, targets = torch.randn(9, 3, generator=seeded()), torch.arange(9) % 3
        hard, soft = (task.training_loss(outputs, t) for t in (targets, F.one_hot(targets, 3).float()))
        torch.testing.assert_close(hard, soft)


def test_classifications_of_pictures_share_their_options(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.zeros((30, 8, 8, 3), np.uint8), y=np.arange(30) % 3)
    for options, said in (({"mixup": -1}, "mixup is -1"), ({"erase": 2}, "erase is 2"), ({"flip": 1}, "flip is 1")):
        with pytest.raises(ConfigError, match=said):
            by_name("npz", path=str(tmp_path / "d.npz"), **options)
    with pytest.raises(ConfigError, match=r"no option 'mixupp'.*Did you mean 'mixup'"):
        by_name("npz", path=str(tmp_path / "d.npz"), mixupp=1)
    with pytest.raises(ConfigError, match="no option 'test'"):
        by_name("cifar", path=str(tmp_path), test=0.1)
    assert by_name("npz", path=str(tmp_path / "d.npz"))._options.flip is False
