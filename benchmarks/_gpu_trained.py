"""Step "trained" of `gpu.py`: steps of the super-network at real size, what the input pipeline loses, a small search.

The search is on digits, on this device: train the super-network, judge random architectures with inherited weights,
measure the front's networks, train the best from those weights. Where optuna is installed a search proper can be run
beside it (`nas search`); here random choice stands for the strategy, so that nothing but torch is needed.
"""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Any

import numpy as np
import torch
from _gpu_context import Context, first_line, require_answers, root
from _gpu_results import Results
from torch import Tensor

from mixnas.evaluators.supernet.judging import SubnetJudge, fine_tune
from mixnas.evaluators.supernet.training import SupernetConfig, train_supernet
from mixnas.evaluators.tasks import Split, Task
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Examples
from mixnas.evaluators.training import TrainConfig, evaluate
from mixnas.predictors.measuring import runtimes
from mixnas.predictors.measuring.measure import MeasureConfig, measure_networks
from mixnas.predictors.measuring.sentinel import make_sentinel
from mixnas.search_space.cost import cost
from mixnas.search_space.errors import StoppedEarly
from mixnas.search_space.files import load_yaml
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
from mixnas.search_space.units import IOSpec

_STEPS = 10_000  # more than there is time for: the clock ends a training
_DRY_STEPS = 5


class _Decoded:
    """Random pictures, kept as bytes and made from them on the CPU whenever they are asked for, as a decoder would."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self._pixels, self._labels = pixels, labels

    def __len__(self) -> int:
        return 100 * len(self._pixels)

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Examples`: cropped, flipped, scaled."""
        at = indices % len(self._pixels)
        return _scaled(self._pixels[at].roll(3, dims=1).flip(2)), self._labels[at]


def _scaled(pixels: Tensor) -> Tensor:
    return pixels.float().div_(255.0).sub_(0.45).div_(0.225)


class _Pretended(Task):
    """Random pictures with random labels, as large as ImageNet's and as many classes."""

    name = "random_pictures"

    def __init__(self, io: IOSpec, count: int, streamed: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (count, *io.size, io.in_features), generator=generator, dtype=torch.uint8)
        labels = torch.randint(io.num_outputs, (count,), generator=generator)
        self.io = io
        split: Examples = _Decoded(pixels, labels) if streamed else Split(_scaled(pixels), labels)
        self.train = self.validation = self.test = split


def run(context: Context) -> None:
    """The parts, each of which may fail by itself."""
    results = context.results("trained")
    parts: list[tuple[str, float, Any]] = []
    batch = 4 if context.dry else 64
    for weight, streamed in ((2.0, False), (1.0, True)):  # the first compiles for both
        where = "decoded on the CPU" if streamed else "on the device"
        label = f"super-network, batch {batch}, pictures {where}"
        parts.append((label, weight, functools.partial(_steps, batch=batch, streamed=streamed)))
    parts.append(("small search on digits", 1.5, _small_search))
    while parts and context.left > 3.0:
        label, weight, part = parts.pop(0)
        seconds = context.left * weight / (weight + sum(each[1] for each in parts))
        before = results.items.get(label, {})
        if before.get("right") or before.get("ended_in") == context.work.name:
            continue
        results.keep(label, {"right": False, "failed": "its process ended", "ended_in": context.work.name})
        try:
            found = part(context, seconds)
            results.keep(label, {"right": True, **found})
        except Exception as error:  # the other parts may be well
            results.keep(label, {"right": False, "failed": first_line(error)})
        _say(label, results)
        require_answers(context)
        if not context.dry:
            torch.cuda.empty_cache()
    for label, *_ in parts:
        results.leave_out(label, "out of time")
    results.complete()


def _say(label: str, results: Results) -> None:
    found = results.items[label]
    print(f"{label}: " + ", ".join(f"{name} {value}" for name, value in found.items() if name != "front"))


