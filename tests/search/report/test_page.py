"""The page of a run that the previous version finished, and of one that is full of markup and of trials."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mixnas.search.report import contents as reading
from mixnas.search.report.contents import contents
from mixnas.search.report.figures import POINTS, figures
from mixnas.search.report.page import page, write_report
from mixnas.search.run.directory import Run
from mixnas.search.study.results import Results, TrialRecord

from .browser import Browser, browser, visited, why_not

FORMER = Path(__file__).parents[2] / "data" / "v1"
EVIL = "</script><script>document.body.dataset.evil=1</script><img src=x onerror='document.body.dataset.evil=1'>&<b>"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    shutil.copytree(FORMER / "finished", tmp_path / "finished")
    return Run.open(tmp_path / "finished")


class Parsed(html.parser.HTMLParser):
    """Elements, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if not self._inside:
            self.text += data


def data_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found is not None
    return json.loads(found.group(1))


def test_a_reader_finds_what_the_run_knows(run):
    path = write_report(run)
    assert path == run.path / "report.html" and path.stat().st_size <= 6_000_000
    text = path.read_text()
    parsed, front = Parsed(text), run.front()
    header = parsed.text[: parsed.text.index("The front")]
    assert header.strip().startswith("finished: architecture search")
    assert header.index("asked params <= 20000, it has 914: kept") < header.index("40 of 40 evaluations done")
    charts = data_of(text)["figures"]
    assert set(charts) == {"front", "predicted", "progress", "effects", "mixers", "by-latency"}
    assert {f"chart-{name}" for name in charts} <= {a.get("id") for _, a in parsed.elements}
    trials, members = charts["front"]["data"]
    assert members["customdata"] == [m.id for m in front.members] and len(trials["x"]) == 40
    assert members["y"] == [m.metrics["accuracy"] for m in front.members]
    for m in front.members:
        assert f"{m.metrics['latency_ms']:.3f}" in parsed.text and m.id in parsed.text
        assert ("button", f"nas export finished --pick {m.id}") in [(t, a.get("data-copy")) for t, a in parsed.elements]
    assert "stages.0.blocks.0.token" in parsed.text and "nas search -c config.yaml --seed 0" in parsed.text
    assert "population_size: 8" in parsed.text and "cpu-intel-xeon-6-167-1t" in parsed.text


