"""The command line under attack: hostile configurations, received runs, broken streams, two at once."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixnas.cli.main import main
from mixnas.cli.streams import Stream
from mixnas.search.run.directory import Run
from mixnas.search.run.integrity import check_own, write_manifest
from mixnas.search.run.stopping import StopSignal
from mixnas.search_space.errors import IntegrityError

pytestmark = pytest.mark.hostile

SPACE = "space: {stem: conv, stages: [{width: 8, block: {mixer: identity, channel_mixer: none}}]}"


def nas(capsys, *words: object) -> tuple[int, str, str]:
    try:
        status = main([str(word) for word in words])
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def stage(text: str) -> str:
    return f"space: {{stem: conv, stages: [{{{text}, block: {{mixer: identity, channel_mixer: none}}}}]}}"


HOSTILE = {
    "NUL": f"task: digits\0\n{SPACE}",
    "escape": f'task: "\\e[31mdigits"\n{SPACE}',
    "bool": f"task: !!bool maybe\n{SPACE}",
    "timestamp": f"task: !!timestamp xx\n{SPACE}",
    "float": f'train: {{lr: !!float ""}}\n{SPACE}',
    "digits": f"search: {{trials: {'9' * 400}}}\n{SPACE}",
    "infinite": f"train: {{lr: 1e999}}\n{SPACE}",
    "depth": stage("width: 8, depth: 1000000000"),
    "recursion": "space: {stem: conv, stages: [{width: 8, block: {mixer: identity, channel_mixer: none, "
    "recursion: 1000000000}}]}",
    "widths": stage(f"width: {list(range(1, 2001))}"),
    "width": stage("width: 1000000000"),
    "stages": "space: {stem: conv, stages: ["
    + ", ".join(["{width: 8, block: {mixer: identity, channel_mixer: none}}"] * 65)
    + "]}",
    "blocks": "space: {stem: conv, stages: ["
    + ", ".join(["{width: 8, depth: 256, block: {mixer: identity, channel_mixer: none}}"] * 5)
    + "]}",
    "scalar": f"task: {'x' * 100_000}\n{SPACE}",
    "name": f"{'x' * 900}: 1\n{SPACE}",
    "operator": f"space: {{stem: {'x' * 900}, stages: []}}",
    "list": f"space: {{stem: conv, stages: {'[' * 90}{']' * 90}}}",
    "dict": f"task: builtins:dict\n{SPACE}",
    "command": f'task: {{name: "subprocess:Popen", args: "id > PROOF", shell: true}}\n{SPACE}',
    "system": f'task: {{name: "os:system", command: "id > PROOF"}}\n{SPACE}',
    "no module": f"task: {'a.' * 90}b:C\n{SPACE}",
    "strategy": f"search: {{strategy: {'x' * 900}}}\n{SPACE}",
    "option": f"search: {{strategy: {{name: nsga2, {'x' * 900}: 1}}}}\n{SPACE}",
    "objective": f"objectives: {{{'x' * 900}: max}}\n{SPACE}",
    "constraint": f"constraints: ['{'x' * 900} <= 1']\n{SPACE}",
    "constraint's number": f"constraints: ['params <= {'9' * 900}']\n{SPACE}",
    "device": f"device: {'x' * 900}\n{SPACE}",
    "a module that is no class": f"task: antigravity:webbrowser\n{SPACE}",
    "threads": f"latency: {{threads: 1000000000}}\n{SPACE}",
    "inputs at once": f"latency: {{batch_size: 1000000000}}\n{SPACE}",
    "profile": f"latency: {{profile: 99999999999999999d}}\n{SPACE}",
    "processes": f"supernet: {{processes: 1000000}}\n{SPACE}",
    "population": f"search: {{strategy: {{name: nsga2, population_size: 1000000000000}}}}\n{SPACE}",
    "examples": f"task: {{name: mqar, train_size: 1000000000000}}\n{SPACE}",
    "words": f"task: {{name: mqar, vocab_size: 1000000000000}}\n{SPACE}",
    "objectives": f"objectives: {{{', '.join(f'm{i}: max' for i in range(5000))}}}\n{SPACE}",
    "constraints": f"constraints: [{', '.join(f'params <= {i}' for i in range(1, 5000))}]\n{SPACE}",
    "memory": stage("width: 16384, depth: 256").replace("mixer: identity, channel_mixer: none", "mixer: attention"),
    "dashes": "- " * 100_000,
    "surrogate": f'task: "\\ud800"\n{SPACE}',
    "a tag by another name": f"%TAG ! tag:yaml.org,2002:python/object/apply:os.\n---\ntask: !system id\n{SPACE}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_configuration_is_refused_in_a_few_words(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(HOSTILE[name])
    status, out, err = nas(capsys, "search", "--dry-run", "-c", "c.yaml")
    assert status == 2 and not out, err
    assert err.startswith("nas: ") and len(err.strip()) <= 300 and err.strip().isprintable()
    assert os.listdir() == ["c.yaml"]


def test_what_is_no_configuration_is_refused_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("utf16").write_bytes(SPACE.encode("utf-16"))
    for words in (
        ("space", "size", "pipe"),
        ("space", "size", "."),
        ("space", "size", "utf16"),
        ("space", "size", "x" * 300),
        ("search", "--dry-run", "-c", "a\0b"),
        ("search", "--name", "x" * 300, "-c", "utf16"),
        ("status", "x" * 300),
        ("front", "a\0b"),
        ("resume", "../" * 100),
        ("search", "--dry-run", "--set", "x" * 5000),
        ("search", "--dry-run", "--set", f"search.trials={'9' * 5000}"),
        ("search", "--dry-run", "--set", f"search.{'y' * 3000}=1"),
    ):
        status, _, err = nas(capsys, *words)
        assert status == 2 and len(err.strip()) <= 300 and err.strip().isprintable(), (words, err)


def test_a_wrong_file_is_refused_before_torch_is_imported(tmp_path):
    (tmp_path / "c.yaml").write_text("a: [1")
    code = (
        "import sys; from mixnas.cli.main import main; status = main(sys.argv[1:]); "
        "sys.exit(77 if 'torch' in sys.modules else status)"
    )
    for words in (("search", "-c"), ("space", "size")):
        done = subprocess.run([sys.executable, "-c", code, *words, tmp_path / "c.yaml"], capture_output=True, text=True)
        assert done.returncode == 2 and "not valid YAML" in done.stderr


# -- received runs --------


@pytest.fixture
def received(tmp_path, monkeypatch):
    """A run of another's, with a task that is a program."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "sender"))
    config = {
        "task": "evil_task_of_a_stranger:Task",
        "objectives": {"accuracy": "max", "params": "min"},
        "constraints": [],
        "search": {"trials": 3, "seed": 0},
        "space": {"stem": "conv", "stages": [{"width": 8, "block": {"mixer": "identity", "channel_mixer": "none"}}]},
        "latency": {"batch_size": 1},
    }
    run = Run.create(tmp_path / "runs", config, name="r", device="cpu-x-1t", latency="eager", seed=0)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "receiver"))
    monkeypatch.chdir(tmp_path)
    Path("evil_task_of_a_stranger.py").write_text(
        "import pathlib\nfrom mixnas.evaluators.tasks import Task as Base\npathlib.Path('PROOF').touch()\n\n\n"
        "class Task(Base):\n    pass\n"
    )
    return run


