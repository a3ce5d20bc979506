"""Networks through every format: how many files agree with the network that they were written from.

    python benchmarks/export.py [--networks 30] [--seed 0] [--run RUN] [--formats A,B] [--output FILE]

Random networks that between them have every registered operator and policy, with norms, biases and statistics away
from one and zero; and with --run all networks of a finished run's front, on inputs of the task's test split. Each file
is loaded in a process in which this package cannot be imported, and compared with the deployed eager network on 64
inputs and on one: float32, and weights of few bits that are widened to it, within 1e-4 of the logits, absolutely, or
where float32 itself is worth no more: no farther from the network in float64 than torch's own float32 is, and counted
as such (`beyond_absolute`); halves as `formats.tolerance` says; and of a network that multiplies whole numbers every
one has to be the deployed network's, or the file is refused with the layer where the first is not, and why. A format
that cannot hold a network has to say which unit, and why; where that is a policy, the same network is written once more
with float32 in its place, so that the rest of it is shown too. `never_shown` are the operators that no file of a format
agreed with. Prints one JSON; ends with 1 where any file neither agrees nor was refused.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _checkout import use_checkout

use_checkout()

from mixnas.evaluators.tasks.loading import by_name  # noqa: E402
from mixnas.search.run.directory import Run  # noqa: E402
from mixnas.search.run.origin import versions  # noqa: E402
from mixnas.search_space import registry  # noqa: E402
from mixnas.search_space.architecture import Architecture, Op  # noqa: E402
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402
from mixnas.search_space.formats import format as formats  # noqa: E402
from mixnas.search_space.formats.apart import Apart  # noqa: E402
from mixnas.search_space.formats.format import Format, NotIdentical  # noqa: E402
from mixnas.search_space.formats.integers import whole_layers  # noqa: E402
from mixnas.search_space.formats.safetensors import load_network  # noqa: E402
from mixnas.search_space.network import Network  # noqa: E402
from mixnas.search_space.operators.norms import has_running_statistics, reset_running_statistics  # noqa: E402
from mixnas.search_space.operators.quantization.policy import policy_of  # noqa: E402
from mixnas.search_space.registry import Context, Knob, Value  # noqa: E402
from mixnas.search_space.units import IOSpec  # noqa: E402

IOS = {
    "image": [
        IOSpec("image", (8, 16), 3, 5),
        IOSpec("image", (8, 8), 1, 4, head="token"),
        IOSpec("image", (8, 8), 3, 2, head="sub_pixel", out_size=(16, 16)),
        IOSpec("image", (8, 8), 3, 2, head="lr_aspp", out_size=(16, 16)),
        IOSpec("image", (8, 8), 3, 3, head="offset_learning"),
    ],
    "sequence": [
        IOSpec("sequence", (24,), 3, 4, head="attsets", out_size=()),
        IOSpec("sequence", (17,), 12, 3, tokens=True),
    ],
    "causal": [
        IOSpec("causal", (16,), 11, 11, head="token", tokens=True),
        IOSpec("causal", (12,), 11, 5, head="unrolled", tokens=True),
    ],
}
WIDTHS = (16, 32)
BLOCKS = 5
"""Of a first stage at most: so many that thirty networks have room for every mixer."""
FORMATS = ("torch-export", "onnx", "safetensors")
ABSOLUTE = 1e-4
INPUTS = 64
INTEGERS = ("layers", "alike", "numbers", "moved", "own", "ties")
"""What is kept of `Integers`."""

Axes = dict[str, set[str]]


def _drawn(knob: Knob, rng: np.random.Generator) -> Value:
    """A value of a knob: one of its choices, or not far from its default."""
    if knob.choices is not None:
        return knob.choices[int(rng.integers(len(knob.choices)))]
    if isinstance(knob.default, bool):
        return bool(rng.integers(2))
    tried = [knob.default, *((knob.default * factor) for factor in (0.5, 2)), knob.low]  # type: ignore[operator]
    allowed = [v for v in (knob.normalise(t) for t in tried if t is not None) if v is not None]
    return allowed[int(rng.integers(len(allowed)))]


def _op(axis: str, context: Context, rng: np.random.Generator, wanted: set[str], **needs: Any) -> Op:
    """An operator that can stand there; one that is still wanted, where one of those can: first of the fewest kinds."""
    names = [n for n in registry.names(axis) if context.kind in registry.get(axis, n).kinds]
    names = [n for n in names if all(getattr(registry.get(axis, n).build, k, False) == v for k, v in needs.items())]
    scarce = {name: len(registry.get(axis, name).kinds) if name in wanted else math.inf for name in names}
    order = sorted(rng.permutation(names).tolist(), key=scarce.__getitem__)
    for name, _ in itertools.product(order, range(20)):
        operator = registry.get(axis, name)
        values = {knob: _drawn(allowed, rng) for knob, allowed in operator.knobs.items()}
        if operator.check is None or operator.check(context, values) is None:
            return Op(name, tuple(sorted(values.items())))
    raise NasError(f"no {axis} fits {context}")


def draw(count: int, rng: np.random.Generator) -> Iterator[tuple[Architecture, IOSpec]]:
    """Architectures with their inputs; whatever has not been in one yet is preferred."""
    wanted: Axes = {axis: set(registry.names(axis)) for axis in registry.AXES}
    places = [io for row in itertools.zip_longest(*IOS.values()) for io in row if io is not None]
    for i in range(count):
        io = places[i % len(places)]
        while True:
            plain = _plain(io, rng, wanted)
            architecture = Architecture.from_dict(plain)
            try:
                Network(architecture, io, generator=torch.Generator().manual_seed(i))
                break
            except ConfigError:  # the parts do not go together: another draw
                continue
        for axis, name in used(architecture, io):
            wanted[axis].discard(name)
        yield architecture, io


def _plain(io: IOSpec, rng: np.random.Generator, wanted: Axes) -> dict[str, Any]:
    width = int(rng.choice(WIDTHS))
    context = Context(width, io.size, io.kind)

    def block() -> dict[str, Any]:
        axes = {axis: _op(axis, context, rng, wanted[axis]) for axis in ("mixer", "gate", "channel_mixer")}
        quants = [_op("quant", context, rng, wanted["quant"]) for _ in range(2)]
        quant = {"mixer": quants[0].to_plain(), "channel_mixer": quants[1].to_plain()}
        return {
            **{axis: op.to_plain() for axis, op in axes.items()},
            "quant": quant,
            "recursion": int(rng.integers(1, 3)),
        }

    stem = _op("stem", io.before, rng, wanted["stem"], takes_tokens=io.tokens)
    dense = io.grid != ()
    if dense or rng.integers(2):  # keeps the grid
        kept = {knob: 1 if knob in ("stride", "patch_size") else value for knob, value in stem.knobs}
        stem = Op(stem.name, tuple(kept.items()))
    blocks = [block() for _ in range(int(rng.integers(1, BLOCKS + 1)))]
    stages: list[dict[str, Any]] = [{"width": width, "blocks": blocks}]
    missed = any(io.kind in registry.get("downsample", name).kinds for name in wanted["downsample"])
    if rng.integers(2) or (missed and not dense):
        down = Op("none") if dense else _op("downsample", context, rng, wanted["downsample"])
        last = {"mixer": "identity", "channel_mixer": "mlp"}
        stages.append({"width": int(rng.choice(WIDTHS)), "downsample": down.to_plain(), "blocks": [last]})
    norm = _op("norm", context, rng, wanted["norm"])
    return {"stem": stem.to_plain(), "norm": norm.to_plain(), "stages": stages}


def used(architecture: Architecture, io: IOSpec) -> set[tuple[str, str]]:
    """(axis, name) of everything in a network."""
    found = {("stem", architecture.stem.name), ("norm", architecture.norm.name), ("head", io.head)}
    for stage in architecture.stages:
        found.add(("downsample", stage.downsample.name))
        for block in stage.blocks:
            found |= {("mixer", block.mixer.name), ("gate", block.gate.name), ("quant", block.quant.name)}
            found |= {("channel_mixer", block.channel_mixer.name), ("quant", block.channel_quant.name)}
    return found


def trained_looking(architecture: Architecture, io: IOSpec, seed: int) -> Network:
    """Deployed, with norms, biases and running statistics away from one and zero, which would hide much."""
    generator = torch.Generator().manual_seed(seed)
    network = Network(architecture, io, generator=generator).eval()
    with torch.no_grad():
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point() and ("norm" in name or name.endswith("bias")):
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator))
        batch = io.example(INPUTS, generator=generator)
        if has_running_statistics(network) and not _trains(network(batch)):
            reset_running_statistics(network)  # with those of no data, products of many blocks grow without bound
            network.train()(batch)
            network.eval()
        while not _trains(network(batch)):  # so do products of tokens without a norm between them
            for tensor in network.parameters():
                if tensor.dim() > 1:
                    tensor.mul_(0.8)
    return network.deploy()


def _trains(outputs: torch.Tensor) -> bool:
    """Whether outputs are of a size that those of trained networks have: else float32 has no digits left to compare."""
    return bool(outputs.abs().max() < 1e3)


def through(name: str, network: Network, inputs: torch.Tensor, folder: Path, apart: Apart) -> dict[str, Any]:
    """Write, load, compare: what became of it."""
    file_format = formats.get(name)
    path = folder / file_format.file_name
    begun = time.perf_counter()
    refused = file_format.why_not(network)
    if refused:
        return {"result": "refused", "why": refused}
    about: dict[str, Any] = {"whole": True} if whole_layers(network) else {}
    try:
        file_format.write(network, path, {})
        answer = apart.load(file_format, path)
        try:
            agreement = formats.verify(file_format, path, network, inputs, answer)
            about["result"] = "agrees"
        except NotIdentical as error:
            about |= {"result": "refused", "why": str(error).replace(f"{path}: ", "")}
            agreement = formats.verify(file_format, path, network, inputs, answer, stated=math.inf)
    except IntegrityError as error:
        return {**about, "result": "wrong", "why": str(error)}
    except NasError as error:
        return {**about, "result": "refused", "why": str(error)}
    widened = formats.tolerance(network) == formats.tolerance(torch.nn.Linear(1, 1))
    allowed = ABSOLUTE if widened else agreement.allowed
    if about["result"] == "agrees" and agreement.difference > allowed:
        about["from_float64"] = distances = from_float64(network, inputs, answer)
        if distances is None or not distances["file"] <= distances["torch"]:
            about["result"] = "wrong"
    about |= {"difference": agreement.difference, "identical": agreement.identical}
    if agreement.integers is not None:
        found = agreement.integers
        about["integers"] = {name: getattr(found, name) for name in INTEGERS}
    if math.isfinite(allowed):
        about["allowed"] = allowed
    return about | {"seconds": round(time.perf_counter() - begun, 2)}


def from_float64(network: Network, inputs: torch.Tensor, answer: formats.Answer) -> dict[str, float] | None:
    """How far a file, and torch in float32, are from the network's answers in float64; see `formats.from_finer`."""
    given = inputs.double() if inputs.is_floating_point() else inputs
    found = formats.from_finer(answer, network, inputs, copy.deepcopy(network).double(), given)
    return None if found is None else {"file": found[0], "torch": found[1]}


