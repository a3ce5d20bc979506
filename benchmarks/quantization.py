"""What quantization costs and gives on this machine.

    python benchmarks/quantization.py crossover      which product is fastest at which width and number of tokens
    python benchmarks/quantization.py truth          judged = deployed = saved = loaded, and bytes, of 100 architectures
    python benchmarks/quantization.py accuracy RUN   each policy on a run's front, before and after training with it
    python benchmarks/quantization.py joint          architecture and policy together, against float32 first

Each writes `benchmarks/results/quantization-<what>-<device>.json`. Times want a quiet machine. `crossover --use` also
writes the table that products are chosen by (`search_space/operators/quantization/products.json`).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import _quantized_search  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from _record import sayable  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mixnas.evaluators.varying import with_weights  # noqa: E402
from mixnas.predictors.measuring import runtimes  # noqa: E402
from mixnas.predictors.measuring.device import device_name, provenance  # noqa: E402
from mixnas.predictors.measuring.measure import MeasureConfig, fixed_threads, measure_networks  # noqa: E402
from mixnas.predictors.measuring.sentinel import make_sentinel  # noqa: E402
from mixnas.search_space.architecture import Op  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402
from mixnas.search_space.operators.layers import Linear  # noqa: E402
from mixnas.search_space.operators.quantization import products  # noqa: E402
from mixnas.search_space.operators.quantization.affine import quantize, quantize_rows  # noqa: E402
from mixnas.search_space.operators.quantization.policy import policy_of, stored_bytes, uniform  # noqa: E402

ROWS = (1, 16, 64, 256, 1024)
WIDTHS = ((16, 64), (32, 128), (64, 64), (64, 256), (256, 64), (128, 512), (256, 1024))
DEPLOYED = {
    "int8": Op("w8a8"),
    "int8_static": Op("w8a8_static", (("observer", "minmax"),)),
    "weight_int8": Op("w8a16"),
    "weight_int4": Op("w4a16", (("group", 16),)),
}
"""By kind of product, a policy that is one."""

WIDTHS_OF_TRUTH = (32, 64)

Call = Callable[[], object]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# -- crossover ---------------------------------------------------------------------------------------------------------


def _forced(module: nn.Module, x: Tensor, kind: str, path: str) -> Call:
    """A forward in which products of a kind take a path; no more than a name is set on the way."""
    paths = {kind: path}

    def call() -> object:
        products._forced = paths
        return module(x)

    return call


def _alone(x: Tensor, layer: Linear) -> Iterator[tuple[str, Call]]:
    """Products of what is whole already, and torch's own dynamic layer, for comparison: they are no path."""
    whole, _ = quantize_rows(x, 8)
    weight, weight_scale = quantize_rows(layer.weight.detach(), 8)
    unsigned = quantize(x, torch.tensor(8 / 255), 128, 0, 255)
    packed = products.onednn_pack(weight, len(x))
    one, zero = torch.tensor(8 / 255), torch.tensor(128, dtype=torch.int32)
    bias = layer.bias.detach()
    yield "int_mm alone", lambda: torch._int_mm(whole, weight.T)
    yield (
        "onednn alone",
        lambda: products.onednn_linear(unsigned, one, zero, packed, weight_scale.squeeze(1), bias),
    )
    yield "quantize rows alone", lambda: quantize_rows(x, 8)
    stored = torch.quantize_per_channel(
        layer.weight.detach(),
        weight_scale.squeeze(1).double(),
        torch.zeros(len(weight), dtype=torch.long),
        0,
        torch.qint8,
    )
    dynamic = torch.ops.quantized.linear_prepack(stored, bias)
    yield "quantized.linear_dynamic", lambda: torch.ops.quantized.linear_dynamic(x, dynamic, False)


