"""The report's charts, as data for plotly.js. All text from the run is escaped: plotly reads some tags as markup."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixnas.predictors.measuring.value import Latency
from mixnas.search.card import interval
from mixnas.search.report.contents import Contents
from mixnas.search.run.front import Member
from mixnas.search.study.results import TrialRecord

POINTS = 2000  # dominated trials that are drawn; more say nothing more, and make the page slow

Figure = dict[str, Any]


def figures(found: Contents) -> dict[str, Figure]:
    """The charts by the name of their place in the page; those without data are left out."""
    made = {
        "front": _front(found),
        "predicted": _predicted(found),
        "progress": _progress(found),
        "effects": _effects(found),
        "mixers": _mixers(found),
        "by-latency": _by_latency(found),
    }
    return {name: figure for name, figure in made.items() if figure is not None}


def _figure(traces: Sequence[Mapping[str, Any]], x: str, y: str, **layout: Any) -> Figure:
    axes = {"xaxis": {"title": {"text": html.escape(x)}}, "yaxis": {"title": {"text": html.escape(y)}}}
    for name, axis in axes.items():
        axis.update(layout.pop(name, {}))
    return {"data": list(traces), "layout": {**axes, **layout}}


def _thinned(records: Sequence[TrialRecord]) -> Sequence[TrialRecord]:
    if len(records) <= POINTS:
        return records
    return [records[int(i)] for i in np.linspace(0, len(records) - 1, POINTS)]


def thinned(found: Contents) -> int:
    """How many finished trials are not drawn."""
    done = sum(record.status == "done" for record in found.results.records)
    return max(0, done - POINTS)


def _front(found: Contents) -> Figure | None:
    front, metric = found.front, found.front.metric
    if not front.members and not found.results.counts["done"]:
        return None
    known = [r for r in found.results.records if r.status == "done" and "latency_ms" in r.metrics]
    # A trial that lies where a member does (a search without a super-network) would be what the mouse meets instead.
    taken = {_place(m.metrics, metric) for m in (*front.members, *front.others)}
    drawn = _thinned([r for r in known if _place(r.metrics, metric) not in taken])
    traces: list[Mapping[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "trials, as searched",
            "x": [_place(r.metrics, metric)[0] for r in drawn],
            "y": [_place(r.metrics, metric)[1] for r in drawn],
            "text": [f"trial {r.number}" for r in drawn],
            "hovertemplate": "%{text}: %{x:.3f} ms, %{y:.4f}<extra></extra>",
            "marker": {"size": 5, "color": "#999999", "opacity": 0.45},
        }
    ]
    others = [m for m in front.others if "latency_ms" in m.metrics and metric in m.metrics]
    for name, members, symbol in (("not on the front", others, "x"), ("front", front.members, "circle")):
        if members:
            traces.append(_members(found, name, members, symbol))
    return _figure(
        traces, f"latency ms ({front.latency or 'as searched'}, {front.device})", metric, hovermode="closest"
    )


def _place(metrics: Mapping[str, float], metric: str) -> tuple[float, float]:
    return round(metrics.get("latency_ms", math.nan), 5), round(metrics.get(metric, math.nan), 5)


def _members(found: Contents, name: str, members: Sequence[Member], symbol: str) -> Mapping[str, Any]:
    metric = found.front.metric
    params = [m.metrics.get("params", 0.0) for m in members]
    largest = max(params) or 1.0
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [m.metrics.get("latency_ms") for m in members],
        "y": [m.metrics[metric] for m in members],
        "customdata": [m.id for m in members],
        "text": [hover(found, m) for m in members],
        "hovertemplate": "%{text}<extra></extra>",
        "error_x": _around([m.latency or m.metrics.get("latency_ms", 0.0) for m in members]),
        "error_y": {
            "type": "data",
            "array": [m.metrics.get(f"{metric}_se", 0.0) for m in members],
            "thickness": 1,
        },
        "marker": {
            "symbol": symbol,
            "size": [9 + 17 * (p / largest) ** 0.5 for p in params],
            "color": params,
            "colorscale": "Viridis",
            "showscale": name == "front",
            "colorbar": {"title": {"text": "parameters"}},
            "line": {"width": 1},
        },
    }


def hover(found: Contents, member: Member) -> str:
    """What is shown beside a point, as plotly's markup."""
    metric, values = found.front.metric, member.metrics
    error = values.get(f"{metric}_se")
    lines = [
        member.id,
        f"{metric} {values[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}"),
    ]
    if member.latency is not None:
        one = member.latency
        between = interval(one.low_ms, one.high_ms)
        lines.append(f"{one.kind} {one.ms:.3f} ms" + (f" ({between})" if between else ""))
    if member.predicted is not None:
        lines.append(f"predicted {member.predicted.ms:.3f} ms")
    if "params" in values:
        lines.append(f"{values['params']:,.0f} parameters")
    if member.reason:
        lines.append(member.reason)
    text = found.architectures.get(member.id, "")
    lines += [text[i : i + 90] for i in range(0, min(len(text), 720), 90)]
    return "<br>".join(html.escape(line) for line in lines)