def test_looking_at_a_received_run_runs_nothing_of_it(received, capsys):
    for words in (
        ("status",),
        ("status", "r"),
        ("front", "r"),
        ("latency", "query", "r"),
        ("resume", "r"),
        ("export", "r"),
    ):
        status, _, err = nas(capsys, *words)
        assert status in (0, 1, 2), (words, err)
        if words[0] in ("resume", "export"):
            assert status == 2 and "evil_task_of_a_stranger.py" in err and f"nas {words[0]} r --trust" in err
    assert not Path("PROOF").exists() and "evil_task_of_a_stranger" not in sys.modules
    status, _, err = nas(capsys, "resume", "r", "--trust")
    assert Path("PROOF").exists() and status == 2  # it is no whole task, but it was run


def test_one_broken_run_hides_no_other(received, capsys):
    for number, broken in enumerate((b"{", b"\xff", b"[" * 100_000, b'{"format": 3}', b"")):
        folder = Path("runs") / f"broken{number}"
        folder.mkdir()
        (folder / "manifest.json").write_bytes(broken)
    shutil.copytree("runs/r", "runs/\x1b[31mred")
    (Path("runs") / "pipe").mkdir()
    os.mkfifo("runs/pipe/manifest.json")
    status, out, _ = nas(capsys, "status")
    assert status == 0 and all(name in out for name in ("r ", "broken0", "broken4", "pipe", "\\x1b[31mred"))
    assert "\x1b" not in out
    status, out, _ = nas(capsys, "status", "--json")
    assert status == 0 and len(json.loads(out)) == 8


