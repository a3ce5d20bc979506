"""Super-resolution: what is made small, what is scored, and that bicubic interpolation has the figure that it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.super_resolution import luma, psnr, reduced
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import evaluate
from mixnas.search_space.errors import ConfigError
from tests.contracts.task import TaskContract


def waves(folder: Path, count: int, size: tuple[int, int] = (72, 120)) -> Path:
    """Pictures of smooth waves with edges, each of its own."""
    rng = np.random.default_rng(0)
    for i in range(count):
        y, x = np.mgrid[: size[0], : size[1]]
        a, b, c = rng.uniform(0.05, 0.4, 3)
        picture = np.stack([np.sin(a * x + b * y), np.cos(c * x - a * y), np.sign(np.sin(b * x + c * y))], -1)
        Image.fromarray((127 + 90 * picture).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


class TestSuperResolution(TaskContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = str(waves(tmp_path, 3))

    def make(self) -> Task:
        return by_name("super_resolution", path=self.folder, scale=2, patch=12)

    def perfect(self, task: Task, targets: Tensor) -> Tensor:
        return targets[..., :1]


def test_luma_is_that_of_bt_601():
    """The corners of the cube, as the recommendation has them."""
    corners = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    assert luma(corners)[0] == pytest.approx([16, 235, 81.481, 144.553, 40.966], abs=1e-4)


@pytest.mark.parametrize("residual", [True, False])
def test_bicubic_interpolation_of_the_whole_photograph_has_the_figure_of_its_tiles(residual, tmp_path):
    """The tiles' middles cover the photograph once: the answer of bicubic interpolation, given tile by tile."""
    folder = waves(tmp_path, 2)
    task = by_name("super_resolution", path=str(folder), scale=3, patch=8, rim=2, residual=residual)
    pixels = np.asarray(Image.open(folder / "1.png"))
    whole = reduced(luma(pixels), 3)
    expected = psnr(float(np.square(whole.high.astype(float) - whole.bicubic).mean()))
    assert task.bicubic["test"] == pytest.approx(expected, abs=1e-4)
    assert task.record()["bicubic_psnr"]["test"] == pytest.approx(expected, abs=1e-3)
    inputs, targets = task.test.gather(torch.arange(len(task.test)))
    assert int(targets[..., 1].sum()) == whole.high.size  # each pixel once
    if residual:
        mean, std = task.record()["target"]["mean"], task.record()["target"]["std"]
        metric = task.new_metric()
        metric.update(torch.full_like(targets[..., :1], -mean / std), targets)
        assert metric.result() == pytest.approx(expected, abs=1e-3)
    assert inputs.min() >= 0 and inputs.max() <= 255 and bool((inputs == inputs.round()).all())


def test_patches_and_targets_are_of_the_same_place(tmp_path):
    """Made small again, the fine patch is the coarse one, but for its edge."""
    task = by_name("super_resolution", path=str(waves(tmp_path, 2)), scale=2, patch=12, residual=False)
    said = task.record()["target"]
    for seed in (None, 0, 1):
        inputs, targets = task.train.gather(torch.arange(4))
        if seed is not None:
            inputs, targets = task.augment(inputs, targets, torch.Generator().manual_seed(seed))
        for low, high in zip(inputs.numpy()[..., 0], targets.numpy()[..., 0], strict=True):
            small = reduced(np.ascontiguousarray(high * said["std"] + said["mean"]).astype(np.float32), 2).low
            assert np.abs(small[3:-3, 3:-3] - low[3:-3, 3:-3]).max() <= 1.01


def test_validation_pixels_are_not_trained_on(tmp_path):
    task = by_name("super_resolution", path=str(waves(tmp_path, 2)), scale=2, patch=12)
    edge = round(0.8 * 60)
    train, validation = (np.array(split._places) for split in (task.train, task.validation))
    assert train[:, 2].max() + 12 <= edge <= validation[:, 2].min()


def test_an_espcn_built_of_our_parts_has_the_published_parameters():
    """1-64-32-r^2 with kernels 5, 3 and 3: 21,284 / 22,729 / 24,752 parameters at x2 / x3 / x4."""
    from mixnas.search_space import registry
    from mixnas.search_space.operators.layers import WindowConv
    from mixnas.search_space.registry import Context

    for scale, published in ((2, 21_284), (3, 22_729), (4, 24_752)):
        first, second, third = (Context(width, (17, 17), "image") for width in (1, 64, 32))
        head = registry.get("head", "sub_pixel").build(
            third, Context(1, (17 * scale,) * 2, "image"), scale=scale, kernel_size=3
        )
        parts = [WindowConv(first, 64, 5), WindowConv(second, 32, 3), head]
        assert sum(p.numel() for part in parts for p in part.parameters()) == published


def test_a_network_learns_more_than_bicubic_interpolation_on_edges(tmp_path):
    from mixnas.evaluators.training import TrainConfig, train
    from mixnas.search_space.architecture import Architecture
    from mixnas.search_space.network import Network

    task = by_name("super_resolution", path=str(waves(tmp_path, 2)), scale=2, patch=12)
    block = {"mixer": {"name": "dwconv", "kernel_size": 5}, "channel_mixer": "mlp"}
    plain = {"stem": {"name": "conv", "stride": 1}, "norm": "batch", "stages": [{"width": 16, "blocks": [block]}]}
    generator = torch.Generator().manual_seed(0)
    network = Network(Architecture.from_dict(plain), task.io, generator=generator)
    train(network, task, TrainConfig(steps=60, batch_size=16), generator=generator)
    assert evaluate(network, task, "validation").score > task.bicubic["validation"] + 0.1


def test_what_cannot_be_is_refused(tmp_path):
    folder = str(waves(tmp_path, 2))
    for options, said in (
        ({"scale": 5}, "scale is 5"),
        ({"patch": 2}, "patch is 2"),
        ({"rim": 20}, "rim is 20"),
        ({"patch": 64}, r"0\.png: has 120x72 pixels, and a patch needs 192x192"),
        ({"patch": 16}, r"0\.png: a part of 8 pixels"),
        ({"memory_gib": 0}, "Raise that"),
    ):
        with pytest.raises(ConfigError, match=said):
            by_name("super_resolution", path=folder, **options)
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"1\.png: is no picture that can be decoded"):
        by_name("super_resolution", path=folder)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ConfigError, match=r"two pictures at least.*there: 0\.png"):
        by_name("super_resolution", path=folder)
