"""Small folders of pictures for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}


def colour(name: str, rng: np.random.Generator, size: tuple[int, int] = (20, 26)) -> Image.Image:
    """Noise about a colour; `size` is (height, width)."""
    pixels = rng.normal(COLOURS[name], 40, (*size, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw(folder: Path, each: int = 10, seed: int = 0, size: tuple[int, int] = (20, 26)) -> Path:
    """A folder of `each` pictures of every colour, PNG and JPEG."""
    rng = np.random.default_rng(seed)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            colour(name, rng, size).save(folder / name / f"{i:02}.{'png' if i % 2 else 'jpg'}")
    return folder