def _calls(rows: int, inputs: int, outputs: int) -> dict[str, Call]:
    """Everything that is measured at one shape: whole layers from floats to floats, by "kind path", and parts."""
    generator = torch.Generator().manual_seed(0)
    layer = Linear(inputs, outputs).requires_grad_(False).eval()
    x = torch.randn(rows, inputs, generator=generator)
    half = policy_of(Op("bf16")).deploy(policy_of(Op("bf16")).prepare(copy.deepcopy(layer)))
    calls: dict[str, Call] = {"fp32": lambda: layer(x), "bf16": lambda: half(x)}
    for kind, quant in DEPLOYED.items():
        policy = policy_of(quant)
        if kind == "weight_int4" and inputs % 32 == 0:
            policy = policy_of(Op("w4a16", (("group", 32),)))
        module = policy.deploy(policy.prepare(copy.deepcopy(layer))).eval()
        for path in products.KINDS[kind]:
            if path == "int32" or not products.fits(path, inputs):
                continue
            if path in products.CHECKED and not products.works(path, inputs, outputs):
                continue
            calls[f"{kind} {path}"] = _forced(module, x, kind, path)
    calls |= dict(_alone(x, layer))
    return calls


def crossover(args: argparse.Namespace) -> dict[str, Any]:
    """Time every path at every shape; the fastest of each kind."""
    shapes = [(rows, inputs, outputs) for rows in ROWS for inputs, outputs in WIDTHS]
    if args.shapes:
        shapes = shapes[: args.shapes]
    found = []
    started = time.monotonic()
    config = MeasureConfig(passes=args.passes, threads=1, window_ms=4.0, min_repeats=10, max_repeats=60)
    with torch.inference_mode(), fixed_threads(1):
        for rows, inputs, outputs in shapes:
            calls = _calls(rows, inputs, outputs)
            for call in calls.values():
                call()
            measured = measure_networks(
                list(calls.values()), rng=np.random.default_rng(0), config=config, sentinel=make_sentinel("cpu")
            )
            us = {name: 1e3 * one.latency.ms for name, one in zip(calls, measured, strict=True)}
            paths = {}
            for kind in DEPLOYED:
                mine = {name.split()[1]: t for name, t in us.items() if name.startswith(f"{kind} ")}
                paths[kind] = min(mine, key=mine.__getitem__)
            gain = {kind: us["fp32"] / us[f"{kind} {path}"] for kind, path in paths.items()}
            found.append(
                {
                    "rows": rows,
                    "inputs": inputs,
                    "outputs": outputs,
                    "paths": paths,
                    "times_as_fast_as_fp32": gain,
                    "us": us,
                }
            )
            products._forced = {}
            _say(f"{rows:>5} x {inputs:>4} x {outputs:>4}: fp32 {us['fp32']:7.1f} us, " + ", ".join(
                f"{kind} {gain[kind]:.2f} ({path})" for kind, path in paths.items()
            ))  # fmt: skip
    return {
        "provenance": provenance("cpu", 1) | {"seconds": round(time.monotonic() - started, 1), "passes": args.passes},
        "shapes": found,
    }


# -- truth -------------------------------------------------------------------------------------------------------------


def _policies(but: Collection[str] = ()) -> list[Any]:
    """Every policy, those with knobs in more than one form; without some, by name."""
    from mixnas.search_space import registry

    quants: list[Any] = [name for name in registry.names("quant") if name != "w4a16"]
    quants += [{"name": "w4a16", "group": 16}, {"name": "w4a8", "step": "learned"}, {"name": "sparse24", "bits": 8}]
    return [quant for quant in quants if (quant if isinstance(quant, str) else quant["name"]) not in but]


def _refused_by(axis: str, name: str, kind: str, io: Any, quants: list[Any]) -> dict[str, str]:
    """Policies that cannot take an operator at some width, and why; "" for a width at which it cannot stand at all."""
    from mixnas.search_space import registry
    from mixnas.search_space.cost import op_cost
    from mixnas.search_space.errors import ConfigError
    from mixnas.search_space.network import check_op
    from mixnas.search_space.registry import Context

    refused = {}
    op = Op(name, tuple(sorted((k, knob.default) for k, knob in registry.get(axis, name).knobs.items())))
    for width in WIDTHS_OF_TRUTH if name != "none" or axis == "gate" else ():
        context = Context(width, io.size, kind)
        try:
            check_op(axis, op, context, name)
        except ConfigError as error:
            return {"": str(error)}
        for quant in quants:
            plain = quant if isinstance(quant, dict) else {"name": quant}
            full = registry.get("quant", plain["name"]).knobs
            chosen = Op(plain["name"], tuple(sorted((k, plain.get(k, v.default)) for k, v in full.items())))
            try:
                op_cost(axis, op, chosen, context, context)
            except ConfigError as error:
                refused[plain["name"]] = str(error)
    return refused