def test_status_says_which_file_is_not_what_was_written(received, capsys):
    path = received.path / "config.yaml"
    path.write_text(path.read_text().replace("trials: 3", "trials: 9"))
    status, _, err = nas(capsys, "status", "r")
    assert status == 5 and "config.yaml: damaged: not what was written" in err
    status, _, err = nas(capsys, "resume", "r", "--trust")
    assert status == 5 and "config.yaml" in err


def _with(received: Run, **facts: object) -> None:
    """Change a manifest as a stranger may: it has its digest."""
    write_manifest(received.path / "manifest.json", {**received.manifest, **facts})


def test_what_a_received_run_says_of_itself_is_checked(received, capsys):
    fixed = received.manifest["fixed"]
    for facts in (
        {"device": ["x"]},
        {"versions": "all"},
        {"seed": "0; id > PROOF"},
        {"reference_ms": "long"},
        {"fixed": {**fixed, "task": ["evil:Task"]}},
        {"fixed": {**fixed, "objectives": {f"m{i}": "max" for i in range(5000)}}},
        {"fixed": {**fixed, "constraints": 7}},
    ):
        _with(received, **facts)
        for words in (("status", "r"), ("resume", "r", "--trust"), ("export", "r", "--trust"), ("report", "r")):
            status, _, err = nas(capsys, *words)
            assert status in (0, 1, 2, 5) and "Error: " not in err, (facts, words, err)
            assert all(len(line) <= 350 for line in err.splitlines()) and err.count("\n") <= 45
    assert not Path("PROOF").exists()


@pytest.mark.parametrize("name", ["study.journal", ".lock"])
def test_a_file_with_another_name_is_not_written(received, capsys, name):
    """A copy by hard links (`cp -l`), or one that a stranger laid in: writing would change what lies elsewhere."""
    victim = Path("victim")
    victim.write_text("mine")
    (received.path / name).unlink(missing_ok=True)
    os.link(victim, received.path / name)
    status, _, _ = nas(capsys, "resume", "r", "--trust")
    assert status in (2, 5) and victim.read_text() == "mine"
    nas(capsys, "status", "r")
    assert victim.read_text() == "mine"
    with pytest.raises(IntegrityError, match="another name elsewhere"):
        check_own(received.path)


@pytest.mark.parametrize("name", ["study.journal.torn", "report.html", "networks/0123456789ab.failed.json"])
def test_what_is_no_file_of_the_run_is_refused_at_once(received, capsys, name):
    path = received.path / name
    path.parent.mkdir(exist_ok=True)
    for make in (os.mkfifo, lambda p: os.symlink("/etc/passwd", p), os.mkdir):
        make(path)
        status, _, err = nas(capsys, "status", "r")
        assert status == 5 and path.name in err and "It is not followed; remove it" in err
        os.rmdir(path) if path.is_dir() else path.unlink()


