"""Trials that are trained in rungs: who goes on, from what, and what a kill costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixnas.search.engines.climbing import Climbing
from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.promotion import Rungs
from mixnas.search.run.stopping import StopSignal
from mixnas.search.study.pareto import as_minimised
from mixnas.search.study.reading import read_results
from mixnas.search_space.errors import StoppedEarly
from tests.contracts.engine import CONSTRAINTS, OBJECTIVES, carry_out, study_at
from tests.search.engines.troubles import InRungs, end
from tests.search.problems import TINY

SHARES = (1 / 9, 1 / 3, 1.0)


def climb(engine, folder, evaluator, trials, plain=None, **options):
    """A search in rungs; returns its results, as the journal alone tells them too."""
    with study_at(folder / "j", **({} if plain is None else {"plain": plain})) as study:
        climbing = Climbing(study, SHARES, 3, folder / "rungs")
        try:
            carry_out(engine, study, evaluator, Budget(trials=trials), climbing=climbing, **options)
        finally:
            study.sync()
            told = study.results
    read = read_results(folder / "j", OBJECTIVES, CONSTRAINTS)
    assert sorted(read.records, key=lambda r: r.number) == sorted(told.records, key=lambda r: r.number)
    assert [r.id for r in read.front()] == [r.id for r in told.front()] and read.to_csv() == told.to_csv()
    return told


def promotions(results):
    return {(r.id, round(s.share, 6)) for r in results.records for s in r.stretches[1:] if not s.failure}


def replayed(results):
    """Whom the rule sends on when trials come one after the other, in the order of their numbers."""
    rule, taken = Rungs(3, 3), set()
    records = {r.number: r for r in results.records if r.status == "done"}
    left = sorted(records)

    def add(number, rung):
        stretch = records[number].stretches[rung] if records[number].stretches else records[number]
        values = as_minimised([[stretch.metrics[o.name] for o in OBJECTIVES]], OBJECTIVES)[0]
        missed = [c.violation(stretch.metrics) for c in CONSTRAINTS if not c.holds(stretch.metrics)]
        rule.add(number, rung, values, max(missed, default=0.0))

    while (found := rule.promotable(last=not left)) or left:
        if found:
            rule.promote(*found)
            taken.add((records[found[0]].id, round(SHARES[found[1] + 1], 6)))
            add(found[0], found[1] + 1)
        else:
            add(left.pop(0), 0)
    return taken


def test_who_goes_on_is_who_the_rule_says_and_goes_on_from_its_own_state(tmp_path):
    evaluator = InRungs(tmp_path / "begun")
    results = climb(LocalEngine(), tmp_path, evaluator, 30)
    assert results.counts["done"] == 30 and promotions(results) == replayed(results)
    climbed = evaluator.climbed
    assert len(climbed) == len(set(climbed)) == 30 + len(promotions(results))
    by_rung = [sum(until == pytest.approx(share) for _, _, until in climbed) for share in SHARES]
    assert by_rung[0] == 30 and by_rung[1] >= 10 and by_rung[2] >= 3
    for record in results.records:
        shares = [stretch.share for stretch in record.stretches]
        assert shares == pytest.approx(SHARES[: max(1, len(shares))]) or not shares
        assert record.metrics["parts"] == max(1, len(shares)) and record.share == (shares or [SHARES[0]])[-1]
    # only who was trained to the end is on the front, and keeps no state
    whole = {r.id for r in results.records if r.whole}
    assert {r.id for r in results.front()} <= whole and results.front()
    kept = {path.stem for path in (tmp_path / "rungs").iterdir()}
    assert kept == {r.id for r in results.records if r.status == "done"} - whole


def test_optuna_s_trials_have_the_metrics_of_the_first_rung_all_of_them(tmp_path):
    """So that a sampler compares like with like."""
    climb(LocalEngine(), tmp_path, InRungs(tmp_path / "begun"), 12)
    with study_at(tmp_path / "j") as study:
        trials = [t for t in study.optuna_study.get_trials() if t.values is not None]
    assert len(trials) == 12 and {t.user_attrs["fidelity"] for t in trials} == {SHARES[0]}
    assert all(t.user_attrs["metrics"]["parts"] == 1 for t in trials)


@pytest.mark.parametrize("engine", [LocalEngine(limit=60.0), LocalEngine(workers=2)], ids=["one worker", "two"])
def test_a_worker_that_is_killed_in_a_rung_is_replaced_and_the_rung_done_again(tmp_path, engine):
    evaluator = InRungs(tmp_path / "begun", {2: end, 8: end, 11: end})
    results = climb(engine, tmp_path, evaluator, 12)
    assert results.counts["done"] == 12 and results.front()
    retries = [*(x for r in results.records for x in r.retries)]
    retries += [x for r in results.records for s in r.stretches for x in s.retries]
    assert set(retries) == {"the process that did it ended by signal 9"}
    again = [one for one in evaluator.climbed if evaluator.climbed.count(one) > 1]
    assert len(again) == 2 * len(retries)
    if engine.workers == 1:  # two that begin at once may both be, or neither, the one that is to end
        assert len(retries) == 3 and promotions(results) == replayed(results)


@pytest.mark.parametrize("stopped_at", [1, 5, 9, 14, 17])
def test_a_search_that_is_stopped_goes_on_from_the_last_rung_of_each(tmp_path, stopped_at):
    whole = InRungs(tmp_path / "whole")
    (tmp_path / "w").mkdir()
    expected = climb(LocalEngine(), tmp_path / "w", whole, 14)
    stop = StopSignal()
    evaluator = InRungs(tmp_path / "begun", {stopped_at: stop.request})
    with pytest.raises(StoppedEarly):
        climb(LocalEngine(), tmp_path, evaluator, 14, stop=stop)
    results = climb(LocalEngine(), tmp_path, evaluator, 14)
    assert evaluator.climbed == whole.climbed  # nothing twice, nothing else
    assert [(r.id, r.metrics, r.share) for r in results.records] == [
        (r.id, r.metrics, r.share) for r in expected.records
    ]


def test_a_driver_that_is_killed_loses_nothing_that_it_recorded(tmp_path):
    """With SIGKILL, in rungs of every kind; the state of one that was being trained on is still there."""
    code = (
        "import sys; from pathlib import Path; from tests.search.engines.test_climbing import *\n"
        "folder, at = Path(sys.argv[1]), int(sys.argv[2])\n"
        "climb(LocalEngine(), folder, InRungs(folder / 'begun', {at: end}), 14)\n"
    )
    whole = InRungs(tmp_path / "whole")
    (tmp_path / "w").mkdir()
    expected = climb(LocalEngine(), tmp_path / "w", whole, 14)
    folder = tmp_path / "killed"
    folder.mkdir()
    further = [at for at, (_, begun, _) in enumerate(whole.climbed, start=1) if begun]
    for kills, at in enumerate((further[0], further[2], further[-1])):  # each kill is a line more
        command = [sys.executable, "-c", code, str(folder), str(at + kills)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        ended = subprocess.run(command, cwd=Path(__file__).parents[3], env=environment, capture_output=True)
        assert ended.returncode == -9, ended.stderr
    evaluator = InRungs(folder / "begun")
    results = climb(LocalEngine(), folder, evaluator, 14)
    assert [(r.id, r.metrics, r.share) for r in results.records] == [
        (r.id, r.metrics, r.share) for r in expected.records
    ]
    twice = {one for one in evaluator.climbed if evaluator.climbed.count(one) > 1}
    assert len(evaluator.climbed) == len(whole.climbed) + 3 and len(twice) == 3


def test_a_space_that_is_used_up_is_climbed_to_the_end(tmp_path):
    evaluator = InRungs(tmp_path / "begun")
    results = climb(LocalEngine(), tmp_path, evaluator, 100, plain=TINY)
    assert results.counts["done"] < 100 and any(r.whole for r in results.records)
    assert promotions(results) == replayed(results)


class Diverging(InRungs):
    """The first that goes on fails; what a trial was before stays."""

    def _evaluate(self, request):
        if request.part.begun > 0 and request.architecture.id == self.victim():
            raise ValueError("it diverged")
        return super()._evaluate(request)

    def victim(self):
        first = self.path.with_suffix(".victim")
        return first.read_text() if first.exists() else ""


def test_one_that_fails_on_its_way_stays_what_it_was_and_gives_its_place_away(tmp_path):
    probe = InRungs(tmp_path / "probe")
    (tmp_path / "p").mkdir()
    climb(LocalEngine(), tmp_path / "p", probe, 6)
    victim = next(identity for identity, begun, _ in probe.climbed if begun)
    (tmp_path / "begun.victim").write_text(victim)
    evaluator = Diverging(tmp_path / "begun")
    results = climb(LocalEngine(), tmp_path, evaluator, 6)
    (failed,) = [r for r in results.records if r.id == victim]
    assert (
        failed.status == "done" and failed.share == SHARES[0] and failed.stretches[-1].failure.endswith("it diverged")
    )
    assert any(r.whole for r in results.records)
    before = len(evaluator.climbed)
    climb(LocalEngine(), tmp_path, evaluator, 6)
    assert len(evaluator.climbed) == before  # it is not tried again