def without_refused(file_format: Format, architecture: Architecture, *, rounds_otherwise: bool) -> Architecture:
    """The same with float32 wherever there is a policy that the format refuses, or that multiplies whole numbers where
    its runtime rounds otherwise."""
    blocks = [block for stage in architecture.stages for block in stage.blocks]
    named = {quant for block in blocks for quant in (block.quant, block.channel_quant)}
    runtime = getattr(file_format, "runtime", "eager")
    refused = {
        quant
        for quant in named
        if policy_of(quant).why_not("cpu", runtime) or (rounds_otherwise and getattr(policy_of(quant), "whole", False))
    }

    def spared(quant: Op) -> Op:
        return Op("fp32") if quant in refused else quant

    stages = []
    for stage in architecture.stages:
        kept = [replace(b, quant=spared(b.quant), channel_quant=spared(b.channel_quant)) for b in stage.blocks]
        stages.append(replace(stage, blocks=tuple(kept)))
    return replace(architecture, stages=tuple(stages))


def _spared(name: str, architecture: Architecture, file: dict[str, Any]) -> Architecture:
    return without_refused(formats.get(name), architecture, rounds_otherwise="difference" in file)


def tried(names: Iterable[str], network: Network, inputs: torch.Tensor, seed: int | None) -> dict[str, Any]:
    """A network through each format; with a seed, also without the policies that a format refuses."""
    found: dict[str, Any] = {}
    names = list(names)
    with tempfile.TemporaryDirectory() as folder, Apart([formats.get(name) for name in names]) as apart:
        for name in names:
            found[name] = through(name, network, inputs, Path(folder), apart)
            if seed is None or found[name]["result"] != "refused":
                continue
            rest = _spared(name, network.architecture, found[name])
            if rest == network.architecture:
                continue
            spared = trained_looking(rest, network.io, seed)
            found[name]["with_float32_instead"] = through(name, spared, inputs, Path(folder), apart)
    return found


