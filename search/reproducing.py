"""Training an exported network again, from what its card says."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixnas.evaluators.protocol import InParts, Part
from mixnas.evaluators.tasks.task import Task, recorded
from mixnas.evaluators.training import evaluate
from mixnas.search import card as cards
from mixnas.search import loader
from mixnas.search.config import Config, read_config
from mixnas.search.export import digest_of_test
from mixnas.search.problem import Problem
from mixnas.search.run.front import SHARE
from mixnas.search.run.integrity import export_problems
from mixnas.search.run.trust import about_to_import, require_trust
from mixnas.search.variants import evaluator_of
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError, listed, shown
from mixnas.search_space.files import json_text, parse_json, read_json
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SILENT, Report

_STANDARD_ERRORS = 1.96
"""Half of a 95% interval."""


@dataclass(frozen=True, slots=True)
class Reproduced:
    """What came out.

    Attributes:
        metric: Of the test split.
        exported: What the card says.
        again: What the network that was trained again has.
        allowed: How far apart they may be: the 95% interval of a difference of two; None where no error is known.
    """

    metric: str
    exported: float
    again: float
    allowed: float | None

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return self.allowed is None or abs(self.exported - self.again) <= self.allowed


def read_export(folder: str | Path) -> dict[str, Any]:
    """An export's card, after its files were compared with its manifest. Nothing of it is executed.

    Raises:
        ConfigError: No export, or of another version.
        IntegrityError: A file is not what was exported.
    """
    folder = Path(folder)
    for name in (cards.CARD, cards.MANIFEST):
        if not os.path.lexists(folder / name):
            raise ConfigError(f"{folder}: no export of this version: {name} is missing. Export the network again.")
    for name, problem in export_problems(folder):
        raise IntegrityError(f"{folder / name}: {problem} Export the network again.")
    card = read_json(folder / cards.CARD)
    written = card.get("format") if isinstance(card, dict) else None
    if written not in cards.READABLE:
        known = ", ".join(map(str, cards.READABLE))
        raise ConfigError(f"{folder}: has format {shown(written)}; this version of mixnas reads {known}.")
    missing = [name for name in ("config", "metrics") if not isinstance(card.get(name), dict)]
    if missing:
        raise IntegrityError(f"{folder / cards.CARD}: damaged: it has no {missing[0]}. Export the network again.")
    found: dict[str, Any] = card
    return found


def reproduce(
    folder: str | Path,
    *,
    report: Report = SILENT,
    should_stop: Callable[[], bool] | None = None,
    told: Callable[[str], None] | None = None,
    trust: bool = False,
) -> Reproduced:
    """Train an exported network again by the run's own recipe, and judge it on the test split.

    A network with inherited weights needs its super-network, which is trained again first; one with the weights of
    another under other policies, that other.

    Args:
        folder: The export.
        report: Told of the phases.
        should_stop: Asked between steps.
        told: Told what is about to be imported.
        trust: Whether a task that is not of the package may be run: the card names it.

    Raises:
        ConfigError, IntegrityError: See `read_export` and `check_data`; or the task or the space cannot be built here.
        StoppedEarly: `should_stop` said so.
    """
    card = read_export(folder)
    config = read_config(card["config"], Path(folder) / cards.CARD)
    require_trust({"fixed": {"task": config.task.to_plain()}}, Path(folder), "reproduce", trust)
    if told is not None and ":" in config.task.name:
        told(f"{about_to_import({'fixed': {'task': config.task.to_plain()}}, trust)}, the task that the card names")
    if config.device == "cuda":  # it is trained on what there is here: its time is not asked about
        config = replace(config, device="auto")
    problem = Problem(config, str(Path(folder) / cards.CARD))
    check_data(card, problem.task, folder)
    architecture = Architecture.load(Path(folder) / cards.ARCHITECTURE)
    first = architecture
    if "weights_from" in card:
        first = Architecture.from_dict(card["weights_from"]["architecture"], str(Path(folder) / cards.CARD))
    evaluator = problem.evaluator(problem.latency())
    evaluator.prepare(report, should_stop)
    with report.phase("train again") as phase:
        if problem.in_rungs and isinstance(evaluator, InParts):
            network = _in_parts(evaluator, first, _shares(card, config), phase, should_stop)
        else:
            network = evaluator.finish(first, phase, should_stop)
    if first != architecture:
        varying = evaluator_of(problem, evaluator.device)
        with report.phase(varying.finishing) as phase:
            network = varying.finish_part(architecture, Part(0, 1, network), phase, should_stop)
    metric = problem.task.metric
    score = evaluate(network.cpu(), problem.task, "test").score
    error = card["metrics"].get(f"test_{metric}_se")
    allowed = None if error is None else _STANDARD_ERRORS * math.sqrt(2) * float(error)
    return Reproduced(metric, float(card["metrics"][f"test_{metric}"]), score, allowed)


def check_data(card: dict[str, Any], task: Task, folder: str | Path) -> None:
    """Compare a task's data with what a card says of it: classes, digests, and networks that were trained before.

    Args:
        card: Of an export; what it does not say is not compared.
        task: What would be trained on.
        folder: The export, for the message.

    Raises:
        ConfigError: It is not the same data; the message says what differs.
    """
    now = parse_json(json_text(recorded(task)), "the task's record")
    told = loader.told(now)
    changed: list[str] = [key for key in ("counts", "data_sha256") if key in card and card[key] != told.get(key)]
    if "labels" in card and card["labels"] != told.get("labels"):
        changed.insert(0, f"labels {shown(card['labels'])}, now {shown(told.get('labels'))}")
    trained = [name for name in ("teacher", "init") if name in card]
    changed += [name for name in trained if card[name]["sha256"] != now.get(name, {}).get("sha256")]
    known = card.get("data", {}).get("sha256")
    if known is not None and not changed and known != digest_of_test(task):
        changed.append("test split")
    if changed:
        raise ConfigError(
            f"{folder}: the data is not what the network was exported with ({listed(changed)}): it would be judged on "
            "another test split. Put the data back, or search again."
        )


def _shares(card: dict[str, Any], config: Config) -> list[float]:
    """The shares of its training after each rung that the network went through."""
    most = float(card["metrics"].get(SHARE, 1.0))
    return [share for share in config.final.halving.shares() if share <= most * (1 + 1e-9)]


def _in_parts(
    evaluator: InParts,
    architecture: Architecture,
    shares: list[float],
    report: Report,
    should_stop: Callable[[], bool] | None,
) -> Network:
    network: Network | None = None
    for begun, until in zip([0.0, *shares], shares, strict=False):
        network = evaluator.finish_part(architecture, Part(begun, until, network), report, should_stop)
    assert network is not None
    return network
