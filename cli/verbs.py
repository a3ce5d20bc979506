"""What a verb is, and the arguments that several verbs share.

A file of this folder that has `VERBS` adds them to the command line: `main.py` finds it, and nothing else has to know.
Its `PLACE` says where they stand in the help. These files are imported for every help, so that whatever is heavy
(torch, optuna, ray, sklearn, NumPy, rich) is imported inside the functions.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixnas.search.config import Config

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "digits.yaml"


def _nothing(parser: argparse.ArgumentParser) -> None:
    """No arguments of its own."""


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb.

    Attributes:
        name: As it is typed.
        text: Its line in the help.
        run: Carries it out; returns the exit status.
        arguments: Adds its own arguments to its parser.
        aborted: Exit status when it is aborted from the keyboard.
    """

    name: str
    text: str
    run: Callable[[argparse.Namespace], int]
    arguments: Callable[[argparse.ArgumentParser], None] = _nothing
    aborted: int = 1


@dataclass(frozen=True, slots=True)
class Group:
    """Verbs under one word: `nas latency query`."""

    name: str
    text: str
    verbs: tuple[Verb, ...]


# -- arguments --------


def configured(parser: argparse.ArgumentParser) -> None:
    """The arguments of verbs that read a configuration."""
    parser.add_argument("-c", "--config", metavar="FILE", help="configuration (default: the embedded one, digits)")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="change a setting, e.g. search.trials=50")
    parser.add_argument("--seed", type=int, help="seed of the search")


def budgeted(parser: argparse.ArgumentParser) -> None:
    """The arguments of verbs that search."""
    parser.add_argument("--trials", type=int, help="architectures to evaluate, in all")
    parser.add_argument("--time", metavar="T", help="time limit of the search phase, e.g. 5m")
    parser.add_argument("--engine", metavar="NAME", help="what carries the trials out: local, or ray")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that evaluate")
    parser.add_argument("--address", metavar="A", help="of a Ray cluster, HOST:PORT or auto (default: one of its own)")
    parser.add_argument("--storage", metavar="URL", help="a PostgreSQL server, for a study that several drivers share")


def trusting(parser: argparse.ArgumentParser) -> None:
    """The argument of verbs that run a run's own task."""
    parser.add_argument(
        "--trust", action="store_true", help="run the run's own task though the run was not started here with it"
    )


# -- what they stand for --------


_SHORT = (("trials", "search.trials"), ("time", "search.time"), ("seed", "search.seed"))
"""Options that are short for a setting."""


def settings(args: argparse.Namespace) -> list[str]:
    """`--set`, and the options that are short for one."""
    found = list(args.set or [])
    for option, key in _SHORT:
        if getattr(args, option, None) is not None:
            found.append(f"{key}={getattr(args, option)}")
    return found


def as_given(args: argparse.Namespace, problem: str) -> str:
    """A message on a setting that was given by an option of its own, with that option in its place."""
    if not hasattr(args, "set"):
        return problem  # of a verb without settings
    for option, key in _SHORT:
        value = getattr(args, option, None)
        if value is not None and f"{key}={value}" not in (args.set or []):
            problem = problem.replace(f"--set {key}={value}: {key}: ", f"--{option}: ")
    if getattr(args, "engine", None) is not None:
        problem = re.sub(r"--set search\.engine=.*?: search\.engine: (?=no engine )", "--engine: ", problem, count=1)
    for option in ("workers", "address"):
        if getattr(args, option, None) is not None:
            problem = re.sub(
                rf"--set search\.engine=.*?: search\.engine: {option}: ", f"--{option}: ", problem, count=1
            )
    return problem


def engine_settings(args: argparse.Namespace, plain: Any) -> list[str]:
    """`--engine`, `--workers` and `--address` as a setting; an engine that stays keeps its other options.

    Args:
        args: Of the command line.
        plain: The configuration that they change.
    """
    given = {name: getattr(args, name, None) for name in ("workers", "address")}
    given = {name: value for name, value in given.items() if value is not None}
    name = getattr(args, "engine", None) or ("ray" if "address" in given else None)
    if name is None and not given:
        return []
    search = plain.get("search") if isinstance(plain, Mapping) else None
    before = (search.get("engine") if isinstance(search, Mapping) else None) or "local"
    before = dict(before) if isinstance(before, Mapping) else {"name": before}
    kept = before if name in (None, before.get("name")) else {"name": name}
    return [f"search.engine={json.dumps({**kept, **given})}"]


def storage_settings(args: argparse.Namespace, plain: Any) -> list[str]:
    """`--storage` as a setting; the other options of a storage stay.

    Args:
        args: Of the command line.
        plain: The configuration that it changes.
    """
    if getattr(args, "storage", None) is None:
        return []
    before = plain.get("storage") if isinstance(plain, Mapping) else None
    return [f"storage={json.dumps({**(before if isinstance(before, Mapping) else {}), 'url': args.storage})}"]


def config_name(args: argparse.Namespace) -> str:
    """The configuration's file, for messages."""
    return str(args.config or DEFAULT_CONFIG.name)


def load_config(args: argparse.Namespace) -> Config:
    """The configuration that was asked for, or the embedded one."""
    from mixnas.search import config
    from mixnas.search_space.files import load_yaml

    path = args.config or DEFAULT_CONFIG
    plain = load_yaml(path) if args.read is None else args.read
    changed = [*engine_settings(args, plain), *storage_settings(args, plain), *settings(args)]
    return config.load_config(path, settings=changed, plain=plain)


def load_space(args: argparse.Namespace) -> tuple[Config, Any, Any]:
    """The configuration, its search space, and what its task's networks read and answer."""
    from mixnas.evaluators.tasks.loading import by_name
    from mixnas.search_space.space import SearchSpace

    config = load_config(args)
    space = SearchSpace.from_dict(config.space, f"{config_name(args)}: space")
    return config, space, by_name(config.task.to_plain()).io
