from __future__ import annotations

import json
import resource
import wsgiref.util

import optuna
import pytest
from optuna.trial import TrialState

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.study.journal import JournalFile, repair, torn_path
from mixnas.search.study.optuna_internals import JournalOperation
from mixnas.search.study.reading import (
    Operation,
    State,
    chained,
    check_summary,
    read_results,
    scan,
    summary_of,
    summary_path,
)
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import IntegrityError, MachineError
from tests.contracts.engine import carry_out


@pytest.fixture(scope="module")
def finished(tmp_path_factory, space, objectives, constraints, evaluator):
    """Bytes of the journal of a search of 12 trials, without its summary."""
    path = tmp_path_factory.mktemp("finished") / "study.journal"
    with SearchStudy(path, space, objectives, constraints) as study:
        carry_out(LocalEngine(), study, evaluator, Budget(trials=12))
    return path.read_bytes()


def test_optuna_itself_reads_the_file(tmp_path, finished):
    path = tmp_path / "study.journal"
    path.write_bytes(finished)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    study = optuna.load_study(study_name="search", storage=storage, sampler=optuna.samplers.RandomSampler())
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 12
    assert study.metric_names == ["accuracy", "latency_ms", "params"]
    names = study.user_attrs["constraints"]
    assert "params <= 10000" in names
    for trial in study.trials:
        assert len(trial.constraints) == len(names)
        held = dict(zip(names, trial.constraints.values(), strict=True))["params <= 10000"] <= 0
        assert held == (trial.user_attrs["metrics"]["params"] <= 10_000)
    for trial in study.trials:
        architecture = Architecture.from_canonical(json.loads(trial.user_attrs["architecture"]))
        assert architecture.id == trial.user_attrs["id"]


def many(finished: bytes, count: int) -> bytes:
    """The journal with so many trials, each like one of those that there are, record by record.

    Later ones are a little worse, so that the front stays as small as a search's: the dashboard looks for it in
    quadratic time.
    """
    worse = (0.999, 1.001, 1.001)  # accuracy, latency_ms, params
    of_study, of_trials = [], {}
    for record in map(json.loads, finished.splitlines()):
        if "trial_id" in record:
            of_trials[record["trial_id"]].append(record)
        elif record["op_code"] == JournalOperation.CREATE_TRIAL:
            of_trials[len(of_trials)] = [record]
        else:
            of_study.append(record)
    records = [*of_study]
    for i in range(count):
        first, *others = of_trials[i % len(of_trials)]
        for record in (first, *({**record, "trial_id": i} for record in others)):
            if record.get("values") and i >= len(of_trials):
                values = [value * factor for value, factor in zip(record["values"], worse, strict=True)]
                record = {**record, "values": values}
            records.append(record)
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize("trials", [12, pytest.param(10_000, marks=pytest.mark.slow)])
def test_optuna_s_dashboard_reads_the_file(tmp_path, finished, trials):
    """What its page asks its server for."""
    dashboard = pytest.importorskip("optuna_dashboard")
    path = tmp_path / "study.journal"
    path.write_bytes(finished if trials == 12 else many(finished, trials))
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    app = dashboard.wsgi(storage)

    def get(place: str) -> dict:
        environ: dict = {}
        wsgiref.util.setup_testing_defaults(environ)
        return json.loads(b"".join(app({**environ, "PATH_INFO": place}, lambda *_: None)))

    (study,) = get("/api/studies")["study_summaries"]
    found = get(f"/api/studies/{study['study_id']}")
    assert found["objective_names"] == ["accuracy", "latency_ms", "params"]
    assert len(found["trials"]) == trials and {trial["state"] for trial in found["trials"]} == {"Complete"}
    for trial in (found["trials"][0], found["trials"][-1]):
        assert "architecture" in {attr["key"] for attr in trial["user_attrs"]} and len(trial["values"]) == 3
        assert trial["constraints"] and all(isinstance(value, float | int) for value in trial["constraints"])


