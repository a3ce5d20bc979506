"""What a verb is, and the arguments that several verbs share.

A file of this folder that has `VERBS` adds them to the command line: `main.py` finds it, and nothing else has to know.
Its `PLACE` says where they stand in the help. These files are imported for every help, so that whatever is heavy
(torch, optuna, ray, sklearn, NumPy, rich) is imported inside the functions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
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


def trusting(parser: argparse.ArgumentParser) -> None:
    """The argument of verbs that run a run's own task."""
    parser.add_argument(
        "--trust", action="store_true", help="run the run's own task though the run was not started here with it"
    )


# -- what they stand for --------


def settings(args: argparse.Namespace) -> list[str]:
    """`--set`, and the options that are short for one."""
    found = list(args.set or [])
    for option, key in (("trials", "search.trials"), ("time", "search.time"), ("seed", "search.seed")):
        if getattr(args, option, None) is not None:
            found.append(f"{key}={getattr(args, option)}")
    return found


def config_name(args: argparse.Namespace) -> str:
    """The configuration's file, for messages."""
    return str(args.config or DEFAULT_CONFIG.name)


def load_config(args: argparse.Namespace) -> Config:
    """The configuration that was asked for, or the embedded one."""
    from mixnas.search import config

    return config.load_config(args.config or DEFAULT_CONFIG, settings=settings(args), plain=args.read)


def load_space(args: argparse.Namespace) -> tuple[Config, Any, Any]:
    """The configuration, its search space, and what its task's networks read and answer."""
    from mixnas.evaluators.tasks.loading import by_name
    from mixnas.search_space.space import SearchSpace

    config = load_config(args)
    space = SearchSpace.from_dict(config.space, f"{config_name(args)}: space")
    return config, space, by_name(config.task.to_plain()).io
