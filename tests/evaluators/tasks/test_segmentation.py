"""Segmentation: pairs, what of a mask is asked, the metric, and that masks move as their pictures do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mixnas.evaluators.tasks.choosing import task_of
from mixnas.evaluators.tasks.decoding import decode_mask
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.segmentation import Pairs
from mixnas.evaluators.tasks.task import IGNORE, SPLITS, Task
from mixnas.evaluators.training import TrainConfig, evaluate, train
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.network import Network
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from tests.contracts.task import DenseTaskContract

COLOURS = np.array([[20, 20, 20], [220, 30, 30], [30, 220, 30]], dtype=np.uint8)


def pair(folder: Path, name: str, rng: np.random.Generator, size: tuple[int, int] = (16, 16), block: int = 4) -> None:
    """A picture whose colours are its classes, in square blocks; the first block is not labelled."""
    classes = rng.integers(0, 3, (size[0] // block, size[1] // block)).repeat(block, 0).repeat(block, 1)
    mask = classes.astype(np.uint8)
    mask[:block, :block] = 255
    for what, pixels in (("images", COLOURS[classes]), ("masks", mask)):
        (folder / what).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / what / f"{name}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i in range(20):
        pair(tmp_path / "d", f"{i:02}", rng)
    return tmp_path / "d"


class TestSegmentation(DenseTaskContract):
    @pytest.fixture(autouse=True)
    def _folder(self, folder: Path) -> None:
        self.folder = str(folder)

    def make(self) -> Task:
        return by_name("segmentation", path=self.folder, size=16, stride=2)

    def truth(self, inputs: Tensor) -> Tensor:
        """The nearest of the colours, of those that are one: what comes in at the edge is not."""
        far = (inputs[..., None, :] - torch.from_numpy(COLOURS).float()).abs().sum(-1)
        return far.argmin(-1)


class TestDrawn(DenseTaskContract):
    """What is drawn where there is no folder; a truth of its own it has not, so that is left out."""

    def make(self) -> Task:
        return by_name("segmentation", size=24, stride=4)

    test_targets_move_along_with_the_inputs = None


def test_masks_are_cut_and_brought_to_size_as_their_pictures_are(tmp_path):
    rng = np.random.default_rng(1)
    for i in range(6):
        pair(tmp_path, str(i), rng, (32, 48), block=8)
    task = by_name("segmentation", path=str(tmp_path), size=16, stride=1)
    assert task.io.head == "token"
    inputs, targets = task.train.gather(torch.arange(len(task.train)))
    far = (inputs[..., None, :] - torch.from_numpy(COLOURS).float()).abs().sum(-1)
    asked = (targets != IGNORE) & (far.min(-1).values < 3)  # the others are mixed of neighbours
    assert asked.float().mean() > 0.3
    assert torch.equal(far.argmin(-1)[asked], targets[asked])


def test_classes_with_offsets_learn(folder):
    task = by_name("segmentation", path=str(folder), size=16, stride=1, head="offset_learning")
    stages = [{"width": 8, "block": {"mixer": "dwconv", "channel_mixer": "mlp"}}]
    architecture = Architecture.from_dict({"stem": {"name": "conv", "stride": 1}, "stages": stages})
    generator = torch.Generator().manual_seed(0)
    network = Network(architecture, task.io, generator=generator)
    train(network, task, TrainConfig(steps=60, batch_size=4, lr=1e-2), generator=generator)
    assert task.io.head == "offset_learning"
    assert evaluate(network, task, "validation").score > 0.6  # one class everywhere has less than a third


def test_mean_iou_is_that_of_its_definition():
    task = by_name("segmentation", size=16, stride=2)
    rng = np.random.default_rng(0)
    answers, targets = (torch.from_numpy(rng.integers(0, 3, (5, 16, 16))) for _ in range(2))
    targets[0, :8] = IGNORE
    metric = task.new_metric()
    for i in range(5):
        metric.update(F.one_hot(answers[i : i + 1], 4).float(), targets[i : i + 1])
    asked = targets != IGNORE
    per_class = []
    for c in range(3):  # the fourth stands nowhere
        a, t = (answers == c) & asked, (targets == c) & asked
        per_class.append(float((a & t).sum() / (a | t).sum()))
    assert metric.result() == pytest.approx(np.mean(per_class), abs=1e-6)


def test_weights_are_those_that_torch_means_and_nothing_labelled_is_no_nan(folder):
    task = by_name("segmentation", path=str(folder), size=16, weighted=True)
    _, targets = task.train.gather(torch.arange(4))
    outputs = torch.randn(4, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(torch.cat([t[t != IGNORE] for t in task.train.gather(torch.arange(len(task.train)))[1:]]))
    weight = counts.sum() / (3 * counts.float())
    expected = F.cross_entropy(outputs.permute(0, 3, 1, 2), targets, weight=weight, ignore_index=IGNORE)
    torch.testing.assert_close(task.training_loss(outputs, targets), expected)
    assert float(task.training_loss(outputs, torch.full_like(targets, IGNORE))) == 0.0
    assert "training is weighted" in task.record()["summary"]


def test_folders_of_splits_are_taken_and_what_is_missing_is_dealt(tmp_path):
    rng = np.random.default_rng(2)
    for split, count in (("train", 10), ("test", 4)):
        for i in range(count):
            pair(tmp_path / split, str(i), rng)
    task = by_name("segmentation", path=str(tmp_path), size=16)
    split = task.record()["split"]
    assert [len(split[name]) for name in SPLITS] == [8, 2, 4]
    assert all(name.startswith("test/") for name in split["test"])
    assert task_of(tmp_path) == {"name": "segmentation", "path": str(tmp_path)}


def test_255_is_not_asked_and_memory_holds_bytes():
    masks = torch.tensor([[[0, 1], [255, 2]]], dtype=torch.uint8)
    pixels, targets = Pairs(torch.full((1, 2, 2, 3), 200, dtype=torch.uint8), masks).gather(torch.tensor([0]))
    assert targets.tolist() == [[[0, 1], [IGNORE, 2]]] and float(pixels.max()) == 200.0
    assert masks[0, 1, 0] == 255


def test_bad_pairs_are_refused_by_name(folder):
    def refused(said: str, **options: object) -> None:
        with pytest.raises(ConfigError, match=said):
            by_name("segmentation", path=str(folder), **options)

    refused("stride is 3, which does not divide", size=16, stride=3)
    refused("stride is 2. The head offset_learning", size=16, stride=2, head="offset_learning")
    refused(r"masks/.*\.png: holds the number 2, and the classes are 0 to 1", size=16, labels=["a", "b"])
    refused("class 'd' has no pixel in train", size=16, labels=["a", "b", "c", "d"])
    refused("names a class twice", labels=["a", "a"])
    refused("memory_gib allows 0", size=16, memory_gib=0)
    mask = folder / "masks" / "03.png"
    good = mask.read_bytes()
    classes = np.asarray(Image.open(mask)).copy()
    classes[:8, :8] = 200
    Image.fromarray(classes).save(mask)
    refused(
        r"03\.png: holds the number 200, and no mask holds 3: the classes so far are 0 to 2.*255.*task.labels", size=16
    )
    Image.new("L", (8, 8)).save(mask)
    refused(r"03\.png: has 8x8 pixels, and its picture 16x16")
    Image.new("RGB", (16, 16)).save(mask)
    refused(r"03\.png: is of mode RGB")
    mask.write_bytes(good[:40])
    refused(r"03\.png: is no picture that can be decoded")
    mask.unlink()
    refused(r"03\.png: has no mask")
    mask.write_bytes(good)
    (folder / "masks" / "more.png").write_bytes(good)
    refused(r"more\.png: is the mask of no picture")
    (folder / "masks" / "more.png").rename(folder / "masks" / "03.jpg")
    refused(r"03\.jpg: cannot be one of the masks.*JPEG would mix")


def test_the_light_head_answers_for_each_pixel_in_a_super_network_too():
    block = {"mixer": "identity", "channel_mixer": "mlp"}
    space = SearchSpace.from_dict(
        {"stem": {"name": "conv", "stride": 2}, "stages": [{"width": [4, 8], "block": block}]}
    )
    for stride, stem in ((2, 2), (1, 1)):
        task = by_name("segmentation", size=16, stride=stride, head="lr_aspp", at_most=8)
        assert task.io.head == "lr_aspp" and task.io.grid == (16, 16)
        if stem == 2:
            supernet = Supernet(space, task.io, torch.Generator().manual_seed(0))
            x, y = task.train.gather(torch.arange(4))
            for choice in (supernet.smallest(), supernet.largest()):
                views, own = supernet.subnet(choice).eval(), supernet.extract(choice).eval()
                assert views(x).shape == (4, 16, 16, 4)
                torch.testing.assert_close(views(x), own(x))
                task.training_loss(supernet.subnet(choice).train()(x), y).backward()
    with pytest.raises(ConfigError, match=r"head is 'aspp'\. Allowed: sub_pixel, lr_aspp"):
        by_name("segmentation", head="aspp")


def masks_of(folder: Path, ending: str, change: Callable[[np.ndarray], Image.Image]) -> str:
    """A folder whose masks are those of another, written otherwise."""
    for mask in sorted((folder / "masks").glob("*.png")):
        change(np.asarray(Image.open(mask)).copy()).save(mask.with_suffix(ending))
        if ending != mask.suffix:
            mask.unlink()
    return str(folder)


def in_colours(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    return image


@pytest.mark.parametrize("written", ["grey.gif", "grey.bmp", "grey.tif", "colours.png", "colours.gif"])
def test_the_classes_of_a_mask_are_those_that_were_written(written, folder):
    """A GIF that is written has only the colours that are used, numbered anew; a palette's numbers elsewhere stay."""
    expected = by_name("segmentation", path=str(folder), size=16).test.gather(torch.arange(4))[1]
    kind, ending = written.split(".")
    masks_of(folder, f".{ending}", Image.fromarray if kind == "grey" else in_colours)
    if written == "colours.gif":
        with pytest.raises(ConfigError, match=r"\.gif: is a GIF in colours.*Write the mask as PNG"):
            by_name("segmentation", path=str(folder), size=16)
        return
    assert torch.equal(by_name("segmentation", path=str(folder), size=16).test.gather(torch.arange(4))[1], expected)


def test_a_grey_gif_of_classes_with_a_gap_keeps_their_numbers(tmp_path):
    mask = np.zeros((4, 4), dtype=np.uint8)
    mask[0], mask[1] = 2, 255
    Image.fromarray(mask).save(tmp_path / "m.gif")
    with Image.open(tmp_path / "m.gif") as image:
        assert sorted(np.unique(np.asarray(image))) != [0, 2, 255]  # the file's own numbers are others
    assert np.array_equal(decode_mask(tmp_path / "m.gif", (4, 4)), mask)


def test_masks_of_0_and_255_are_told_what_255_means(folder):
    masks_of(folder, ".png", lambda mask: Image.fromarray(np.where(mask == 1, 255, 0).astype(np.uint8)))
    for labels in (None, ["ground", "thing"]):
        with pytest.raises(ConfigError, match=r"255, which means unknown: write 1 for the second class\."):
            by_name("segmentation", path=str(folder), size=16, labels=labels)
