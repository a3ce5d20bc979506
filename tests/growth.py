"""Eight extensions of the package, each one file's worth; `test_growth.py` runs a job through all of them.

Nothing of the package knows of anything here: a mixer, a norm, a head, a quantization policy with a parameter of its
own whose layers take the place of an operator's, a strategy that proposes batches from cheap metrics, an engine of
threads, a streamed task with dense targets that its augmentation moves along, and a format. They are registered by
being imported, which only the job's own process does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from optuna.samplers import BaseSampler
from optuna.study import Study
from torch import Tensor, nn

from mixnas.evaluators.protocol import Evaluator, Outcome, Request
from mixnas.evaluators.tasks import Task
from mixnas.search.engines import ENGINES, Engine
from mixnas.search.engines.session import Session
from mixnas.search.strategies import STRATEGIES, Acceptable, Cheap, Question, Strategy
from mixnas.search.strategies.drawing import BatchSampler
from mixnas.search.study.study import Proposal
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.files import write_json
from mixnas.search_space.formats import format as formats
from mixnas.search_space.network import IOSpec, Network
from mixnas.search_space.operators.layers import Linear
from mixnas.search_space.operators.quantization.policy import deployed_bytes, replace_projections
from mixnas.search_space.registry import Context, Knob, register
from mixnas.search_space.reporting import SILENT

PAPER = "made for a test"


# -- a mixer ------------------------------------------------------------


@register("mixer", "growth_roll", paper=PAPER, kinds=("image",), knobs={"by": Knob(1, low=1, high=3)})
class Roll(nn.Module):
    """Each token beside the one `by` columns to its left, projected."""

    def __init__(self, context: Context, *, by: int) -> None:
        super().__init__()
        self.by = by
        self.here, self.left = (Linear(context.width, context.width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        y: Tensor = self.here(x) + self.left(x.roll(self.by, dims=2))
        return y


# -- a norm ------------------------------------------------------------


@register("norm", "growth_max", paper=PAPER)
class MaxNorm(nn.Module):
    """Each token over its largest magnitude, times a weight."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(context.width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to the same."""
        return x / (x.abs().amax(-1, keepdim=True) + 1e-6) * self.weight


# -- a head ------------------------------------------------------------


