"""Taking networks away from a run: as files that other programs load, each loaded and compared before it counts."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixnas.evaluators.batches import in_order
from mixnas.evaluators.protocol import guarded
from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task, recorded
from mixnas.predictors.measuring.device import DEFAULT_THREADS, device_name
from mixnas.predictors.measuring.measure import MeasureConfig, fixed_threads, measure_networks
from mixnas.search import card as cards
from mixnas.search.loader import processor
from mixnas.search.picking import Choice
from mixnas.search.publishing import MAKING, Exported, check_place, clear_up, digest_of_weights, locked, publish
from mixnas.search.run.directory import Run
from mixnas.search.run.front import Member
from mixnas.search.run.origin import versions
from mixnas.search.run.trust import require_trust
from mixnas.search.run.typed import typed
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.apart import Apart
from mixnas.search_space.formats.format import Answer, Format, NotIdentical
from mixnas.search_space.formats.safetensors import load_network
from mixnas.search_space.network import Network
from mixnas.search_space.operators.quantization.policy import policy_of
from mixnas.search_space.operators.quantization.ran import products_that_ran
from mixnas.search_space.reporting import SILENT, Report
from mixnas.search_space.settings import one_or_more

_COMPARED = 64  # inputs whose outputs are compared one by one
_BATCH = 256  # of the test split, as it goes through a file

_WHOLE = (torch.int8, torch.uint8)  # types of weights that are stored as whole numbers

DEFAULT_FORMATS = ("safetensors",)

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Judged:
    """What the whole test split says of a network and of its files.

    Attributes:
        score: Of the network.
        of_files: By the file's name.
        digest: SHA-256 of all inputs and targets.
        examples: How many.
    """

    score: float
    of_files: dict[str, float]
    digest: str
    examples: int


def export_run(
    run: Run | str | Path,
    *,
    pick: str | None = None,
    trial: int | None = None,
    where: str | None = None,
    knee: bool = False,
    one_se: bool = False,
    weights: Mapping[str, float] | None = None,
    everything: bool = False,
    format_names: Sequence[str] | str = DEFAULT_FORMATS,
    output: str | None = None,
    verify: bool = True,
    tolerance: float | None = None,
    licence: str = "unknown",
    trust: bool = False,
    report: Report = SILENT,
    told: Callable[[str], None] = _logger.warning,
) -> list[Path]:
    """Write networks of a run as folders: files of each network as deployed, with what a reader needs to know.

    Every file is loaded in a fresh process without this package. Its outputs are compared with the deployed network's
    on inputs of the test split, and it is judged on the whole of it: what is exported does what the front says. Until
    all of it does, nothing has its final name. Then its latency is measured in its own runtime.

    Args:
        run: A finished run, or its name or path.
        pick, where, knee, one_se, weights, everything: Which networks, in one way: see `Choice`.
        trial: The network of this trial; it is finished first, where it is not on the front.
        format_names: Formats, or one: see `formats.names()`.
        output: Directory; the run's `exports/` if not given.
        verify: Whether the task is loaded and judges the files. Without it, their outputs are compared on random
            inputs, and nothing is measured.
        tolerance: How far outputs of a file may be from the network's. If not given it follows from the types that the
            network stores, and of a network that multiplies whole numbers each has to be the same in the file.
        licence: Of the exported weights, an SPDX identifier.
        trust: Whether a task that is not of the package may be run though the run was not started here with it.
        report: Told of what is done.
        told: Told of each file of an earlier export that does not stay as it was.

    Returns:
        The folders.

    Raises:
        ConfigError: No such format or network, or a format can't hold one of the networks, or lacks a package.
        IntegrityError: A file's outputs are not the network's, or its score is not what the front says;
            `NotIdentical` where the file's runtime rounds otherwise: the other formats are written then.

    Examples:
        After the example of `mixnas.search`:

        >>> import mixnas
        >>> (folder,) = mixnas.export(mixnas.Run.open("small"), output="exported")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'architecture.yaml', 'card.json', 'load.py', 'manifest.json', 'model.py', 'model.safetensors']
    """
    run = run if isinstance(run, Run) else Run.open(run)
    if verify or trial is not None:  # else no task is loaded
        require_trust(run.manifest, run.path, "export", trust)
    wanted = [formats.get(name) for name in dict.fromkeys(one_or_more(format_names))]
    for file_format in wanted:
        formats.require(file_format)
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance: {tolerance}: expected a number from 0, of the unit of the outputs.")
    choice = Choice(pick=pick, where=where, knee=knee, one_se=one_se, weights=weights, everything=everything)
    if trial is not None and choice != Choice():
        raise ConfigError("trial is one way to choose a network: give no other beside it.")
    root = Path(output) if output else run.path / "exports"
    chosen = []
    for member in choice.of(run.front(), typed(run.path)) if trial is None else [finished_trial(run, trial, trust)]:
        trained = load_network(run.networks / f"{member.id}.safetensors")
        digest, network = digest_of_weights(trained), trained.deploy()
        if network.architecture.id != member.id:
            raise IntegrityError(
                f"{run.networks / member.id}.safetensors: damaged: it holds {network.architecture.id}, another network."
            )
        for file_format in wanted:
            if problem := file_format.why_not(network):
                raise ConfigError(f"{member.id} cannot be exported as {file_format.name}: {problem}.")
        check_place(root / member.id, digest)
        chosen.append((member, network, digest))
    task = by_name(run.manifest["fixed"]["task"]) if verify else None
    data = run.data()
    if task is not None:
        now = recorded(task)
        run.check_data(now)
        data |= {"prepared": now["prepared"]} if "prepared" in now else {}  # runs of before did not say it
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    held = contextlib.ExitStack()
    if output is None:  # the run is written
        held.enter_context(run)
    root.mkdir(parents=True, exist_ok=True)
    clear_up(root)
    making = Path(tempfile.mkdtemp(dir=root, prefix=MAKING))
    held.enter_context(locked(making))
    ready: list[Exported] = []
    refused: list[NotIdentical] = []
    try:
        with _loading(wanted) as load:
            for done, (member, network, digest) in enumerate(chosen, 1):
                folder = making / member.id
                folder.mkdir()
                card = _write(folder, wanted, run, member, network, task, data, load, licence, tolerance, refused)
                if card["files"]:
                    ready.append(Exported(folder, network, {**card, "weights": digest}, data))
                report(done, len(chosen))
        written = [publish(one, root / one.made.name, told) for one in ready]
    finally:
        shutil.rmtree(making)
        held.close()
        with contextlib.suppress(OSError):  # they go only if nothing is in them
            for folder in made or ([root] if output is None else []):
                folder.rmdir()
    if refused:
        names = [f"{root / one.made.name} ({', '.join(one.card['files'])})" for one in ready]
        said = f" Written all the same: {'; '.join(names)}." if names else " Nothing was written."
        raise NotIdentical(f"{' '.join(map(str, refused))}{said}")
    return written


def finished_trial(run: Run, number: int, trust: bool = False) -> Member:
    """The final network of a trial; finished now, where it is not.

    Args:
        run: Its run.
        number: Of the trial.
        trust: As of `export_run`.

    Raises:
        NasError: See `Job.finish_trial`.
    """
    front = run.front()
    if front.final:
        for member in (*front.members, *front.others):
            own = member.trial == number and not member.weights_from
            if own and (run.networks / f"{member.id}.safetensors").exists():
                return member
    from mixnas.search.job import Job, reopen
    from mixnas.search.run.progress import make_progress
    from mixnas.search.run.stopping import StopSignal

    opened, config = reopen(run.path, trust=trust)
    return Job(opened, config, progress=make_progress("auto"), stop=StopSignal()).finish_trial(number)


@contextlib.contextmanager
def _loading(wanted: Sequence[Format]) -> Iterator[Any]:
    """A function that loads a file of a format, where it can without this package."""
    free = [file_format for file_format in wanted if not file_format.needs_mixnas]
    with Apart(free) if free else contextlib.nullcontext() as apart:

        def load(file_format: Format, path: Path) -> Answer:
            if file_format.needs_mixnas or apart is None:
                return formats.load(file_format, path)
            return apart.load(file_format, path)

        yield load


def _write(
    folder: Path,
    wanted: Sequence[Format],
    run: Run,
    member: Member,
    network: Network,
    task: Task | None,
    data: Mapping[str, Any],
    load: Any,
    licence: str,
    tolerance: float | None,
    refused: list[NotIdentical],
) -> dict[str, Any]:
    """Fill a folder, and verify each file in it; gives the card. A file that is `NotIdentical` goes, and is noted."""
    front = run.front()
    origin = {"id": member.id, "run": run.name, "metrics": dict(member.metrics)}
    inputs = _inputs(network, task)
    files: dict[str, dict[str, Any]] = {}
    answers: dict[str, Answer] = {}
    for file_format in wanted:
        path = folder / file_format.file_name
        file_format.write(network, path, origin)
        answers[path.name] = load(file_format, path)
        try:
            agreement = formats.verify(file_format, path, network, inputs, answers[path.name], stated=tolerance)
        except NotIdentical as error:
            difference = formats.compare(answers.pop(path.name), network, inputs, path, math.inf).difference
            refused.append(
                NotIdentical(
                    f"{member.id} as {file_format.name} is {error} To take it as it is, state how far its outputs may "
                    f"differ: --tolerance {_just_above(difference)}. The formats that torch loads hold it to the last "
                    "bit."
                )
            )
            for name in (path.name, *file_format.beside):
                (folder / name).unlink(missing_ok=True)
            continue
        files[path.name] = {
            "format": file_format.name,
            "bytes": path.stat().st_size,
            "weight_bytes": file_format.weight_bytes(path),
            "needs": list(formats.loads_with(file_format)),
            **_instead(file_format, network),
            "verified": {
                "inputs": agreement.inputs,
                "of": "the test split" if task is not None else "random numbers",
                "difference": agreement.difference,
                "allowed": agreement.allowed,
                "stated": tolerance is not None,
                "identical": agreement.identical,
                **({} if agreement.integers is None else {"integers": str(agreement.integers)}),
            },
        }
    if not files:
        return {"files": files}
    wanted = [file_format for file_format in wanted if file_format.file_name in files]
    judgement = None
    if task is not None:
        with guarded(f"judging {member.id} on the test split"):
            judgement = _judge(network, answers, task)
        _check(judgement, member, task, network)
        for name, score in judgement.of_files.items():
            files[name]["verified"][f"test_{task.metric}"] = score
        for name, latency in _measured(folder, wanted, network, run).items():
            files[name]["latency"] = latency
    card = cards.card(run, front, member, network, licence=licence, files=files, data=data)
    if judgement is not None and task is not None:
        card["verified"] = {f"test_{task.metric}": judgement.score}
        card["data"] = {"split": "test", "examples": judgement.examples, "sha256": judgement.digest}
    if any(tensor.dtype in _WHOLE for tensor in network.state_dict().values()):
        card["ran"] = [one.to_plain() for one in products_that_ran(network, inputs[:1])]
    card["exported_with"] = {"versions": versions(), "device": device_name("cpu"), **processor()}
    return card


def _just_above(difference: float) -> str:
    """The next number above a difference that has one digit.

    >>> _just_above(0.0123), _just_above(0.02), _just_above(0.96), _just_above(12.5)
    ('0.02', '0.03', '1', '20')
    """
    if not 0 < difference < math.inf:
        return "0.05"
    exponent = math.floor(math.log10(difference))
    digit = math.floor(float(f"{difference / 10.0**exponent:.9f}")) + 1
    return f"{float(f'{digit}e{exponent}'):g}"


def _instead(file_format: Format, network: Network) -> dict[str, dict[str, str]]:
    """What runs on a CPU in the place of the network's policies, in a file of a format."""
    runtime = getattr(file_format, "runtime", "eager")
    quants = [getattr(unit, "quant", None) for _, unit in network.units()]
    said = {str(q): policy_of(q).instead("cpu", runtime) for q in dict.fromkeys(quants) if q is not None}
    said = {name: text for name, text in said.items() if text}
    return {"instead": said} if said else {}


