"""The answer of a search, `pareto.json`: what it holds, and its one reader and writer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixnas.predictors.measuring.value import Latency
from mixnas.search.study.objectives import parse_constraints
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError, counted, shown, visible
from mixnas.search_space.files import atomic_write, json_text, parse_json, read_bytes

FORMAT = 2
"""1 had no format number and spelt latencies in three ways; it can still be read."""


SHARE = "train_share"
"""The metric of a network that was trained in rungs which says how much of a whole training it had."""

BESIDE = "one_policy"
"""Among the numbers of trials: those under one quantization policy throughout, which no strategy proposed."""


def in_words(shares: Sequence[float]) -> str:
    """How long networks were trained, by what share of a whole training each had; those of none had all of it."""
    short = [share for share in shares if share < 1]
    if not short:
        return "trained to the end"
    least = f"{min(short):.0%}" if min(short) == max(short) else f"{min(short):.0%} to {max(short):.0%}"
    return f"trained to the end but for {len(short)} of {len(shares)}, which had {least} of a whole training"


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Member:
    """A network of the front, or a finalist that did not come on it.

    Attributes:
        id: Of the architecture.
        trial: Number of its trial in the study.
        architecture: Its canonical form.
        metrics: On the validation split (objectives and constraints refer to these), on the test split (`test_...`),
            costs and latency. Before the networks are final: what the trial gave.
        latency: Of a final network.
        predicted: Predicted latency of a final network, where a predictor answered.
        searched: What the search went by; of a final network.
        seconds: Time of the trial.
        reason: Why a finalist is not on the front; empty where it is.
        weights_from: Id of the finished network whose weights it began with, under other policies (`search.variants`);
            `trial` and `seconds` are then that one's, and `searched` is what it was chosen by. Empty of all others.
    """

    id: str
    trial: int
    architecture: Mapping[str, Any]
    metrics: Mapping[str, float]
    latency: Latency | None = None
    predicted: Latency | None = None
    searched: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    reason: str = ""
    weights_from: str = ""

    def __repr__(self) -> str:
        """What tells it from others: id, metrics of the validation split, costs."""
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in self.metrics.items() if name[-3:] != "_se")
        return f"Member({self.id}: {numbers}{f'; {self.reason}' if self.reason else ''})"

    @property
    def values(self) -> dict[str, float]:
        """All that a filter may name: the metrics, and the ends of the latency's interval."""
        if self.latency is None:
            return dict(self.metrics)
        return {**self.metrics, **self.latency.ends}

    def to_plain(self) -> dict[str, Any]:
        """Plain data; what is empty is left out."""
        plain: dict[str, Any] = {"id": self.id, "trial": self.trial, "metrics": dict(self.metrics)}
        if self.latency is not None:
            plain["latency"] = self.latency.to_plain()
        if self.predicted is not None:
            plain["predicted"] = self.predicted.to_plain()
        if self.searched:
            plain["searched"] = dict(self.searched)
        if self.reason:
            plain["reason"] = self.reason
        if self.weights_from:
            plain["weights_from"] = self.weights_from
        return {**plain, "seconds": self.seconds, "architecture": self.architecture}

    def _check(self) -> None:
        """See `Front._check`."""
        if not isinstance(self.id, str) or Architecture.from_canonical(self.architecture).id != self.id:
            raise ValueError(f"{shown(self.id)} is not the id of its architecture")
        if not isinstance(self.reason, str):
            raise ValueError("a reason is no text")
        if not isinstance(self.weights_from, str) or (self.weights_from and not _ID.fullmatch(self.weights_from)):
            raise ValueError("weights_from is no id")
        _check_numbers("a metric", (*self.metrics.values(), *self.searched.values(), self.trial))
        _check_numbers("a time", (self.seconds,), least=0.0)
        for latency in (self.latency, self.predicted):
            if latency is not None:
                _check_numbers("a latency", (latency.ms, latency.low_ms, latency.high_ms), least=0.0)
                if latency.kind not in ("measured", "predicted"):
                    raise ValueError(f"a latency is neither measured nor predicted but {shown(latency.kind)}")

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Member:
        """The inverse of `to_plain`."""
        latencies = {name: Latency.from_plain(plain[name]) for name in ("latency", "predicted") if name in plain}
        return cls(**{**plain, **latencies})


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class Front:
    """A Pareto front, and the search that it came from.

    Attributes:
        run: Name of the run.
        task: As in the configuration.
        metric: The task's metric.
        objectives: Metric to direction, in the order of a trial's values.
        constraints: As text.
        evaluator: Where metrics came from.
        device: What latency is of.
        latency: Whether `latency_ms` of the members is "measured" or "predicted".
        trials: How many are "done", "failed", "duplicate", "infeasible"; of those done and failed, how many were of one
            policy throughout and beside the budget ("one_policy", where there are any).
        hypervolume: Of the searched front; None while too few trials are done.
        reference: Reference point of the hypervolume.
        final: Whether the members are trained to the end; False while it is the searched front.
        members: Best of the first objective first.
        others: Final networks that another dominates, or that violate a constraint, each with a reason.
        knee: Id of the member nearest to the ideal point; None of an empty front.
        searched_front: Ids of the front by what the search went by.
    """

    run: str
    task: str | Mapping[str, Any]
    metric: str
    objectives: Mapping[str, str]
    constraints: tuple[str, ...]
    evaluator: str
    device: str
    latency: str
    trials: Mapping[str, int]
    hypervolume: float | None
    reference: tuple[float, ...] | None
    final: bool
    members: tuple[Member, ...]
    others: tuple[Member, ...]
    knee: str | None
    searched_front: tuple[str, ...]

    def __repr__(self) -> str:
        what = "final" if self.final else "so far"
        return f"Front({self.run}, {what}: {counted(len(self.members), 'network')} on {self.device or 'no device'})"

    @property
    def ids(self) -> set[str]:
        """Of its networks, and of the others."""
        return {member.id for member in (*self.members, *self.others)}

    @property
    def asked(self) -> tuple[str, ...]:
        """The metrics that objectives and constraints name, in order."""
        bounds = parse_constraints(list(self.constraints))
        return tuple(dict.fromkeys([*self.objectives, *(bound.metric for bound in bounds)]))

    def to_plain(self) -> dict[str, Any]:
        """What the file holds; the members stand under "front"."""
        return {
            "format": FORMAT,
            "run": self.run,
            "task": self.task,
            "metric": self.metric,
            "objectives": dict(self.objectives),
            "constraints": list(self.constraints),
            "evaluator": self.evaluator,
            "device": self.device,
            "latency": self.latency,
            "trials": dict(self.trials),
            "hypervolume": self.hypervolume,
            "reference": None if self.reference is None else list(self.reference),
            "final": self.final,
            "knee": self.knee,
            "front": [member.to_plain() for member in self.members],
            "others": [member.to_plain() for member in self.others],
            "searched_front": list(self.searched_front),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Front:
        """The inverse of `to_plain`."""
        fields = {name: value for name, value in plain.items() if name not in ("format", "front")}
        reference = plain["reference"]
        return cls(
            **{
                **fields,
                "constraints": tuple(plain["constraints"]),
                "reference": None if reference is None else tuple(reference),
                "members": tuple(map(Member.from_plain, plain["front"])),
                "others": tuple(map(Member.from_plain, plain["others"])),
                "searched_front": tuple(plain["searched_front"]),
            }
        )

    def to_text(self) -> str:
        """The file's text."""
        return json_text(self.to_plain())

    def write(self, path: str | Path) -> None:
        """Write the file, atomically."""
        atomic_write(path, self.to_text())

    @classmethod
    def read(cls, path: str | Path) -> Front:
        """Read the file, of this format or the first.

        Raises:
            ConfigError: There is none, or it is of a later format.
            IntegrityError: It is damaged.
        """
        return cls.parse(read_bytes(path), str(path))

    @classmethod
    def parse(cls, text: str | bytes, path: str) -> Front:
        """What the file holds; see `read`."""
        try:
            plain = parse_json(text, path)
            written = plain.get("format", 1)
            if written == 1:
                plain = _from_first_format(plain)
            elif written != FORMAT:
                raise ConfigError(
                    f"{path}: has format {shown(written)}; this version of mixnas reads up to {FORMAT}. "
                    "Open it with the version that wrote it."
                )
            front = cls.from_plain(plain)
            front._check()
            for name in (front.metric, *front.objectives) if written == FORMAT else ():
                if any(name not in member.metrics for member in front.members):
                    raise ValueError(f"a member of the front has no {shown(name)}")
            return front
        except ConfigError:
            raise
        except IntegrityError as error:
            raise IntegrityError(f"{path}: damaged: not a front. Delete it; a resume writes it again.") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            reason = visible(str(error))[:120]
            raise IntegrityError(
                f"{path}: damaged: not a front ({reason}). Delete it; a resume writes it again."
            ) from error

    def _check(self) -> None:
        """That every part is of its type, and every id that of its architecture.

        Raises:
            ValueError: With what is wrong.
        """
        ids = self.ids
        for member in (*self.members, *self.others):
            member._check()
            if member.weights_from and member.weights_from not in ids:
                raise ValueError(f"{member.id} has the weights of a network that is not there")
        named = self.task.get("name") if isinstance(self.task, Mapping) else self.task
        if not isinstance(named, str):
            raise ValueError(f"the task is {shown(self.task)}")
        texts = (self.run, self.metric, self.evaluator, self.device, self.latency, *self.constraints)
        if not all(isinstance(text, str) for text in texts) or not isinstance(self.final, bool):
            raise ValueError("a text or a yes or no is something else")
        if not all(isinstance(i, str) and _ID.fullmatch(i) for i in self.searched_front):
            raise ValueError("searched_front holds something else than ids")
        if not all(d in ("max", "min") for d in self.objectives.values()):
            raise ValueError("an objective has no direction")
        if self.final and self.knee is not None and self.knee not in ids:
            raise ValueError("the knee is none of its networks")
        _check_numbers("trials", self.trials.values())
        _check_numbers("hypervolume", (x for x in (self.hypervolume, *(self.reference or ())) if x is not None))


_ID = re.compile(r"[0-9a-f]{12}")


def _check_numbers(what: str, numbers: Iterable[object], *, least: float = -math.inf) -> None:
    for number in numbers:
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if not plain or not math.isfinite(number) or number < least:  # type: ignore[arg-type, operator]
            raise ValueError(f"{what} is {shown(number)}")


def _from_first_format(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The first format's content in the words of this one."""
    final = bool(plain.get("final", False))
    kind = plain.get("latency", "")
    known = ("run", "task", "metric", "objectives", "constraints", "trials", "hypervolume", "reference", "knee")
    return {
        **{name: plain[name] for name in known},
        "evaluator": plain.get("evaluator", ""),
        "device": plain.get("device", ""),
        "latency": kind,
        "final": final,
        "front": [_member_from_first_format(member, kind) for member in plain["front"]],
        "others": [_member_from_first_format(member, kind) for member in plain.get("others", [])],
        "searched_front": plain.get("searched_front", [member["id"] for member in plain["front"]]),
    }


def _member_from_first_format(plain: Mapping[str, Any], kind: str) -> dict[str, Any]:
    member = dict(plain)
    predicted = member.pop("predicted", {})
    if kind:  # the networks are final, and their interval stood among the metrics
        metrics = dict(member["metrics"])
        ends = metrics.pop("latency_low_ms"), metrics.pop("latency_high_ms")
        member["metrics"] = metrics
        member["latency"] = Latency(metrics["latency_ms"], *ends, kind).to_plain()  # type: ignore[arg-type]
    if predicted:
        member["predicted"] = Latency(
            predicted["latency_ms"], predicted["low_ms"], predicted["high_ms"], "predicted", tuple(predicted["outside"])
        ).to_plain()
    return member