def test_nothing_is_remote(run):
    text = page(contents(run))
    parsed = Parsed(text)
    named = [a[key] for _, a in parsed.elements for key in ("src", "href", "action", "srcset") if a.get(key)]
    assert named == ["data:,"]
    policy = next(a["content"] for tag, a in parsed.elements if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def evil(run: Run) -> reading.Contents:
    """A run whose every text is markup."""
    found = contents(run)
    records = [replace(r, failure=EVIL, status="failed") if r.number % 7 == 0 else r for r in found.results.records]
    members = tuple(replace(m, reason=EVIL) for m in found.front.members)
    front = replace(found.front, run=EVIL, task=EVIL, device=EVIL, members=members, constraints=())
    return replace(
        found,
        front=front,
        results=Results(found.results.objectives, records=records),
        budgets=(EVIL,),
        effects=tuple(replace(e, knob=EVIL, values=((EVIL, 3, v[2]) for v in e.values)) for e in found.effects),
        mixers=((EVIL, EVIL, 2),),
        by_latency=((0.1, 0.2, EVIL, 1.0),),
        drawn={i: [replace(u, name=EVIL, operators=EVIL) for u in units] for i, units in found.drawn.items()},
        failures=((EVIL, 3),),
        architectures=dict.fromkeys(found.architectures, EVIL),
        config=EVIL,
        manifest={**found.manifest, "created": EVIL, "versions": {EVIL: EVIL}, "commit": EVIL, "seed": 0},
    )


def test_what_comes_from_the_run_is_text(run):
    text = page(evil(run))
    assert EVIL not in text
    parsed = Parsed(text)
    assert [tag for tag, _ in parsed.elements].count("script") == 3 and "img" not in [t for t, _ in parsed.elements]
    assert parsed.text.count(EVIL) > 8
    written = json.dumps(figures(evil(run)))
    assert "<script" not in written and "<img" not in written


def many(found: reading.Contents, count: int) -> Results:
    """As many trials, like those that there are."""
    known = [r for r in found.results.records if r.status == "done"]
    records = []
    for i in range(count):
        one = known[i % len(known)]
        metrics = {**one.metrics, "accuracy": one.metrics["accuracy"] * (1 + i / count)}
        records.append(TrialRecord(i, "done", one.id, one.architecture_json, metrics, seconds=0.5))
    return Results(found.results.objectives, found.results.constraints, records)


def test_ten_thousand_trials_are_a_page_that_opens(run, monkeypatch):
    results = many(contents(run), 10_000)
    monkeypatch.setattr(reading, "read_results", lambda *_: results)
    text = page(contents(run))
    assert len(text.encode()) <= 6_000_000
    trials = data_of(text)["figures"]["front"]["data"][0]
    assert len(trials["x"]) == POINTS and f"{10_000 - POINTS:,} are not" in text


def test_no_trial_lies_over_a_network_of_the_front(run, monkeypatch):
    """What was searched with what it ends with is in one place twice, and a click is to meet the network."""
    found, front = contents(run), run.front()
    ended = [TrialRecord(100 + i, "done", m.id, "{}", dict(m.metrics)) for i, m in enumerate(front.members)]
    results = found.results
    results = Results(results.objectives, results.constraints, [*results.records, *ended])
    monkeypatch.setattr(reading, "read_results", lambda *_: results)
    trials, members = data_of(page(contents(run)))["figures"]["front"]["data"]
    assert members["customdata"] == [m.id for m in front.members]
    assert trials["text"] == [f"trial {i}" for i in range(40)]


def test_a_run_without_a_final_front_has_a_page_too(tmp_path):
    shutil.copytree(FORMER / "finished", tmp_path / "half")
    run = Run.open(tmp_path / "half")
    (run.path / "networks").rename(run.path / "elsewhere")
    text = Parsed(page(contents(run))).text
    assert "Networks, unit by unit" not in text and "The front" in text


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_browser_draws_it_and_hover_copy_and_keys_work(run, tmp_path):
    path = write_report(run)
    ids = [m.id for m in run.front().members]
    with browser() as chromium:
        found = visited(chromium, path.as_uri())
        assert found["charts"] == 6 and found["points"] >= 40 + len(ids) and ids[0] in found["hover"]
        assert found["copied"] == f"nas export finished --pick {ids[0]}"
        assert found["errors"] == found["remote"] == []
        chromium.run("document.querySelectorAll('button[data-copy]')[1].focus();")
        chromium.press("\ue007")  # Enter
        chromium.wait(f"document.body.dataset.copied === 'nas export finished --pick {ids[1]}'")
        (tmp_path / "evil.html").write_text(page(evil(run)))
        found = visited(chromium, (tmp_path / "evil.html").as_uri())
        assert chromium.run("return document.body.dataset.evil ?? null;") is None
        assert found["errors"] == found["remote"] == []


def luminance(color: str) -> float:
    """Relative luminance of rgb(...), 0 to 1 (WCAG 2.2)."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


INK = """
const paper = getComputedStyle(document.body).backgroundColor;
const words = [...document.querySelectorAll('p, td, th, h1, h2, figcaption, summary')];
const drawn = [...document.querySelectorAll('#chart-front .xtick text')];
return [paper, [...new Set(words.map((e) => getComputedStyle(e).color)), getComputedStyle(drawn[0]).fill]];
"""


def contrasts(chromium: Browser, paper: str = "") -> list[float]:
    """Of each colour of words on the page's own background, or on that of paper."""
    there, inks = chromium.run(INK)
    pairs = [sorted((luminance(ink), luminance(paper or there))) for ink in inks]
    return [(light + 0.05) / (dim + 0.05) for dim, light in pairs]


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_ten_thousand_trials_are_read_on_a_phone_in_the_dark_and_on_paper(run, tmp_path, monkeypatch):
    results = many(contents(run), 10_000)
    monkeypatch.setattr(reading, "read_results", lambda *_: results)
    path = write_report(run)
    with browser() as chromium:
        found = visited(chromium, path.as_uri())
        assert found["points"] >= POINTS and found["errors"] == found["remote"] == [] and found["copied"]
        assert min(contrasts(chromium)) >= 4.5  # what WCAG 2.2 asks for text, 1.4.3
        screen = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        chromium.devtools("Emulation.setDeviceMetricsOverride", **screen)
        chromium.wait("document.querySelector('#chart-front svg').getBoundingClientRect().width <= 390")
        assert chromium.run("return document.documentElement.scrollWidth;") <= 390  # tables scroll by themselves
        night = [{"name": "prefers-color-scheme", "value": "dark"}]
        chromium.devtools("Emulation.setEmulatedMedia", features=night)
        chromium.wait("getComputedStyle(document.querySelector('#chart-front .xtick text')).fill !== 'rgb(27, 31, 36)'")
        assert luminance(chromium.run(INK)[0]) < 0.05 and min(contrasts(chromium)) >= 4.5
        chromium.devtools("Emulation.setEmulatedMedia", media="print", features=night)
        chromium.run("dispatchEvent(new Event('beforeprint'));")
        chromium.wait("getComputedStyle(document.querySelector('#chart-front .xtick text')).fill === 'rgb(0, 0, 0)'")
        assert min(contrasts(chromium, "rgb(255, 255, 255)")) >= 4.5  # on white paper
        assert chromium.run("return [...document.querySelectorAll('details')].every((one) => one.open);")
        assert chromium.run("return [...document.querySelectorAll('button')].every((one) => !one.offsetParent);")
        assert [entry for entry in chromium.log("browser") if entry["level"] == "SEVERE"] == []


def test_a_command_that_is_copied_runs_nothing_of_the_run(run):
    """The seed of a received run stood in a command for the shell as it was."""
    found = replace(contents(run), manifest={**run.manifest, "seed": "0; id > PROOF"})
    copied = [value for _, attributes in Parsed(page(found)).elements if (value := attributes.get("data-copy"))]
    assert "nas search -c config.yaml --seed '0; id > PROOF'" in copied