def _train(supernet: Supernet, task: Task, config: SupernetConfig, device: str, seconds: float) -> tuple[list, float]:
    """The one call of the trainer: train until the time is over; the times at which steps ended, and the last loss."""
    ends: list[float] = []
    losses = [float("nan")]

    class Report:
        def __call__(self, done: float, total: float | None = None, **info: Any) -> None:
            ends.append(time.monotonic())
            losses.append(float(info.get("loss", losses[-1])))

        def phase(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("a training has no parts")

    until = time.monotonic() + seconds
    with contextlib.suppress(StoppedEarly):
        train_supernet(
            supernet,
            task,
            config,
            seed=0,
            device=device,
            report=Report(),
            should_stop=lambda: time.monotonic() > until,
        )
    return ends, losses[-1]


@functools.cache
def _real_size(dry: bool) -> tuple[SearchSpace, IOSpec, Supernet]:
    """The super-network of configs/imagenet.yaml at its largest widths: others would be other kernels to compile."""
    plain = load_yaml(root() / "configs" / "imagenet.yaml")["space"] | {"norm": "layer"}
    io = IOSpec("image", (224, 224), 3, 1000)
    for stage in plain["stages"]:
        stage["width"] = stage["width"][-1:]
        stage["block"] |= {"quant": "fp32"}  # the training computes in mixed precision
    if dry:
        io = IOSpec("image", (32, 32), 3, 10)
        block = {"mixer": ["identity", {"name": "dwconv", "kernel_size": 3}], "gate": "none", "channel_mixer": "mlp"}
        plain["stages"] = [{"width": [8], "depth": [1, 2], "block": block}]
    space = SearchSpace.from_dict(plain)
    return space, io, Supernet(space, io, torch.Generator().manual_seed(0))


def _steps(context: Context, seconds: float, *, batch: int, streamed: bool) -> dict[str, Any]:
    """Steps a second at real size, mixed precision, four sub-networks a step."""
    began = time.monotonic()
    space, io, supernet = _real_size(context.dry)
    task = _Pretended(io, 16 if context.dry else 512, streamed)
    config = SupernetConfig(steps=_DRY_STEPS if context.dry else _STEPS, batch_size=batch, lr=1e-4, warmup=0.0, ema=0.0)
    built = time.monotonic() - began
    if not context.dry:
        torch.cuda.reset_peak_memory_stats()
    ends, loss = _train(supernet, task, config, context.torch_device, max(2.0, seconds - built))
    steady = np.diff(ends[len(ends) // 2 :])  # the first steps compile and choose algorithms
    found: dict[str, Any] = {
        "batch": batch,
        "streamed": streamed,
        "mixed_precision": config.mixed_precision and not context.dry,
        "subnets_a_step": config.subnets,
        "steps": len(ends),
        "built_s": round(built, 1),
        "loss": round(loss, 4),
    }
    if len(steady):
        found["steps_per_s"] = round(1 / float(np.median(steady)), 3)
        found["floor_steps_per_s"] = round(1 / _floor_s(context, space, io, batch, config.subnets), 3)
    if not context.dry:
        found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def _floor_s(context: Context, space: SearchSpace, io: IOSpec, batch: int, subnets: int) -> float:
    """Seconds that the multiply-accumulates of a step take at the matrix rate: forward and twice that backward."""
    drawn = space.decode_many(space.sample_many(8, np.random.default_rng(0)))
    macs = float(np.mean([cost(architecture, io).macs for architecture in drawn]))
    rate = context.machine.get("rates", {}).get("matrix_operations_per_s", 1e12)
    return 3 * 2 * macs * batch * subnets / rate


def _small_search(context: Context, seconds: float) -> dict[str, Any]:
    """Digits, from the super-network to trained and measured networks, all of it on this device."""
    device = context.torch_device
    until = time.monotonic() + seconds
    task = by_name("digits")
    plain = load_yaml(root() / "configs" / "digits.yaml")["space"]
    if context.dry:  # of everything one or two
        block = {"mixer": ["identity", "pooling"], "gate": "none", "channel_mixer": ["none", "mlp"]}
        plain["stages"] = [plain["stages"][0] | {"width": [4, 8, 16], "depth": [1, 2], "block": block}]
    space = SearchSpace.from_dict(plain)
    supernet = Supernet(space, task.io, torch.Generator().manual_seed(0))
    settings = SupernetConfig(
        steps=_DRY_STEPS if context.dry else _STEPS, batch_size=64, corners="largest", samples=1, distillation=0.0
    )
    ends, loss = _train(supernet, task, settings, device, 0.4 * seconds)
    judge = SubnetJudge(supernet, task, device=device, seed=0)
    judged: list[tuple[float, int, Any]] = []
    rng = np.random.default_rng(0)
    judging = time.monotonic()
    while time.monotonic() < judging + 0.25 * seconds and len(judged) < (4 if context.dry else 2000):
        (architecture,) = space.decode_many(space.sample_many(1, rng))
        judged.append((judge(architecture)[task.metric], cost(architecture, task.io).params, architecture))
    judged_s = time.monotonic() - judging
    front = _front(judged)[: 2 if context.dry else 4]
    trained = []
    config = TrainConfig(epochs=1 if context.dry else 8, lr=4e-3)
    for score, params, architecture in front:
        if trained and time.monotonic() > until - 0.05 * seconds:
            break
        generator = torch.Generator().manual_seed(0)
        network, _ = fine_tune(supernet, architecture, task, config, generator=generator, device=device)
        accuracy = evaluate(network, task, "test", device=device).score
        trained.append(
            {
                "architecture": architecture.to_dict(),
                "params": params,
                "inherited": round(score, 4),
                "test": round(accuracy, 4),
                "ms": _latency_ms(network, task.io, device),
            }
        )
    return {
        "strategy": "random, without a study: optuna is not needed here",
        "supernet_steps_per_s": round((len(ends) - 1) / max(ends[-1] - ends[0], 1e-9), 1) if len(ends) > 1 else None,
        "supernet_loss": round(loss, 4),
        "judged_per_s": round(len(judged) / judged_s, 1),
        "judged": len(judged),
        "front": trained,
        "best_test": max(entry["test"] for entry in trained),
    }


def _front(judged: list[tuple[float, int, Any]]) -> list[tuple[float, int, Any]]:
    """Those that nothing smaller beats, the best first."""
    found: list[tuple[float, int, Any]] = []
    for entry in sorted(judged, key=lambda entry: (entry[1], -entry[0])):
        if not found or entry[0] > found[-1][0]:
            found.append(entry)
    return found[::-1]


def _latency_ms(network: Any, io: IOSpec, device: str) -> float:
    network = network.eval().requires_grad_(False)
    inputs = io.example(1, generator=torch.Generator().manual_seed(0)).to(device)
    runtime = "eager" if device == "cpu" else "graph"
    call = runtimes.prepare(network, inputs, runtime, 1)
    (found,) = measure_networks(
        [call],
        rng=np.random.default_rng(0),
        config=MeasureConfig(passes=1),
        sentinel=make_sentinel(device),
        clock=runtimes.clock_of(runtime, device),
    )
    return round(found.latency.ms, 5)
