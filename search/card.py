"""What stands beside an exported network's files: its card for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mixnas.evaluators.starting import by_unit, why_not
from mixnas.search.loader import as_batch, inputs_of, prepared_of, takes_pictures, told
from mixnas.search.policies import used
from mixnas.search.run.directory import Run
from mixnas.search.run.front import SHARE, Front, Member
from mixnas.search.run.integrity import EXPORT_FORMAT, EXPORT_MANIFEST
from mixnas.search.study.objectives import parse_constraints
from mixnas.search_space.cost import unit_cost
from mixnas.search_space.errors import exactly, listed, visible
from mixnas.search_space.files import dump_yaml
from mixnas.search_space.network import Network
from mixnas.search_space.units import IOSpec, Unit, plan

FORMAT, MANIFEST = EXPORT_FORMAT, EXPORT_MANIFEST
READABLE = (FORMAT - 1, FORMAT)
ARCHITECTURE, LOADER, CARD, README = "architecture.yaml", "load.py", "card.json", "README.md"
OWN = (ARCHITECTURE, LOADER, CARD, README, MANIFEST)


def card(
    run: Run,
    front: Front,
    member: Member,
    network: Network,
    *,
    licence: str,
    files: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is known of an exported network, as plain data: `card.json`; `data` if it is more than the run's own."""
    data = run.data() if data is None else data
    plain = member.to_plain()
    config, manifest = run.config(), run.manifest
    search = config.get("search", {})
    known = manifest.get("policies", {})
    instead = {name: known[name] for name in used(member.architecture) if known.get(name)}
    return {
        "format": FORMAT,
        **{key: plain[key] for key in ("id", "trial", "metrics", "latency", "predicted", "searched") if key in plain},
        **began_with(front, member),
        "run": run.name,
        "task": manifest["fixed"]["task"],
        "metric": front.metric,
        "licence": licence,
        "budget": budget(front, member),
        "found": {
            "strategy": search.get("strategy"),
            "evaluator": front.evaluator or search.get("evaluator"),
            "trials": dict(front.trials),
            "hypervolume": front.hypervolume,
            "objectives": dict(front.objectives),
            "seed": manifest.get("seed"),
            "begun": manifest.get("created"),
            "commit": manifest.get("commit"),
        },
        "device": front.device or manifest.get("device"),
        "versions": manifest["versions"],
        "io": network.io.to_plain(),
        **told(data),
        **trained_before(data, network, shared=search.get("evaluator") == "supernet"),
        "files": dict(files),
        "config": config,
        **({"instead": instead} if instead else {}),
    }


def began_with(front: Front, member: Member) -> dict[str, Any]:
    """Whose weights a network began with that was made under other policies; nothing of others."""
    if not member.weights_from:
        return {}
    (other,) = [one for one in (*front.members, *front.others) if one.id == member.weights_from]
    return {"weights_from": {"id": other.id, "architecture": dict(other.architecture)}}


def trained_before(data: Mapping[str, Any], network: Network, *, shared: bool) -> dict[str, Any]:
    """Which trained networks this one goes by: its teacher, and what it began with.

    Args:
        data: Of the run, see `recorded`.
        network: What is exported.
        shared: Whether it comes from a super-network, which takes smaller units too.
    """
    found: dict[str, Any] = {}
    if teacher := data.get("teacher"):
        found["teacher"] = {**teacher}
    if init := data.get("init"):
        with torch.random.fork_rng(devices=[]):  # as it was trained, and not as it is deployed
            trained = by_unit(Network(network.architecture, network.io).state_dict())
        own = {unit: {name: tuple(t.shape) for name, t in tensors.items()} for unit, tensors in trained.items()}
        earlier = {unit: {n: tuple(shape) for n, shape in shapes.items()} for unit, shapes in init["units"].items()}
        left = {}
        for unit, shapes in own.items():
            if unit not in earlier:
                left[unit] = "the earlier network has none"
            elif why := why_not(earlier[unit], shapes, smaller=False):
                left[unit] = f"in part or not at all: {why}" if shared else why
        taken = [unit for unit in own if unit not in left]
        found["init"] = {"from": init["from"], "sha256": init["sha256"], "taken": taken, "not_taken": left}
    return found


