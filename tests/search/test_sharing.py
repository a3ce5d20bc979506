"""Runs that share a study on a PostgreSQL server: one budget, one end, one configuration; and passwords are nowhere."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import optuna
import pytest

from mixnas.cli.main import main
from mixnas.search.config import read_config
from mixnas.search.job import Job, new_run, reopen
from mixnas.search.run.directory import Run
from mixnas.search.run.progress import Progress
from mixnas.search.run.stopping import StopSignal
from mixnas.search.study import connection as connections
from mixnas.search.study.server import Server
from mixnas.search_space.errors import ConfigError, IntegrityError, StoppedEarly
from mixnas.search_space.files import dump_yaml
from tests.postgres import PASSWORD
from tests.search.test_job import PLAIN, STANDALONE


@pytest.fixture
def url(postgres):
    return postgres.new()


class _Noted(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def searched(root: Path, name: str, plain: dict[str, Any]) -> tuple[Run, Any, list[str]]:
    """A new run, or one that is gone on with, carried out: its front and what was noted."""
    config = read_config(plain, "test")
    run = reopen(name, root)[0] if (root / name).exists() else new_run(config, root=root, name=name, source="test")
    progress = _Noted()
    front = Job(run, config, progress=progress, stop=StopSignal()).execute()
    return run, front, progress.notes


def test_one_budget_one_end_and_what_a_run_shows_needs_no_server(url, tmp_path, monkeypatch):
    plain = {**STANDALONE, "storage": url}
    _, front, _ = searched(tmp_path, "a", plain)
    assert front.final and front.trials["done"] == 5
    b, left, notes = searched(tmp_path, "b", plain)
    assert not left.final and left.trials["done"] == 5 and left.searched_front == front.searched_front
    assert "was brought to its final weights by" in notes[-1] and notes[-1].count(str((tmp_path / "a").absolute())) == 1
    more = {**plain, "search": {**plain["search"], "trials": 7}}
    _, extended, _ = searched(tmp_path, "b", more)
    assert extended.final and extended.trials["done"] == 7
    _, again, notes = searched(tmp_path, "a", plain)
    assert "was brought to its final weights by" in notes[-1] and str((tmp_path / "b").absolute()) in notes[-1]
    assert again.final  # the run keeps the answer that it had

    def refused(*_: Any) -> None:
        raise AssertionError("there is no server")

    monkeypatch.setattr(connections, "Connection", refused)
    for name in "ab":
        status = Run.open(name, tmp_path).status()
        assert (status.done, status.running) == (7, 0)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["front", name, "--json", "--runs", str(tmp_path)]) == 0
            assert main(["report", name, "--runs", str(tmp_path)]) == 0
        assert json.loads(out.getvalue().partition("\n}\n")[0] + "}")["front"]
    assert reopen(b.path)[1].storage == Server(url=url)


def test_another_configuration_is_refused_before_a_run_is_made(url, tmp_path):
    searched(tmp_path, "a", {**STANDALONE, "storage": url})
    other = {**STANDALONE, "train": {"steps": 4}, "storage": url}
    with pytest.raises(
        ConfigError, match=r"begun by .*configuration [0-9a-f]{12}, and this one is [0-9a-f]{12}"
    ) as said:
        searched(tmp_path, "b", other)
    assert "-  steps: 3" in str(said.value) and "+  steps: 4" in str(said.value) and PASSWORD not in str(said.value)
    assert not (tmp_path / "b").exists()
    other["storage"] = {"url": url, "study": "of-its-own"}
    assert searched(tmp_path, "b", other)[1].final
    with pytest.raises(
        ConfigError, match=r"lies in postgresql\S+ \(study search\); in postgresql\S+ \(study of-its-own\)"
    ):
        reopen("a", tmp_path, settings=["storage.study=of-its-own"])
    with pytest.raises(ConfigError, match="its own directory, which is asked for"):
        reopen("a", tmp_path, settings=["storage=null"])


@pytest.mark.parametrize("directions", [["maximize"], ["maximize", "minimize", "minimize"]])
def test_a_study_of_another_program_is_left_as_it_is(url, tmp_path, directions):
    storage = optuna.storages.RDBStorage(url)
    study = optuna.create_study(study_name="search", storage=storage, directions=directions)
    study.optimize(lambda trial: [trial.suggest_float("x", 0, 1)] * len(directions), n_trials=2)
    plain = {**STANDALONE, "storage": url}
    with pytest.raises(ConfigError, match=r"\(study search\) is a study of another program: it has 2 trials"):
        searched(tmp_path, "a", plain)
    assert not (tmp_path / "a").exists()
    searched(tmp_path, "b", {**plain, "storage": {"url": url, "study": "of-its-own"}})
    run, config = reopen("b", tmp_path)
    config = dataclasses.replace(config, storage=dataclasses.replace(config.storage, study="search", url=url))
    with pytest.raises(ConfigError, match="of another program"):
        Job(run, config, progress=_Noted(), stop=StopSignal()).execute()
    assert not study.user_attrs and len(study.trials) == 2
    storage.engine.dispose()


def test_a_study_that_is_gone_is_not_begun_anew(url, tmp_path, postgres):
    plain = {**STANDALONE, "storage": url}
    run, _, _ = searched(tmp_path, "a", plain)
    before = run.journal.read_bytes()
    postgres.execute("TRUNCATE studies CASCADE", url.rpartition("/")[2])
    with pytest.raises(IntegrityError, match="no such study any more, and 5 trials"):
        Job(run, read_config(plain, "test"), progress=_Noted(), stop=StopSignal()).execute()
    assert not postgres.execute("SELECT * FROM studies", url.rpartition("/")[2])
    assert run.journal.read_bytes() == before


def test_a_super_network_of_another_driver_is_asked_for_not_trained_again(url, tmp_path):
    plain = {**PLAIN, "storage": url, "search": {"trials": 4, "strategy": "random"}}
    a, _, _ = searched(tmp_path, "a", plain)
    with pytest.raises(StoppedEarly, match=r"Copy these files") as said:
        searched(tmp_path, "b", plain)
    assert "supernet.safetensors" in str(said.value) and not (tmp_path / "b" / "supernet.safetensors").exists()
    named = str(said.value).partition("is not that (")[2].partition(")")[0].split(", ")
    for name in named:
        (tmp_path / "b" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "b" / name).write_bytes((a.path / name).read_bytes())
    more = {**plain, "search": {"trials": 6, "strategy": "random"}}
    _, front, _ = searched(tmp_path, "b", more)
    assert front.final and front.trials["done"] >= 6


def test_a_password_is_in_no_file_and_in_no_message(url, tmp_path, caplog, capfd):
    """On the command line, and in a configuration file, which is not the run's."""
    caplog.set_level(logging.DEBUG)
    (tmp_path / "mine.yaml").write_text(dump_yaml(STANDALONE))
    runs = tmp_path / "runs"
    called = ["-c", str(tmp_path / "mine.yaml"), "--runs", str(runs), "--storage", url]
    assert main(["search", *called, "--dry-run"]) == 0
    assert main(["search", *called, "--name", "a", "-v"]) == 0
    assert main(["search", *called, "--name", "b", "--set", "train.steps=7"]) == 2
    assert main(["search", *called, "--name", "b", "--set", "storage.grace=1"]) == 2
    assert main(["resume", "a", "--runs", str(runs), "--trials", "6"]) == 2  # without it nobody is let in
    assert main(["resume", "a", "--runs", str(runs), "--trials", "6", "--storage", url]) == 0
    assert main(["export", "a", "--runs", str(runs), "--knee", "--format", "safetensors"]) == 0
    assert main(["report", "a", "--runs", str(runs)]) == 0
    said = capfd.readouterr()
    texts = {"stdout": said.out, "stderr": said.err, "log": caplog.text}
    texts |= {str(p): p.read_bytes().decode(errors="replace") for p in runs.rglob("*") if p.is_file()}
    assert len(texts) > 10 and "PGPASSWORD" in said.err
    for form in (PASSWORD, quote(PASSWORD), quote(PASSWORD, safe=""), quote_plus(PASSWORD), url):
        assert not [where for where, text in texts.items() if form in text]