@register("head", "growth_upsample", paper=PAPER, kinds=("image",))
class Upsample(nn.Module):
    """An answer for each pixel of an input twice as fine as the tokens: (B, H, W, C) to (B, 2H, 2W, outputs)."""

    def __init__(self, before: Context, after: Context) -> None:
        super().__init__()
        self.answers = Linear(before.width, 4 * after.width)

    @staticmethod
    def out_size(size: tuple[int, ...]) -> tuple[int, ...]:
        """Twice as fine."""
        return tuple(2 * extent for extent in size)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return F.pixel_shuffle(self.answers(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)


# -- a policy ------------------------------------------------------------


class Stepped(nn.Module):
    """A linear layer whose weights are multiples of a learned step, from -7 to 7: what the policy trains and judges."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.growth_w4 = nn.Module()  # what the policy adds lies under its name
        self.growth_w4.step = nn.Parameter(torch.full((), 0.05, device=layer.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        step = self.growth_w4.step
        rounded = (self.weight / step).clamp(-7, 7)
        rounded = rounded + (rounded.round() - rounded).detach()  # straight through
        return F.linear(x, rounded * step, self.bias)


class Stored(nn.Module):
    """The same as it is stored: integers and their step."""

    integers: Tensor
    step: Tensor

    def __init__(self, layer: Stepped) -> None:
        super().__init__()
        step = layer.growth_w4.step.detach()
        self.register_buffer("integers", (layer.weight.detach() / step).clamp(-7, 7).round().to(torch.int8))
        self.register_buffer("step", step.clone())
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return F.linear(x, self.integers.to(x.dtype) * self.step, self.bias)


@register("quant", "growth_w4", paper=PAPER)
@dataclass(frozen=True)
class W4:
    """Weights of linear layers as small integers with one learned step a layer."""

    def prepare(self, module: nn.Module) -> nn.Module:
        """Layers with a step."""
        return replace_projections(module, lambda layer: Stepped(layer) if isinstance(layer, Linear) else layer)

    def deploy(self, module: nn.Module) -> nn.Module:
        """Layers with integers."""
        if isinstance(module, Stepped):
            return Stored(module)
        for name, child in list(module.named_children()):
            setattr(module, name, self.deploy(child))
        return module

    def weight_bytes(self, module: nn.Module) -> int:
        """As stored."""
        return deployed_bytes(self, module)

    def why_not(self, device: str, runtime: str) -> str:
        """It runs everywhere."""
        return ""

    def instead(self, device: str, runtime: str) -> str:
        """It multiplies floats."""
        return "float32: its integers are widened before they are multiplied"


# -- a task ------------------------------------------------------------


class Stripes:
    """A streamed split: image n is computed when it is asked for. Its dense targets are shifted to the right."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (n, 8, 8, 2) and targets (n, 8, 8): whether the pixel to the left is bright."""
        images = []
        for index in indices.tolist():
            rng = np.random.default_rng([self.seed, index])
            images.append(torch.from_numpy(rng.standard_normal((8, 8, 2)).astype(np.float32)))
        inputs = torch.stack(images)
        return inputs, (inputs[..., 0].roll(1, dims=2) > 0).long()


class LeftNeighbour(Task):
    """Say of every pixel whether the one to its left is bright; judged by the intersection over union of "bright"."""

    name = "growth_left"
    metric = "iou"

    def __init__(self) -> None:
        self.train, self.validation, self.test = Stripes(96, 0), Stripes(32, 1), Stripes(32, 2)
        self.io = IOSpec("image", (8, 8), 2, 2, head="growth_upsample", out_size=(8, 8))

    def augment(self, inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Roll both down by one number of rows."""
        by = int(torch.randint(8, (), generator=generator))
        return inputs.roll(by, dims=1), targets.roll(by, dims=1)

    def new_metric(self) -> BrightIoU:
        """No mean of batches."""
        return BrightIoU()


class BrightIoU:
    """Intersection over union of the class 1, over a whole split."""

    def __init__(self) -> None:
        self.both = self.either = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Count a batch."""
        said, true = outputs.argmax(-1) == 1, targets == 1
        self.both += int((said & true).sum())
        self.either += int((said | true).sum())

    def result(self) -> float:
        """The share."""
        return self.both / max(self.either, 1)


# -- a strategy ------------------------------------------------------------


@STRATEGIES.register("growth_small_first")
@dataclass(frozen=True, kw_only=True, slots=True)
class SmallFirst(Strategy):
    """Of a random pool, the architectures with the fewest parameters.

    Attributes:
        pool: Architectures to choose from, for each that is wanted.
    """

    pool: int = 8

    def make(self, question: Question, cheap: Cheap | None, acceptable: Acceptable) -> BaseSampler:
        """See `Strategy`."""
        assert cheap is not None
        return _SmallFirst(question, cheap, acceptable, self.pool)


class _SmallFirst(BatchSampler):
    def __init__(self, question: Question, cheap: Cheap, acceptable: Acceptable, pool: int) -> None:
        super().__init__(question, acceptable)
        self._cheap, self._pool = cheap, pool

    def propose(self, study: Study, count: int, rng: np.random.Generator) -> list[Architecture]:
        """See `BatchSampler`."""
        matrix = self._space.sample_many(self._pool * count, rng)
        ordered = [self._space.decode(row) for row in matrix[np.argsort(self._cheap(matrix)["params"], kind="stable")]]
        fresh = [a for a in dict.fromkeys(ordered) if self._acceptable(a)]
        return (fresh or ordered)[:count]


# -- an engine ------------------------------------------------------------


@ENGINES.register("growth_threads")
@dataclass(frozen=True, kw_only=True, slots=True)
class Threads(Engine):
    """Threads, each with an evaluator of its own that the spec makes."""

    workers: int = 2

    def run(self, session: Session, evaluator: Evaluator) -> None:
        """See `Engine`."""
        own = local()

        def work(request: Request) -> Outcome:
            if not hasattr(own, "evaluator"):
                own.evaluator = evaluator.spec.open()
                own.evaluator.prepare(SILENT)
            (outcome,) = own.evaluator.evaluate([request])
            return outcome

        with ThreadPoolExecutor(self.workers) as pool:
            flying: dict[Future[Outcome], Proposal] = {}
            while True:
                for proposal in session.next(2 * self.workers - len(flying)):
                    flying[pool.submit(work, proposal.request)] = proposal
                if not flying:
                    return
                for future in wait(flying, return_when=FIRST_COMPLETED).done:
                    session.done(flying.pop(future), future.result())


# -- a format ------------------------------------------------------------


def load_growth_json(path: str | Path) -> formats.Answer:
    """A network that was written as text: arrays to arrays."""
    import json
    from pathlib import Path

    import torch

    from mixnas.search_space.architecture import Architecture
    from mixnas.search_space.network import IOSpec, Network

    plain = json.loads(Path(path).read_text())
    network = Network(Architecture.from_dict(plain["architecture"]), IOSpec.from_plain(plain["io"])).deploy().eval()
    state = network.state_dict()
    network.load_state_dict(
        {k: torch.tensor(v, dtype=state[k].dtype).view_as(state[k]) for k, v in plain["state"].items()}
    )

    def answer(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return network(torch.from_numpy(batch)).numpy()

    return answer


@formats.register
class GrowthJson:
    """Every weight as a decimal."""

    name = "growth-json"
    file_name = "model.growth.json"
    beside: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    needs_mixnas = True
    load = staticmethod(load_growth_json)

    def why_not(self, network: Network) -> str:
        """It can hold any."""
        return ""

    def write(self, network: Network, path: Path, extra: Mapping[str, Any]) -> None:
        """See `Format`."""
        state = {name: tensor.tolist() for name, tensor in network.state_dict().items()}
        about = {"architecture": network.architecture.to_dict(), "io": network.io.to_plain(), "extra": dict(extra)}
        write_json(path, {**about, "state": state})

    def weight_bytes(self, path: Path) -> int:
        """Bytes of the network's tensors."""
        plain = json.loads(path.read_text())
        network = Network(Architecture.from_dict(plain["architecture"]), IOSpec.from_plain(plain["io"])).deploy()
        return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
