"""A run as one page: self-contained, nothing remote, everything that comes from the run escaped."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mixnas.search.card import interval
from mixnas.search.report.breakdown import UnitRow
from mixnas.search.report.contents import Contents, contents
from mixnas.search.report.figures import POINTS, figures, thinned
from mixnas.search.run.directory import Run
from mixnas.search.run.front import SHARE, Member, in_words
from mixnas.search_space.errors import counted
from mixnas.search_space.files import atomic_write

_HERE = Path(__file__).parent
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
_TRIALS_SHOWN = 40  # rows of a long table

_e = html.escape


def write_report(run: Run, path: str | Path | None = None) -> Path:
    """Write the page.

    Args:
        run: Whose.
        path: Where to; `report.html` of the run if not given.

    Raises:
        NasError: No front has been written yet.
    """
    where = Path(path) if path is not None else run.path / "report.html"
    atomic_write(where, page(contents(run)))
    return where


def page(found: Contents) -> str:
    """The whole page."""
    charts = figures(found)
    commands = {m.id: _command(found, m) for m in (*found.front.members, *found.front.others)}
    data = _for_script({"figures": charts, "commands": commands})
    sections = [
        _section("front", "The front", _front(found), charts, _front_caption(found)),
        _section("predicted", "Predicted against measured latency", "", charts, "On the dotted line they are equal."),
        _section("progress", "Hypervolume", "", charts, _progress_caption(found)),
        _section("effects", "What each choice does", _effects(found), charts, _EFFECTS_CAPTION),
        _section("mixers", "Mixers of the front, by depth", "", charts, "Networks of the front with a mixer there."),
        _section("by-latency", "Mixers of the front, by latency", "", charts, ""),
        _plain_section("networks", "Networks, unit by unit", _networks(found)),
        _plain_section("failures", "Failures", _failures(found)),
        _plain_section("settings", "Settings", _settings(found)),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_e(found.front.run)}: architecture search</title>",
            '<link rel="icon" href="data:,">',
            f"<style>{_asset('page.css')}</style>",
            "</head>",
            "<body>",
            _head(found),
            *filter(None, sections),
            '<div id="said" role="status" aria-live="polite"></div>',
            f'<script type="application/json" id="data">{data}</script>',
            f"<script>{_plotly()}</script>",
            f"<script>{_asset('page.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    text: str = get_plotlyjs()
    return text


def _for_script(plain: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(plain, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _command(found: Contents, member: Member) -> str:
    if not found.front.final:
        return f"nas export {found.typed} --trial {member.trial}"
    return f"nas export {found.typed} --pick {member.id}"


def _section(name: str, title: str, text: str, charts: dict[str, Any], caption: str) -> str:
    """A chart, with what stands below it; nothing where there is no chart."""
    if name not in charts:
        return ""
    chart = f'<div class="chart" id="chart-{name}" role="img" aria-label="{_e(title)}"></div>'
    figure = f"<figure>{chart}<figcaption>{_e(caption)}</figcaption></figure>"
    return f'<section id="{name}"><h2>{_e(title)}</h2>{figure}{text}</section>'


def _plain_section(name: str, title: str, text: str) -> str:
    return f'<section id="{name}"><h2>{_e(title)}</h2>{text}</section>' if text else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: frozenset[int] = frozenset()) -> str:
    """Cells are markup already."""

    def line(cells: Sequence[str], tag: str) -> str:
        classes = [' class="number"' if i in numbers else "" for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{c}>{cell}</{tag}>" for c, cell in zip(classes, cells, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    head = line([_e(column) for column in columns], "th")
    return f'<div class="scroll" tabindex="0"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


# -- the parts ----------------------------------------------------------------------------------------------------


def _head(found: Contents) -> str:
    front, counts = found.front, found.results.counts
    budgets = found.budgets or ("no budget was asked for",)
    about = [
        f"{counts['done']:,} of {found.results.evaluated:,} evaluations done, {counts['failed']:,} failed",
        f"{counted(len(front.members), 'network')} on the front",
        f"task {front.task if isinstance(front.task, str) else front.task.get('name', '')}",
        f"device {front.device or found.manifest.get('device', '')}",
    ]
    if front.hypervolume is not None:
        about.append(f"hypervolume {front.hypervolume:.4f}")
    shares = [m.metrics[SHARE] for m in front.members if SHARE in m.metrics]
    if shares:
        about.append(f"its networks are {in_words(shares)}")
    if not front.final:
        about.append("the search has not come to its final networks: numbers are those of the search")
    lines = "".join(f'<p class="budget">{_e(line)}</p>' for line in budgets)
    return f"<header><h1>{_e(front.run)}</h1>{lines}<p>{_e('; '.join(about))}</p></header>"


def _front_caption(found: Contents) -> str:
    text = (
        "Bars: 90% interval of latency, one standard error of the metric. Size and colour: parameters. "
        "Choose a point, or a button below, to copy the command that exports it."
    )
    left = thinned(found)
    return text + (f" Of the trials {POINTS:,} are drawn, evenly; {left:,} are not." if left else "")


def _front(found: Contents) -> str:
    front, metric = found.front, found.front.metric
    parts = any(SHARE in m.metrics for m in front.members)
    columns = ["network", metric, *(["trained"] if parts else []), *([f"test {metric}"] if front.final else [])]
    columns += ["latency ms", "90% interval"]
    own = {metric, f"test_{metric}", "latency_ms", "params", "weight_bytes"}
    further = [name for name in front.asked if name not in own]
    columns += ["predicted ms", "parameters", "bytes", *further, "export", "architecture"]
    rows = []
    for m in front.members:
        values, latency = m.metrics, m.latency
        between = "" if latency is None else interval(latency.low_ms, latency.high_ms)
        predicted = "" if m.predicted is None else f"{m.predicted.ms:.3f}"
        command = _command(found, m)
        button = f'<button type="button" data-copy="{_e(command)}" aria-label="copy: {_e(command)}">copy</button>'
        row = [f"<code>{_e(m.id)}</code>" + (" (knee)" if m.id == front.knee else ""), _with_error(values, metric)]
        row += [f"{values.get(SHARE, 1.0):.0%}"] if parts else []
        row += [_with_error(values, f"test_{metric}")] if front.final else []
        row += [_number(values.get("latency_ms"), ".3f"), between, predicted, _number(values.get("params"), ",.0f")]
        row += [_number(values.get("weight_bytes"), ",.0f"), *(_number(values.get(n), ",.5g") for n in further)]
        row += [button, f"<code>{_e(found.architectures[m.id])}</code>"]
        rows.append(row)
    numbers = frozenset(range(1, len(columns) - 2))
    said = "".join(f"<p>{_e(line)}</p>" for line in found.policies)
    return _table(columns, rows, numbers=numbers) + said


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _with_error(values: Any, name: str) -> str:
    if name not in values:
        return ""
    error = values.get(f"{name}_se")
    return f"{values[name]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _progress_caption(found: Contents) -> str:
    reference = found.results.reference
    if reference is None:
        return ""
    point = ", ".join(
        f"{o.name} {value:.4g}" for o, value in zip(found.results.objectives, reference.point, strict=True)
    )
    return f"Of the searched front, in units of the box that the first trials fixed; reference point: {point}."


_EFFECTS_CAPTION = (
    "Over all finished trials. A strategy tries what it takes for good more often, so this is association, not cause."
)


def _effects(found: Contents) -> str:
    parts = []
    for effect in found.effects:
        names = list(effect.shares)
        rows = [
            [f"<code>{_e(value)}</code>", f"{count:,}", *(f"{means[name]:.4g}" for name in names)]
            for value, count, means in effect.values
        ]
        columns = ["value", "trials", *(f"mean {name}" for name in names)]
        table = _table(columns, rows, numbers=frozenset(range(1, len(columns))))
        parts.append(f"<details><summary><code>{_e(effect.knob)}</code></summary>{table}</details>")
    return "".join(parts)


def _networks(found: Contents) -> str:
    members = {m.id: m for m in found.front.members}
    parts = []
    for i, (identity, units) in enumerate(found.drawn.items()):
        opened = " open" if i == 0 else ""
        summary = (
            f"<code>{_e(identity)}</code> {_e(found.front.metric)} {members[identity].metrics[found.front.metric]:.4f}"
        )
        parts.append(f"<details{opened}><summary>{summary}</summary>{unit_table(units)}</details>")
    left = len(found.front.members) - len(found.drawn)
    if left > 0 and found.drawn:
        parts.append(f'<p class="soft">{left} more: nas explain {_e(found.typed)} ID</p>')
    return "".join(parts)


def unit_table(units: Sequence[UnitRow]) -> str:
    """A network's units with bars of latency."""
    longest = max((u.latency_ms for u in units if u.latency_ms is not None), default=0.0)
    rows = []
    for u in units:
        width = 0.0 if u.latency_ms is None or longest <= 0 else max(0.0, 100 * u.latency_ms / longest)
        rows.append(
            [
                f"<code>{_e(u.name)}</code>",
                _e(u.operators),
                u.answers,
                f"{u.params:,}",
                f"{u.weight_bytes:,}",
                _number(u.latency_ms, ".4f"),
                f'<span style="display:block;height:0.8rem;background:var(--bar);width:{width:.1f}%"></span>',
            ]
        )
    columns = ["unit", "operators", "answers", "parameters", "bytes", "predicted ms", "share of the slowest unit"]
    return _table(columns, rows, numbers=frozenset((3, 4, 5)))


