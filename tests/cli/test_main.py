"""The command line itself: how its verbs are found, help, wrong words."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import mixnas
from mixnas import cli
from mixnas.cli.main import find_verbs
from mixnas.cli.verbs import Verb

from .command import nas, ok

WORDS = [
    words
    for found in find_verbs()
    for words in ([[found.name]] if isinstance(found, Verb) else [[found.name, verb.name] for verb in found.verbs])
]


def test_verbs_come_in_the_order_of_their_files():
    names = [" ".join(words) for words in WORDS]
    first = ["search", "resume", "status", "front", "explain", "diff", "export", "reproduce", "report"]
    first += ["latency devices", "latency profile", "latency query"]
    assert names[: len(first)] == first
    assert {"space show", "space size", "space sample", "space check", "ops", "doctor"} <= set(names)
    assert len(names) == len(set(names))


def test_a_new_file_is_a_new_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "greeting.py").write_text(
        "from mixnas.cli.verbs import Verb\n"
        "PLACE = 9\n"
        "def arguments(parser):\n"
        "    parser.add_argument('name')\n"
        "def greet(args):\n"
        "    print('good morning', args.name)\n"
        "    return 3\n"
        "VERBS = (Verb('greet', 'says good morning', greet, arguments),)\n"
    )
    monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
    try:
        assert nas("greet", "Ada") == (3, "good morning Ada\n", "")
        assert "greet says good morning" in " ".join(ok("--help").split())
    finally:
        sys.modules.pop("mixnas.cli.greeting", None)


def test_the_installed_command_answers():
    command = [str(Path(sys.executable).with_name("nas")), "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == mixnas.__version__


def test_wrong_words_end_with_status_2():
    for words, says in (
        (["serach"], "'serach' is not known. Did you mean 'search'? Allowed: search, resume"),
        (["latency", "qeury"], "nas latency: argument VERB: 'qeury' is not known. Did you mean 'query'?"),
        (["front", "x", "--wear", "params<1"], "nas front: '--wear' is not known. Did you mean '--where'? See:"),
        (["front", "mine", "extra"], "nas front: 'extra' is not known. See: nas front --help"),
        (["search", "--dat", "pics"], "nas search: '--dat' is not known. Did you mean '--data'? See:"),  # no shorthand
        (["latency", "query", "--samp", "3"], "nas latency query: '--samp' is not known. Did you mean '--sample'?"),
        (["search", "--trials", "-3"], "nas: --trials: -3 is not allowed. Allowed: a whole number from 1"),
        (["search", "--time", "soon"], "nas: --time: 'soon' is not a duration."),
        (["search", "--workers", "0"], "nas: --workers: 0 is not allowed."),
        (["search", "--set", "search.trials=null"], "search.trials: null is not allowed."),
        (["search", "--set", "search.trials=true"], "search.trials: true is not allowed."),
    ):
        wrong = nas(*words)
        assert wrong.returncode == 2 and says in wrong.stderr
    assert nas("front").returncode == 2
    assert nas("search", "--trials", "many").returncode == 2


@pytest.mark.parametrize("words", [[], *WORDS, ["latency"], ["space"]], ids=" ".join)
def test_help_of_every_verb(words: list[str]):
    assert f"usage: {' '.join(['nas', *words])} " in ok(*words, "--help")


def test_help_of_no_verb_loads_anything_heavy():
    code = """
import contextlib, io, json, sys
from mixnas.nas import main
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    assert "usage: nas" in out.getvalue(), words
    heavy = {"torch", "optuna", "ray", "sklearn", "triton", "numpy", "rich"} & set(sys.modules)
    assert not heavy, f"{words} --help imports {heavy}"
"""
    words = json.dumps([[], *WORDS, ["latency"], ["space"]])
    done = subprocess.run([sys.executable, "-c", code, words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_of_one_verb_answers_in_a_fraction_of_a_second():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "mixnas.nas", "search", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0  # of processor time
