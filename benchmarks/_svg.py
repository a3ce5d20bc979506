"""Lines with bands as an SVG file: no browser, no plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from mixnas.search_space.files import atomic_write

_COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7d5ba6", "#b58900")
_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 44, 56


@dataclass(frozen=True)
class Line:
    """One line: its name, x, y and where given the lower and upper edge of its band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def _ticks(low: float, high: float, count: int = 6) -> list[float]:
    raw = (high - low) / count
    scale = 10 ** math.floor(math.log10(raw))
    step = scale * next(s for s in (1, 2, 5, 10) if s * scale >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(path: str | Path, lines: Sequence[Line], *, title: str, x_label: str, y_label: str) -> None:
    """Write the picture; axes begin at zero or at the smallest value, whichever is lower."""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in (*line.y, *(line.low or ()), *(line.high or ()))]
    x0, x1, y0, y1 = min(0.0, *xs), max(xs), min(0.0, *ys), max(ys) * 1.03
    assert x1 > x0 and y1 > y0, "nothing to draw"

    def px(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    def points(x: Sequence[float], y: Sequence[float]) -> str:
        return " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in zip(x, y, strict=True))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="13"><rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{escape(title)}</text>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 14}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(18 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    parts += [
        f'<line x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="#eee"/>'
        f'<text x="{px(x):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:g}</text>'
        for x in _ticks(x0, x1)
    ]
    parts += [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="#eee"/>'
        f'<text x="{_LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in _ticks(y0, y1)
    ]
    for i, line in enumerate(lines):
        colour = _COLOURS[i % len(_COLOURS)]
        if line.low is not None and line.high is not None:
            outline = points(line.x, line.low) + " " + points(line.x[::-1], line.high[::-1])
            parts.append(f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.15"/>')
        parts.append(f'<polyline points="{points(line.x, line.y)}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y_legend = _TOP + 16 + 20 * i
        parts.append(
            f'<line x1="{_LEFT + 12}" x2="{_LEFT + 40}" y1="{y_legend}" y2="{y_legend}" stroke="{colour}" '
            f'stroke-width="3"/><text x="{_LEFT + 48}" y="{y_legend + 4}">{escape(line.name)}</text>'
        )
    atomic_write(path, "\n".join([*parts, "</svg>"]) + "\n")