def _moved(file: dict[str, Any]) -> bool:
    """Whether a whole number is another one in a file, or can't be told to be the same."""
    found = file.get("integers")
    return found is None or found["moved"] > 0 or found["alike"] < found["layers"]


def counted(rows: list[dict[str, Any]], names: Iterable[str]) -> dict[str, Any]:
    """How many files of each format agree, were refused, are wrong; how many of integers are the same to the bit."""
    counts: dict[str, Any] = {}
    for name in names:
        files = [row[name] for row in rows]
        again = [file["with_float32_instead"] for file in files if "with_float32_instead" in file]
        compared = [file for file in (*files, *again) if "difference" in file]
        whole = [file for file in compared if file.get("whole")]
        looked = [file["integers"] for file in whole if "integers" in file]
        counts[name] = {
            **Counter(file["result"] for file in files),
            "with_float32_instead": Counter(file["result"] for file in again),
            "identical": sum(file["identical"] for file in compared),
            "beyond_absolute": sum(file["result"] == "agrees" and "from_float64" in file for file in compared),
            "of_whole_numbers": {
                "networks": len(whole),
                "outputs_identical": sum(file["identical"] for file in whole),
                "whole_numbers_identical": sum(file["identical"] or not _moved(file) for file in whole),
                "refused": sum(file["result"] == "refused" for file in whole),
                "refused_for_the_order_of_sums_alone": sum(
                    file["result"] == "refused" and file.get("integers", {}).get("ties", False) for file in whole
                ),
                "numbers": sum(found["numbers"] for found in looked),
                "moved": sum(found["moved"] for found in looked),
                "moved_by_torch_itself": sum(found["own"] for found in looked),
                "layers": sum(found["layers"] for found in looked),
                "layers_alike": sum(found["alike"] for found in looked),
            },
            "largest_difference": max((file["difference"] for file in compared), default=None),
            "largest_difference_of_those_that_agree": max(
                (file["difference"] for file in compared if file["result"] == "agrees"), default=None
            ),
        }
    return counts