def test_cut_anywhere_it_opens_and_keeps_every_whole_record(tmp_path, finished, space, objectives, constraints):
    path = tmp_path / "study.journal"
    for cut in range(1, len(finished), len(finished) // 25):
        path.write_bytes(finished[:cut])
        whole = finished[:cut].rfind(b"\n") + 1
        summary_path(path).unlink(missing_ok=True)
        done = sum(b'"op_code":6,' in line for line in finished[:whole].splitlines())
        with SearchStudy(path, space, objectives, constraints) as study:
            assert study.results.counts["done"] == done
        assert path.read_bytes().startswith(finished[:whole])


@pytest.mark.parametrize(
    "tail", [b'{"op_code":6,"wor', b'{"op_code":6,"wor\n', b"\0" * 700, b'{"op\0\0\0\n\0\0', b"nonsense\nmore\n"]
)
def test_torn_ends_are_cut_off_and_kept_beside(tmp_path, finished, objectives, tail):
    path = tmp_path / "study.journal"
    path.write_bytes(finished + tail)
    assert len(read_results(path, objectives).records) == 12  # reading changes nothing: the writer may still be at it
    assert path.read_bytes() == finished + tail and not torn_path(path).exists()
    data, found = repair(path)
    assert path.read_bytes() == data == finished and found.end == len(finished)
    assert torn_path(path).read_bytes() == tail
    assert repair(path)[0] == finished and torn_path(path).read_bytes() == tail
    path.write_bytes(finished + tail)
    repair(path)
    assert torn_path(path).read_bytes() == tail * 2


@pytest.mark.parametrize("byte", [b"\0", b" ", b"9", b"\n", b"}"])
def test_a_byte_that_changed_is_noticed_and_nothing_is_cut(tmp_path, finished, space, objectives, byte):
    """One NUL in the middle once cut 34 of 50 finished trials off for good."""
    path = tmp_path / "study.journal"
    end = finished[:-1].rfind(b"\n")
    for place in range(3, end, len(finished) // 40):
        damaged = finished[:place] + (byte if finished[place : place + 1] != byte else b"#") + finished[place + 1 :]
        path.write_bytes(damaged)
        for read in (lambda: read_results(path, objectives), lambda: SearchStudy(path, space, objectives)):
            with pytest.raises(IntegrityError, match=r"study\.journal:\d+: damaged: .* Restore the file") as refused:
                read()
            assert len(str(refused.value).removeprefix(str(tmp_path))) <= 300
        assert path.read_bytes() == damaged and not torn_path(path).exists()


def test_records_that_went_or_changed_places_are_noticed(tmp_path, finished, objectives):
    path = tmp_path / "study.journal"
    lines = finished.splitlines(keepends=True)
    for changed in (lines[:20] + lines[21:], [*lines[:20], lines[21], lines[20], *lines[22:]], lines[:9] + lines[8:]):
        path.write_bytes(b"".join(changed))
        with pytest.raises(IntegrityError, match="not the record that was written"):
            read_results(path, objectives)


def test_a_journal_that_was_begun_without_a_chain_goes_on_with_one(tmp_path, finished, space, objectives, evaluator):
    path = tmp_path / "study.journal"
    bare = b"".join(line[:-18] + b"}\n" for line in finished.splitlines())
    path.write_bytes(bare)
    assert read_results(path, objectives).counts["done"] == 12
    with SearchStudy(path, space, objectives) as study:
        carry_out(LocalEngine(), study, evaluator, Budget(trials=14))
    assert path.read_bytes().startswith(bare) and read_results(path, objectives).counts["done"] == 14
    path.write_bytes(path.read_bytes().replace(b'"state":1', b'"state":2', 1))
    summary_path(path).unlink()
    with pytest.raises(IntegrityError, match="not the record that was written"):
        read_results(path, objectives)


RECORDS = {
    "operation": '{"op_code":42,"worker_id":"w"}',
    "no operation": '{"worker_id":"w"}',
    "no trial": '{"op_code":6,"worker_id":"w","trial_id":99,"state":1,"values":[1,2,3]}',
    "negative trial": '{"op_code":6,"worker_id":"w","trial_id":-1,"state":1,"values":[1,2,3]}',
    "state": '{"op_code":6,"worker_id":"w","trial_id":0,"state":77}',
    "no state": '{"op_code":6,"worker_id":"w","trial_id":12}',
    "attribute": '{"op_code":8,"worker_id":"w","trial_id":12,"user_attr":7}',
    "NaN": '{"op_code":8,"worker_id":"w","trial_id":12,"user_attr":{"seconds":NaN}}',
    "negative time": '{"op_code":8,"worker_id":"w","trial_id":12,"user_attr":{"seconds":-1}}',
    "metric": '{"op_code":8,"worker_id":"w","trial_id":12,"user_attr":{"metrics":{"accuracy":"high"}}}',
    "deep": '{"op_code":8,"worker_id":"w","trial_id":12,"user_attr":' + "[" * 100_000 + "]" * 100_000 + "}",
    "reference": '{"op_code":2,"worker_id":"w","study_id":0,"user_attr":{"reference":{"point":3}}}',
    "done without metrics": '{"op_code":6,"worker_id":"w","trial_id":12,"state":1,"values":[1,2,3]}',
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_that_makes_no_sense_is_one_sentence(tmp_path, finished, space, objectives, name):
    """Written by hand, with a chain that fits."""
    path = tmp_path / "study.journal"
    begin = b'{"op_code":4,"worker_id":"w","study_id":0,"datetime_start":null}'
    begin, chain = chained(begin, scan(finished, path).chain)
    path.write_bytes(finished + begin + chained(RECORDS[name].encode(), chain)[0])
    for read in (lambda: read_results(path, objectives), lambda: SearchStudy(path, space, objectives)):
        with pytest.raises(IntegrityError, match=r"study\.journal:?\d*: damaged: ") as refused:
            read()
        said = str(refused.value).removeprefix(str(tmp_path))
        assert len(said) <= 300 and said.isprintable()


def test_the_numbers_of_optuna():
    assert {op.name: op for op in Operation}.items() <= {op.name: int(op) for op in JournalOperation}.items()
    assert {state.name: int(state) for state in State} == {state.name: state.value for state in TrialState}


def test_a_summary_spares_the_records_and_is_checked_against_them(tmp_path, finished, objectives, constraints, space):
    path = tmp_path / "study.journal"
    path.write_bytes(finished)
    slow = summary_of(path, objectives, constraints)
    SearchStudy(path, space, objectives, constraints).close()  # Optuna notes that it was opened
    finished = path.read_bytes()
    assert check_summary(path, finished)[1] == len(finished)
    found = summary_of(path, objectives, constraints)
    assert found == slow and found.counts["done"] == 12 and set(found.best) == {o.name for o in objectives}
    assert summary_of(path).counts == found.counts
    # longer: a search is going on
    path.write_bytes(finished + chained(b'{"op_code":4,"study_id":0}', scan(finished, path).chain)[0])
    assert summary_of(path).counts == {**found.counts, "running": 1}
    # shorter by whole records, as no kill leaves it, or changed
    whole = finished[:-1].rfind(b"\n") + 1
    for damaged in (finished[:whole], finished[: whole + 9], finished.replace(b'"state":1', b'"state":2', 1), b""):
        path.write_bytes(damaged)
        for read in (
            lambda: summary_of(path),
            lambda: read_results(path, objectives),
            lambda: SearchStudy(path, space, objectives),
        ):
            with pytest.raises(IntegrityError, match="trials are missing or changed"):
                read()
        assert path.read_bytes() == damaged
    path.unlink()
    with pytest.raises(IntegrityError, match="is shorter than it was"):
        SearchStudy(path, space, objectives)
    path.write_bytes(finished)
    for changed in ("{", "[]", "{}", summary_path(path).read_text().replace('"done": 12', '"done": 13')):
        summary_path(path).write_text(changed)
        with pytest.raises(IntegrityError, match=r"study\.summary\.json"):
            summary_of(path)


def test_records_wait_until_a_trial_ends(tmp_path):
    path = tmp_path / "j"
    backend = JournalFile(path)
    backend.append_logs([{"op_code": 4, "study_id": 0}])
    assert path.read_bytes() == b""
    backend.append_logs([{"op_code": 6, "trial_id": 0, "state": 1}])
    assert [json.loads(line)["op_code"] for line in path.read_bytes().splitlines()] == [4, 6]
    assert [log["op_code"] for log in backend.read_logs(0)] == [4, 6]
    assert list(backend.read_logs(2)) == []
    backend.append_logs([{"op_code": 6, "trial_id": 1, "state": 1}])
    assert not backend.synced  # the second within a quarter of a second
    backend.close()
    backend.close()
    assert backend.synced and scan(path.read_bytes(), path).end == path.stat().st_size


def test_a_full_disk_leaves_a_sound_file_and_nothing_is_lost(tmp_path, finished):
    path = tmp_path / "j"
    path.write_bytes(finished)
    backend = JournalFile(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(finished) + 10, hard))  # room for a part of the record
    try:
        with pytest.raises(MachineError, match=r"cannot be written: File too large\. Make room, then resume"):
            backend.append_logs([{"op_code": 6, "trial_id": 99}])
        assert path.read_bytes() == finished
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    backend.close()
    assert path.read_bytes() == finished + chained(b'{"op_code":6,"trial_id":99}', scan(finished, path).chain)[0]


def test_a_journal_that_was_taken_away_is_written_no_more(tmp_path, finished):
    path = tmp_path / "j"
    path.write_bytes(finished)
    backend = JournalFile(path)
    path.unlink()
    with pytest.raises(MachineError, match="was removed or replaced"):
        backend.append_logs([{"op_code": 6, "trial_id": 99}])
    with pytest.raises(MachineError):
        backend.close()
    (tmp_path / "elsewhere").write_bytes(finished)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        JournalFile(path)
