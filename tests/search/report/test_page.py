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

from .browser import browser, why_not

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
        chromium.open(path.as_uri())
        chromium.wait("document.body.dataset.drawn === '6'")
        assert chromium.run("return document.querySelectorAll('#chart-front .point').length;") >= 40 + len(ids)
        place = chromium.run(
            "document.getElementById('chart-front').scrollIntoView();"
            "const points = [...document.querySelectorAll('#chart-front .scatterlayer .trace')].at(-1)"
            ".querySelectorAll('.point'); const box = points[0].getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2];"
        )
        chromium.move_to(*place)
        chromium.wait("document.querySelector('#chart-front .hoverlayer .hovertext')")
        assert ids[0] in chromium.run("return document.querySelector('#chart-front .hoverlayer').textContent;")
        chromium.move_to(*place, click=True)
        chromium.wait(f"document.body.dataset.copied === 'nas export finished --pick {ids[0]}'")
        chromium.run("document.querySelectorAll('button[data-copy]')[1].focus();")
        chromium.press("\ue007")  # Enter
        chromium.wait(f"document.body.dataset.copied === 'nas export finished --pick {ids[1]}'")
        (tmp_path / "evil.html").write_text(page(evil(run)))
        chromium.open((tmp_path / "evil.html").as_uri())
        chromium.wait("document.body.dataset.drawn")
        assert chromium.run("return document.body.dataset.evil ?? null;") is None
        assert [entry for entry in chromium.log("browser") if entry["level"] == "SEVERE"] == []
        messages = [json.loads(entry["message"])["message"] for entry in chromium.log("performance")]
        asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert {url.partition(":")[0] for url in asked} <= {"file", "data", "blob"} and len(asked) >= 2


def test_a_command_that_is_copied_runs_nothing_of_the_run(run):
    """The seed of a received run stood in a command for the shell as it was."""
    found = replace(contents(run), manifest={**run.manifest, "seed": "0; id > PROOF"})
    copied = [value for _, attributes in Parsed(page(found)).elements if (value := attributes.get("data-copy"))]
    assert "nas search -c config.yaml --seed '0; id > PROOF'" in copied
