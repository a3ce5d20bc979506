"""What lies in a module of one's own is known to every verb that is told of it, and asked for where it is not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mixnas.search.strategies import STRATEGIES
from mixnas.search_space import extensions, registry
from mixnas.search_space.errors import NasError
from mixnas.search_space.formats import format as formats

from .command import CONFIG, nas, ok

MODULE = """
from dataclasses import dataclass
from mixnas.search.strategies import STRATEGIES
from mixnas.search.strategies.random import Random
from mixnas.search_space.formats import format as formats
from mixnas.search_space.operators.mixers.convolution import Identity
from mixnas.search_space.registry import register

@register("mixer", "own_mixer", paper="-")
class Own(Identity):
    pass

@STRATEGIES.register("own_strategy")
@dataclass(frozen=True, kw_only=True, slots=True)
class OwnStrategy(Random):
    pass

@formats.register
class OwnFormat:
    name, file_name, packages = "own-format", "model.own", ()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module beside a configuration that needs it, not imported yet."""
    registry.load()
    list(STRATEGIES)
    monkeypatch.setattr(registry, "_operators", dict(registry._operators))
    monkeypatch.setattr(STRATEGIES, "_classes", dict(STRATEGIES._classes))
    monkeypatch.setattr(formats, "_formats", dict(formats._formats))
    monkeypatch.setattr(extensions, "_begun", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(extensions.VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_extensions.py").write_text(MODULE)
    own = CONFIG.replace("mixer: [identity,", "mixer: [own_mixer,").replace("seed: 0", "strategy: own_strategy")
    (tmp_path / "own.yaml").write_text(own)
    yield tmp_path
    sys.modules.pop("own_extensions", None)


def test_a_module_is_named_where_it_is_missing_and_imported_where_it_is_named(own: Path):
    missing = nas("search", "--dry-run", "-c", "own.yaml")
    assert missing.returncode == 2 and "no strategy is called 'own_strategy'" in missing.stderr
    assert "nas ... --import MODULE" in missing.stderr
    set_aside = ("--set", "search.strategy=random")
    missing = nas("space", "check", "own.yaml", *set_aside)
    assert missing.returncode == 2 and "no mixer is called 'own_mixer'" in missing.stderr
    assert "nas ... --import MODULE" in missing.stderr
    named = ("--import", "own_extensions")
    assert "84 architectures" in ok("space", "check", "own.yaml", *named)
    assert "trials by own_strategy" in ok("search", "--dry-run", "-c", "own.yaml", *named)
    assert "own_mixer" in ok("ops", *named)
    assert formats.get("own-format").file_name == "model.own" and "own-format" in formats.names()


def test_a_module_of_the_environment_is_imported(own: Path, monkeypatch):
    monkeypatch.setenv(extensions.VARIABLE, "own_extensions")
    assert "84 architectures" in ok("space", "check", "own.yaml")


def test_a_module_that_fails_or_is_missing_is_named(own: Path):
    (own / "fails.py").write_text("1 / 0")
    for name, says in (("nowhere_found", "Run from the directory that it lies in"), ("fails", "ZeroDivisionError")):
        answer = nas("space", "check", "own.yaml", "--import", name)
        assert answer.returncode == 2 and f"--import {name}: " in answer.stderr and says in answer.stderr
        extensions.os.environ[extensions.VARIABLE] = ""


def test_two_formats_with_one_file_are_refused(own: Path):
    class Other:
        name, file_name, packages = "other-format", "model.own", ()

    extensions.name_extensions(["own_extensions"])
    formats.names()
    with pytest.raises(NasError, match=r"'other-format' writes model.own, and so does 'own-format'"):
        formats.register(Other)
