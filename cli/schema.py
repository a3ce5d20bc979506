"""`nas schema`: JSON Schemas (draft 2020-12) of a configuration and of what each verb answers with `--json`.

`ANSWERS` is what programs may rely on. A test compares every verb's answer with it, key by key.
"""

from __future__ import annotations

import argparse
from typing import Any

from mixnas.cli.printing import print_json
from mixnas.cli.verbs import Verb
from mixnas.search_space.errors import ConfigError, nearest

PLACE = 9

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FLAG: Schema = {"type": "boolean"}
ANY: Schema = {}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _or_null(of: Schema) -> Schema:
    return {"anyOf": [of, {"type": "null"}]}


def _by_name(of: Schema) -> Schema:
    return {"type": "object", "additionalProperties": of}


def _record(maybe: dict[str, Schema] | None = None, **always: Schema) -> Schema:
    """An object with these keys, and perhaps with others, and with no more."""
    properties = {**always, **(maybe or {})}
    return {"type": "object", "properties": properties, "required": list(always), "additionalProperties": False}


_DIRECTIONS = _by_name({"enum": ["max", "min"]})
_ARCHITECTURE: Schema = {"type": "object", "required": ["stem", "stages"]}
_LATENCY = _record(
    ms=NUMBER,
    low_ms=_or_null(NUMBER),
    high_ms=_or_null(NUMBER),
    kind={"enum": ["measured", "predicted"]},
    outside=_list(TEXT),
)
_MEMBER = _record(
    {"latency": _LATENCY, "predicted": _LATENCY, "searched": _by_name(NUMBER), "reason": TEXT, "weights_from": TEXT},
    id=TEXT,
    trial=WHOLE,
    metrics=_by_name(NUMBER),
    seconds=NUMBER,
    architecture=ANY,
)
_FRONT = _record(
    format=WHOLE,
    run=TEXT,
    task=ANY,
    metric=TEXT,
    objectives=_DIRECTIONS,
    constraints=_list(TEXT),
    evaluator=TEXT,
    device=_or_null(TEXT),
    latency=TEXT,
    trials=_by_name(WHOLE),
    hypervolume=_or_null(NUMBER),
    reference=_or_null(_list(NUMBER)),
    final=FLAG,
    knee=_or_null(TEXT),
    front=_list(_MEMBER),
    others=_list(_MEMBER),
    searched_front=_list(TEXT),
)
_RUN: dict[str, Schema] = {
    "name": TEXT,
    "state": {"enum": ["running", "finished", "stopped"]},
    "created": TEXT,
    "done": WHOLE,
    "failed": WHOLE,
    "running": WHOLE,
    "trials": _or_null(WHOLE),
    "problem": TEXT,
}
_ONE_RUN = _record(
    **_RUN,
    hypervolume=_or_null(NUMBER),
    best=_by_name(NUMBER),
    best_se=_by_name(NUMBER),
    final=FLAG,
    phase=_or_null(TEXT),
    phases=_list(_record(name=TEXT, seconds=NUMBER, ended=TEXT)),
    wrong=_by_name(TEXT),
    unchecked=_list(TEXT),
)
_UNIT = _record(
    name=TEXT,
    operators=TEXT,
    answers=TEXT,
    latency_ms=_or_null(NUMBER),
    floor_ms=_or_null(NUMBER),
    params=WHOLE,
    macs=WHOLE,
    weight_bytes=WHOLE,
    precision=TEXT,
)
_CHANGE = _record(before=NUMBER, after=NUMBER)
_CORNER = _record(value=NUMBER, architecture=_ARCHITECTURE)
_PREDICTED = _record(
    {"measured_ms": NUMBER, "architecture": _ARCHITECTURE},
    id=TEXT,
    latency_ms=NUMBER,
    low_ms=_or_null(NUMBER),
    high_ms=_or_null(NUMBER),
    outside=_list(TEXT),
    units=_list({"type": "object", "required": ["name"]}),
    device=TEXT,
    runtime=TEXT,
    estimate=FLAG,
)
_KNOB = _record(default={"type": ["number", "string", "boolean"]}, allowed=TEXT, doc=TEXT)

