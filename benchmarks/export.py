"""Random networks that between them have every registered operator and policy, through every format: how many agree.

    python benchmarks/export.py [--networks 30] [--seed 0] [--formats torch-export,onnx,safetensors] [--output FILE]

Each file is loaded in a process in which this package cannot be imported, and compared with eager on 64 inputs and on
one: float32 within 1e-4 of the logits, absolutely; others as `formats.tolerance` says. A format that cannot hold a
network has to say which unit, and why. Prints one JSON; ends with 1 where any file neither agrees nor was refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _checkout import use_checkout

use_checkout()

from mixnas.search_space import registry  # noqa: E402
from mixnas.search_space.architecture import Architecture, Op  # noqa: E402
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402
from mixnas.search_space.formats import format as formats  # noqa: E402
from mixnas.search_space.formats.apart import Apart  # noqa: E402
from mixnas.search_space.network import Network  # noqa: E402
from mixnas.search_space.registry import Context, Knob, Value  # noqa: E402
from mixnas.search_space.units import IOSpec  # noqa: E402

IOS = {
    "image": [IOSpec("image", (8, 16), 3, 5), IOSpec("image", (8, 8), 1, 4, head="token")],
    "sequence": [
        IOSpec("sequence", (24,), 3, 4, head="attsets", out_size=()),
        IOSpec("sequence", (17,), 12, 3, tokens=True),
    ],
    "causal": [IOSpec("causal", (16,), 11, 11, head="token", tokens=True)],
}
WIDTHS = (16, 32)
FORMATS = ("torch-export", "onnx", "safetensors")
ABSOLUTE = 1e-4
INPUTS = 64

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
    """An operator that can stand there; one that is still wanted, where one of those can."""
    names = [n for n in registry.names(axis) if context.kind in registry.get(axis, n).kinds]
    names = [n for n in names if all(getattr(registry.get(axis, n).build, k, False) == v for k, v in needs.items())]
    order = sorted(rng.permutation(names).tolist(), key=lambda name: name not in wanted)
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
    if io.head == "token" or rng.integers(2):  # keeps the grid
        kept = {knob: 1 if knob in ("stride", "patch_size") else value for knob, value in stem.knobs}
        stem = Op(stem.name, tuple(kept.items()))
    stages: list[dict[str, Any]] = [{"width": width, "blocks": [block() for _ in range(int(rng.integers(1, 4)))]}]
    if rng.integers(2):
        down = Op("none") if io.head == "token" else _op("downsample", context, rng, wanted["downsample"])
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
    return network.deploy()


def through(name: str, network: Network, inputs: torch.Tensor, folder: Path, apart: Apart) -> dict[str, Any]:
    """Write, load, compare: what became of it."""
    file_format = formats.get(name)
    path = folder / file_format.file_name
    begun = time.perf_counter()
    refused = file_format.why_not(network)
    if refused:
        return {"result": "refused", "why": refused}
    try:
        file_format.write(network, path, {})
        agreement = formats.verify(file_format, path, network, inputs, apart.load(file_format, path))
    except IntegrityError as error:
        return {"result": "wrong", "why": str(error)}
    except NasError as error:
        return {"result": "refused", "why": str(error)}
    single = all(t.dtype in (torch.float32, torch.int64) for t in network.state_dict().values())
    allowed = ABSOLUTE if single else agreement.allowed
    result = "agrees" if agreement.difference <= allowed else "wrong"
    seconds = round(time.perf_counter() - begun, 2)
    return {"result": result, "difference": agreement.difference, "allowed": allowed, "seconds": seconds}


def measure(count: int, seed: int, names: Iterable[str]) -> dict[str, Any]:
    """All of it, as plain data."""
    rng = np.random.default_rng(seed)
    rows, covered = [], set()
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for i, (architecture, io) in enumerate(draw(count, rng)):
        covered |= used(architecture, io)
        network = trained_looking(architecture, io, seed + i)
        inputs = io.example(INPUTS, generator=torch.Generator().manual_seed(i))
        found = {}
        with tempfile.TemporaryDirectory() as folder, Apart([formats.get(name) for name in counts]) as apart:
            for name, counter in counts.items():
                found[name] = through(name, network, inputs, Path(folder), apart)
                counter[found[name]["result"]] += 1
        rows.append({"id": architecture.id, "kind": io.kind, "architecture": str(architecture), **found})
        print(f"{i + 1}/{count} {architecture.id} {[r['result'] for r in found.values()]}", file=sys.stderr, flush=True)
    every = {(axis, name) for axis in registry.AXES for name in registry.names(axis)} - {("channel_mixer", "none")}
    missing = sorted(f"{axis} {name}" for axis, name in every - covered)
    return {"seed": seed, "networks": count, "counts": counts, "not_covered": missing, "rows": rows}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--output")
    args = parser.parse_args()
    found = measure(args.networks, args.seed, args.formats.split(","))
    print(json.dumps(found, indent=1))
    if args.output:
        write_json(args.output, found)
    return int(any(counter["wrong"] for counter in found["counts"].values()) or bool(found["not_covered"]))


if __name__ == "__main__":
    sys.exit(main())