def test_a_second_process_changes_nothing(received, capsys):
    """It was refused, but had rewritten the configuration of the search that was running."""
    before = {path.name: path.read_bytes() for path in received.path.iterdir() if path.is_file()}
    code = "import sys; from mixnas.search.run.directory import Run\n"
    code += "with Run.open(sys.argv[1]): print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(received.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        Path("evil_task_of_a_stranger.py").write_text("from mixnas.evaluators.tasks.digits import Digits as Task\n")
        status, _, err = nas(capsys, "resume", "r", "--trust", "--trials", "9")
        assert status == 1 and f"process {holder.pid} is using this run" in err
        holder.stdin.close()
    after = {path.name: path.read_bytes() for path in received.path.iterdir() if path.is_file()}
    assert {name: text for name, text in after.items() if name != ".lock"} == before


# -- streams and signals --------


def test_control_characters_of_a_file_never_reach_the_terminal():
    raw = io.StringIO()
    stream = Stream(raw, quiet=True)
    print("a\x1b[2J\u202eb\x9bc\x7f\r\0é\tü", file=stream)
    assert raw.getvalue() == "a\\x1b[2J\\u202eb\\x9bc\\x7f\\r\\x00é\tü\n"


class Broken(io.StringIO):
    """As a pipe whose reader is gone, or a disk that is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["space", "--help"]])
def test_a_help_that_cannot_be_written_is_said(monkeypatch, words):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(OSError(28, "No space left on device")))
    monkeypatch.setattr(sys, "stderr", err)
    assert main(words) == 1 and err.getvalue() == "nas: stdout cannot be written: No space left on device.\n"


def test_sigterm_clears_away_as_ctrl_c_does(monkeypatch, tmp_path, capsys):
    """An export that was told to end left half of its folder behind."""

    def told(*words: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("mixnas.search.run.directory.list_runs", told)
    before = signal.getsignal(signal.SIGTERM)
    status, _, err = nas(capsys, "status", "--runs", tmp_path)
    assert (status, err) == (1, "nas: aborted\n") and signal.getsignal(signal.SIGTERM) == before


def test_a_fault_of_this_program_is_one_sentence_too(monkeypatch, tmp_path, capsys):
    def broken(*words: object) -> None:
        raise KeyError("x" * 5000 + "\x1b[31m")

    monkeypatch.setattr("mixnas.search.run.directory.list_runs", broken)
    status, _, err = nas(capsys, "status", "--runs", tmp_path)
    assert status == 1 and err.startswith("nas: status: KeyError: ") and len(err) < 300 and err.strip().isprintable()


def test_one_damaged_profile_hides_no_device(tmp_path, capsys):
    shipped = sorted((Path(__file__).parents[2] / "predictors" / "tables").glob("*.npz"))
    for path in shipped:
        shutil.copy(path, tmp_path)
    (tmp_path / "cpu-a-1t.eager.npz").write_bytes(shipped[0].read_bytes()[:1000])
    status, out, err = nas(capsys, "latency", "devices", "--json", "--tables", tmp_path)
    assert status == 5 and len(json.loads(out)) == len(shipped) and "cpu-a-1t.eager.npz: damaged" in err


def test_a_reader_of_stderr_that_went_away_stops_nothing(monkeypatch):
    """`nas search 2>&1 | head -1` ended with status 0 in the middle of the search."""
    monkeypatch.setattr(sys, "stderr", Broken(BrokenPipeError(32, "Broken pipe")))
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["front", "no such run"]) == 2
    assert main(["status", "--json", "--runs", "nowhere"]) == 0 and json.loads(out.getvalue()) == []


def test_an_answer_that_cannot_be_written_is_said(monkeypatch):
    for raw, status in (
        (Broken(OSError(28, "No space left on device")), 1),
        (None, 1),
        (Broken(BrokenPipeError(32, "Broken pipe")), 0),
    ):
        err = io.StringIO()
        monkeypatch.setattr(sys, "stdout", raw)
        monkeypatch.setattr(sys, "stderr", err)
        assert main(["status", "--json", "--runs", "nowhere"]) == status
        said = err.getvalue()
        assert "Traceback" not in said and said.count("\n") == status
        assert not status or "stdout" in said or "No space left on device" in said


def test_a_terminal_that_is_closed_stops_as_sigterm_does():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may have said nohup
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0)
            assert stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_under_nohup_it_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)