def _spaces(kind: str, left_out: dict[str, str]) -> Iterator[tuple[Any, Any]]:
    """A space of every operator that serves a kind and every policy; and one of operators that some policy cannot take.

    Args:
        kind: As in `IOSpec`.
        left_out: Told which operators are not in the first space, and why.
    """
    from mixnas.search_space import registry
    from mixnas.search_space.space import SearchSpace
    from mixnas.search_space.units import IOSpec

    io = {
        "image": IOSpec("image", (8, 8), 3, 5),
        "sequence": IOSpec("sequence", (32,), 3, 5),
        "causal": IOSpec("causal", (32,), 11, 11, head="token", tokens=True),
    }[kind]
    quants, refusing = _policies(), set[str]()
    axes = ("mixer", "gate", "channel_mixer")
    first: dict[str, Any] = {axis: [] for axis in axes}
    second: dict[str, Any] = {axis: [] for axis in axes}
    for axis in axes:
        for name in registry.names(axis):
            if kind in registry.get(axis, name).kinds:
                refused = _refused_by(axis, name, kind, io, quants)
                left_out |= {f"{kind} {axis} {name} {policy}".strip(): why for policy, why in refused.items()}
                if "" not in refused:
                    (second if refused else first)[axis].append(name)
                    refusing |= set(refused)
    for block, but in ((first, set[str]()), (second, refusing)):
        if not any(block.values()):
            continue
        block = {axis: names or ["none" if axis == "gate" else "identity"] for axis, names in block.items()}
        block["channel_mixer"] = [name for name in block["channel_mixer"] if name != "identity"] or ["mlp"]
        block["quant"] = {"mixer": _policies(but), "channel_mixer": _policies(but)}
        stem = {"image": {"name": "conv", "stride": 1}, "sequence": "linear", "causal": "embedding"}[kind]
        stage = {"width": list(WIDTHS_OF_TRUTH), "depth": [1, 2, 3], "block": block}
        yield SearchSpace.from_dict({"stem": stem, "norm": ["layer", "rms"], "stages": [stage]}), io


