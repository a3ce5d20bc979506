"""What the super-network must show, part by part; each part is one run and writes one file in `benchmarks/results/`.

    python benchmarks/supernet.py equality        extracted networks compute what sub-networks compute
    python benchmarks/supernet.py fidelity        inherited against stand-alone validation loss, proxies beside it
    python benchmarks/supernet.py cost            time through the store against plain networks; evaluations a second
    python benchmarks/supernet.py kill            killed at random moments, it resumes to the same weights
    python benchmarks/supernet.py hypervolume     super-network search against stand-alone search, by the clock
    python benchmarks/supernet.py hypervolume --against 0b9e032  today's default against that commit's, by the clock

Times want a quiet machine. `fidelity` trains 150 networks first; they are kept as they come, and it goes on from there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout
from _record import sayable

use_checkout()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from mixnas.evaluators.supernet.judging import SubnetJudge  # noqa: E402
from mixnas.evaluators.supernet.sampling import FairSampler  # noqa: E402
from mixnas.evaluators.supernet.training import SupernetConfig, load_supernet, train_supernet, update  # noqa: E402
from mixnas.evaluators.tasks.loading import by_name  # noqa: E402
from mixnas.evaluators.training import parameter_groups  # noqa: E402
from mixnas.predictors.measuring.device import provenance  # noqa: E402
from mixnas.search.config import Config, load_config  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402
from mixnas.search_space.network import Network  # noqa: E402
from mixnas.search_space.space import SearchSpace  # noqa: E402
from mixnas.search_space.supernet import Supernet  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def write(part: str, threads: int, record: dict[str, Any]) -> None:
    """One result file."""
    path = RESULTS / f"supernet-{part}.json"
    write_json(path, sayable({**record, "provenance": provenance("cpu", threads)}))
    say(f"wrote {path.parent.name}/{path.name}")


def quantiles(values: list[float]) -> dict[str, float]:
    """Median with its quartiles."""
    low, median, high = (float(np.quantile(values, q)) for q in (0.25, 0.5, 0.75))
    return {"median": median, "low": low, "high": high, "n": len(values)}


def embedded(settings: Sequence[str] = ()) -> tuple[Config, SearchSpace, Any]:
    """The embedded default, with settings ("key=value") changed: its configuration, space and task."""
    config = load_config(ROOT / "configs" / "digits.yaml", settings=settings)
    return config, SearchSpace.from_dict(config.space), by_name(config.task.to_plain())


# -- equality -----------------------------------------------------------------------------------------------------


def _spaces() -> ModuleType:
    """The tests' spaces in which every registered operator can occur."""
    sys.path.append(str(ROOT))
    return importlib.import_module("tests.search_space.spaces")


