"""`nas space ...` explains a search space; `nas ops` lists what it can be made of."""

from __future__ import annotations

import argparse
from typing import Any

from mixnas.cli.printing import number, print_json, print_table
from mixnas.cli.verbs import Group, Verb, config_name, load_config, load_space
from mixnas.search_space.errors import ConfigError, nearest

PLACE = 4


def space_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of every verb on a space."""
    parser.add_argument("config", metavar="FILE", nargs="?", help="configuration (default: the embedded one, digits)")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="change a setting")


def _load_checked(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Configuration, space and interface, after a check of what stands where."""
    from mixnas.search_space.enumeration import check_space

    config, space, io = load_space(args)
    check_space(space, io)
    return config, space, io


# -- nas space show --------


def show(args: argparse.Namespace) -> int:
    """Knobs, size, corners, constraints."""
    from mixnas.search.study.feasibility import check_constraints, corners

    config, space, io = _load_checked(args)
    found = corners(space, io)
    check_constraints(config.parsed_constraints(), found)
    if args.json:
        variables = [{"name": v.name, "values": list(v.values)} for v in space.variables]
        ends = {
            metric: {end: {"value": c.value, "architecture": c.architecture.to_dict()} for end, c in pair.items()}
            for metric, pair in found.items()
        }
        print_json({"size": space.size(), "variables": variables, "corners": ends})
        return 0
    print(f"{space.size():,} architectures, {len(space.variables)} choices\n")
    rows = []
    for variable in space.variables:
        condition = ""
        if variable.parent >= 0:
            parent = space.variables[variable.parent]
            condition = f"{parent.name} in {', '.join(str(parent.values[i]) for i in sorted(variable.parent_options))}"
        rows.append([variable.name, ", ".join(map(str, variable.values)), condition])
    print_table(args, ["choice", "values", "only when"], rows)
    rows = []
    for metric, pair in found.items():
        rows += [[f"{end} {metric}", number(c.value), str(c.architecture)] for end, c in pair.items()]
    print_table(args, ["corner", "value", "architecture"], rows, cut="architecture")
    if config.constraints:
        print(f"Each of the constraints can be met as far as costs tell: {', '.join(config.constraints)}")
    return 0


# -- nas space size --------


def size(args: argparse.Namespace) -> int:
    """The exact number of architectures."""
    _, space, _ = _load_checked(args)
    if args.json:
        print_json({"size": space.size()})
    else:
        print(space.size())
    return 0


# -- nas space sample --------


def sample_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas space sample`."""
    space_arguments(parser)
    parser.add_argument("-n", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--seed", type=int, help="seed")
    parser.add_argument("--full", action="store_true", help="every architecture in full, below the table")


def sample(args: argparse.Namespace) -> int:
    """Random architectures with their costs."""
    import numpy as np

    from mixnas.search_space.cost import cost

    if args.n < 1:
        raise ConfigError(f"-n {args.n}: give a whole number from 1.")
    _, space, io = _load_checked(args)
    rng = np.random.default_rng(args.seed or 0)
    found = [space.sample(rng) for _ in range(args.n)]
    costs = [cost(architecture, io) for architecture in found]
    if args.json:
        print_json(
            [{"id": a.id, "params": c.params, "macs": c.macs, **a.to_dict()} for a, c in zip(found, costs, strict=True)]
        )
    elif args.n == 1:
        print(found[0].to_yaml(), end="")
    else:
        rows = [[a.id, number(c.params), number(c.macs), str(a)] for a, c in zip(found, costs, strict=True)]
        print_table(args, ["id", "params", "macs", "architecture"], rows, cut="architecture")
        if args.full:
            print("\n".join(f"{a.id}  {a}" for a in found))
    return 0


# -- nas space check --------


def check(args: argparse.Namespace) -> int:
    """Whether the file is a space that can be searched."""
    from mixnas.search.problem import Problem

    problem = Problem(load_config(args), config_name(args))  # whatever a search would refuse before it starts
    print(f"{config_name(args)}: {problem.space.size():,} architectures, everything fits {problem.io.kind} tasks")
    return 0


# -- nas ops --------


def ops_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas ops`."""
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style pattern of a name or an axis")


def ops(args: argparse.Namespace) -> int:
    """The registered operators, axis by axis."""
    import fnmatch

    from mixnas.search_space import registry

    known = [registry.get(axis, name) for axis in registry.AXES for name in registry.names(axis)]
    found = [op for op in known if any(fnmatch.fnmatch(text, args.pattern) for text in (op.name, op.axis))]
    if not found:
        near = nearest(args.pattern, [op.name for op in known])
        raise ConfigError(f"no operator matches {args.pattern!r}.{near} See all: nas ops")
    if args.json:
        print_json(
            [
                {
                    "axis": op.axis,
                    "name": op.name,
                    "kinds": list(op.kinds),
                    "paper": op.paper,
                    "knobs": {
                        name: {"default": knob.default, "allowed": knob.describe(), "doc": knob.doc}
                        for name, knob in op.knobs.items()
                    },
                }
                for op in found
            ]
        )
        return 0
    rows = []
    for op in found:
        knobs = "; ".join(f"{name}={knob.default} ({knob.describe()})" for name, knob in op.knobs.items())
        rows.append([op.axis.replace("_", " "), op.name, ", ".join(op.kinds), knobs, op.paper])
    print_table(args, ["axis", "name", "tasks", "knobs, default (allowed)", "paper"], rows)
    return 0


VERBS = (
    Group(
        "space",
        "explain a search space",
        (
            Verb(
                "show",
                "choices, number of architectures, cheapest and dearest corner, constraints",
                show,
                space_arguments,
            ),
            Verb("size", "the exact number of architectures", size, space_arguments),
            Verb("sample", "random architectures", sample, sample_arguments),
            Verb("check", "whether the file can be searched", check, space_arguments),
        ),
    ),
    Verb("ops", "the registered operators: knobs, task kinds, paper", ops, ops_arguments),
)
