"""Pictures from files. Pillow decodes them; nothing that a file contains is executed, and none unpacks to gigabytes."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from mixnas.search_space.errors import ConfigError, visible

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""As Pillow calls them. Not EPS: it is a program."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Of files that are taken for pictures."""

MAX_PIXELS = 1 << 26
"""A picture with more is refused before it is unpacked: 192 MiB in colour."""

_THREADS = 4
_AT_ONCE = 512  # pictures

_ORIENTATION = 0x0112  # of EXIF

_T = TypeVar("_T")


def upright(image: Image.Image, channels: int) -> Image.Image:
    """A picture as it is looked at, grey or RGB of 8 bits: turned, and laid on white where it is transparent.

    Raises:
        ValueError: Its pixels are numbers of some other scale.
    """
    import numpy as np
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(image)
    clear = picture.info.get("transparency")  # a PNG's, of the depth that its file has
    if picture.mode.startswith("I;16"):
        deep = np.asarray(picture)
        grey = (deep // 257).astype(np.uint8)
        if clear is not None:
            grey[deep == clear] = 255
        picture = Image.fromarray(grey)
    elif picture.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:  # Pillow reads the upper bytes
        picture.info["transparency"] = tuple(value >> 8 for value in clear)
    if picture.mode in ("I", "F"):
        raise ValueError(
            f"its pixels are numbers of mode {picture.mode}; 8 bits can be read, 16 of PNG or TIFF: save it so"
        )
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return picture.convert("L" if channels == 1 else "RGB")


def read_picture(path: str | Path, size: Sequence[int], channels: int) -> NDArray[np.uint8]:
    """A picture's pixels, (height, width, channels), as a network of these extents reads them. Needs Pillow alone.

    It is turned upright, laid on white where it is transparent, and the largest part of its middle that has the shape
    is brought to `size` = (height, width). `load.py` of an export holds the text of this function and of `upright`.
    """
    import numpy as np
    from PIL import Image, ImageOps

    height, width = size
    with Image.open(path, formats=("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")) as image:
        image.draft(None, (2 * max(size), 2 * max(size)))  # a JPEG need not be unpacked to its full size
        picture = upright(image, channels)
        picture = ImageOps.fit(picture, (width, height), method=Image.Resampling.BILINEAR)
    return np.asarray(picture, dtype=np.uint8).reshape(height, width, channels)


def header(path: Path) -> tuple[int, int, bool]:
    """Width, height and whether it is grey, from a picture's header.

    Raises:
        ConfigError: No file, no picture, or one that would unpack to more than `MAX_PIXELS`.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{visible(str(path))}: is no file. Take it out of the folder.")

    def looked(image: Image.Image) -> tuple[int, int, bool]:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ConfigError(_too_large(path, f"{width}x{height}"))
        return width, height, image.mode in ("1", "L", "LA", "I;16", "I;16B", "I;16L")

    return _opened(path, looked)


def decode(path: Path, size: Sequence[int], channels: int) -> NDArray[np.uint8]:
    """`read_picture` of a file of a data set, whose `header` was looked at.

    Raises:
        ConfigError: It cannot be decoded: truncated, damaged, or of a mode that is no picture's.
    """
    try:
        return np.array(read_picture(path, size, channels))  # its own memory, which may be written to
    except Exception as error:  # a decoder raises whatever it meets
        raise ConfigError(_undecodable(path, error)) from error


def decode_whole(path: Path) -> NDArray[np.uint8]:
    """All pixels of a picture, (height, width, 3), see `upright`, of a file whose `header` was looked at.

    Raises:
        ConfigError: It cannot be decoded.
    """

    def unpacked(image: Image.Image) -> NDArray[np.uint8]:
        return np.array(upright(image, 3))

    return _opened(path, unpacked)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as it is looked at: a camera's turn is taken into account."""

    def looked(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)

    return _opened(path, looked)


def decode_mask(path: Path, size: Sequence[int]) -> NDArray[np.uint8]:
    """A mask's numbers of classes, (height, width), cut as `read_picture` cuts its picture; no two pixels are mixed.

    Raises:
        ConfigError: It cannot be decoded, or has colours rather than a number at each pixel.

    A palette's numbers are classes whatever its colours, but not a GIF's: who writes one numbers the palette anew.
    There the greys are the classes.
    """

    def unpacked(mask: Image.Image) -> NDArray[np.uint8]:
        from PIL import Image, ImageOps

        if mask.mode not in ("1", "L", "P"):
            raise ConfigError(
                f"{visible(str(path))}: is of mode {mask.mode}. A mask has the number of a class at each pixel, in 8 "
                "bits: grey or with a palette."
            )
        numbers = np.array(ImageOps.exif_transpose(mask)).astype(np.uint8)
        if mask.format == "GIF" and mask.mode == "P":
            numbers = _greys_of(path, numbers, mask.getpalette("RGB") or [])
        plain = Image.fromarray(numbers)
        return np.array(ImageOps.fit(plain, (size[1], size[0]), method=Image.Resampling.NEAREST))

    return _opened(path, unpacked)


def _greys_of(path: Path, numbers: NDArray[np.uint8], palette: Sequence[int]) -> NDArray[np.uint8]:
    """The grey of each number of a palette, of those that are used."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    given = np.array(palette, dtype=np.uint8).reshape(-1, 3)[:256]
    colours[: len(given)] = given
    used = colours[np.unique(numbers)]
    if (used != used[:, :1]).any():
        raise ConfigError(
            f"{visible(str(path))}: is a GIF in colours. Who writes a GIF numbers its palette anew, so that its "
            "numbers are no classes. Write the mask as PNG, with the number of a class at each pixel, or as a grey GIF."
        )
    return colours[numbers, 0]


def decode_many(
    paths: Sequence[Path], size: Sequence[int], channels: int, *, threads: int = _THREADS
) -> Iterator[NDArray[np.uint8]]:
    """`decode` of each, in order, by a few threads: decoders run outside of Python's lock."""
    if len(paths) < 2 or threads == 1:
        yield from (decode(path, size, channels) for path in paths)
        return
    with ThreadPoolExecutor(min(threads, os.cpu_count() or 1)) as pool:
        for start in range(0, len(paths), _AT_ONCE):  # no more wait, done, than that
            yield from pool.map(lambda path: decode(path, size, channels), paths[start : start + _AT_ONCE])


def _opened(path: Path, what: Callable[[Image.Image], _T]) -> _T:
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as image:
            return what(image)
    except ConfigError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ConfigError(_too_large(path, "more than it should")) from error
    except Exception as error:
        raise ConfigError(_undecodable(path, error)) from error


def _too_large(path: Path, extents: str) -> str:
    return (
        f"{visible(str(path))}: unpacks to {extents} pixels; at most {MAX_PIXELS:,} are read. Make it smaller, or take "
        "it out of the folder."
    )


def _undecodable(path: Path, error: Exception) -> str:
    reason = visible(" ".join(str(error).split()))[:150] or type(error).__name__
    return (
        f"{visible(str(path))}: is no picture that can be decoded ({reason}). Allowed: {', '.join(FORMATS)}. Restore "
        "it, or take it out of the folder."
    )