def measure(count: int, seed: int, names: Iterable[str]) -> dict[str, Any]:
    """Random networks, as plain data."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    covered: set[tuple[str, str]] = set()
    shown: dict[str, set[tuple[str, str]]] = {name: set() for name in names}
    for i, (architecture, io) in enumerate(draw(count, rng)):
        covered |= used(architecture, io)
        network = trained_looking(architecture, io, seed + i)
        inputs = io.example(INPUTS, generator=torch.Generator().manual_seed(i))
        found = tried(shown, network, inputs, seed + i)
        for name, file in found.items():
            if file["result"] == "agrees":
                shown[name] |= used(architecture, io)
            elif file.get("with_float32_instead", {}).get("result") == "agrees":
                shown[name] |= used(_spared(name, architecture, file), io)
        rows.append({"id": architecture.id, "kind": io.kind, "architecture": str(architecture), **found})
        said = [file["result"] for file in found.values()]
        print(f"{i + 1}/{count} {architecture.id} {said}", file=sys.stderr, flush=True)
        for file in (*found.values(), *(file.get("with_float32_instead", {}) for file in found.values())):
            if file.get("result") == "wrong":
                print(file.get("why", file), file=sys.stderr, flush=True)
    every = {(axis, name) for axis in registry.AXES for name in registry.names(axis)} - {("channel_mixer", "none")}
    missing = {name: sorted(f"{axis} {op}" for axis, op in every - seen) for name, seen in shown.items()}
    return {
        "seed": seed,
        "networks": count,
        "operators_and_policies": len(every),
        "counts": counted(rows, shown),
        "not_covered": sorted(f"{axis} {name}" for axis, name in every - covered),
        "never_shown": missing,
        "rows": rows,
    }


def measure_front(run: str, names: Iterable[str]) -> dict[str, Any]:
    """The networks of a finished run's front, on inputs of its task's test split."""
    opened = Run.open(run)
    test = by_name(opened.manifest["fixed"]["task"]).test
    inputs, _ = test.gather(torch.arange(min(INPUTS, len(test))))
    names, rows = list(names), []
    for member in opened.front().members:
        network = load_network(opened.networks / f"{member.id}.safetensors").deploy()
        found = tried(names, network, inputs, None)
        rows.append({"id": member.id, "architecture": str(network.architecture), **found})
        print(f"front {member.id} {[file['result'] for file in found.values()]}", file=sys.stderr, flush=True)
    return {"run": opened.name, "networks": len(rows), "counts": counted(rows, names), "rows": rows}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="a finished run, whose front is written too")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--output")
    args = parser.parse_args()
    names = args.formats.split(",")
    found: dict[str, Any] = {"versions": versions(), "random": measure(args.networks, args.seed, names)}
    if args.output:
        write_json(args.output, found)  # whatever becomes of the front
    if args.run:
        found["front"] = measure_front(args.run, names)
    print(json.dumps(found, indent=1))
    if args.output:
        write_json(args.output, found)
    parts = [found[part] for part in ("random", "front") if part in found]
    files = [row[name] for part in parts for row in part["rows"] for name in names]
    files += [file["with_float32_instead"] for file in files if "with_float32_instead" in file]
    wrong = any(file["result"] == "wrong" for file in files)
    return int(wrong or bool(found["random"]["not_covered"]))


if __name__ == "__main__":
    sys.exit(main())
