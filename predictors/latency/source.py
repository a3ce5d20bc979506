"""Where a search's latency comes from: predicted for its device, and measured where that device is this machine.

What a latency is of (device, runtime, threads, batch size) stands in `LatencySpec` and nowhere else. Finding a stored
predictor and asking it needs no torch; profiling and measuring do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixnas.predictors.latency.correction import Correction
from mixnas.predictors.latency.predictor import LatencyPredictor, installed, user_directory
from mixnas.predictors.measuring.device import device_name, require_cuda
from mixnas.predictors.measuring.energy import ENERGY, Energy, counter_of, measure_energy
from mixnas.predictors.measuring.measure import Call, Clock, MeasureConfig, measure_networks
from mixnas.predictors.measuring.table import MeasurementTable, tagged
from mixnas.predictors.measuring.value import Latency
from mixnas.search_space.architecture import Architecture, Op
from mixnas.search_space.errors import ConfigError
from mixnas.search_space.grammar import OpChoice
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.space import SearchSpace

if TYPE_CHECKING:
    import torch

    from mixnas.search_space.network import Network
    from mixnas.search_space.units import IOSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySpec:
    """Which latency is meant, as plain data.

    Attributes:
        device: "auto", "cpu", "cuda", or the name of a device.
        runtime: One of `predictors.measuring.table.RUNTIMES`.
        threads: Threads inside an operator.
        batch_size: Inputs per forward.
        directory: Where this machine's profile is kept; None for the user's profiles.
        profile_s: Time for a profile, the fit included, in seconds.
        passes: Passes over a network that is measured.
        seed: Of inputs and of what a profile draws.
        reference_ms: The sentinel's reference time. Latencies compare only under the same one, so whoever continues a
            search, or takes part in it, gets the one that it began with; None where it is not fixed yet.
    """

    device: str
    runtime: str
    threads: int
    batch_size: int
    directory: Path | None
    profile_s: float
    passes: int
    seed: int
    reference_ms: float | None = None

    def open(self) -> LatencySource:
        """The source; nothing is measured or read yet."""
        return LatencySource(self)


class LatencySource:
    """See the module. `prepare` comes before predictions; measuring needs no preparation.

    Attributes:
        shares_machine: Whether it is this machine that is measured, so that nothing else may run on it meanwhile.
    """

    shares_machine = True

    def __init__(self, spec: LatencySpec) -> None:
        self._spec = spec
        self._reference_ms = spec.reference_ms
        self._predictor: LatencyPredictor | None = None
        self._correction: tuple[SearchSpace, Correction] | None = None
        self._rng = np.random.default_rng(spec.seed)

    @property
    def spec(self) -> LatencySpec:
        """What it is made from, with the reference time once that is fixed."""
        return replace(self._spec, reference_ms=self._reference_ms)

    # -- the device ---------------------------------------------------------------------------------------------------

    @cached_property
    def torch_device(self) -> str:
        """Where networks are trained: "cuda" when there is a GPU and the spec does not rule it out, else "cpu".

        Raises:
            ConfigError: "cuda" was asked for, and there is none: see `require_cuda`.
        """
        if self._spec.device == "cpu" or self._spec.device.startswith("cpu-"):
            return "cpu"
        if self._spec.device == "cuda":
            require_cuda()
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def here(self) -> bool:
        """Whether the device is this machine, so that it can be measured."""
        if self._spec.device in ("auto", "cpu", "cuda"):
            return True
        return self._spec.device == device_name(self.torch_device, self._spec.threads)

    @cached_property
    def device(self) -> str:
        """The device's standard name."""
        given = self._spec.device
        return device_name(self.torch_device, self._spec.threads) if given in ("auto", "cpu", "cuda") else given

    @property
    def tag(self) -> str:
        """Runtime and batch size as in the names of files."""
        return tagged(self._spec.runtime, self._spec.batch_size)

    @cached_property
    def processor(self) -> str:
        """What the device is: "cpu" or "cuda"."""
        here = self._spec.device in ("auto", "cpu", "cuda") or self.here
        return self.torch_device if here or self._spec.device.startswith("cpu-") else "cuda"

    def instead(self, policies: Sequence[Op]) -> dict[str, str]:
        """What runs on the device in the place of each policy, as text; "" where it runs itself (`Policy.instead`)."""
        from mixnas.search_space.operators.quantization.policy import policy_of

        return {str(policy): policy_of(policy).instead(self.processor, self._spec.runtime) for policy in policies}

    def check_policies(self, space: SearchSpace) -> None:
        """Refuse a space with a quantization policy that does not run through the runtime on the device.

        Raises:
            ConfigError: Names the policy, where it stands, and why it does not run.
        """
        from mixnas.search_space.operators.quantization.policy import policy_of

        kind = self.processor
        for s, stage in enumerate(space.tree.stages):
            choices = [choice for block in stage.blocks for choice in (block.quant, block.channel_quant)]
            for policy in dict.fromkeys(op for choice in choices if choice is not None for op in _operators(choice)):
                reason = policy_of(policy).why_not(kind, self._spec.runtime)
                if reason:
                    raise ConfigError(
                        f"{space.source}: stages[{s}]: quant {policy} does not run through {self._spec.runtime!r} on "
                        f"{self.device}: {reason}. Leave the policy out, or choose another latency.runtime."
                    )

    def check(self, space: SearchSpace) -> None:
        """Refuse what can neither be measured nor predicted, before any work is started.

        Args:
            space: Whose networks it will be asked about.

        Raises:
            ConfigError: This machine lacks the runtime, nobody measured the device, or see `check_policies`.
        """
        self.check_policies(space)
        if self.here:
            from mixnas.predictors.measuring import runtimes

            runtimes.require(self._spec.runtime, self.torch_device)
        else:
            self.find()

    # -- predicting ---------------------------------------------------------------------------------------------------

    def prepare(
        self,
        space: SearchSpace,
        io: IOSpec,
        *,
        plain: Any = None,
        report: Report = SILENT,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        """Open the predictor; where the device is this machine and has none yet, profile it.

        Args:
            space: Whose networks are to be predicted.
            io: The task's input.
            plain: `{task: ..., space: ...}` as they stood in the file, so that a query of the same needs no torch.
            report: Told of a profile, as a phase.
            should_stop: Asked between measurements; what was measured until then is kept.

        Raises:
            ConfigError: Nobody measured the device through this runtime with this batch size.
            StoppedEarly: `should_stop` said so.
        """
        if self._predictor is not None:
            return
        if not self.here:
            self._predictor = self.find()
            return
        directory = self._spec.directory or user_directory()
        if (self.device, self.tag) in {(device, tag) for device, tag, _ in installed(directory)}:
            self._predictor = LatencyPredictor.load(self.device, self.tag, directory)
        else:
            self._predictor = self._profile(space, io, directory, plain, report, should_stop)
        # Measured and predicted latency refer to the same sentinel time.
        self._reference_ms = MeasurementTable.load(directory, self.device, self.tag).reference_ms

    def _profile(
        self,
        space: SearchSpace,
        io: IOSpec,
        directory: Path,
        plain: Any,
        report: Report,
        should_stop: Callable[[], bool] | None,
    ) -> LatencyPredictor:
        from mixnas.predictors.latency.profile import ProfileConfig, profile

        spec = self._spec
        config = ProfileConfig(budget_s=spec.profile_s, measure=self._measure_config(spec.passes), seed=spec.seed)
        with report.phase("profile", spec.profile_s, unit="s", seconds=spec.profile_s) as phase:
            return profile(
                space,
                io,
                device=self.torch_device,
                runtime=spec.runtime,
                directory=directory,
                config=config,
                plain=plain,
                report=phase,
                should_stop=should_stop,
            )

    def find(self) -> LatencyPredictor:
        """The stored predictor: in the directory where that exists, else of the user's profiles or shipped. No torch.

        Raises:
            ConfigError: Nobody measured the device through this runtime with this batch size.
        """
        directory = self._spec.directory
        there = directory is not None and directory.is_dir()
        return LatencyPredictor.load(self.device, self.tag, directory if there else None)

    def adopt(self) -> None:
        """Predict by the stored predictor (`find`) from now on, whether the device is this machine or not."""
        if self._predictor is None:
            self._predictor = self.find()

    @property
    def predictor(self) -> LatencyPredictor | None:
        """The predictor; None before `prepare`."""
        return self._predictor

    def _prepared(self) -> LatencyPredictor:
        assert self._predictor is not None, "prepare comes first"
        return self._predictor

    def predict(self, architecture: Architecture, io: IOSpec) -> Latency:
        """Predicted latency of one architecture, corrected where the space's networks were measured (`correct`)."""
        found = self._prepared().predict(architecture, io).latency
        if self._correction is None:
            return found
        space, correction = self._correction
        factor = float(correction.factors(space.encode(architecture)[None])[0])
        ends = [None if end is None else end * factor for end in (found.low_ms, found.high_ms)]
        return replace(found, ms=found.ms * factor, low_ms=ends[0], high_ms=ends[1])

    def predict_many(self, matrix: np.ndarray, space: SearchSpace, io: IOSpec) -> np.ndarray:
        """Predicted milliseconds (rows,) of encoded architectures (rows, variables), corrected like `predict`."""
        found = self._prepared().predict_many(matrix, space, io)
        if self._correction is None or self._correction[0] is not space:
            return found
        return found * self._correction[1].factors(matrix)

    def correct(
        self, measured: Sequence[tuple[Architecture, Latency]], space: SearchSpace, io: IOSpec
    ) -> Correction | None:
        """Correct predictions of a space's networks by those that were measured, from now on; None where none was.

        The predictor stays as it is, and what was corrected before is forgotten.

        Args:
            measured: Architectures of the space and their measured latency.
            space: The one that predictions are asked of.
            io: The task's input.
        """
        self._correction = None
        if not measured:
            return None
        rows = space.encode_many([architecture for architecture, _ in measured])
        predicted = self._prepared().predict_many(rows, space, io)
        found = Correction(rows, predicted.tolist(), [latency.ms for _, latency in measured])
        self._correction = space, found
        return found

    # -- measuring ----------------------------------------------------------------------------------------------------

    def _measure_config(self, passes: int) -> MeasureConfig:
        return MeasureConfig(passes=passes, threads=self._spec.threads, batch_size=self._spec.batch_size)

    @cached_property
    def _sentinel(self) -> Call:
        from mixnas.predictors.measuring import runtimes
        from mixnas.predictors.measuring.sentinel import make_sentinel, sentinel_module

        if self._spec.runtime == "graph":
            return runtimes.prepare(*sentinel_module(self.torch_device), "graph", self._spec.threads)
        return make_sentinel(self.torch_device)

    @cached_property
    def _clock(self) -> Clock:
        from mixnas.predictors.measuring import runtimes

        return runtimes.clock_of(self._spec.runtime, self.torch_device)

    @property
    def reference_ms(self) -> float:
        """The sentinel's reference time; measured when it is first asked for, unless it was fixed before."""
        if self._reference_ms is None:
            assert self.here, "another device cannot be measured"
            (itself,) = measure_networks(
                [self._sentinel],
                rng=self._rng,
                config=self._measure_config(self._spec.passes),
                sentinel=self._sentinel,
                clock=self._clock,
            )
            self._reference_ms = itself.latency.ms / itself.ratio
        return self._reference_ms

    def measure(self, networks: Sequence[Network], passes: int | None = None) -> list[Latency]:
        """Measure networks as deployed, together in shuffled passes; the networks are left as they are.

        Args:
            networks: Trained or not: weights have no influence on time.
            passes: Other than the spec's, for example more of them for the final table.

        Raises:
            ConfigError: The runtime does not compute one of them as eager PyTorch does.
        """
        found = self.measure_each(networks, passes)
        for one in found:
            if isinstance(one, str):
                raise ConfigError(one)
        return [one for one in found if not isinstance(one, str)]

    def measure_each(self, networks: Sequence[Network], passes: int | None = None) -> list[Latency | str]:
        """`measure`; where the runtime does not compute a network, the reason stands in its latency's place."""
        calls, reasons = self._calls(networks)
        measured = measure_networks(
            calls,
            rng=self._rng,
            config=self._measure_config(passes or self._spec.passes),
            sentinel=self._sentinel,
            reference_ms=self.reference_ms,
            clock=self._clock,
        )
        latencies = iter(one.latency for one in measured)
        return [reasons[i] if i in reasons else next(latencies) for i in range(len(networks))]

    def check_energy(self) -> None:
        """Refuse energy where it cannot be measured.

        Raises:
            ConfigError: The device is not this machine, has no counter, or it may not be read.
        """
        if not self.here:
            raise ConfigError(
                f"{ENERGY}: device {self.device!r} is not this machine, and nobody predicts energy. Leave the metric "
                "out, or search on that device."
            )
        counter_of(self.torch_device)

    def measure_energy(self, networks: Sequence[Network], passes: int | None = None) -> list[Energy | str]:
        """Energy of networks as deployed, measured together in shuffled passes; see `measuring.energy`.

        Args:
            networks: Trained or not: they stay as they are.
            passes: Other than the spec's.

        Returns:
            Of each; where the runtime does not compute it as eager PyTorch does, the reason in its place.
        """
        calls, reasons = self._calls(networks)
        measured = measure_energy(
            calls,
            counter_of(self.torch_device),
            device=self.torch_device,
            passes=passes or self._spec.passes,
            threads=self._spec.threads,
            rng=self._rng,
        )
        found = iter(measured)
        return [reasons[i] if i in reasons else next(found) for i in range(len(networks))]

    def _calls(self, networks: Sequence[Network]) -> tuple[list[Call], dict[int, str]]:
        """The forwards of networks, and of those that the runtime does not compute the reason, by their number."""
        calls: list[Call] = []
        reasons: dict[int, str] = {}
        generator = self._generator()
        for i, network in enumerate(networks):
            try:
                calls.append(self._call(network, generator))
            except ConfigError as error:
                reasons[i] = str(error)
        return calls, reasons

    def _generator(self) -> torch.Generator:
        import torch

        return torch.Generator().manual_seed(self._spec.seed)

    def _call(self, network: Network, generator: torch.Generator) -> Call:
        from mixnas.predictors.measuring import runtimes

        spec = self._spec
        inputs = network.io.example(spec.batch_size, generator=generator).to(self.torch_device)
        deployed = copy.deepcopy(network).deploy().to(self.torch_device).eval().requires_grad_(False)
        return runtimes.prepare(deployed, inputs, spec.runtime, spec.threads, f"network {network.architecture.id}")


def _operators(choice: OpChoice) -> Iterator[Op]:
    """Every operator that may stand at a place, with every setting of its knobs."""
    for option in choice.options:
        names = [name for name, _ in option.knobs]
        for values in product(*(values for _, values in option.knobs)):
            yield Op(option.name, tuple(zip(names, values, strict=True)))