def _inputs(network: Network, task: Task | None) -> Tensor:
    if task is None:
        return network.io.example(_COMPARED, generator=torch.Generator().manual_seed(0))
    inputs, _ = task.test.gather(torch.arange(min(_COMPARED, len(task.test))))
    return inputs


@torch.no_grad()
def _judge(network: Network, answers: dict[str, Answer], task: Task) -> _Judged:
    """One pass over the test split, for the network and all of its files."""
    digest = hashlib.sha256()
    metrics = {name: task.new_metric() for name in ("", *answers)}
    examples = 0
    for x, y in in_order(task.test, _BATCH, torch.device("cpu")):
        _feed(digest, x, y)
        metrics[""].update(network(x), y)
        for name, answer in answers.items():
            metrics[name].update(torch.from_numpy(np.asarray(answer(x.numpy()))), y)
        examples += len(y)
    scores = {name: float(metric.result()) for name, metric in metrics.items()}
    return _Judged(scores.pop(""), scores, digest.hexdigest(), examples)


def digest_of_test(task: Task) -> str:
    """SHA-256 of the inputs and targets of a task's test split, as a card has it."""
    digest = hashlib.sha256()
    for x, y in in_order(task.test, _BATCH, torch.device("cpu")):
        _feed(digest, x, y)
    return digest.hexdigest()