def budget(front: Front, member: Member) -> list[str]:
    """What was asked, and whether it is kept: a line for each constraint."""
    found = []
    for constraint in parse_constraints(list(front.constraints)):
        unit = " ms" if constraint.metric.endswith("_ms") else ""
        asked = f"{constraint.metric} {constraint.comparison} {exactly(constraint.bound)}{unit}"
        value = member.metrics.get(constraint.metric)
        if value is None:
            found.append(f"asked {asked}: not known")
            continue
        kept = "kept" if constraint.holds(member.metrics) else "missed"
        latency = member.latency
        if constraint.metric == "latency_ms" and latency is not None:
            between = interval(latency.low_ms, latency.high_ms)
            text = f"{latency.ms:.3f}" + (f" ({between})" if between else "")
            found.append(f"asked {asked}, {latency.kind} {text}: {kept}")
        else:
            found.append(f"asked {asked}, it has {value:,.6g}: {kept}")
    return found


def interval(low_ms: float | None, high_ms: float | None) -> str:
    """The 90% interval of a latency in words; empty where there is no telling."""
    return "" if low_ms is None or high_ms is None else f"{low_ms:.3f} to {high_ms:.3f}"


def drawing(network: Network) -> str:
    """The network's units as text, in the order in which they run: what they are, what they answer, what they hold."""
    units = plan(network.architecture, network.io)
    rows = [("input", "", _grid(network.io.size, network.io.in_features), "", "")]
    for name, unit in units:
        own = unit_cost(unit)
        answer = _grid(unit.after.size, unit.after.width)
        rows.append((name, describe(unit), answer, f"{own.params:,}", f"{own.weight_bytes:,}"))
    rows.insert(0, ("unit", "operators", "answers", "parameters", "bytes"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return "\n".join(lines)


def _grid(size: tuple[int, ...], width: int) -> str:
    return "x".join(map(str, (*size, width)))


def describe(unit: Unit) -> str:
    """A unit's operators in the order in which they act, with the policy."""
    ops = " > ".join(str(op) for axis, op in unit.ops if (axis, op.name) != ("gate", "none"))
    return ops if unit.quant is None or unit.quant.name == "fp32" else f"{ops} [{unit.quant}]"


def _trained(plain: Mapping[str, Any]) -> list[str]:
    """What a network lacks of a whole training, where it was left off before, and whose weights it began with."""
    share = plain["metrics"].get(SHARE, 1.0)
    lines = [f"It had {share:.0%} of a whole training, and was left off then.", ""] if share < 1 else []
    if "weights_from" in plain:
        other = plain["weights_from"]["id"]
        began = f"It began with the weights of network {other} of the same run"
        lines += [f"{began}, and was trained on under this network's policies.", ""]
    return lines


def readme(plain: Mapping[str, Any], network: Network) -> str:
    """The card for people, with the front matter that model hubs read."""
    metric, values = plain["metric"], plain["metrics"]
    front_matter = {
        "license": plain["licence"],
        "library_name": "pytorch",
        "tags": ["neural-architecture-search", "mixnas", network.io.kind],
        "metrics": [metric],
    }
    task = plain["task"] if isinstance(plain["task"], str) else plain["task"]["name"]
    lines = [
        "---",
        dump_yaml(front_matter).strip(),
        "---",
        "",
        f"# {plain['run']}: network {plain['id']}",
        "",
        f"Found by mixnas for the task {task}: input {_grid(network.io.size, network.io.in_features)}, "
        f"{network.io.num_outputs} outputs.",
        "",
        *_trained(plain),
        *_classes(plain, network.io),
        *[f"- {line}" for line in plain["budget"]],
        *([""] if plain["budget"] else []),
        "| metric | value |",
        "| --- | --- |",
        *[f"| {name} | {_value(values, name)} |" for name in values if not name.endswith("_se")],
        "",
        "## Latency",
        "",
        "| what | ms | 90% interval | on |",
        "| --- | --- | --- | --- |",
        *_latencies(plain),
        "",
        "## Files",
        "",
        "| file | format | needs | bytes | of them weights | largest difference from eager | allowed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    whole = []
    for name, about in plain["files"].items():
        verified = about["verified"]
        lines.append(
            f"| {name} | {about['format']} | {', '.join(about['needs'])} | {about['bytes']:,} | "
            f"{about['weight_bytes']:,} | {_difference(verified)} | {verified['allowed']:.2g}"
            f"{', as stated' if verified.get('stated') else ''} |"
        )
        if "integers" in verified:
            whole += ["", f"{name}: {verified['integers']}."]
        for quant, text in about.get("instead", {}).items():
            whole += ["", f"{name}: {quant} runs as {text}."]
    lines += [
        *whole,
        "",
        "Each file was loaded in a fresh process without mixnas and compared with the trained network on "
        f"{_inputs(plain)}. SHA-256 of every file: `{MANIFEST}`.",
        "",
        "```python",
        "from load import network",
        "",
        f'answer = network("{next(iter(plain["files"]))}")',
        "outputs = answer(inputs)  # NumPy arrays; any number of inputs",
        "```",
        "",
        *_trained_before(plain),
        *_products(plain),
        "## Architecture",
        "",
        "```text",
        drawing(network),
        "```",
        "",
        "```yaml",
        network.architecture.to_yaml().strip(),
        "```",
        "",
        "## How it was found",
        "",
        "```yaml",
        dump_yaml(
            {
                **{key: plain[key] for key in ("found", "device", "versions", "data", "exported_with") if key in plain},
            }
        ).strip(),
        "```",
        "",
        f"`nas reproduce` trains it again from `{CARD}`, which holds the whole configuration.",
        "",
    ]
    return "\n".join(lines)


def _classes(plain: Mapping[str, Any], io: IOSpec) -> list[str]:
    """What goes in and comes out, where the data says it."""
    lines = [f"Data: {_in_a_line(plain['summary'])}.", ""] if "summary" in plain else []
    if plain.get("labels"):
        names = ", ".join(_in_a_line(str(name)) for name in plain["labels"])
        lines += [f"Classes, in the order of the outputs: {names}.", ""]
    task = plain["task"] if isinstance(plain["task"], str) else plain["task"]["name"]
    dtype, shape = inputs_of(io)
    order = "channels last: height, width, channels" if io.kind == "image" else "moments, channels"
    order = f"whole numbers from 0 to {io.in_features - 1}" if io.tokens else order
    answers = as_batch((*io.grid, io.num_outputs))
    lines += [f"Inputs: {dtype}, {as_batch(shape)}, {order}. `load.py` converts other types. Outputs: {answers}.", ""]
    if "target" in plain:
        lines += ["It answers with (target - mean) / std; `load.in_units(outputs)` gives the targets' own unit.", ""]
    if io.padded:
        lines += [f"Series shorter than {io.size[0]} moments are filled up with NaN at their end.", ""]
    if io.mean is not None:
        of = "pixels, 0 to 255" if "pictures" in plain else "numbers"
        lines += [f"It reads raw {of}: what standardises them is part of the network.", ""]
    elif (own := prepared_of(plain)) is not None:
        raw = f"raw {own.what}, {own.low:g} to {own.high:g}"
        lines += [
            f"A network's file reads what the task prepared: {own.in_words()}, of {raw}. `load.py` takes the raw ones, "
            f"{as_batch((*own.raw_size(io.size), io.in_features))}, and prepares them so; a file that is used without "
            "it is given prepared ones.",
            "",
        ]
    elif not io.tokens:
        lines += [
            f"It reads what the task {visible(str(task))} gives: whatever that prepares is no part of the network.",
            "",
        ]
    if takes_pictures(plain):
        said = "the class of a picture's file"
        if io.grid:
            said = "the shares of the classes in a picture's file, `load.segment(PICTURE, FILE)` gives each pixel's"
        lines += [f"`python load.py PICTURE` prints {said} (needs Pillow).", ""]
    return lines


def _in_a_line(text: str) -> str:
    """A name, which may be a folder's, without what would end the line or move a terminal's cursor."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _trained_before(plain: Mapping[str, Any]) -> list[str]:
    """The networks that it learned from and began with."""
    lines = []
    if teacher := plain.get("teacher"):
        lines.append(
            f"- It learned from {teacher['file']} too (SHA-256 {teacher['sha256']}): {teacher['weight']:.0%} of the "
            f"loss, temperature {teacher['temperature']:g}."
        )
    if init := plain.get("init"):
        lines.append(
            f"- It began with the weights of {init['from']} (SHA-256 {init['sha256']}) in "
            f"{listed(init['taken']) or 'no unit'}."
        )
        lines += [f"  - {unit} not: {why}." for unit, why in init["not_taken"].items()]
    return ["## Networks that were trained before", "", *lines, ""] if lines else []


def _products(plain: Mapping[str, Any]) -> list[str]:
    """What multiplied, of a network with whole numbers: it is called int8 only if an int8 product ran."""
    said = [f"- {name} does not run as itself here: {text}" for name, text in plain.get("instead", {}).items()]
    said += [""] if said else []
    if "ran" not in plain:
        return ["## Policies", "", *said] if said else []
    rows = [
        f"| {one['operation']} | {one['multiplies']} | {one['calls']} | {one['share']:.1%} |" for one in plain["ran"]
    ]
    head = ["| operation | multiplies | calls in a forward | share of the time |", "| --- | --- | --- | --- |"]
    return ["## Products that ran, in eager mode", "", *head, *rows, "", *said]


def _value(values: Mapping[str, float], name: str) -> str:
    error = values.get(f"{name}_se")
    text = f"{values[name]:,.6g}"
    return text if error is None else f"{text} ± {error:.2g} (one standard error)"


def _difference(verified: Mapping[str, Any]) -> str:
    return "none, to the last bit" if verified.get("identical") else f"{verified['difference']:.2g}"


def _inputs(plain: Mapping[str, Any]) -> str:
    """What the files were compared on, of each by itself where they were exported one after the other."""
    metric = f"test_{plain['metric']}"
    of: dict[str, list[str]] = {}
    for name, about in plain["files"].items():
        compared = f"{about['verified']['inputs']} inputs of {about['verified']['of']}"
        compared += ", and by its metric on all of them" if metric in about["verified"] else ""
        of.setdefault(compared, []).append(name)
    return next(iter(of)) if len(of) == 1 else "; ".join(f"{', '.join(names)}: {text}" for text, names in of.items())


def _latencies(plain: Mapping[str, Any]) -> list[str]:
    found = []
    for key, what in (("latency", "the network, in the run"), ("predicted", "predicted for it")):
        if key in plain:
            one = plain[key]
            found.append(
                f"| {what} | {one['ms']:.3f} | {interval(one['low_ms'], one['high_ms'])} | {plain['device']} |"
            )
    searched = plain.get("searched", {}).get("latency_ms")
    if searched is not None:
        found.append(f"| what the search went by | {searched:.3f} | | {plain['device']} |")
    for name, about in plain["files"].items():
        if "latency" in about:
            one = about["latency"]
            where = f"{one['device']}, batch {one['batch_size']}"
            found.append(
                f"| {name}, when exported | {one['ms']:.3f} | {interval(one['low_ms'], one['high_ms'])} | {where} |"
            )
    return found