def test_an_address_that_will_not_do_is_refused():
    for given, said in [
        ("mysql://ann:s3cret@host/nas", "mysql:// is not allowed"),
        ("sqlite:///file.db", "PostgreSQL only"),
        ("postgresql://ann:s3cret@host", "names no database"),
        ("ann:s3cret", "is not the URL"),
        ({"url": "postgresql://host/nas", "study": "a b"}, "is no name"),
        ({"url": "postgresql://ann:s3cret@host/nas", "heartbeat": 40}, "two heartbeats"),
        ({"url": "postgresql://ann:s3cret@host/nas", "studdy": "a"}, "Did you mean 'study'"),
    ]:
        with pytest.raises(ConfigError, match=said) as raised:
            read_config({"storage": given}, "test")
        assert "s3cret" not in str(raised.value)


def test_no_part_of_a_password_is_told_of_an_address_that_cannot_be_taken_apart(tmp_path, capfd):
    place = "127.0.0.1:5432/nas"
    (tmp_path / "mine.yaml").write_text(dump_yaml(STANDALONE))
    for given, said in [
        (f"postgresql+psycopg://ann:geheim@teilzwei@{place}", "percent-encode it"),
        (f"postgresql+psycopg://ann:geheim/teilzwei@{place}", "percent-encode it"),
        (f"postgresql+psycopg://{place}?options=geheim@teilzwei", "percent-encode it"),
        (f"postgresql+psycopg://ann:geheim@{place}:teilzwei", "no host, port and database"),
        ("postgresql+psycopg://ann:geheim/teilzwei", "no host, port and database"),
        ("host=127.0.0.1 user=ann password=geheim dbname=teilzwei", "is not the URL"),
        (f"ann:geheim@teilzwei@{place}", "is not the URL"),
        (f"postgresql+psycopg:/ann:geheim@teilzwei@{place}", "is not the URL"),
        (f"postgresql+psycopg://ann@{place}?Password=geheim", "Did you mean 'password'"),
        (f"postgresql+psycopg://ann@{place}?passwort=geheim&teilzwei=1", "none of libpq's"),
        (f"postgresql+psycopg://ann@{place}?password=geheim&password=teilzwei", "password stands there twice"),
    ]:
        with pytest.raises(ConfigError, match=said) as raised:
            read_config({"storage": given}, "test")
        texts = [str(raised.value), repr(raised.value.__cause__), repr(raised.value.__context__)]
        for how in (["--storage", given], ["--set", f"storage={given}"], ["--set", f"storage.url={given}"]):
            called = ["search", "-c", str(tmp_path / "mine.yaml"), "--runs", str(tmp_path / "runs"), *how, "--dry-run"]
            assert main(called) == 2
            texts.append(capfd.readouterr().err)
            assert "geheim" not in texts[-1], (given, how, texts[-1])
        assert not any(part in text for text in texts for part in ("geheim", "teilzwei")), (given, texts)


def test_an_address_is_kept_without_its_secrets():
    given = "postgres://ann:s3cr%2Fet@host:5433/nas?sslmode=require&sslpassword=other&host=/run/pg"
    server = read_config({"storage": given}, "test").storage
    assert server.url == "postgresql+psycopg://ann@host:5433/nas?host=%2Frun%2Fpg&sslmode=require"
    assert server.secrets == {"password": "s3cr/et", "sslpassword": "other"} and "s3cr" not in repr(server)
    assert read_config({"storage": server.to_plain()}, "test").storage == server