def truth(args: argparse.Namespace) -> dict[str, Any]:
    """Logits and bytes of random architectures: as judged, deployed, saved, loaded; predicted, stored.

    As many as are asked for, and on until each operator and policy has been in one. Those in which batch norms are
    folded or parts merged when they are deployed, and judged so, are counted as `folded`.
    """
    from mixnas.evaluators.supernet.sampling import FairSampler
    from mixnas.search_space.cost import cost
    from mixnas.search_space.formats.safetensors import load_network, save_network
    from mixnas.search_space.operators.quantization.projected import calibrating
    from mixnas.search_space.supernet import Supernet

    record: dict[str, Any] = {"provenance": provenance("cpu", 1), "architectures": 0, "unequal": [], "bytes_wrong": []}
    seen: dict[str, int] = {}
    record |= {"left_out": {}, "never_seen": [], "folded": 0}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kinds = ("image", "sequence", "causal")
        counts = dict(zip(kinds, _split(args.architectures, 3), strict=True))
        spaces = [(kind, *each) for kind in kinds for each in _spaces(kind, record["left_out"])]
        for kind, space, io in spaces:
            count = counts.pop(kind, 1)  # the second space of a kind has few operators: until all have been in one
            supernet = Supernet(space, io, torch.Generator().manual_seed(0))
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():  # steps and statistics as if they had been learned
                for name, parameter in supernet.named_parameters():
                    if ".w4a8.log" in name:
                        parameter.uniform_(-0.5, 0.1, generator=generator)
                for name, buffer in supernet.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.normal_(generator=generator)
                    elif name.endswith("running_var"):
                        buffer.uniform_(0.5, 2.0, generator=generator)
            sampler, drawn = FairSampler(space, args.seed), 0
            never = {str(name) for name in _named_in(space)}
            while drawn < count or (never and drawn < 10 * args.architectures):
                architecture = sampler.draw()
                drawn += 1
                subnet = supernet.subnet(architecture).eval()
                inputs = io.example(4, generator=torch.Generator().manual_seed(1))
                with torch.no_grad(), calibrating(subnet):
                    subnet(inputs)
                path = Path(folder) / architecture.id
                with subnet.as_deployed() as units, torch.inference_mode():
                    record["folded"] += units != subnet.units()
                    judged = nn.Sequential(*(module for _, module in units))(inputs)
                with torch.inference_mode():
                    network = supernet.extract(architecture).eval().deploy()
                    deployed = network(inputs)
                    save_network(path, network, {})
                    loaded = load_network(path).eval()(inputs)
                record["architectures"] += 1
                if not (torch.equal(judged, deployed) and torch.equal(deployed, loaded)):
                    record["unequal"].append(architecture.to_dict())
                if stored_bytes(network) != cost(architecture, io).weight_bytes:
                    record["bytes_wrong"].append(architecture.to_dict())
                for stage in architecture.stages:
                    for block in stage.blocks:
                        for op in (block.mixer, block.gate, block.channel_mixer, block.quant, block.channel_quant):
                            seen[op.name] = seen.get(op.name, 0) + 1
                            never.discard(op.name)
            record["never_seen"] += sorted(f"{kind} {name}" for name in never)
            _say(f"{kind}: {drawn} architectures, {len(record['unequal'])} unequal so far")
    record["seen"] = dict(sorted(seen.items()))
    return record


def _named_in(space: Any) -> set[str]:
    """Names of the operators and policies that blocks of a space choose from."""
    blocks = [block for stage in space.tree.stages for block in stage.blocks]
    choices = [getattr(block, axis) for block in blocks for axis in ("mixer", "gate", "channel_mixer", "quant")]
    return {option.name for choice in choices if choice is not None for option in choice.options}