_RANGE = _list(NUMBER)
_DRY_RUN = _record(
    task=ANY,
    architectures=WHOLE,
    choices=WHOLE,
    objectives=_DIRECTIONS,
    constraints=_list(TEXT),
    trials=WHOLE,
    strategy=TEXT,
    evaluator=TEXT,
    seed=WHOLE,
    device=TEXT,
    rehearsal=_or_null(
        _record(
            batch_size=WHOLE,
            step_s=_RANGE,
            judge_s=_RANGE,
            phases_s=_by_name(_RANGE),
            total_s=_RANGE,
            memory_bytes=WHOLE,
            disk_bytes=WHOLE,
        )
    ),
)

ANSWERS: dict[str, Schema] = {
    "search": {"anyOf": [_FRONT, _DRY_RUN]},
    "resume": _FRONT,
    "status": {"anyOf": [_list(_record(**_RUN)), _ONE_RUN]},
    "front": _FRONT,
    "explain": _list(_record(id=TEXT, metrics=_by_name(NUMBER), units=_list(_UNIT))),
    "diff": _record(
        objectives=_DIRECTIONS,
        reference=_list(NUMBER),
        hypervolumes=_list(NUMBER),
        ratio=_or_null(NUMBER),
        dominated=_list(_list(TEXT)),
        remarks=_list(TEXT),
    ),
    "export": _list(TEXT),
    "reproduce": _record(metric=TEXT, exported=NUMBER, again=NUMBER, allowed=_or_null(NUMBER), holds=FLAG),
    "report": _record(report=TEXT, bytes=WHOLE),
    "latency devices": _list(
        _record(
            device=TEXT,
            runtime=TEXT,
            threads=WHOLE,
            batch=ANY,
            half_width=ANY,
            half_width_outside=ANY,
            accuracy=_by_name(ANY),
            provenance=ANY,
            num_units=WHOLE,
            num_networks=WHOLE,
            estimate=FLAG,
            file=TEXT,
        )
    ),
    "latency profile": _record(device=TEXT, runtime=TEXT, accuracy=_by_name(ANY)),
    "latency query": _list({"anyOf": [_PREDICTED, _record(id=TEXT, measured_ms=NUMBER)]}),
    "space show": _record(
        size=WHOLE,
        variables=_list(_record(name=TEXT, values=_list(ANY))),
        corners=_by_name(_record(smallest=_CORNER, largest=_CORNER)),
    ),
    "space size": _record(size=WHOLE),
    "space sample": _list({"type": "object", "required": ["id", "params", "macs", "stem", "stages"]}),
    "space scale": _record(
        factors=_record(depth=NUMBER, width=NUMBER, resolution=NUMBER),
        config={"type": "object"},
        corners=_by_name(_record(smallest=_CHANGE, largest=_CHANGE)),
        size=_CHANGE,
        note=TEXT,
    ),
    "ops": _list(_record(axis=TEXT, name=TEXT, kinds=_list(TEXT), paper=TEXT, knobs=_by_name(_KNOB))),
    "bench table": _record(
        table=TEXT,
        lines=WHOLE,
        rows=WHOLE,
        empty=WHOLE,
        objectives=_DIRECTIONS,
        cheap=_list(TEXT),
        reference=_by_name(NUMBER),
        front=WHOLE,
        hypervolume=_or_null(NUMBER),
        trials=WHOLE,
        seeds=WHOLE,
        strategies=_by_name(_record(share=_by_name(_record(mean=NUMBER, sd=NUMBER)), proposal_s=NUMBER)),
    ),
    "doctor": _list(_record(what=TEXT, found=TEXT, ok=_or_null(FLAG), advice=TEXT)),
}
"""By the words of the verb."""


def schema_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas schema`."""
    parser.add_argument("words", metavar="NAME", nargs="*", help="config, or a verb: front, latency query")


def schema(args: argparse.Namespace) -> int:
    """One schema; without a name, the names that there are."""
    words = " ".join(args.words)
    if not words:
        print("\n".join(["config", *ANSWERS]))
        return 0
    if words == "config":
        from mixnas.search.config import Config
        from mixnas.search_space.schema import schema_of

        print_json({"$schema": DRAFT, "title": "A configuration of mixnas", **schema_of(Config)})
        return 0
    if words not in ANSWERS:
        known = ["config", *ANSWERS]
        raise ConfigError(f"no schema is called {words!r}.{nearest(words, known)} Allowed: {', '.join(known)}.")
    print_json({"$schema": DRAFT, "title": f"What nas {words} --json answers", **ANSWERS[words]})
    return 0


VERBS = (
    Verb("schema", "JSON Schemas of a configuration and of what verbs answer with --json", schema, schema_arguments),
)
