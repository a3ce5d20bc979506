"""A study that several drivers share, on a real PostgreSQL server that is started for it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
import time
from collections import Counter

import optuna
import pytest

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget, Session
from mixnas.search.study.connection import Connection
from mixnas.search.study.driver import FILE, Driver
from mixnas.search.study.reading import check_journal, read_results
from mixnas.search_space.errors import ConfigError, IntegrityError, MachineError
from tests.postgres import PASSWORD, running, why_not
from tests.search.problems import TINY, FromFunction, analytic
from tests.search.study.shared_driver import (
    OBJECTIVES,
    Evaluations,
    drive,
    server_at,
    shared_study,
    started,
)

LIMIT_S = 120


@pytest.fixture
def url(postgres):
    return postgres.new()


@pytest.fixture
def connect(url):
    made = []

    def make(**options) -> Connection:
        made.append(Connection(server_at(url, **options)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def evaluated(folder):
    found = read_results(folder / "study.journal", OBJECTIVES)
    return {r.number: r.id for r in found.records if r.evaluated}


def reported(folder):
    lines = [line.split() for line in (folder / "reported").read_text().splitlines()]
    return {int(number): identity for number, identity in lines}


def until(holds):
    end = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(process):
    _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said


def test_two_drivers_spend_one_budget_and_neither_lose_nor_double_a_trial(url, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for driver in [started(folder, url, 30, seconds=0.1) for folder in folders]:
        ended(driver)
    storage = optuna.storages.RDBStorage(url)
    trials = optuna.load_study(study_name="search", storage=storage).trials
    storage.engine.dispose()
    done = {t.number: t.user_attrs["id"] for t in trials if t.state == optuna.trial.TrialState.COMPLETE}
    assert len(done) == len(set(done.values())) == 30
    told = [reported(folder) for folder in folders]
    assert all(told) and not set(told[0]) & set(told[1]) and told[0] | told[1] == done
    begun = [identity for folder in folders for identity in Evaluations(folder).ids]
    assert Counter(begun) == Counter(done.values())
    # each has a whole copy, that reads like the journal of any run, and the same front in the same box
    found = [read_results(folder / "study.journal", OBJECTIVES) for folder in folders]
    assert evaluated(folders[0]) == evaluated(folders[1]) == done
    assert sorted(r.id for r in found[0].front()) == sorted(r.id for r in found[1].front())
    assert found[0].hypervolume() == found[1].hypervolume() is not None
    for folder in folders:
        check_journal(folder / "study.journal", OBJECTIVES)
    for record in found[0].records:
        assert record.metrics == (analytic(record.architecture) if record.status == "done" else {})


def test_the_trial_of_a_driver_that_is_killed_is_given_back_and_carried_out(url, tmp_path):
    killed = started(tmp_path / "killed", url, 20, hangs_at=4)
    until(lambda: len(Evaluations(tmp_path / "killed").ids) == 4)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=LIMIT_S)
    drive(tmp_path / "other", url, 20)
    found = read_results(tmp_path / "other" / "study.journal", OBJECTIVES)
    assert found.counts["done"] == 20 and found.counts["interrupted"] == 1 and not found.counts["running"]
    done = evaluated(tmp_path / "other")
    assert len(set(done.values())) == 20 and reported(tmp_path / "killed").items() <= done.items()
    lost = Evaluations(tmp_path / "killed").ids[-1]
    (first,) = [r for r in found.records if r.status == "interrupted"]
    (again,) = [r for r in found.records if r.evaluated and r.id == lost]
    assert first.id == lost and len(again.retries) == 1
    assert re.fullmatch(rf"its driver killed#[0-9a-f.]+ was gone, as trial {first.number}", again.retries[0])


def test_a_trial_that_outlives_its_drivers_fails_after_three_retries(url, connect, tmp_path):
    """Each session leaves a trial open and is gone; a driver that comes back need not wait for its own heartbeats."""
    left = []
    for _ in range(5):
        connection = connect()
        with shared_study(tmp_path / "a", connection) as study:
            left.append(study.ask(10))
        connection.close()
    ids = [proposal.architecture.id for proposal in left]
    assert len(set(ids[:4])) == 1 and ids[4] != ids[0]
    found = read_results(tmp_path / "a" / "study.journal", OBJECTIVES)
    assert found.counts == Counter(interrupted=3, failed=1, running=1)
    (failed,) = [r for r in found.records if r.status == "failed"]
    assert failed.id == ids[0] and "and 3 retries were lost before" in failed.failure and len(failed.retries) == 3


def test_a_living_driver_of_the_same_name_keeps_its_trial(url, connect, tmp_path):
    """Of host and path alone two containers are often the same. Its own next session need not wait."""
    for name in "xy":
        (tmp_path / name).mkdir()
    first, second, third = (connect(heartbeat=1000, grace=3000) for _ in range(3))
    with shared_study(tmp_path / "x" / "a", first) as study, shared_study(tmp_path / "y" / "a", second) as other:
        proposal = study.ask(10)
        other.refresh()
        assert other.elsewhere == 1 and other.ask(10).architecture != proposal.architecture
        with shared_study(tmp_path / "y" / "a", third) as again:
            again.refresh()
            assert again.elsewhere == 1 and again.results.counts["interrupted"] == 1  # its own, not the other's
        assert study.tell(proposal, analytic(proposal.architecture), 1.0).status == "done"


def test_what_a_driver_knows_of_its_earlier_processes(tmp_path):
    (tmp_path / "a").mkdir()
    first = Driver.begin(tmp_path / "a", "host:/a")
    second = Driver.begin(tmp_path / "a", "host:/a")
    assert second.run == first.run != first.process != second.process
    assert second.gone == second.earlier == {first.process} and not first.earlier
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copied = Driver.begin(tmp_path / "copy", "host:/a")
    assert copied.earlier == {first.process, second.process} and not copied.gone  # they may be living
    (tmp_path / "a" / FILE).write_text("{")
    assert not Driver.begin(tmp_path / "a", "host:/a").earlier


def test_a_study_that_is_deleted_while_it_is_searched_is_told_of(url, connect, tmp_path, postgres):
    with shared_study(tmp_path / "a", connect()) as study:
        proposal = study.ask(10)
        postgres.execute("TRUNCATE studies CASCADE", url.rpartition("/")[2])
        for does in (
            lambda: study.tell(proposal, analytic(proposal.architecture), 1.0),
            lambda: study.ask(10),
            study.refresh,
        ):
            with pytest.raises(IntegrityError, match=r"\(study search\).*was deleted on the server") as raised:
                does()
            assert raised.value.exit_status == 5
    assert not postgres.execute("SELECT * FROM studies", url.rpartition("/")[2])


def test_a_driver_that_was_held_to_be_gone_is_not_believed(url, connect, tmp_path):
    slow, other = connect(heartbeat=3000, grace=6000), connect(heartbeat=0.25, grace=0.5)
    with shared_study(tmp_path / "slow", slow) as study, shared_study(tmp_path / "other", other) as others:
        proposal = study.ask(10)
        assert others.elsewhere == 0
        others.refresh()
        assert others.elsewhere == 1
        until(lambda: others.refresh() or not others.elsewhere)
        again = others.ask(10)
        assert again.architecture == proposal.architecture
        record = study.tell(proposal, analytic(proposal.architecture), 1.0)
        assert record.status == "interrupted" and study.results.evaluated == 0
        assert others.tell(again, analytic(again.architecture), 1.0).status == "done"
        study.refresh()
        assert study.results.counts == others.results.counts == Counter(done=1, interrupted=1)


def test_drivers_do_not_coincide_to_the_last_architecture_of_a_small_space(url, connect, tmp_path):
    """Both propose in turn and tell late: what one has in flight the other does not propose, nor what is done."""
    with shared_study(tmp_path / "a", connect(), TINY) as a, shared_study(tmp_path / "b", connect(), TINY) as b:
        size, flying = a.space.size(), []
        for i in range(size):
            study = (a, b)[i % 2]
            flying.append((study, study.ask(size)))
            if i % 3 == 2:
                teller, proposal = flying.pop(0)
                teller.tell(proposal, analytic(proposal.architecture), 0.1)
        for study, proposal in flying:
            study.tell(proposal, analytic(proposal.architecture), 0.1)
        a.refresh()
        b.refresh()
        assert (
            a.results.evaluated == b.results.evaluated == size == len({r.id for r in a.results.records if r.evaluated})
        )
        with Session(a, Budget(trials=1000)) as session:
            LocalEngine().run(session, FromFunction(analytic))
            assert session.ending().reason == "exhausted"


@pytest.fixture
def own_server():
    if reason := why_not():
        pytest.skip(reason)
    with running() as server:
        yield server


def test_a_server_that_goes_away_for_a_while_is_waited_for_and_then_not(own_server, tmp_path):
    """Back in time: nothing shows. Not back: status 4, and what was evaluated is sent by the next session."""
    url, counted = own_server.new(), Evaluations(tmp_path / "a")

    def interrupted(architecture):
        if len(counted.ids) == 4:
            own_server.stop()
            threading.Timer(1.0, own_server.start).start()
        if len(counted.ids) == 9:
            own_server.stop()
        return counted(architecture)

    connection = Connection(server_at(url, wait=60))
    with shared_study(tmp_path / "a", connection) as study:
        with Session(study, Budget(trials=7)) as session:
            LocalEngine().run(session, FromFunction(interrupted))
        assert study.results.counts == Counter(done=7) and len(set(counted.ids)) == 7
    connection.close()
    connection = Connection(server_at(url, wait=0.5))
    with (
        shared_study(tmp_path / "a", connection) as study,
        pytest.raises(MachineError, match="resume") as raised,
        Session(study, Budget(trials=12)) as session,
    ):
        LocalEngine().run(session, FromFunction(interrupted))
    assert raised.value.exit_status == 4 and PASSWORD not in str(raised.value)
    connection.close()
    with pytest.raises(ConfigError, match="cannot be used"):
        Connection(server_at(url))
    own_server.start()
    drive(tmp_path / "a", url, 12)
    found = read_results(tmp_path / "a" / "study.journal", OBJECTIVES)
    assert found.counts["done"] == 12 and len(counted.ids) == len(set(counted.ids)) == 12
    assert not (tmp_path / "a" / "unsent.json").exists()


def test_a_server_that_has_lost_trials_is_not_taken_for_the_truth(postgres, tmp_path):
    drive(tmp_path / "a", postgres.new(), 3)
    before = (tmp_path / "a" / "study.journal").read_bytes()
    with pytest.raises(IntegrityError, match="3 that were evaluated are only in the copy"):
        drive(tmp_path / "a", postgres.new(), 3)
    assert (tmp_path / "a" / "study.journal").read_bytes() == before


def test_what_is_wrong_with_a_server_is_said_without_the_password(postgres, url):
    database = url.rpartition("/")[2]
    for wrong, said in [
        (postgres.url(database, "not th3 password"), "PGPASSWORD"),
        (postgres.url("nowhere"), "createdb"),
        (url.replace(str(postgres.port), "1"), "See that it runs"),
    ]:
        with pytest.raises(ConfigError, match=said) as raised:
            Connection(server_at(wrong))
        told = [str(raised.value), repr(raised.value.__cause__), repr(raised.value.__context__)]
        assert not any("th3" in text or "corr3ct" in text for text in told)


def test_tables_of_another_version_of_optuna_are_refused(postgres, url):
    Connection(server_at(url)).close()
    database = url.rpartition("/")[2]
    postgres.execute("UPDATE alembic_version SET version_num = 'v3.0.0.a'", database)
    postgres.execute("UPDATE version_info SET library_version = '3.0.0'", database)
    with pytest.raises(ConfigError, match=r"another version of Optuna.*5\.0\.0.*3\.0\.0"):
        Connection(server_at(url))


@pytest.mark.parametrize(
    ("made", "names"),
    [
        ("CREATE TABLE trials (x int)", "trials"),
        ("CREATE TABLE studies (study_id int, study_name text); CREATE VIEW trials AS SELECT 1 AS trial_id", "trials"),
        (
            "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('1')",
            "alembic_version",
        ),
    ],
)
def test_a_database_with_another_programs_tables_is_left_as_it_is(postgres, url, made, names):
    database = url.rpartition("/")[2]
    query = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
    postgres.execute(made, database)
    before = sorted(postgres.execute(query, database))
    with pytest.raises(ConfigError, match=f"of another program, .*: {names}. Nothing was written"):
        Connection(server_at(url))
    assert sorted(postgres.execute(query, database)) == before


def test_optuna_says_nothing_of_a_new_study(connect):
    optuna.logging.set_verbosity(optuna.logging.INFO)
    connect().make_study([optuna.study.StudyDirection.MINIMIZE])
    assert optuna.logging.get_verbosity() == optuna.logging.WARNING
