"""Evaluation with one super-network: candidates inherit its weights, and their latency is predicted.

Of a space that is too small for a predictor, each candidate's latency is measured.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixnas.evaluators.costs import SpaceCosts, costs
from mixnas.evaluators.metrics import energy_of, metrics_of
from mixnas.evaluators.other_devices import OtherDevices
from mixnas.evaluators.protocol import Metric, Outcome, Part, Request, attempt, guarded
from mixnas.evaluators.starting import begun
from mixnas.evaluators.supernet.judging import SubnetJudge, fine_tune
from mixnas.evaluators.supernet.processes import processes
from mixnas.evaluators.supernet.sampling import FairSampler
from mixnas.evaluators.supernet.training import SupernetConfig, SupernetResult, is_trained, train_supernet
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import DivergedError, TrainConfig, steps_of, train
from mixnas.predictors.latency.enough import too_small
from mixnas.predictors.latency.source import LatencySource, LatencySpec
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.network import Network
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet


@dataclass(frozen=True, kw_only=True, slots=True)
class SupernetSpec:
    """What a `SupernetEvaluator` is made from.

    Attributes:
        task: The task as in a configuration: a name, or a mapping with options.
        space: The search space as in a configuration.
        supernet: How the super-network is trained, and sub-networks are judged.
        final: How a network is trained to its final weights.
        inherit: Whether that begins with the super-network's weights rather than with fresh ones.
        seed: Of all that is drawn.
        latency: What latency is predicted of, or measured on (see `measures`); None leaves it out.
        checkpoint: File of the super-network; None keeps it in memory only.
        device: Where networks are trained, "cpu" or a CUDA device; None for where latency is measured, or a CPU.
        other_devices: Names of devices whose latency is looked up too; see `OtherDevices`.
        memory: Whether peak memory is counted too; see `search_space.memory`.
        energy: Whether energy is measured too, of networks without trained weights: they have no influence on it.
    """

    task: str | Mapping[str, Any]
    space: Mapping[str, Any]
    supernet: SupernetConfig
    final: TrainConfig
    inherit: bool = True
    seed: int = 0
    latency: LatencySpec | None = None
    checkpoint: Path | None = None
    device: str | None = None
    other_devices: tuple[str, ...] = ()
    memory: bool = False
    energy: bool = False

    def open(self) -> SupernetEvaluator:
        """Make the evaluator."""
        return SupernetEvaluator(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredSpec:
    """What an evaluator of first parts is made from that needs no file: it judges with these weights.

    Attributes:
        spec: Without latency and checkpoint.
        weights: Of the trained super-network, by name.
    """

    spec: SupernetSpec
    weights: Mapping[str, np.ndarray]

    def open(self) -> SupernetEvaluator:
        """Make the evaluator, prepared. Matrices and kernels are used where they lie, and never written to."""
        evaluator = SupernetEvaluator(self.spec)
        evaluator.judge_with(self.weights)
        return evaluator


class SupernetEvaluator:
    """Judges sub-networks of one super-network; an `Evaluator`, and `Apart`: latency is known where it searches.

    Args:
        spec: What it is made from.
        task: The spec's task, where it was made already.
        space: The spec's space, likewise.
        latency: The spec's latency, likewise.
        together: How processes are had that train together; see `train_supernet`.
    """

    def __init__(
        self,
        spec: SupernetSpec,
        *,
        task: Task | None = None,
        space: SearchSpace | None = None,
        latency: LatencySource | None = None,
        together: Callable[..., contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        self._spec, self._together = spec, together or processes
        self.task = task or by_name(spec.task)
        self.space = space or SearchSpace.from_dict(spec.space)
        self._costs = SpaceCosts(self.space, self.task.io, memory=spec.memory)
        self.latency: LatencySource | None = latency or (None if spec.latency is None else spec.latency.open())
        self._other_devices = OtherDevices(
            spec.other_devices, None if self.latency is None else self.latency.spec, self.space, self.task.io
        )
        self.device = spec.device or (self.latency.torch_device if self.latency is not None else "cpu")
        self._judge: SubnetJudge | None = None

    @property
    def spec(self) -> SupernetSpec:
        """See `Evaluator`."""
        return replace(self._spec, latency=None if self.latency is None else self.latency.spec)

    @property
    def quiet(self) -> bool:
        """See `Apart`: latency is predicted, as a rule; energy is measured."""
        return self._spec.energy or (self.measures and self.latency is not None and self.latency.shares_machine)

    @cached_property
    def measures(self) -> bool:
        """Whether latency is measured rather than predicted: nothing could be fitted on so small a space."""
        return self.latency is not None and self.latency.here and bool(too_small(self.space, self.task.io))

    def elsewhere(self) -> StoredSpec:
        """See `Apart`: the weights of the super-network go along."""
        supernet = self._prepared().supernet
        weights = {name: tensor.detach().cpu().numpy() for name, tensor in supernet.state_dict().items()}
        spec = replace(self._spec, latency=None, other_devices=(), energy=False, checkpoint=None, device=self.device)
        return StoredSpec(spec=spec, weights=weights)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See `Evaluator`."""
        own = metrics_of(
            self.task,
            latency=self.latency is not None,
            cheap_latency=not self.measures,
            memory=self._spec.memory,
            energy=self._spec.energy,
        )
        return own | self._other_devices.metrics

    @property
    def finishing(self) -> str:
        """See `Evaluator`."""
        return "fine-tune" if self._spec.inherit else "train from scratch"

    def prepare(self, report: Report = SILENT, should_stop: Callable[[], bool] | None = None) -> None:
        """Profile the device and train the super-network, as far as that is not done. See `Evaluator`."""
        if self._judge is not None:
            return
        spec = self._spec
        if self.latency is not None and self.measures:
            _ = self.latency.reference_ms
        elif self.latency is not None:
            written = {"task": spec.task, "space": spec.space}
            with guarded("profiling the device"):
                self.latency.prepare(self.space, self.task.io, plain=written, report=report, should_stop=should_stop)
        with guarded("training the super-network"):
            self._judge = self._trained(report, should_stop)

    def _trained(self, report: Report, should_stop: Callable[[], bool] | None) -> SubnetJudge:
        spec = self._spec
        supernet = begun(Supernet(self.space, self.task.io, torch.Generator().manual_seed(spec.seed)), self.task)
        judge = self._judge_of(supernet)
        if spec.checkpoint is not None and is_trained(spec.checkpoint):
            self._train(supernet, SILENT, should_stop)
        else:
            with report.phase("train supernet", unit="steps", seconds=spec.supernet.seconds) as phase:
                result = self._train(supernet, phase, should_stop)
                with contextlib.suppress(DivergedError):  # what a barely trained one may do
                    inherited = judge(FairSampler(self.space, spec.seed).draw(max))[self.task.metric]
                    told = {f"{self.task.metric} of the largest": inherited}
                    phase(result.steps, result.steps, loss=result.loss, **told)
        return judge

    def _judge_of(self, supernet: Supernet) -> SubnetJudge:
        spec = self._spec
        return SubnetJudge(supernet, self.task, device=self.device, seed=spec.seed, probe=spec.supernet.probe)

    def judge_with(self, weights: Mapping[str, np.ndarray]) -> None:
        """Be prepared with the weights of a super-network that was trained elsewhere; see `StoredSpec`."""
        supernet = Supernet(self.space, self.task.io, torch.Generator().manual_seed(self._spec.seed))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that an array is not to be written to, which nobody does
            for name, parameter in supernet.named_parameters():
                stored = torch.from_numpy(weights[name])
                # what is found anew for each sub-network, statistics and ranges, are vectors and numbers
                parameter.data = stored if stored.ndim > 1 else stored.clone()
            for name, buffer in supernet.named_buffers():
                buffer.copy_(torch.from_numpy(weights[name]))
        self._judge = self._judge_of(supernet)

    def _train(self, supernet: Supernet, report: Report, should_stop: Callable[[], bool] | None) -> SupernetResult:
        return train_supernet(
            supernet,
            self.task,
            self._spec.supernet,
            seed=self._spec.seed,
            device=self.device,
            checkpoint=self._spec.checkpoint,  # where it ends already, its weights are loaded and nothing is left to do
            report=report,
            should_stop=should_stop,
            together=self._together,
        )

    def _prepared(self) -> SubnetJudge:
        assert self._judge is not None, "prepare comes first"
        return self._judge

    def cheap(self, matrix: np.ndarray) -> dict[str, np.ndarray]:
        """See `Evaluator`; latency needs `prepare` first."""
        found = self._costs.of(matrix) | self._other_devices.of(matrix)
        if self.latency is not None and not self.measures:
            found["latency_ms"] = self.latency.predict_many(matrix, self.space, self.task.io)
        return found

    def evaluate(self, requests: Sequence[Request]) -> list[Outcome]:
        """See `Evaluator`: relatives one after the other. A judgement takes the same at every fidelity."""
        outcomes: dict[int, Outcome] = {}
        for i in self._prepared().order([request.architecture for request in requests]):
            outcomes[i] = attempt(self._evaluate, requests[i])
        return [outcomes[i] for i in range(len(requests))]

    def _evaluate(self, request: Request) -> Outcome:
        architecture, io = request.architecture, self.task.io
        counted = costs(architecture, io, memory=self._spec.memory)
        return self._completed(request, Outcome({**self._prepared()(architecture), **counted}))

    def complete(self, request: Request, outcome: Outcome) -> Outcome:
        """See `Apart`: with the latency that is predicted or measured, and the energy that is measured."""
        found = attempt(lambda asked: self._completed(asked, outcome), request)
        return replace(found, seconds=outcome.seconds + found.seconds)

    def _completed(self, request: Request, outcome: Outcome) -> Outcome:
        found = self._other_devices.of_one(request.architecture)
        if self.latency is not None:
            network = None
            if self.measures or self._spec.energy:  # weights have no influence on either
                generator = torch.Generator().manual_seed(self._spec.seed)
                network = Network(request.architecture, self.task.io, generator=generator).eval()
            if network is not None and self.measures:
                (latency,) = self.latency.measure([network])
                found |= {"latency_ms": latency.ms, **latency.ends}
            else:
                found["latency_ms"] = self.latency.predict(request.architecture, self.task.io).ms
            if network is not None and self._spec.energy:
                found |= energy_of(network, self.latency)
        return replace(outcome, metrics={**outcome.metrics, **found})

    def finish(
        self, architecture: Architecture, report: Report = SILENT, should_stop: Callable[[], bool] | None = None
    ) -> Network:
        """See `Evaluator`: trained on from the inherited weights, or from scratch, as the spec says."""
        spec = self._spec
        network, _ = fine_tune(
            self._prepared().supernet,
            architecture,
            self.task,
            spec.final,
            generator=torch.Generator().manual_seed(spec.seed),
            inherit=spec.inherit,
            device=self.device,
            report=report,
            should_stop=should_stop,
        )
        return network.cpu().eval()

    def finish_part(
        self,
        architecture: Architecture,
        part: Part,
        report: Report = SILENT,
        should_stop: Callable[[], bool] | None = None,
    ) -> Network:
        """See `InParts`: each part is a training of its own, whose learning rate rises and falls to zero.

        What comes out of a part is then as good as so many steps can make it, and compares with the others (warm
        restarts: Loshchilov and Hutter 2017, arXiv 1608.03983).
        """
        spec = self._spec
        steps = steps_of(spec.final, len(self.task.train))
        ends = [round(share * steps) for share in (part.begun, part.until)]
        config = replace(spec.final, steps=max(1, ends[1] - ends[0]))
        drawn = np.random.SeedSequence([spec.seed, ends[0]]).generate_state(1)[0]  # other batches in each part
        generator = torch.Generator().manual_seed(int(drawn) if ends[0] else spec.seed)
        supernet = self._prepared().supernet
        told: dict[str, Any] = {"report": report, "should_stop": should_stop}
        if part.network is None:
            network, _ = fine_tune(
                supernet,
                architecture,
                self.task,
                config,
                generator=generator,
                inherit=spec.inherit,
                device=self.device,
                **told,
            )
        else:
            network = copy.deepcopy(part.network)
            train(network, self.task, config, generator=generator, device=self.device, **told)
        return network.cpu().eval()
