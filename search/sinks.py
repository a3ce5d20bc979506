"""Who else is told of a search while it runs: TensorBoard, MLflow. Each is an extra to install.

A sink that fails is dropped with a warning: no search ends because somebody's server does.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from mixnas.search.run.directory import Run
from mixnas.search.run.front import Front
from mixnas.search.study.results import TrialRecord
from mixnas.search_space.errors import ConfigError, nearest

_logger = logging.getLogger(__name__)

_FLUSHED_S = 5  # between what a reader of the event files sees


class Sink(Protocol):
    """Told of a search."""

    def trial(self, record: TrialRecord) -> None:
        """Of a finished trial, once it is safe on the disk."""

    def finished(self, front: Front) -> None:
        """Of the answer."""

    def close(self) -> None:
        """The search has ended, in whatever way."""


class TensorBoard:
    """Each metric of each trial as a scalar at the trial's number, final ones under "final", in `<run>/tensorboard`."""

    package = "tensorboardX"

    def __init__(self, run: Run) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run.path / "tensorboard"), flush_secs=_FLUSHED_S)

    def trial(self, record: TrialRecord) -> None:
        """See `Sink`."""
        for name, value in record.metrics.items():
            self._writer.add_scalar(f"trial/{name}", value, record.number)

    def finished(self, front: Front) -> None:
        """See `Sink`."""
        for member in front.members:
            for name, value in member.values.items():
                self._writer.add_scalar(f"final/{name}", value, member.trial)

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class MLflow:
    """A run of the experiment "mixnas": metrics at the trial's number, then `pareto.json`. See MLFLOW_TRACKING_URI."""

    package = "mlflow"

    def __init__(self, run: Run) -> None:
        import mlflow

        self._mlflow, self._run = mlflow, run
        mlflow.set_experiment("mixnas")
        self._active = mlflow.start_run(run_name=run.name)
        about = {name: run.manifest.get(name) for name in ("seed", "device", "latency")}
        mlflow.log_params({"task": str(run.manifest["fixed"]["task"]), **about})

    def trial(self, record: TrialRecord) -> None:
        """See `Sink`."""
        if record.metrics:
            self._mlflow.log_metrics(dict(record.metrics), step=record.number, run_id=self._active.info.run_id)

    def finished(self, front: Front) -> None:
        """See `Sink`."""
        self._mlflow.log_artifact(str(self._run.path / "pareto.json"), run_id=self._active.info.run_id)

    def close(self) -> None:
        """See `Sink`."""
        self._mlflow.end_run()


SINKS: Mapping[str, Any] = {"tensorboard": TensorBoard, "mlflow": MLflow}


def check(names: Iterable[str]) -> None:
    """Refuse a sink that there is not, or that is not installed, before any work is started.

    Raises:
        ConfigError: Says which there are, or what to install.
    """
    for name in names:
        if name not in SINKS:
            raise ConfigError(f"--log: no sink is called {name!r}.{nearest(name, SINKS)} Allowed: {', '.join(SINKS)}.")
        if importlib.util.find_spec(SINKS[name].package) is None:
            raise ConfigError(f"--log {name}: {SINKS[name].package} is not installed: pip install 'mixnas[{name}]'")


class Sinks:
    """Several sinks as one; a context.

    Args:
        names: Of `SINKS`, checked.
        run: Whose trials.
    """

    def __init__(self, names: Sequence[str], run: Run) -> None:
        self._open: dict[str, Sink] = {}
        for name in dict.fromkeys(names):
            with self._dropping(name):
                self._open[name] = SINKS[name](run)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda sink: sink.close())

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Any:
        try:
            yield
        except Exception as error:  # theirs are of every kind
            self._open.pop(name, None)
            _logger.warning("%s is told no more: %s: %s", name, type(error).__name__, error)

    def _each(self, act: Callable[[Sink], None]) -> None:
        for name, sink in list(self._open.items()):
            with self._dropping(name):
                act(sink)

    def trial(self, record: TrialRecord) -> None:
        """See `Sink`."""
        self._each(lambda sink: sink.trial(record))

    def finished(self, front: Front) -> None:
        """See `Sink`."""
        self._each(lambda sink: sink.finished(front))