def _feed(digest: Any, x: Tensor, y: Tensor) -> None:
    for tensor in (x, y):
        digest.update(tensor.contiguous().numpy().tobytes())


def _check(judgement: _Judged, member: Member, task: Task, network: Network) -> None:
    """Refuse what does not score what the front says."""
    metric = f"test_{task.metric}"
    expected = member.metrics[metric]
    share = max(1e-3, formats.tolerance(network))
    for name, score in {member.id: judgement.score, **judgement.of_files}.items():
        if not abs(score - expected) <= share * max(1.0, abs(expected)):
            raise IntegrityError(
                f"{name}: the exported network's test {task.metric} is {score:.4f}, and the front says "
                f"{expected:.4f} ({torch.get_num_threads()} threads). Resume the run and export again."
            )


def _measured(folder: Path, wanted: Iterable[Format], network: Network, run: Run) -> dict[str, dict[str, Any]]:
    """Latency of each file in its own runtime on this machine's CPU, by its name; under the run's reference time."""
    config = run.config().get("latency", {})
    threads, batch_size = int(config.get("threads", DEFAULT_THREADS)), int(config.get("batch_size", 1))
    batch = network.io.example(batch_size, generator=torch.Generator().manual_seed(0)).numpy()
    measure = MeasureConfig(passes=int(config.get("final_passes", 7)), threads=threads, batch_size=batch_size)
    with fixed_threads(threads):
        calls = {f.file_name: formats.call(f, folder / f.file_name, batch, threads) for f in wanted}
        device = device_name("cpu", threads)
        reference = run.manifest.get("reference_ms") if run.manifest.get("device") == device else None
        rng = np.random.default_rng(0)
        found = measure_networks(list(calls.values()), rng=rng, config=measure, reference_ms=reference)
    about = {"device": device, "threads": threads, "batch_size": batch_size}
    return {name: {**one.latency.to_plain(), **about} for name, one in zip(calls, found, strict=True)}
