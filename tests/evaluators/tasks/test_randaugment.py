"""RandAugment, compared with Pillow's operations."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.tasks import randaugment as ra
from mixnas.search_space.errors import ConfigError

FILL = 100.0


def picture(seed: int = 0, size: tuple[int, int] = (21, 17), channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(20, 220, (4, 4, 3), dtype=np.uint8)).resize((size[1], size[0]))
    noisy = np.clip(np.asarray(coarse) + rng.normal(0, 12, (*size, 3)), 0, 255).astype(np.uint8)
    return noisy if channels == 3 else noisy[..., :1]


def ours(operation, pixels: np.ndarray, strength: float) -> np.ndarray:
    x = torch.from_numpy(pixels.copy()).float()[None]
    return operation(x, torch.tensor([strength]), FILL)[0].numpy()


def enhanced(kind, image: Image.Image, strength: float) -> Image.Image:
    return kind(image).enhance(1 + 0.9 * strength)


@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.6, 1.0])
@pytest.mark.parametrize(
    ("operation", "of_pillow"),
    [
        (ra.brightness, lambda i, s: enhanced(ImageEnhance.Brightness, i, s)),
        (ra.colour, lambda i, s: enhanced(ImageEnhance.Color, i, s)),
        (ra.contrast, lambda i, s: enhanced(ImageEnhance.Contrast, i, s)),
        (ra.sharpness, lambda i, s: enhanced(ImageEnhance.Sharpness, i, s)),
        (ra.autocontrast, lambda i, s: ImageOps.autocontrast(i)),
        (ra.equalize, lambda i, s: ImageOps.equalize(i)),
        (ra.posterize, lambda i, s: ImageOps.posterize(i, 8 - round(4 * abs(s)))),
        (ra.solarize, lambda i, s: ImageOps.solarize(i, 255 * (1 - abs(s)))),
        (ra.identity, lambda i, s: i),
    ],
)
def test_colours_change_as_pillow_changes_them(operation, of_pillow, strength):
    pixels = picture()
    expected = np.asarray(of_pillow(Image.fromarray(pixels), strength)).astype(float)
    np.testing.assert_allclose(ours(operation, pixels, strength), expected, atol=2.0)


@pytest.mark.parametrize("strength", [-1.0, 0.4])
@pytest.mark.parametrize(
    ("operation", "coefficients"),
    [
        (ra.shear_x, lambda s: (1, 0.3 * s, 0, 0, 1, 0)),
        (ra.shear_y, lambda s: (1, 0, 0, 0.3 * s, 1, 0)),
        (ra.translate_x, lambda s: (1, 0, round(s * 150 / 331 * 17), 0, 1, 0)),
        (ra.translate_y, lambda s: (1, 0, 0, 0, 1, round(s * 150 / 331 * 21))),
    ],
)
def test_places_move_as_in_pillow(operation, coefficients, strength):
    pixels = picture()
    a, b, c, d, e, f = coefficients(strength)
    y, x = 10.5, 8.5  # of the middle; Pillow counts from a corner
    about = (a, b, c + x - a * x - b * y, d, e, f + y - d * x - e * y)
    image = Image.fromarray(pixels).transform((17, 21), Image.Transform.AFFINE, about, fillcolor=(int(FILL),) * 3)
    same = np.abs(ours(operation, pixels, strength) - np.asarray(image)).max(-1) < 1.5
    assert same.mean() > 0.9  # halves are rounded one way or the other


def test_a_rotation_is_that_of_pillow():
    pixels = np.asarray(Image.fromarray(picture(size=(41, 41))).filter(ImageFilter.GaussianBlur(2)))
    for strength in (-1.0, 0.5):
        expected = np.asarray(Image.fromarray(pixels).rotate(30 * strength, fillcolor=(int(FILL),) * 3)).astype(float)
        assert np.median(np.abs(ours(ra.rotate, pixels, strength) - expected)) < 4


def test_every_operation_takes_any_picture():
    for size, channels in (((1, 1), 3), ((2, 5), 1), ((8, 8), 3)):
        x = torch.randint(256, (4, *size, channels), generator=torch.Generator().manual_seed(0)).float()
        for operation in ra.OPERATIONS:
            y = operation(x, torch.tensor([-1.0, -0.1, 0.1, 1.0]), FILL)
            assert y.shape == x.shape and y.dtype == x.dtype and y.min() >= 0 and y.max() <= 255
    flat = torch.full((1, 6, 6, 3), 77.0)
    for operation in (ra.autocontrast, ra.equalize, ra.contrast, ra.sharpness):
        torch.testing.assert_close(operation(flat, torch.ones(1), FILL), flat)


def test_it_is_drawn_from_the_generator_alone_and_leaves_the_pictures():
    x = torch.from_numpy(np.stack([picture(i) for i in range(40)])).float()
    before, state = x.clone(), torch.random.get_rng_state()
    first, again, other = (ra.rand_augmented(x, 2, 9, FILL, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(x, before) and torch.equal(torch.random.get_rng_state(), state)
    changed = (first != x).flatten(1).any(1).float().mean()
    assert 0.7 < changed <= 1


def test_it_is_an_option_of_pictures(tmp_path):
    x = np.stack([picture(i, (16, 16)) for i in range(40)])
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(40) % 2)
    task = by_name("npz", path=str(tmp_path / "d.npz"), randaugment=2, magnitude=12)
    inputs, targets = task.train.gather(torch.arange(8))
    moved, _ = task.augment(inputs, targets, torch.Generator().manual_seed(0))
    assert not torch.equal(moved, inputs) and moved.min() >= 0 and moved.max() <= 255
    for wrong in ({"randaugment": -1}, {"randaugment": 2, "magnitude": 31}, {"randaugment": 1.5}):
        with pytest.raises(ConfigError, match=r"randaugment|magnitude"):
            by_name("npz", path=str(tmp_path / "d.npz"), **wrong)
    np.savez(tmp_path / "f.npz", x=x / 255.0, y=np.arange(40) % 2)
    with pytest.raises(ConfigError, match=r"f\.npz: randaugment is of pixels from 0 to 255"):
        by_name("npz", path=str(tmp_path / "f.npz"), randaugment=2)
