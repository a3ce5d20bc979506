"""The command line in this process, and the small search that its tests share."""

from __future__ import annotations

import csv
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import jsonschema

from mixnas.cli.main import main
from mixnas.cli.schema import ANSWERS

CONFIG = """\
task: digits
search: {trials: 6, seed: 0, evaluator: standalone}
train: {steps: 20}
final: {candidates: 4}
latency: {passes: 1, final_passes: 2}
space:
  stem: conv
  stages:
    - width: [4, 8]
      depth: [1, 2]
      block: {mixer: [identity, {name: dwconv, kernel_size: [3, 5]}], channel_mixer: {name: mlp, expansion: [1, 2]}}
"""


class Answer(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def nas(*words: object, stderr: io.StringIO | None = None) -> Answer:
    """Run a command line; what it says on stderr goes to a stream of the caller's if there is one."""
    out, err = io.StringIO(), stderr or io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            status = main([str(word) for word in words])
        except SystemExit as end:
            status = int(end.code or 0)
    if status == 0 and "--json" in words:
        check_answer(" ".join(map(str, words)), out.getvalue())
    return Answer(status, out.getvalue(), err.getvalue())


def check_answer(line: str, answer: str) -> None:
    """A verb's JSON is what `nas schema` says of it: no key more, none less."""
    (verb,) = [verb for verb in ANSWERS if line.startswith(f"{verb} ")]
    jsonschema.Draft202012Validator(ANSWERS[verb]).validate(json.loads(answer))


def ok(*words: object) -> str:
    """What a command line that has to succeed prints."""
    result = nas(*words)
    assert result.returncode == 0, result.stderr
    return result.stdout


def read_csv(path: Path) -> list[dict[str, str]]:
    """A CSV file's rows."""
    return list(csv.DictReader(io.StringIO(path.read_text())))
