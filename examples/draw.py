"""A folder of pictures as it might lie on your disk: `python draw.py shapes` makes one, with four shapes as classes."""

from __future__ import annotations

import sys
from pathlib import Path

from pictures import draw
from PIL import Image

NAMES = ("disc", "square", "cross", "ring")


def main(folder: Path, count: int = 2000) -> None:
    """Write so many pictures of 24x24 pixels as PNG files."""
    for name in NAMES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i, (picture, label) in enumerate(zip(*draw(count, seed=0), strict=True)):
        pixels = (picture * 60 + 100).clamp(0, 255).byte().numpy()
        Image.fromarray(pixels).save(folder / NAMES[label] / f"{i:04}.png")
    print(f"{count} pictures in {folder}: {', '.join(NAMES)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
