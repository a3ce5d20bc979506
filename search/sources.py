"""Where a search's metrics and final networks come from: training each from scratch, or one super-network.

A source knows how to evaluate an architecture during the search, how to bring a candidate to its final weights, and
what latency means on the device that the search is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mixnas.evaluators.standalone import StandaloneEvaluator
from mixnas.evaluators.supernet.judging import SubnetJudge, fine_tune
from mixnas.evaluators.supernet.training import train_supernet
from mixnas.predictors.latency.predictor import LatencyPredictor
from mixnas.predictors.latency.profile import ProfileConfig, profile
from mixnas.predictors.measuring.device import device_name
from mixnas.predictors.measuring.measure import Latency
from mixnas.predictors.measuring.table import MeasurementTable
from mixnas.search.run.directory import Run
from mixnas.search.run.stopping import StopSignal
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.formats.safetensors import load_network, save_network
from mixnas.search_space.network import Network
from mixnas.search_space.supernet import Supernet

if TYPE_CHECKING:
    from mixnas.search.job import Plan

OpenPhase = Callable[..., AbstractContextManager[Any]]
StepProgress = Callable[..., None]


def run_on(device: str) -> str:
    """Where networks are trained for a configuration's `device`: a GPU when there is one and none was ruled out."""
    if device == "cpu" or device.startswith("cpu-"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def is_here(device: str, threads: int) -> bool:
    """Whether the device that latency refers to is this machine, so that it can be measured."""
    if device in ("auto", "cpu", "cuda"):
        return True
    return device == device_name("cuda" if run_on(device) == "cuda" else "cpu", threads)


class Source(Protocol):
    """See the module."""

    finishing: str
    measurable: bool
    device_name: str

    def evaluate(self, architecture: Architecture) -> Mapping[str, float]:
        """Metrics for the search."""

    def finish(self, architecture: Architecture, progress: StepProgress) -> Network:
        """The network with its final weights."""

    def predict(self, architecture: Architecture) -> Mapping[str, Any]:
        """Predicted latency: `latency_ms`, `low_ms`, `high_ms`, `outside`; empty without a predictor."""

    def measure(self, networks: Sequence[Network]) -> list[Latency]:
        """Measured latency of final networks, together."""

    def forget_others(self, front: set[str]) -> None:
        """Drop what was kept for architectures that are not on the front."""


class _Here:
    """What both sources share: the machine that they train, and where possible measure, on."""

    def __init__(self, plan: Plan, run: Run, stop: StopSignal) -> None:
        config = plan.config
        threads = config.latency.threads
        self.plan, self.run, self.stop = plan, run, stop
        self.torch_device = run_on(config.device)
        self.measurable = is_here(config.device, threads)
        self.device_name = device_name(self.torch_device, threads) if self.measurable else config.device
        self.trainer = self._trainer()

    def _trainer(self) -> StandaloneEvaluator:
        config = self.plan.config
        return StandaloneEvaluator(
            self.plan.task,
            config.train,
            device=self.torch_device,
            seed=config.search.seed,
            measure=config.latency.measure(config.latency.passes) if self.measurable else None,
            reference_ms=self.run.manifest.get("reference_ms"),
            keep=self._keep,  # no should_stop: Ctrl-C lets the trial in progress finish
        )

    def _keep(self, architecture: Architecture, network: Network, metrics: dict[str, float]) -> None:
        """Called with each network that the search trains from scratch."""

    def _fix_reference(self) -> None:
        # Latencies of a run compare only under one reference time of the sentinel, also after a resume.
        if self.measurable and "reference_ms" not in self.run.manifest:
            self.run.update(reference_ms=self.trainer.reference_ms)

    def measure(self, networks: Sequence[Network]) -> list[Latency]:
        """See `Source`."""
        return self.trainer.latencies(networks, self.plan.config.latency.measure(self.plan.config.latency.final_passes))

    def forget_others(self, front: set[str]) -> None:
        """See `Source`."""


class Standalone(_Here):
    """Every candidate is trained from scratch; the front's weights are kept, and those are the final ones."""

    finishing = "judge on the test split"

    def __init__(self, plan: Plan, run: Run, stop: StopSignal) -> None:
        super().__init__(plan, run, stop)
        if not self.measurable:
            raise ConfigError(
                f"device {plan.config.device!r} is not this machine ({device_name(self.torch_device)}), so networks "
                "cannot be measured on it during the search. Use search.evaluator: supernet, which predicts latency, "
                "or device: auto."
            )
        self._fix_reference()

    def _path(self, identity: str) -> Path:
        return self.run.path / "networks" / f"{identity}.safetensors"

    def _keep(self, architecture: Architecture, network: Network, metrics: dict[str, float]) -> None:
        save_network(self._path(architecture.id), network)

    def evaluate(self, architecture: Architecture) -> Mapping[str, float]:
        """See `Source`."""
        return self.trainer(architecture)

    def finish(self, architecture: Architecture, progress: StepProgress) -> Network:
        """See `Source`: the weights that the trial ended with; trained again if their file is gone."""
        path = self._path(architecture.id)
        return load_network(path) if path.exists() else self.trainer.train(architecture)[0]

    def predict(self, architecture: Architecture) -> Mapping[str, Any]:
        """See `Source`."""
        return {}

    def forget_others(self, front: set[str]) -> None:
        """See `Source`."""
        for path in (self.run.path / "networks").glob("*.safetensors"):
            if path.stem not in front:
                path.unlink()


class FromSupernet(_Here):
    """One super-network is trained; candidates inherit its weights, their latency is predicted, and the front is tuned.

    Profiling and training happen when it is made; what an earlier session left of them is used.
    """

    def __init__(self, plan: Plan, run: Run, stop: StopSignal, open_phase: OpenPhase) -> None:
        super().__init__(plan, run, stop)
        config = plan.config
        self.finishing = "fine-tune" if config.final.weights == "inherited" else "train from scratch"
        self.predictor = self._predictor(open_phase)
        if self.measurable:
            table = MeasurementTable.load(run.latency, self.device_name, self.predictor.tag)
            run.update(reference_ms=table.reference_ms)
            self.trainer = self._trainer()  # measured and predicted latency refer to the same sentinel time
        generator = torch.Generator().manual_seed(config.search.seed)
        self.supernet = Supernet(plan.space, plan.io, generator)
        self._train(open_phase)
        self._judge = SubnetJudge(
            self.supernet,
            plan.task,
            device=self.torch_device,
            seed=config.search.seed,
            probe=config.supernet.probe,
        )

    def _predictor(self, open_phase: OpenPhase) -> LatencyPredictor:
        plan, latency = self.plan, self.plan.config.latency
        if not self.measurable:
            return LatencyPredictor.load(self.device_name)
        if any((self.run.latency).glob("*.npz")):
            return LatencyPredictor.load(self.device_name, directory=self.run.latency)
        settings = ProfileConfig(
            budget_s=latency.profile, measure=latency.measure(latency.passes), seed=plan.config.search.seed
        )
        with open_phase("profile", latency.profile, unit="s", seconds=latency.profile) as phase:
            predictor = profile(
                plan.space,
                plan.io,
                device=self.torch_device,
                directory=self.run.latency,
                config=settings,
                plain=plan.config.space,
                progress=lambda share, text: phase(
                    round(share * latency.profile), measured=text.removesuffix(" measured")
                ),
                should_stop=self.stop,
            )
        return predictor

    def _train(self, open_phase: OpenPhase) -> None:
        settings = self.plan.config.supernet
        with open_phase("train supernet", None, unit="steps", seconds=settings.seconds) as phase:
            train_supernet(
                self.supernet,
                self.plan.task,
                settings,
                seed=self.plan.config.search.seed,
                device=self.torch_device,
                checkpoint=self.run.supernet,  # where it ends already, nothing is left to do
                report=phase,
                should_stop=self.stop,
            )

    def evaluate(self, architecture: Architecture) -> Mapping[str, float]:
        """See `Source`."""
        latency_ms = self.predictor.predict(architecture, self.plan.io).latency_ms
        return {**self._judge(architecture), **self.trainer.cost(architecture), "latency_ms": latency_ms}

    def finish(self, architecture: Architecture, progress: StepProgress) -> Network:
        """See `Source`: trained on from the inherited weights, or from scratch, as the configuration says."""
        final = self.plan.config.final
        network, _ = fine_tune(
            self.supernet,
            architecture,
            self.plan.task,
            final.train,
            generator=torch.Generator().manual_seed(self.plan.config.search.seed),
            inherit=final.weights == "inherited",
            device=self.torch_device,
            report=progress,  # type: ignore[arg-type]
            should_stop=self.stop,
        )
        return network

    def predict(self, architecture: Architecture) -> Mapping[str, Any]:
        """See `Source`."""
        answer = self.predictor.predict(architecture, self.plan.io)
        return {"latency_ms": answer.latency_ms, "low_ms": answer.low_ms, "high_ms": answer.high_ms,
                "outside": list(answer.outside)}  # fmt: skip


def make_source(plan: Plan, run: Run, stop: StopSignal, open_phase: OpenPhase) -> Source:
    """The source that the configuration asks for, ready to evaluate: its own phases are carried out here."""
    if plan.config.search.evaluator == "standalone":
        return Standalone(plan, run, stop)
    return FromSupernet(plan, run, stop, open_phase)