def _failures(found: Contents) -> str:
    if not found.failures:
        return "<p>None.</p>"
    rows = [[f"{count:,}", f"<code>{_e(reason[:600])}</code>"] for reason, count in found.failures]
    return _table(["trials", "reason"], rows, numbers=frozenset((0,)))


def _settings(found: Contents) -> str:
    manifest = found.manifest
    phases = [[_e(str(p.get("name", ""))), _number(p.get("seconds"), ".1f")] for p in manifest.get("phases", [])]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    command = f"nas search -c config.yaml --seed {shlex.quote(str(manifest.get('seed', 0)))}"
    commit = str(manifest.get("commit") or "unknown")
    begun, ended = str(manifest.get("created", "")), str(manifest.get("finished") or "not yet")
    return "".join(
        [
            f"<p>To repeat it, with the configuration below as config.yaml: <code>{_e(command)}</code> "
            f'<button type="button" data-copy="{_e(command)}">copy</button></p>',
            f"<p>Begun {_e(begun)}, finished {_e(ended)}. {_e(versions)}. Commit {_e(commit)}.</p>",
            _table(["phase", "seconds"], phases[-_TRIALS_SHOWN:], numbers=frozenset((1,))) if phases else "",
            f"<pre tabindex='0'>{_e(found.config)}</pre>",
        ]
    )
