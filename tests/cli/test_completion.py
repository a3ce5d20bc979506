"""What a real shell completes with the script of `nas completion`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mixnas.cli.main import find_verbs
from mixnas.cli.verbs import Verb

from .command import nas, ok


def completed(words: list[str], folder: Path) -> list[str]:
    """What bash offers for the last of the words."""
    script = folder / "completion.bash"
    script.write_text(ok("completion", "bash"))
    asked = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _nas; printf "%s\\n" "${COMPREPLY[@]}"'
    command = ["bash", "--norc", "-c", asked, str(script), *words]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("mine", "other", "no name", "$(touch PROOF)"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "mine.yaml").touch()
    return tmp_path


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_verbs_options_runs_and_files(folder: Path):
    assert completed(["nas", "sea"], folder) == ["search"]
    verbs = completed(["nas", ""], folder)
    assert set(verbs) == {found.name for found in find_verbs()} | {"--help", "--version"}
    for found in find_verbs():
        if not isinstance(found, Verb):
            assert completed(["nas", found.name, ""], folder) == [verb.name for verb in found.verbs]
    assert completed(["nas", "search", "--sm"], folder) == ["--smoke"]
    assert completed(["nas", "latency", "query", "--est"], folder) == ["--estimate"]
    assert completed(["nas", "front", "m"], folder) == ["mine"]
    assert completed(["nas", "diff", "mine", "o"], folder) == ["other"]
    assert completed(["nas", "search", "-c", "mi"], folder) == ["mine.yaml"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_a_folder_s_name_is_never_run(folder: Path):
    assert completed(["nas", "front", ""], folder) == ["mine", "other"]
    assert not (folder / "PROOF").exists()


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_it(folder: Path):
    script = folder / "completion.zsh"
    script.write_text(ok("completion", "zsh"))
    command = ["zsh", "-f", "-c", f"autoload -Uz compinit && compinit -u && source {script} && whence -w _nas"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "_nas: function"


def test_another_shell_is_refused():
    wrong = nas("completion", "fsh")
    assert wrong.returncode == 2 and "Allowed: bash, zsh" in wrong.stderr
