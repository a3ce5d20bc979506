"""Who else is told of a search: by what is read back from there."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest

from mixnas.search import sinks
from mixnas.search.run.directory import Run
from mixnas.search.sinks import Sinks, check
from mixnas.search.study.results import TrialRecord
from mixnas.search_space.errors import ConfigError

TRIALS = [TrialRecord(n, "done", metrics={"accuracy": 0.5 + n / 10, "params": 100.0 * n}) for n in range(4)]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path, {"task": "digits"}, name="told", seed=3, device="here", latency="eager")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's event files hold, in the format that they are in (TFRecord, without its checksums)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.glob("events.*"):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + length :]
    return found


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX is not installed")
def test_tensorboard_holds_every_metric_of_every_trial(run: Run):
    with Sinks(["tensorboard", "tensorboard"], run) as told:
        for record in TRIALS:
            told.trial(record)
    found = scalars(run.path / "tensorboard")
    assert found["trial/params"] == [(0, 0.0), (1, 100.0), (2, 200.0), (3, 300.0)]
    assert [round(value, 6) for _, value in found["trial/accuracy"]] == [0.5, 0.6, 0.7, 0.8]


@pytest.mark.filterwarnings("ignore")  # mlflow's own, about what it uses of SQLAlchemy
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_holds_every_metric_of_every_trial(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with Sinks(["mlflow"], run) as told:
        for record in TRIALS:
            told.trial(record)
    (found,) = mlflow.search_runs(experiment_names=["mixnas"], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "accuracy")
    assert [(m.step, round(m.value, 6)) for m in history] == [(0, 0.5), (1, 0.6), (2, 0.7), (3, 0.8)]
    assert found.info.run_name == "told" and found.data.params["seed"] == "3"
    dropped = [record.message for record in caplog.records if "is told no more" in record.message]
    assert found.info.status == "FINISHED" and not dropped


def test_what_there_is_not_is_said_before_any_work(monkeypatch):
    with pytest.raises(ConfigError, match=r"tensorbord.\. Did you mean .tensorboard.\?"):
        check(["tensorbord"])
    monkeypatch.setattr(sinks.MLflow, "package", "a_package_that_is_not_there")
    with pytest.raises(ConfigError, match=r"that_is_not_there is not installed: pip install 'mixnas\[mlflow\]'"):
        check(["mlflow"])


def test_one_that_fails_is_dropped_and_the_others_go_on(run: Run, monkeypatch, caplog):
    told = []

    class Kept:
        def __init__(self, run):
            told.append(run.name)

        def trial(self, record):
            told.append(record.number)

        def finished(self, front):
            told.append("front")

        def close(self):
            told.append("closed")

    class Failing(Kept):
        def trial(self, record):
            raise OSError("the server is gone")

    monkeypatch.setattr(sinks, "SINKS", {"failing": Failing, "kept": Kept})
    with caplog.at_level(logging.WARNING), Sinks(["failing", "kept"], run) as both:
        for record in TRIALS[:2]:
            both.trial(record)
        both.finished(None)
    assert told == ["told", "told", 0, 1, "front", "closed"]
    assert [r.message for r in caplog.records] == ["failing is told no more: OSError: the server is gone"]