def _relative_error(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(((first - second).abs().max() / second.abs().max().clamp(min=1e-12)).detach())


def equality(args: argparse.Namespace) -> None:
    """Outputs and gradients of 100 random architectures of each kind of task, all norm weights randomised."""
    spaces = _spaces()
    record: dict[str, Any] = {"architectures": args.architectures, "goal": 1e-6}
    for kind, io in spaces.IOS.items():
        space = spaces.everything(kind)
        supernet = Supernet(space, io, torch.Generator().manual_seed(0))
        generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(0)
        with torch.no_grad():
            for name, tensor in [*supernet.named_parameters(), *supernet.named_buffers()]:
                if "norm" in name and tensor.is_floating_point():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        outputs, gradients, operators = [], [], set()
        for i in range(args.architectures):
            architecture = space.sample(rng)
            extracted, subnet = supernet.extract(architecture).eval(), supernet.subnet(architecture).eval()
            Network(architecture, io).load_state_dict(extracted.state_dict(), strict=True)
            x = io.example(2, generator=generator)
            outputs.append(_relative_error(extracted(x), subnet(x)))
            if i % 5 == 0:
                supernet.zero_grad()
                for network in (extracted, subnet):
                    network(x).square().mean().backward()
                pairs = zip(extracted.parameters(), subnet.parameters(), strict=True)
                gradients.append(max(_relative_error(q.grad, p.grad) for p, q in pairs if p.grad is not None))
            for stage in architecture.stages:
                for block in stage.blocks:
                    operators |= {block.mixer.name, block.gate.name, block.channel_mixer.name, block.quant.name}
        record[kind] = {
            "largest_relative_difference_of_outputs": max(outputs),
            "largest_relative_difference_of_gradients": max(gradients),
            "state_dicts_load_strictly": True,  # else it would have raised
            "operators": sorted(operators),
            "space_size": str(space.size()),
        }
        say(f"{kind}: outputs differ by at most {max(outputs):.1e}, {len(operators)} operators")
        if max(outputs) > record["goal"]:
            raise SystemExit(f"{kind}: outputs differ by {max(outputs):.1e}, more than {record['goal']:.0e}")
    write("equality", torch.get_num_threads(), record)


# -- cost ---------------------------------------------------------------------------------------------------------


def _forward_backward(network: nn.Module, task: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    task.training_loss(network(x), y).backward()


def _interleaved(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Times in ms of each call, taken in turns, in an order that changes."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for call in calls.values():
        call()
    for i in range(rounds):
        random.Random(i).shuffle(order)
        for name in order:
            started = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - started) * 1e3)
    return times


def _optimiser(network: nn.Module, config: SupernetConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(network, config.weight_decay), lr=0.0, fused=True)


def cost(args: argparse.Namespace) -> None:
    """One architecture's training step through the store and plainly; a whole step of the training; evaluations."""
    config, space, task = embedded()
    settings = config.supernet
    supernet = Supernet(space, task.io, torch.Generator().manual_seed(0))
    x, y = task.train.gather(torch.arange(settings.batch_size))
    rng = np.random.default_rng(0)
    picked = {"largest": supernet.largest(), "smallest": supernet.smallest()}
    picked |= {f"random {i}": space.sample(rng) for i in range(args.architectures)}

    def step(network: Network, owner: nn.Module, optimizer: torch.optim.Optimizer | None) -> Callable[[], None]:
        parameters = list(owner.parameters())

        def call() -> None:
            owner.zero_grad(set_to_none=False)
            _forward_backward(network, task, x, y)
            if optimizer is None:
                return
            if owner is supernet:
                update(optimizer, supernet.touched([network.architecture]), 1.0)
            else:
                nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
                optimizer.step()

        return call

    whole = _optimiser(supernet, settings)
    rows: dict[str, Any] = {}
    ratios: dict[str, list[float]] = {"gradients": [], "gradients_and_update": []}
    for name, architecture in picked.items():
        subnet, plain = supernet.subnet(architecture).train(), supernet.extract(architecture).train()
        calls = {
            "store": step(subnet, supernet, None),
            "plain": step(plain, plain, None),
            "store_update": step(subnet, supernet, whole),
            "plain_update": step(plain, plain, _optimiser(plain, settings)),
        }
        times = _interleaved(calls, args.rounds)
        row = {name: quantiles(values) for name, values in times.items()}
        for label, suffix in (("gradients", ""), ("gradients_and_update", "_update")):
            pairs = zip(times[f"store{suffix}"], times[f"plain{suffix}"], strict=True)
            row[f"ratio_{label}"] = quantiles([a / b for a, b in pairs])
            ratios[label].append(row[f"ratio_{label}"]["median"])
        rows[name] = row
    say(f"one network: gradients {np.median(ratios['gradients']):.3f}, with the update "
        f"{np.median(ratios['gradients_and_update']):.3f} of the plain time")  # fmt: skip
    record = {
        "batch_size": settings.batch_size,
        "store_parameters": sum(p.numel() for p in supernet.parameters()),
        "ratio_gradients": quantiles(ratios["gradients"]),
        "ratio_gradients_and_update": quantiles(ratios["gradients_and_update"]),
        "training_step": _training_step_cost(supernet, task, settings, whole, x, y, args.rounds),
        "evaluation": _evaluation_speed(supernet, task, args.evaluations, config.supernet.probe),
        "evaluation_without_probe": _evaluation_speed(supernet, task, args.evaluations, 0),
        "networks": rows,
    }
    write("cost", torch.get_num_threads(), record)


def _training_step_cost(
    supernet: Supernet, task: Any, settings: SupernetConfig, whole: Any, x: Any, y: Any, rounds: int
) -> dict[str, Any]:
    """A step as it is trained, architectures new each time, against one plain step of each of its networks."""
    sampler = FairSampler(supernet.space, 0)
    for _ in range(10):  # most operators have been met, as after the first steps of a training
        for architecture in sampler.step(settings.samples, settings.corners):
            supernet.subnet(architecture)
    generator = torch.Generator().manual_seed(0)
    ratios, store_ms = [], []
    for _ in range(rounds):
        architectures = sampler.step(settings.samples, settings.corners)
        plains = [Network(architecture, task.io, generator=generator).train() for architecture in architectures]
        optimisers = [_optimiser(plain, settings) for plain in plains]
        for plain in plains:  # so that AdamW has its state
            _forward_backward(plain, task, x, y)
        for optimiser in optimisers:
            optimiser.step()
        started = time.perf_counter()
        supernet.zero_grad()
        for architecture in architectures:
            _forward_backward(supernet.subnet(architecture).train(), task, x, y)
        update(whole, supernet.touched(architectures), 1.0)
        between = time.perf_counter()
        for plain, optimiser in zip(plains, optimisers, strict=True):
            plain.zero_grad(set_to_none=False)
            _forward_backward(plain, task, x, y)
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0, foreach=True)
            optimiser.step()
        ended = time.perf_counter()
        ratios.append((between - started) / (ended - between))
        store_ms.append((between - started) * 1e3)
    say(f"training step: {np.median(ratios):.3f} of its networks' plain steps")
    return {"ratio": quantiles(ratios), "store_ms": quantiles(store_ms), "subnets": settings.subnets}


