"""The command line, `nas`: thin. Every verb parses its words, calls the package, and prints.

Results go to stdout, everything else to stderr. Heavy packages are imported inside the verbs, so that help is instant.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__" and not __package__:
    # `python nas.py` in a checkout that is not installed: this folder is the package.
    import importlib.util

    if importlib.util.find_spec("mixnas") is None:
        _root = Path(__file__).resolve().parent
        _spec = importlib.util.spec_from_file_location(
            "mixnas", _root / "__init__.py", submodule_search_locations=[str(_root)]
        )
        assert _spec is not None and _spec.loader is not None
        sys.modules["mixnas"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["mixnas"])

from mixnas.search_space.errors import ConfigError, nearest

if TYPE_CHECKING:
    pass

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "digits.yaml"
EXIT_STATUS = """\
exit status: 0 done; 1 failed; 2 wrong usage or configuration; 3 nothing feasible under the constraints;
4 stopped early and can be resumed; 5 a file failed its integrity check."""


# -- printing --------


def _console(args: argparse.Namespace, stderr: bool = False) -> Any:
    from rich.console import Console

    plain = args.no_color or bool(os.environ.get("NO_COLOR"))
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else 160  # a file or a pipe has no width of its own
    return Console(stderr=stderr, no_color=plain, highlight=False, width=width, soft_wrap=False)


def _table(args: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(*columns, title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(table.columns):
        cells = [row[i] for row in rows]
        if cells and all(cell[:1].isdigit() or cell in ("", "-") for cell in cells):
            column.justify = "right"
            column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    _console(args).print(table)


def _json(obj: Any) -> None:
    print(json.dumps(obj, indent=2, allow_nan=False))


def _number(value: float) -> str:
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


# -- what several verbs need --------


def _settings(args: argparse.Namespace) -> list[str]:
    """`--set` and the options that are short for one."""
    settings = list(args.set or [])
    for option, key in (("trials", "search.trials"), ("time", "search.time"), ("seed", "search.seed")):
        if getattr(args, option, None) is not None:
            settings.append(f"{key}={getattr(args, option)}")
    return settings


def _load_config(args: argparse.Namespace) -> Any:
    from mixnas.search.config import load_config

    return load_config(args.config or DEFAULT_CONFIG, settings=_settings(args))


# -- nas space --------


def _space_and_io(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    from mixnas.evaluators.tasks import by_name
    from mixnas.search_space.enumeration import check_space
    from mixnas.search_space.space import SearchSpace

    args.config = args.file
    config = _load_config(args)
    space = SearchSpace.from_dict(config.space, f"{args.file or DEFAULT_CONFIG.name}: space")
    io = by_name(config.task.to_plain()).io
    check_space(space, io)
    return config, space, io


def space_show(args: argparse.Namespace) -> int:
    """Knobs, size, corners, constraints."""
    from mixnas.search.feasibility import check_constraints, corners

    config, space, io = _space_and_io(args)
    found = corners(space, io)
    check_constraints(config.parsed_constraints(), found)
    if args.json:
        variables = [{"name": v.name, "values": list(v.values)} for v in space.variables]
        ends = {
            metric: {end: {"value": c.value, "architecture": c.architecture.to_dict()} for end, c in pair.items()}
            for metric, pair in found.items()
        }
        _json({"size": space.size(), "variables": variables, "corners": ends})
        return 0
    print(f"{space.size():,} architectures, {len(space.variables)} choices\n")
    rows = []
    for variable in space.variables:
        condition = ""
        if variable.parent >= 0:
            parent = space.variables[variable.parent]
            condition = f"{parent.name} in {', '.join(str(parent.values[i]) for i in sorted(variable.parent_options))}"
        rows.append([variable.name, ", ".join(map(str, variable.values)), condition])
    _table(args, ["choice", "values", "only when"], rows)
    rows = []
    for metric, pair in found.items():
        rows += [[f"{end} {metric}", _number(c.value), str(c.architecture)] for end, c in pair.items()]
    _table(args, ["corner", "value", "architecture"], rows)
    if config.constraints:
        print(f"Each of the constraints can be met as far as costs tell: {', '.join(config.constraints)}")
    return 0


def space_size(args: argparse.Namespace) -> int:
    """The exact number of architectures."""
    _, space, _ = _space_and_io(args)
    _json({"size": space.size()}) if args.json else print(space.size())
    return 0


def space_sample(args: argparse.Namespace) -> int:
    """Random architectures with their costs."""
    import numpy as np

    from mixnas.search_space.network import cost

    _, space, io = _space_and_io(args)
    rng = np.random.default_rng(args.seed or 0)
    found = [space.sample(rng) for _ in range(args.n)]
    if args.json:
        _json([{"id": a.id, "params": cost(a, io).params, "macs": cost(a, io).macs, **a.to_dict()} for a in found])
    elif args.n == 1:
        print(found[0].to_yaml(), end="")
    else:
        rows = [[a.id, _number(cost(a, io).params), _number(cost(a, io).macs), str(a)] for a in found]
        _table(args, ["id", "params", "macs", "architecture"], rows)
    return 0


def space_check(args: argparse.Namespace) -> int:
    """Whether the file is a space that can be searched."""
    from mixnas.search.feasibility import check_constraints, corners

    config, space, io = _space_and_io(args)
    check_constraints(config.parsed_constraints(), corners(space, io))
    print(f"{args.file or DEFAULT_CONFIG.name}: {space.size():,} architectures, everything fits {io.kind} tasks")
    return 0


# -- nas ops, nas doctor --------


def ops(args: argparse.Namespace) -> int:
    """The registered operators."""
    import fnmatch

    from mixnas.search_space import registry

    registry.load()
    found = [
        registry.get(axis, name)
        for axis in registry.AXES
        for name in registry.names(axis)
        if fnmatch.fnmatch(name, args.pattern) or fnmatch.fnmatch(axis, args.pattern)
    ]
    if not found:
        known = [name for axis in registry.AXES for name in registry.names(axis)]
        raise ConfigError(f"no operator matches {args.pattern!r}.{nearest(args.pattern, known)} See all: nas ops")
    if args.json:
        rows_json = [
            {
                "axis": op.axis,
                "name": op.name,
                "kinds": list(op.kinds),
                "paper": op.paper,
                "knobs": {
                    k: {"default": v.default, "allowed": v.describe(), "doc": v.doc} for k, v in op.knobs.items()
                },
            }
            for op in found
        ]
        _json(rows_json)
        return 0
    rows = []
    for op in found:
        knobs = "; ".join(f"{k}={v.default} ({v.describe()})" for k, v in op.knobs.items())
        rows.append([op.axis.replace("_", " "), op.name, ", ".join(op.kinds), knobs, op.paper])
    _table(args, ["axis", "name", "tasks", "knobs, default (allowed)", "paper"], rows)
    return 0


def doctor(args: argparse.Namespace) -> int:
    """What this machine has, what will work, what to install."""
    from mixnas.predictors.doctor import examine

    findings = examine()
    if args.json:
        _json([{"what": f.what, "found": f.found, "ok": f.ok, "advice": f.advice} for f in findings])
    else:
        mark = {True: "ok", False: "missing", None: "-"}
        rows = [[f.what, mark[f.ok], f.found, f.advice] for f in findings]
        _table(args, ["what", "", "found", "advice"], rows)
    return 0 if all(f.ok is not False or not f.required for f in findings) else 1
