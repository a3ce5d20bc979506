from __future__ import annotations

import json
import resource

import optuna
import pytest
from optuna.trial import TrialState

from mixnas.search.engines.local import LocalEngine
from mixnas.search.engines.session import Budget
from mixnas.search.study.journal import JournalFile, count_states, repair, sound_size
from mixnas.search.study.study import SearchStudy, read_results
from mixnas.search_space.errors import IntegrityError, NasError
from tests.contracts.engine import carry_out


@pytest.fixture(scope="module")
def finished(tmp_path_factory, space, objectives, constraints, evaluator):
    """Bytes of the journal of a search of 12 trials."""
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
    assert "params <= 10000" in study.trials[0].constraints


def test_cut_anywhere_it_opens_and_keeps_every_whole_record(tmp_path, finished, space, objectives, constraints):
    path = tmp_path / "study.journal"
    for cut in range(1, len(finished), len(finished) // 25):
        path.write_bytes(finished[:cut])
        whole = finished[:cut].rfind(b"\n") + 1
        done = sum(b'"op_code":6,' in line for line in finished[:whole].splitlines())
        with SearchStudy(path, space, objectives, constraints) as study:
            assert study.results.counts["done"] == done
        assert path.read_bytes().startswith(finished[:whole])


@pytest.mark.parametrize(
    "tail", [b'{"op_code":6,"wor', b'{"op_code":6,"wor\n', b"\0" * 700, b'{"op\0\0\0\n\0\0', b"nonsense\nmore\n"]
)
def test_torn_ends_are_cut_off(tmp_path, finished, objectives, tail):
    path = tmp_path / "study.journal"
    path.write_bytes(finished + tail)
    assert len(read_results(path, objectives).records) == 12  # reading changes nothing: the writer may still be at it
    assert path.read_bytes() == finished + tail
    assert repair(path) == len(tail)
    assert path.read_bytes() == finished
    assert repair(path) == 0


def test_damage_in_the_middle_is_refused_and_left_alone(tmp_path, finished, space, objectives):
    path = tmp_path / "study.journal"
    damaged = finished.replace(b'{"op_code":6', b'"op_code":6', 1)
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match=r"study\.journal:\d+: damaged"):
        SearchStudy(path, space, objectives)
    path.write_bytes(finished.replace(b'"state":1', b'"state":::1', 1))
    with pytest.raises(IntegrityError, match=r"study\.journal:\d+: damaged"):
        SearchStudy(path, space, objectives)


def test_count_states(tmp_path, finished):
    path = tmp_path / "study.journal"
    assert set(count_states(path).values()) == {0}
    lines = finished.splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith(b'{"op_code":6,'))
    path.write_bytes(b"".join(lines[:last]) + b'{"op_c')
    counts = count_states(path)
    assert counts[TrialState.COMPLETE] == 11 and counts[TrialState.RUNNING] == 1 and sum(counts.values()) == 12


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
    assert backend.synced and sound_size(path) == path.stat().st_size


def test_a_full_disk_leaves_a_sound_file_and_nothing_is_lost(tmp_path, finished):
    path = tmp_path / "j"
    path.write_bytes(finished)
    backend = JournalFile(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(finished) + 10, hard))  # room for a part of the record
    try:
        with pytest.raises(NasError, match=r"cannot be written: File too large\. Make room, then resume"):
            backend.append_logs([{"op_code": 6, "trial_id": 99}])
        assert path.read_bytes() == finished
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    backend.close()
    assert path.read_bytes() == finished + b'{"op_code":6,"trial_id":99}\n'


def test_reading_only_does_not_write(tmp_path, finished):
    path = tmp_path / "j"
    path.write_bytes(finished)
    with pytest.raises(NasError, match="reading only"):
        JournalFile(path, read_only=True).append_logs([{"op_code": 4}])
