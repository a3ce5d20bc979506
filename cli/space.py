"""`nas space ...` explains a search space; `nas ops` lists what it can be made of."""

from __future__ import annotations

import argparse
import sys
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
    from mixnas.evaluators.costs import SpaceCosts
    from mixnas.search.study.feasibility import check_costs, corners
    from mixnas.search_space.memory import PEAK_MEMORY

    config, space, io = _load_checked(args)
    found = corners(space, io)
    constraints = config.parsed_constraints()
    known = SpaceCosts(space, io, memory=any(c.metric == PEAK_MEMORY for c in constraints)).of
    doubt = check_costs(space, io, constraints, known, found)
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
    if doubt:
        print(f"warning: {doubt}")
    elif config.constraints:
        print(f"The constraints can be met as far as costs tell: {', '.join(config.constraints)}")
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
    if problem.doubt:
        print(f"warning: {problem.doubt}")
    return 0


# -- nas space scale --------


def scale_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `nas space scale`."""
    space_arguments(parser)
    parser.add_argument("--macs", metavar="2x", required=True, help="by what multiply-accumulates are multiplied")
    parser.add_argument(
        "--width-share",
        type=float,
        default=0.8,
        metavar="S",
        help="share of it that goes to width, the rest to depth and resolution (default: 0.8, the fast rule; 1: width "
        "alone)",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where the scaled file goes (default: stdout)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def scale(args: argparse.Namespace) -> int:
    """The file scaled, and what becomes of its corners."""
    import os

    from mixnas.cli.verbs import DEFAULT_CONFIG
    from mixnas.search_space.cost import METRICS
    from mixnas.search_space.enumeration import cost_corner
    from mixnas.search_space.files import atomic_write, dump_yaml, load_yaml
    from mixnas.search_space.scaling import Rule, missed, scale_space
    from mixnas.search_space.space import SearchSpace

    rule = Rule(_factor(args.macs), _share(args.width_share))
    if args.output and not args.force and os.path.lexists(args.output):
        raise ConfigError(f"-o {args.output}: is there already. Give another name, or --force to write over it.")
    config, space, io = _load_checked(args)
    task, new_io, note = _scaled_input(config, space, io, rule)
    scaled = scale_space(config.space, rule, new_io, f"{config_name(args)}: space, scaled by {args.macs}")
    written = load_yaml(args.config or DEFAULT_CONFIG) if args.read is None else args.read
    written = scaled if "stages" in written else {**written, "space": scaled}
    if task is not None:
        written["task"] = task
    spaces = ((space, io), (SearchSpace.from_dict(scaled, "scaled"), new_io))
    corners: dict[str, dict[str, dict[str, float]]] = {}
    for metric in METRICS:
        for end in ("smallest", "largest"):
            before, after = (cost_corner(s, i, metric, largest=end == "largest").value for s, i in spaces)
            corners.setdefault(metric, {})[end] = {"before": before, "after": after}
    largest = corners["macs"]["largest"]
    reached = largest["after"] / largest["before"] if largest["before"] else rule.factor
    notes = list(filter(None, (note, missed(rule, reached, (config.space, scaled), (io.size, new_io.size)))))
    if args.output:
        atomic_write(args.output, dump_yaml(written))
    factors = {"depth": rule.depth, "width": rule.width, "resolution": rule.resolution}
    if args.json:
        sizes = {"before": spaces[0][0].size(), "after": spaces[1][0].size()}
        print_json({"factors": factors, "config": written, "corners": corners, "size": sizes, "note": "; ".join(notes)})
        return 0
    out = sys.stdout if args.output else sys.stderr
    print(", ".join(f"{name} x {value:.4g}" for name, value in factors.items()) + " before rounding", file=out)
    for metric, ends in corners.items():
        for end, value in ends.items():
            ratio = f" ({value['after'] / value['before']:.3g}x)" if value["before"] else ""
            print(f"{end} {metric}: {number(value['before'])} -> {number(value['after'])}{ratio}", file=out)
    for line in (*notes, *([f"written to {args.output}"] if args.output else [])):
        print(line, file=out)
    if not args.output:
        print(dump_yaml(written), end="")
    return 0


def _factor(text: str) -> float:
    """Of "2x"."""
    digits = text.removesuffix("x")
    try:
        factor = float(digits)
    except ValueError:
        factor = 0.0
    if not text.endswith("x") or not 0.01 <= factor <= 1000:  # also of NaN
        raise ConfigError(f"--macs {text}: give a factor from 0.01x to 1000x, for example 2x or 0.5x.")
    return factor


def _share(given: float) -> float:
    if not 0 <= given <= 1:
        raise ConfigError(f"--width-share {given:g}: give a number from 0 to 1.")
    return given


def _scaled_input(config: Any, space: Any, io: Any, rule: Any) -> tuple[dict[str, Any] | None, Any, str]:
    """The task with its `size` scaled where the file gives one, the interface then, and what is to be said of it."""
    import math

    from mixnas.evaluators.tasks.loading import by_name
    from mixnas.search_space.enumeration import contexts
    from mixnas.search_space.scaling import scale_extents

    if io.kind != "image":
        return None, io, ""
    grids = [at.size for inside in contexts(space, io) for at in inside]
    stride = math.lcm(*(whole // part for grid in grids for whole, part in zip(io.size, grid, strict=True)))
    wanted = "x".join(map(str, scale_extents(io.size, rule, stride)))
    stays = f"the input stays {'x'.join(map(str, io.size))}"
    size = config.task.options.get("size")
    if wanted == "x".join(map(str, io.size)):
        return None, io, f"{stays}: the nearest that strides of {stride} divide"
    if not isinstance(size, int | list):
        return None, io, f"{stays}: the file gives the task no size; the rule asks for {wanted}"
    extents = scale_extents(size if isinstance(size, list) else [size], rule, stride)
    extent: Any = extents if isinstance(size, list) else extents[0]
    task = {"name": config.task.name, **config.task.options, "size": extent}
    try:
        return task, by_name(task).io, ""
    except ConfigError as error:
        return None, io, f"{stays}, not {wanted}: {error}"


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
            Verb("scale", "the file for a larger or smaller budget, by the fast compound rule", scale, scale_arguments),
        ),
    ),
    Verb("ops", "the registered operators: knobs, task kinds, paper", ops, ops_arguments),
)