def _predicted(found: Contents) -> Figure | None:
    members = [
        m
        for m in (*found.front.members, *found.front.others)
        if m.predicted is not None and m.latency is not None and m.latency.kind == "measured"
    ]
    if not members:
        return None
    pairs = [(m.predicted, m.latency) for m in members if m.predicted is not None and m.latency is not None]
    both = [one for pair in pairs for one in pair]
    ends = [min(one.low_ms or one.ms for one in both), max(one.high_ms or one.ms for one in both)]
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": "networks",
        "x": [p.ms for p, _ in pairs],
        "y": [t.ms for _, t in pairs],
        "text": [html.escape(m.id) for m in members],
        "hovertemplate": "%{text}: predicted %{x:.3f}, measured %{y:.3f} ms<extra></extra>",
        "error_x": _around([p for p, _ in pairs]),
        "error_y": _around([t for _, t in pairs]),
        "marker": {"size": 9},
    }
    line = {"type": "scatter", "mode": "lines", "name": "equal", "x": ends, "y": ends, "line": {"dash": "dot"}}
    return _figure([line, points], "predicted ms, 90% interval", "measured ms, 90% interval", showlegend=False)


def _around(latencies: Sequence[Latency | float]) -> dict[str, Any]:
    """Bars to the ends of intervals; none where there is no telling."""
    known = [one if isinstance(one, Latency) else Latency(one, None, None, "predicted") for one in latencies]
    return {
        "type": "data",
        "symmetric": False,
        "array": [0.0 if one.high_ms is None else one.high_ms - one.ms for one in known],
        "arrayminus": [0.0 if one.low_ms is None else one.ms - one.low_ms for one in known],
        "thickness": 1,
    }


def _progress(found: Contents) -> Figure | None:
    if not found.progress:
        return None
    evaluations, seconds, values = zip(*found.progress, strict=True)
    style = {"type": "scatter", "mode": "lines", "line": {"shape": "hv"}, "y": list(values)}
    by_time = {"x": [round(s, 2) for s in seconds], "xaxis": "x2", "line": {"dash": "dot", "shape": "hv"}}
    return _figure(
        [
            {**style, "name": "by evaluations", "x": list(evaluations)},
            {**style, **by_time, "name": "by time"},
        ],
        "evaluations",
        "hypervolume",
        xaxis2={"title": {"text": "seconds of evaluating"}, "overlaying": "x", "side": "top"},
    )  # fmt: skip


def _effects(found: Contents) -> Figure | None:
    if not found.effects:
        return None
    effects = list(reversed(found.effects))
    names = dict.fromkeys(name for effect in effects for name in effect.shares)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": html.escape(name),
            "x": [round(effect.shares.get(name, 0.0), 4) for effect in effects],
            "y": [html.escape(effect.knob) for effect in effects],
            "hovertemplate": "%{y}: %{x:.0%}<extra></extra>",
        }
        for name in names
    ]
    shown = {"xaxis": {"tickformat": ".0%"}, "yaxis": {"automargin": True}}
    return _figure(traces, "share of the variance over all trials that the choice explains", "", height=480, **shown)


def _mixers(found: Contents) -> Figure | None:
    if not found.mixers:
        return None
    places = list(dict.fromkeys(place for place, _, _ in found.mixers))
    mixers = sorted({mixer for _, mixer, _ in found.mixers})
    counts = {(place, mixer): n for place, mixer, n in found.mixers}
    trace = {
        "type": "heatmap",
        "x": [html.escape(place) for place in places],
        "y": [html.escape(mixer) for mixer in mixers],
        "z": [[counts.get((place, mixer), 0) for place in places] for mixer in mixers],
        "colorscale": "Blues",
        "reversescale": True,
        "hovertemplate": "%{y} at %{x}: %{z} networks<extra></extra>",
        "colorbar": {"title": {"text": "networks"}},
    }
    return _figure([trace], "", "", yaxis={"automargin": True})


def _by_latency(found: Contents) -> Figure | None:
    if not found.by_latency:
        return None
    groups = list(dict.fromkeys(f"{low:.3f} to {high:.3f} ms" for low, high, _, _ in found.by_latency))
    mixers = sorted({mixer for _, _, mixer, _ in found.by_latency})
    shares = {(f"{low:.3f} to {high:.3f} ms", mixer): share for low, high, mixer, share in found.by_latency}
    traces = [
        {
            "type": "bar",
            "name": html.escape(mixer),
            "x": groups,
            "y": [round(shares.get((group, mixer), 0.0), 4) for group in groups],
            "hovertemplate": "%{fullData.name}: %{y:.0%}<extra></extra>",
        }
        for mixer in mixers
    ]
    return _figure(traces, "latency of the front's networks", "share of their blocks", barmode="stack",
                   yaxis={"tickformat": ".0%"})  # fmt: skip
