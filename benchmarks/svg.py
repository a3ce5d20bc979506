"""A chart as SVG text: points, lines and bands on two axes. Small enough to commit, and GitHub shows it.

python benchmarks/svg.py RUN -o docs/front.svg      # the front of a run: accuracy against measured latency
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixnas.search.run.front import Front

COLORS = ("#2563eb", "#dc2626", "#059669", "#9333ea", "#d97706", "#475569")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 720, 440, 70, 20, 55


@dataclass(frozen=True)
class Series:
    """One set of points.

    Attributes:
        name: In the legend.
        points: (x, y).
        line: Whether the points are joined.
        marks: Whether they are drawn.
        x_error: (low, high) of each x, drawn as a bar.
        band: (x, low y, high y), drawn as a faint area.
        labels: Text beside each point, or nothing.
        faint: Whether it is but the background of the others.
    """

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = False
    marks: bool = True
    x_error: Sequence[tuple[float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    labels: Sequence[str] = ()
    faint: bool = False


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        found = [
            m * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for m in (1, 2, 5)
        ]
        return [t for t in found if low <= t <= high]
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def chart(series: Sequence[Series], *, title: str, x: str, y: str, x_log: bool = False) -> str:
    """The chart.

    Args:
        series: What to draw, the first at the bottom.
        title: Above it.
        x, y: Names of the axes, with units.
        x_log: Whether the x axis is logarithmic.
    """
    xs = [v for s in series for v in [*(p[0] for p in s.points), *(e for pair in s.x_error for e in pair)]]
    ys = [v for s in series for v in [*(p[1] for p in s.points), *(e for band in s.band for e in band[1:])]]

    def scale(v: float) -> float:
        return math.log10(v) if x_log else v

    top = 38 + 15 * len(series)  # below the legend
    margin_x = 0.04 * (scale(max(xs)) - scale(min(xs)) or 1)
    margin_y = 0.06 * (max(ys) - min(ys) or 1)
    x0, x1 = scale(min(xs)) - margin_x, scale(max(xs)) + margin_x
    y0, y1 = min(ys) - margin_y, max(ys) + margin_y

    def at(px: float, py: float) -> tuple[float, float]:
        across = _LEFT + (scale(px) - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (py - y0) / (y1 - y0) * (_HEIGHT - top - _BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15">{escape(title)}</text>',
    ]
    bottom = _HEIGHT - _BOTTOM
    low_x, high_x = (10**x0, 10**x1) if x_log else (x0, x1)
    for tick in _ticks(low_x, high_x, x_log):
        px, _ = at(tick, y0)
        out.append(f'<path d="M{px:.1f} {top}V{bottom}" stroke="#e5e7eb"/>')
        out.append(f'<text x="{px:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(y0, y1, False):
        _, py = at(10**x0 if x_log else x0, tick)
        out.append(f'<path d="M{_LEFT} {py:.1f}H{_WIDTH - _RIGHT}" stroke="#e5e7eb"/>')
        out.append(f'<text x="{_LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    out.append(f'<text x="{middle}" y="{_HEIGHT - 12}" text-anchor="middle">{escape(x)}</text>')
    up = (top + bottom) / 2
    out.append(f'<text transform="translate(16 {up}) rotate(-90)" text-anchor="middle">{escape(y)}</text>')
    for i, s in enumerate(series):
        color = COLORS[i % len(COLORS)]
        if s.band:
            there = [at(px, high) for px, _, high in s.band] + [at(px, low) for px, low, _ in reversed(s.band)]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in there)
            out.append(f'<polygon points="{path}" fill="{color}" opacity="0.15"/>')
        if s.line:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*p) for p in s.points))
            out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        for (low, high), point in zip(s.x_error, s.points, strict=False):
            (a, b), (c, _) = at(low, point[1]), at(high, point[1])
            out.append(f'<path d="M{a:.1f} {b:.1f}H{c:.1f}" stroke="{color}"/>')
        for j, point in enumerate(s.points if s.marks else ()):
            a, b = at(*point)
            look = 'r="2.5" opacity="0.3"' if s.faint else 'r="4"'
            out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" {look} fill="{color}"/>')
            if j < len(s.labels) and s.labels[j]:
                out.append(f'<text x="{a + 7:.1f}" y="{b + 14:.1f}" fill="#374151">{escape(s.labels[j])}</text>')
        row = 42 + 15 * i
        out.append(f'<circle cx="{_LEFT + 6}" cy="{row - 4}" r="4" fill="{color}"/>')
        out.append(f'<text x="{_LEFT + 16}" y="{row}">{escape(s.name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def front_chart(front: Front, searched: Sequence[tuple[float, float]]) -> str:
    """A run's front, over all that its search looked at.

    A front in more than these two objectives is no line here: the line goes through what is best within its latency.
    """
    metric = front.metric
    better = max if front.objectives[metric] == "max" else min
    members = sorted((m.values for m in front.members), key=lambda m: m["latency_ms"])
    final = [(m["latency_ms"], m[f"test_{metric}"]) for m in members]
    errors = [(m["latency_low_ms"], m["latency_high_ms"]) for m in members]
    steps: list[tuple[float, float]] = []
    labels = []
    for (x, y), m in zip(final, members, strict=True):
        known = steps[-1][1] if steps else None
        improves = known is None or better(y, known) != known
        labels.append(f"{m['params'] / 1000:.0f}k" if improves else "")
        if improves:
            steps += [(x, y)] if known is None else [(x, known), (x, y)]
    reach = max(y for _, y in final) - min(y for _, y in final)
    low, high = min(y for _, y in final) - 0.5 * reach, max(y for _, y in final) + 0.5 * reach
    shown = [point for point in searched if low <= point[1] <= high]
    return chart(
        [
            Series(f"evaluated in the search, predicted latency ({len(shown)} shown)", shown, faint=True),
            Series("final networks: test split, measured; label: parameters", final, x_error=errors, labels=labels),
            Series("the best within a latency", [*steps, (final[-1][0], steps[-1][1])], line=True, marks=False),
        ],
        title=f"{metric} against latency on {front.device}",
        x="latency, ms (logarithmic)",
        y=metric,
        x_log=True,
    )


def main() -> None:
    """The command line."""
    from mixnas.search.run.directory import Run
    from mixnas.search.study.objectives import parse_objectives
    from mixnas.search.study.reading import read_results
    from mixnas.search_space.files import atomic_write

    parser = argparse.ArgumentParser(description="The front of a run as SVG.")
    parser.add_argument("run")
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    run = Run.open(args.run)
    front = run.front()
    results = read_results(run.journal, parse_objectives(run.manifest["fixed"]["objectives"]))
    done = [r.metrics for r in results.records if r.status == "done"]
    searched = [(m["latency_ms"], m[front.metric]) for m in done]
    atomic_write(args.output, front_chart(front, searched))


if __name__ == "__main__":
    main()