def _split(total: int, parts: int) -> list[int]:
    return [total // parts + (i < total % parts) for i in range(parts)]


# -- accuracy ----------------------------------------------------------------------------------------------------------


RUNTIMES = ("eager", "onnxruntime")
LEARNED = "w4a8, learned"


def accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """Every policy throughout networks of a run's front: post-training, and trained on with it; bytes and time.

    The policies of a network are measured together. A record with the same settings is gone on with.
    """
    from mixnas.evaluators.tasks.loading import by_name
    from mixnas.evaluators.training import TrainConfig, calibrate, evaluate, train
    from mixnas.search.run.directory import Run
    from mixnas.search_space.errors import NasError
    from mixnas.search_space.formats.safetensors import load_network
    from mixnas.search_space.network import Network

    run = Run.open(args.run, args.runs)
    task = by_name(run.manifest["fixed"]["task"])
    members = run.front().members[:: args.every]
    settings = {"run": args.run, "every": args.every, "epochs": args.epochs, "lr": args.lr, "policies": args.policies}
    path = args.output / f"quantization-accuracy-{device_name('cpu', 1)}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows: list[dict[str, Any]] = before["rows"] if before.get("settings") == settings else []
    known = {row["id"] for row in rows}
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    for member in [member for member in members if member.id not in known][: args.networks or None]:
        original = load_network(run.networks / f"{member.id}.safetensors")
        own: list[dict[str, Any]] = []
        networks: list[Network] = []
        for name in args.policies:
            row: dict[str, Any] = {"id": member.id, "policy": name}
            own.append(row)
            try:
                network = _under(original, name)
            except NasError as error:
                row["refused"] = str(error)
                continue
            quant = network.architecture.stages[0].blocks[0].quant
            row["policy"] = str(quant)
            calibrate(network, task, generator=torch.Generator().manual_seed(0))
            row["post_training"] = evaluate(network, task, "test").score
            config = TrainConfig(epochs=args.epochs, lr=args.lr)
            trained = copy.deepcopy(network)
            train(trained, task, config, generator=torch.Generator().manual_seed(0))
            row["trained"] = evaluate(trained, task, "test").score
            deployed = network.eval().requires_grad_(False).deploy()
            row["weight_bytes"] = stored_bytes(deployed)
            row["instead"] = {runtime: policy_of(quant).instead("cpu", runtime) for runtime in RUNTIMES}
            row["index"] = len(networks)
            networks.append(deployed)
            _say(f"{member.id} {quant}: {row['post_training']:.4f}, trained on {row['trained']:.4f}")
        measured = {runtime: _times(networks, task.io.example(1), runtime, args.passes) for runtime in RUNTIMES}
        for row in own:
            if "index" in row:
                index = row.pop("index")
                row["latency_ms"] = {runtime: found.get(index) for runtime, found in measured.items()}
        rows += own
        record = {
            "provenance": provenance("cpu", 1),
            "settings": settings,
            "networks": len({row["id"] for row in rows}),
            "of_the_front": len(members),
            "by_policy": _by_policy(rows),
            "rows": rows,
        }
        write_json(path, sayable(record))
    return record or before


def _times(networks: list[Any], example: Tensor, runtime: str, passes: int) -> dict[int, float]:
    """Milliseconds of deployed networks by their index, measured together; without those that the runtime refuses."""
    from mixnas.search_space.errors import ConfigError

    calls = {}
    with torch.inference_mode(), fixed_threads(1):
        for i, network in enumerate(networks):
            blocks = [block for stage in network.architecture.stages for block in stage.blocks]
            if any(policy_of(block.quant).why_not("cpu", runtime) for block in blocks):
                continue
            try:
                with torch.inference_mode(False), torch.no_grad():
                    calls[i] = runtimes.prepare(network, example, runtime, 1)
            except ConfigError as error:
                _say(str(error))
        found = measure_networks(
            list(calls.values()),
            rng=np.random.default_rng(0),
            config=MeasureConfig(passes=passes, threads=1),
            sentinel=make_sentinel("cpu"),
        )
    return {i: one.latency.ms for i, one in zip(calls, found, strict=True)}


def _by_policy(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the networks that have the policy, beside those of the same networks in float32."""
    plain = {row["id"]: row for row in rows if row["policy"] == "fp32" and "weight_bytes" in row}
    table: dict[str, dict[str, Any]] = {}

    def named(row: dict[str, Any]) -> str:  # one name whatever the group, and one for learned steps
        name = str(row["policy"])
        return name if "learned" in name else name.partition("(")[0]

    for name in dict.fromkeys(map(named, rows)):
        own = [row for row in rows if named(row) == name and "weight_bytes" in row]
        if not own:
            continue
        lost = {
            when: 100 * float(np.mean([row[when] - plain[row["id"]]["post_training"] for row in own]))
            for when in ("post_training", "trained")
        }
        table[name] = {
            "networks": len(own),
            "points_of_accuracy_against_fp32": {when: round(value, 2) for when, value in lost.items()},
            "bytes_against_fp32": _ratio(own, plain, lambda row: row["weight_bytes"]),
            "latency_against_fp32": {
                runtime: _ratio(own, plain, lambda row, runtime=runtime: row["latency_ms"][runtime])  # type: ignore[misc]
                for runtime in RUNTIMES
            },
        }
    return table


def _ratio(
    own: list[dict[str, Any]], plain: dict[str, Any], of: Callable[[dict[str, Any]], float | None]
) -> float | None:
    """Geometric mean of each row's value over the float32 network's, of those that have both."""
    pairs = [(of(row), of(plain[row["id"]])) for row in own]
    logs = [np.log(mine / other) for mine, other in pairs if mine is not None and other is not None]
    return round(float(np.exp(np.mean(logs))), 3) if logs else None


def _under(original: Any, name: str) -> Any:
    """A trained network with one policy throughout; of w4a16 the largest group that divides all its layers."""
    from mixnas.search_space.errors import ConfigError

    if name == "w4a16":
        tried = [Op("w4a16", (("group", group),)) for group in (32, 16)]
    else:
        tried = [Op("w4a8", (("step", "learned"),)) if name == LEARNED else _op(name)]
    for i, quant in enumerate(tried):
        try:
            return with_weights(uniform(original.architecture, quant), original)
        except ConfigError:
            if i == len(tried) - 1:
                raise
    raise AssertionError


def _op(name: str) -> Op:
    from mixnas.search_space import registry

    return Op(name, tuple(sorted((k, knob.default) for k, knob in registry.get("quant", name).knobs.items())))


def joint(args: argparse.Namespace) -> dict[str, Any]:
    """Search architecture and policy together, and float32 first with policies after, for the same time."""

    path = args.output / f"quantization-joint-{device_name('cpu', 1)}.json"

    def keep(record: dict[str, Any]) -> None:
        write_json(path, sayable(record))

    args.checkpoint = keep
    args.before = [json.loads(one.read_text(encoding="utf-8")) for one in (path, *args.take) if one.exists()]
    return _quantized_search.run(args, _say)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results")
    one = what.add_parser("crossover", help=crossover.__doc__)
    one.add_argument("--passes", type=int, default=5)
    one.add_argument("--shapes", type=int, default=0, help="only so many, to try")
    one.add_argument("--use", action="store_true", help="products are chosen by this table from now on")
    one = what.add_parser("truth", help=truth.__doc__)
    one.add_argument("--architectures", type=int, default=100)
    one.add_argument("--seed", type=int, default=0)
    one = what.add_parser("accuracy", help=accuracy.__doc__)
    one.add_argument("run")
    one.add_argument("--runs", default=str(ROOT / "runs"))
    one.add_argument("--every", type=int, default=1, help="of the front, each so many-th network")
    one.add_argument("--networks", type=int, default=0, help="so many at most in this call; 0 for all")
    one.add_argument("--epochs", type=int, default=6)
    one.add_argument("--lr", type=float, default=3e-4)
    one.add_argument("--passes", type=int, default=5)
    one.add_argument(
        "--policies",
        nargs="+",
        default=["fp32", "bf16", "w8a16", "w8a8", "w8a8_static", "w4a16", "w4a8", LEARNED, "fp8", "sparse24"],
    )
    one = what.add_parser("joint", help=joint.__doc__)
    one.add_argument("-c", "--config", type=Path, default=ROOT / "configs" / "joint.yaml")
    one.add_argument("--seeds", type=int, default=5, help="so many, from 1 on")
    one.add_argument("--profile", type=float, default=150.0, help="seconds, once for all")
    one.add_argument("--tables", type=Path, help="a profile of the space that is there already")
    one.add_argument("--only", type=int, nargs="+", help="these seeds; those that the record has stay")
    one.add_argument("--take", type=Path, nargs="+", default=[], help="records of other seeds, made elsewhere alike")
    one.add_argument("--steps", type=int, default=400, help="of a super-network, in both arms")
    one.add_argument("--trials", type=int, default=60, help="of a search, in both arms")
    one.add_argument("--candidates", type=int, default=4, help="finalists, jointly")
    one.add_argument("--policies", type=int, default=8, help="networks of these under other policies, at most")
    one.add_argument("--candidates-first", type=int, default=4, help="finalists in float32")
    one.add_argument("--epochs", type=int, default=10, help="of a finalist's training, in both arms")
    one.add_argument("--passes", type=int, default=5)
    args = parser.parse_args()
    record = {"crossover": crossover, "truth": truth, "accuracy": accuracy, "joint": joint}[args.what](args)
    record = sayable(record)
    path = args.output / f"quantization-{args.what}-{device_name('cpu', 1)}.json"
    write_json(path, record)
    if args.what == "crossover" and args.use:
        small = {"source": path.name, **record["provenance"]}
        shapes = [{k: shape[k] for k in ("rows", "inputs", "outputs", "paths")} for shape in record["shapes"]]
        write_json(products.TABLE, {"provenance": small, "shapes": shapes})
    print(path)
    if record.get("unequal") or record.get("bytes_wrong"):
        sys.exit(1)


if __name__ == "__main__":
    main()