def _evaluation_speed(supernet: Supernet, task: Any, count: int, probe: int) -> dict[str, Any]:
    """Sub-networks judged a second: each by itself, and together, for strangers and for a generation of relatives."""
    rng = np.random.default_rng(1)
    strangers = [supernet.space.sample(rng) for _ in range(count)]
    parents = strangers[: max(1, count // 10)]
    relatives = [supernet.space.mutate(parents[i % len(parents)], rng) for i in range(count)]
    record: dict[str, Any] = {"count": count, "validation_examples": len(task.validation), "probe": probe}
    for name, architectures in (("strangers", strangers), ("relatives", relatives)):
        unique = list(dict.fromkeys(architectures))
        for architecture in unique:
            supernet.subnet(architecture)
        alone, together = (SubnetJudge(supernet, task, probe=probe) for _ in range(2))
        started = time.perf_counter()
        for architecture in unique:
            alone._trail.leave()
            alone(architecture)
        between = time.perf_counter()
        together.judge_many(unique)
        ended = time.perf_counter()
        record[name] = {
            "alone_per_second": len(unique) / (between - started),
            "together_per_second": len(unique) / (ended - between),
        }
        say(f"{name}: {record[name]}")
    return record


# -- kill ---------------------------------------------------------------------------------------------------------


def _train_for_kill(path: str) -> None:
    """What a killed process does (`python benchmarks/supernet.py kill --child PATH`)."""
    torch.set_num_threads(1)
    config, space, task = embedded()
    settings = replace(config.supernet, seconds=None, steps=40, checkpoint_every=0.0, processes=1)
    supernet = Supernet(space, task.io, torch.Generator().manual_seed(0))
    train_supernet(supernet, task, settings, seed=0, checkpoint=path, report=lambda s, *_, **__: print(s, flush=True))


def kill(args: argparse.Namespace) -> None:
    """kill -9 at random moments, then resumed to the end; the weights against those of an undisturbed training."""
    if args.child:
        _train_for_kill(args.child)
        return
    _, space, task = embedded()

    def final(path: Path) -> dict[str, torch.Tensor]:
        supernet = Supernet(space, task.io, torch.Generator().manual_seed(1))
        load_supernet(supernet, path)
        return dict(supernet.state_dict())

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}

        def start(path: Path) -> subprocess.Popen[str]:
            command = [sys.executable, __file__, "kill", "--child", str(path)]
            return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

        whole = Path(folder) / "whole.safetensors"
        with start(whole) as process:
            started = time.perf_counter()
            for line in process.stdout or ():
                if line.strip() == "1":
                    started = time.perf_counter()
            seconds = time.perf_counter() - started
        expected = final(whole)
        draw, kills, finished_before = random.Random(args.seed), [], 0
        path = Path(folder) / "killed.safetensors"
        while len(kills) < args.kills:
            with start(path) as process:
                assert process.stdout is not None
                process.stdout.readline()
                time.sleep(draw.uniform(0, 0.6 * seconds))
                process.send_signal(signal.SIGKILL)
                steps = process.stdout.read().split()
                if process.wait() != -signal.SIGKILL:  # it had ended: once more from the start
                    finished_before += 1
                    assert all(torch.equal(tensor, expected[name]) for name, tensor in final(path).items())
                    path.unlink()
                    continue
                kills.append(int(steps[-1]) if steps else None)
        with start(path) as process:
            process.communicate()
        same = all(torch.equal(tensor, expected[name]) for name, tensor in final(path).items())
    say(f"{len(kills)} kills, last steps reported {kills}; bitwise the same: {same}")
    if not same:
        raise SystemExit("the resumed weights differ from those of an undisturbed training")
    record = {"kills": len(kills), "last_step_reported": kills, "completions": finished_before + 1, "steps": 40}
    write("kill", 1, {**record, "bitwise_equal": same})


# -- fidelity -----------------------------------------------------------------------------------------------------


def fidelity(args: argparse.Namespace) -> None:
    """See `supernet_fidelity.py`."""
    from supernet_fidelity import run

    config, space, task = embedded(args.set)
    write(args.out, args.threads, run(args, config, space, task, RESULTS, say))


def hypervolume(args: argparse.Namespace) -> None:
    """See `supernet_hypervolume.py`, and with `--against COMMIT` `_against.py`."""
    if args.against is not None:
        from _against import run as compare

        write(args.out, args.threads, compare(args, ROOT, say))
        return
    if args.set:
        raise SystemExit("hypervolume: `--set` goes with `--against COMMIT`; without, the default is run as it is.")
    from supernet_hypervolume import run

    write("hypervolume", args.threads, run(args, RESULTS, say))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operator")
    parts = parser.add_subparsers(required=True)

    def add(function: Callable[[argparse.Namespace], None], **options: Any) -> None:
        part = parts.add_parser(function.__name__, help=(function.__doc__ or "").splitlines()[0])
        part.set_defaults(function=function)
        for name, default in options.items():
            flag, kind = f"--{name.replace('_', '-')}", str if default is None else type(default)
            if kind is list:
                part.add_argument(flag, action="append", default=default, metavar="KEY=VALUE")
            else:
                part.add_argument(flag, type=kind, default=default)

    add(equality, architectures=100)
    add(fidelity, architectures=50, sample_seed=123, seeds=3, supernets=3, workers=2, set=[], out="fidelity")
    add(cost, architectures=8, rounds=30, evaluations=200)
    add(kill, kills=10, seed=0, child=None)
    add(hypervolume, seeds=3, against=None, set=[], out="hypervolume-against")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.function(args)


if __name__ == "__main__":
    main()
