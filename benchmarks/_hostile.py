"""What `hostile.py` and `tests/hostile/` share: damaging every kind of stored file, and asking every reader of it.

A file is cut or one of its bytes is changed, with a seed; then it is read. The reader refuses it (in one sentence, as
an `IntegrityError` or a `ConfigError`), or its answer is right: that of the whole file, or of a beginning of it where a
beginning is what a kill leaves. Anything else is wrong: another answer, another exception, a long or unprintable one.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixnas.evaluators.protocol import Outcome
from mixnas.search.engines.session import Budget, Session
from mixnas.search.run.directory import Run, list_runs
from mixnas.search.run.front import Front
from mixnas.search.run.integrity import weights_problem
from mixnas.search.run.trust import is_trusted, mark
from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.reading import read_results, summary_of
from mixnas.search.study.study import SearchStudy
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.errors import ConfigError, IntegrityError
from mixnas.search_space.space import SearchSpace

LONGEST = 300
"""Characters of a refusal, without the path of the file."""

OBJECTIVES = parse_objectives({"accuracy": "max", "params": "min"})
SPACE: dict[str, Any] = {
    "stem": "conv",
    "stages": [
        {
            "width": [8, 16, 24, 32],
            "depth": [1, 2, 3],
            "block": {
                "mixer": ["identity", "pooling", {"name": "dwconv", "kernel_size": [3, 5, 7]}],
                "gate": ["none", "se"],
                "channel_mixer": ["none", {"name": "mlp", "expansion": [1, 2, 4]}],
            },
        }
    ]
    * 2,
}
CONFIG = {
    "task": "digits",
    "objectives": {o.name: o.direction for o in OBJECTIVES},
    "constraints": [],
    "search": {"trials": 30, "seed": 0},
    "space": SPACE,
    "latency": {"batch_size": 1},
}


def made_up(architecture: Architecture) -> Outcome:
    """Metrics of an architecture that cost nothing: numbers of its id and its widths."""
    number = int(architecture.id, 16)
    params = sum(stage.width * len(stage.blocks) for stage in architecture.stages) + number % 7
    return Outcome({"accuracy": number % 9973 / 9973, "params": float(params)}, seconds=0.001)


def search_trials(journal: Path, trials: int) -> SearchStudy:
    """Carry out trials with a trivial evaluator; the study is left open."""
    study = SearchStudy(journal, SearchSpace.from_dict(SPACE), OBJECTIVES)
    with Session(study, Budget(trials=trials)) as session:
        while proposals := session.next(1):
            for proposal in proposals:
                session.done(proposal, made_up(proposal.architecture))
    return study


# -- every kind of file, and its readers --------------------------------------------------------------------------

Read = Callable[[Path], Any]
"""Reads the file at a path in its folder; what it gives is compared."""


def _nothing_more(whole: Any, found: Any) -> bool:
    return bool(whole == found)


@dataclass(frozen=True)
class Kind:
    """A kind of stored file.

    Attributes:
        name: As counted.
        path: A whole one.
        folder: What has to lie beside it; copied with it.
        readers: Each way in which it is read.
        right: Whether an answer to the damaged file is right, given that to the whole one.
    """

    name: str
    path: Path
    folder: Path
    readers: dict[str, Read]
    right: Callable[[Any, Any], bool] = _nothing_more


def _beginning(whole: Any, found: Any) -> bool:
    """Whether the records found are the first of the whole: what a kill may leave."""
    return bool(found == whole[: len(found)])


def kinds(folder: Path) -> Iterator[Kind]:
    """One whole file of every kind, written by the package itself."""
    import torch

    from mixnas.cli.overview import overview
    from mixnas.predictors.latency.predictor import LatencyPredictor, summary
    from mixnas.predictors.measuring.table import MeasurementTable
    from mixnas.search.study.journal import JournalFile
    from mixnas.search_space.formats.safetensors import load_network, load_tensors, read_extra, save_network
    from mixnas.search_space.network import IOSpec, Network

    run = Run.create(folder / "runs", CONFIG, name="r", device="cpu-x-1t", latency="eager", seed=0)
    with run:
        study = search_trials(run.journal, 30)
        study.close()
        run.add_phase("search", 1.5)
        results = study.results
        run.write_tables(results.to_csv(), _front(run, results))
        run.finish()
    io = IOSpec(kind="image", size=(8, 8), in_features=1, num_outputs=10)
    network = Network(results.records[0].architecture, io, generator=torch.Generator().manual_seed(0))
    save_network(run.networks / f"{results.records[0].id}.safetensors", network, {"task": "digits", "test": {"a": 0.5}})

    def in_run(read: Callable[[Run], Any]) -> Read:
        return lambda path: read(Run.open(path.parent))

    def listing(path: Path) -> Any:
        """The list of all runs: the problem of one is a refusal."""
        (one,) = list_runs(path.parents[1])
        if one.problem:
            raise IntegrityError(one.problem)
        return one.to_plain()

    def journal_records(path: Path) -> Any:
        with SearchStudyReading(path) as records:
            return records

    yield Kind("manifest.json", run.path / "manifest.json", run.path, {
        "open": in_run(lambda run: run.manifest),
        "status": in_run(lambda run: run.status().to_plain()),
        "list": listing,
    })  # fmt: skip
    yield Kind("config.yaml", run.path / "config.yaml", run.path, {
        "config": in_run(lambda run: run.config()),
        "list": listing,
        "overview": in_run(lambda run: overview(run).status.to_plain()),
    })  # fmt: skip
    yield Kind("pareto.json", run.path / "pareto.json", run.path, {
        "front": in_run(lambda run: run.front()),
        "report": in_run(_reported),
    })  # fmt: skip
    yield Kind("trials.csv", run.path / "trials.csv", run.path, {"status": in_run(_checked_table)})
    yield Kind("study.journal", run.journal, run.path, {
        "results": lambda path: read_results(path, OBJECTIVES).records,
        "summary": lambda path: summary_of(path, OBJECTIVES),
        "overview": in_run(lambda run: (overview(run).best, overview(run).hypervolume)),
        "resume": journal_records,
        "report": in_run(_reported),
    })  # fmt: skip
    yield Kind("study.summary.json", run.path / "study.summary.json", run.path, {
        "summary": lambda path: summary_of(path.with_name("study.journal"), OBJECTIVES),
    })  # fmt: skip
    killed = folder / "killed"
    killed.mkdir()
    shutil.copy(run.journal, killed / "study.journal")  # as a kill leaves it: without a summary
    yield Kind("study.journal, killed", killed / "study.journal", killed, {
        "results": lambda path: [r for r in read_results(path, OBJECTIVES).records if r.status != "running"],
        "resume": journal_records,
        "reopen": lambda path: [log["op_code"] for log in JournalFile(path).read_logs(0)],
    }, _beginning)  # fmt: skip
    weights = run.networks / f"{results.records[0].id}.safetensors"
    yield Kind("network.safetensors", weights, run.networks, {
        "load": lambda path: _plain_network(load_network(path)),
        "extra": read_extra,
        "tensors": lambda path: sorted(load_tensors(path, "mixnas-network-2")[0]),
        "status": _checked_weights,
    })  # fmt: skip
    tables = folder / "tables"
    tables.mkdir()
    device = _table(tables)
    yield Kind("latency table, csv", tables / f"{device}.eager.csv", tables, {
        "load": lambda path: _plain_table(MeasurementTable.load(path.parent, device, "eager")),
    }, _beginning)  # fmt: skip
    yield Kind("latency table, json", tables / f"{device}.eager.json", tables, {
        "load": lambda path: MeasurementTable.load(path.parent, device, "eager").header,
    })  # fmt: skip
    shipped = min((Path(__file__).parents[1] / "predictors" / "tables").glob("*.npz"), key=lambda p: p.stat().st_size)
    yield Kind("predictor.npz", shipped, shipped, {
        "summary": summary,
        "open": lambda path: [str(u) for u in LatencyPredictor.open(path).meta.items()],
    })  # fmt: skip
    yield from _of_a_finished_run(folder / "finished", results, network, device, shipped)
    yield from _by_hand(folder / "by hand", results.records[0].architecture)


def _of_a_finished_run(folder: Path, results: Any, network: Any, device: str, shipped: Path) -> Iterator[Kind]:
    """What lies in a run's folders: final networks and why others have none, profile, super-network, exports."""
    import numpy as np
    import torch

    from mixnas.evaluators.supernet.training import SupernetConfig, is_trained, load_supernet, train_supernet
    from mixnas.evaluators.tasks.loading import by_name
    from mixnas.search.reproducing import read_export
    from mixnas.search.run.integrity import read_failure
    from mixnas.search_space.files import stamped, write_json
    from mixnas.search_space.formats.safetensors import save_network
    from mixnas.search_space.supernet import Supernet

    run = Run.create(folder / "runs", CONFIG, name="r", device=device, latency="eager", seed=0)
    member = results.records[0].id
    save_network(run.networks / f"{member}.safetensors", network, {"task": "digits", "test": {"a": 0.5}})
    write_json(run.networks / "0123456789ab.failed.json", stamped({"failure": "the loss is nan", "recipe": None}))
    run.latency.mkdir()
    _table(run.latency)
    shutil.copy(shipped, run.latency / f"{device}.graph.npz")
    task = by_name("digits")
    space, config = SearchSpace.from_dict(SPACE), SupernetConfig(steps=2, batch_size=8)

    def supernet() -> Supernet:
        return Supernet(space, task.io, torch.Generator().manual_seed(0))

    def loaded(path: Path) -> Any:
        found = supernet()
        load_supernet(found, path)
        return {name: tensor.tolist() for name, tensor in found.state_dict().items()}

    def gone_on(path: Path) -> Any:
        ended = train_supernet(supernet(), task, config, seed=0, checkpoint=path)
        return ended.steps, ended.loss

    train_supernet(supernet(), task, config, seed=0, checkpoint=run.supernet)
    export = _export(run, results, network)

    def status(path: Path) -> Any:
        """Of the run that a file is in; what the file holds, of an archive its arrays: headers hold times of day."""
        found = next(folder for folder in path.parents if (folder / "config.yaml").exists())
        _check_run(Run.open(found))
        if path.suffix != ".npz":
            return path.read_bytes()
        with np.load(path) as arrays:
            return {name: (arrays[name].dtype.str, arrays[name].tolist()) for name in arrays.files}

    def exported(path: Path) -> Any:
        return read_export(path.parent), {file.name: file.read_bytes() for file in path.parent.iterdir()}

    files: dict[str, dict[str, Read]] = {
        f"networks/{member}.safetensors": {},
        "networks/0123456789ab.failed.json": {"finish": read_failure},
        f"latency/{device}.eager.csv": {},
        f"latency/{device}.eager.json": {},
        f"latency/{device}.graph.npz": {},
        "supernet.safetensors": {"is trained": is_trained, "load": loaded, "resume": gone_on},
        **{f"exports/{member}/{name}": {"reproduce": exported} for name in sorted(os.listdir(export))},
    }
    for name, readers in files.items():
        shown = name.replace(member, "ID").replace(device, "DEVICE")
        right = _beginning if name.endswith(".csv") else _nothing_more  # a table cut between rows has fewer
        yield Kind(f"run: {shown}", run.path / name, run.path, {**readers, "status": status}, right)


def _export(run: Run, results: Any, network: Any) -> Path:
    """A folder as `nas export` writes it, without the judging."""
    from mixnas.search import card as cards
    from mixnas.search.finish import searched_member
    from mixnas.search.publishing import Exported, digest_of_weights, publish
    from mixnas.search_space.formats.format import get

    member, file_format = searched_member(results.records[0]), get("safetensors")
    folder = run.path / "making"
    folder.mkdir()
    weights, deployed = digest_of_weights(network), network.deploy()
    file_format.write(deployed, folder / file_format.file_name, {"id": member.id})
    verified = {"inputs": 64, "of": "random numbers", "difference": 0.0, "allowed": 1e-5}
    about = {"format": "safetensors", "bytes": 1, "weight_bytes": 1, "needs": ["torch"], "verified": verified}
    files = {file_format.file_name: about}
    card = cards.card(run, _front(run, results), member, deployed, licence="unknown", files=files)
    ready = Exported(folder, deployed, {**card, "weights": weights}, run.data())
    return publish(ready, run.exports / member.id, told=print)


def _by_hand(folder: Path, architecture: Architecture) -> Iterator[Kind]:
    """What people write: it may be any other when it is changed; what it must not be is a traceback."""
    from mixnas.evaluators.tabular import Table
    from mixnas.search.config import load_config
    from mixnas.search_space.files import dump_yaml, load_yaml

    written: dict[str, tuple[str, dict[str, Read]]] = {
        "architecture.yaml": (architecture.to_yaml(), {"yaml": load_yaml, "load": Architecture.load}),
        "config.yaml": (dump_yaml({**CONFIG, "device": "auto"}), {"load": load_config}),
        "space.yaml": (dump_yaml(SPACE), {"load": SearchSpace.load}),
        "table.yaml": (_TABLE_ABOUT, {"load": Table.load}),
        "table.csv": (_TABLE, {"load": Table.load}),
    }
    folder.mkdir()
    for name, (text, _) in written.items():
        (folder / name).write_text(text)
    for name, (_, readers) in written.items():
        yield Kind(f"{name}, by hand", folder / name, folder, readers, lambda whole, found: True)
    state = folder / "state"
    with _environment(XDG_STATE_HOME=str(state)):
        own = {"fixed": {"task": "mine:Task"}, "created": "now", "mark": mark("mine:Task", "now")}
    with _environment(XDG_STATE_HOME=str(folder / "another's")):
        others = {**own, "mark": mark("mine:Task", "now")}

    def trusted(path: Path) -> tuple[bool, bool]:
        with _environment(XDG_STATE_HOME=str(path.parents[1])):
            return is_trusted(own), is_trusted(others)

    yield Kind("key of the user", state / "mixnas" / "key", state, {
        "trust": trusted
    }, lambda whole, found: whole == (True, False) and not found[1])  # fmt: skip # a damaged key trusts nobody


_TABLE_ABOUT = """\
name: small
knobs: {op: [conv, skip], width: [numeric]}
metrics: {accuracy: max, latency_ms: min}
"""
_TABLE = """\
op,width,accuracy,latency_ms
conv,8,0.91,1.5
conv,16,0.93,2.25
skip,8,0.85,0.5
skip,16,0.86,0.75
"""


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class SearchStudyReading:
    """Opening for a resume, and the trials that it finds."""

    def __init__(self, path: Path) -> None:
        self.study = SearchStudy(path, SearchSpace.from_dict(SPACE), OBJECTIVES)

    def __enter__(self) -> list[Any]:
        return [r for r in self.study.results.records if r.status != "interrupted"]

    def __exit__(self, *error: object) -> None:
        self.study.close()


def _check_run(run: Run) -> None:
    from mixnas.search.run.integrity import problems

    for name, problem in problems(run.path, run.manifest):
        raise IntegrityError(f"{run.path / name}: {problem}")


def _checked_table(run: Run) -> str:
    _check_run(run)
    return (run.path / "trials.csv").read_text()


def _reported(run: Run) -> Any:
    from mixnas.search.report.contents import contents

    found = contents(run)
    return found.front, found.results.records, found.config


def _checked_weights(path: Path) -> bool:
    if problem := weights_problem(path):
        raise IntegrityError(f"{path}: {problem}")
    return True


def _plain_network(network: Any) -> Any:
    state = {name: tensor.flatten().tolist() for name, tensor in network.state_dict().items()}
    return network.architecture, network.io, state


def _plain_table(table: Any) -> list[Any]:
    return [(i, w.pass_index, w.samples_ns.tolist(), w.before_ns) for i, ws in table.windows.items() for w in ws]


def _front(run: Run, results: Any) -> Front:
    from mixnas.search.finish import searched_member

    knee = results.knee()
    return Front(
        run=run.name, task="digits", metric="accuracy", objectives=CONFIG["objectives"], constraints=(),  # type: ignore[arg-type]
        evaluator="standalone", device="cpu-x-1t", latency="measured", trials={"done": results.counts["done"]},
        hypervolume=results.hypervolume(), reference=results.reference.point, final=False,
        members=tuple(map(searched_member, results.front())), others=(), knee=knee.id,
        searched_front=tuple(record.id for record in results.front()),
    )  # fmt: skip


def _table(folder: Path) -> str:
    import numpy as np

    from mixnas.predictors.measuring.measure import Window
    from mixnas.predictors.measuring.table import MeasurementTable, subject

    device, rng = "cpu-x-1t", np.random.default_rng(0)
    table = MeasurementTable.create_or_open(folder, device, "eager", 1, 0.2)
    provenance = table.add_provenance({"load": 0.5})
    for number in range(6):
        what = subject("unit", {"number": number}, {"macs": 12.5 * number}, 1)
        table.append([(what, Window(0, p, rng.uniform(1e5, 2e5, 5), 2e5, 2e5)) for p in range(3)], provenance)
    return device


# -- damage -------------------------------------------------------------------------------------------------------


def damages(data: bytes, cuts: int, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Versions of a file: cut at random places, and with one byte changed in one of several ways."""
    for _ in range(cuts):
        yield "cut", data[: rng.randrange(len(data))]
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    for number in range(flips):
        place = rng.choice(digits) if digits and number % 2 else rng.randrange(len(data))
        old = data[place]
        if number % 2 and chr(old).isdigit():
            new = ord(rng.choice([d for d in "0123456789" if ord(d) != old]))
        else:
            new = rng.choice([b for b in (0, old ^ (1 << rng.randrange(8)), 255 - old) if b != old])
        yield "flip", data[:place] + bytes([new]) + data[place + 1 :]


@dataclass
class Counts:
    """What came of it.

    Attributes:
        by: Right, refused and wrong by kind of file, reader and damage.
        wrong: A line for each that was wrong.
    """

    by: dict[str, Counter[str]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    @property
    def total(self) -> Counter[str]:
        """Of all."""
        return sum(self.by.values(), Counter())


def put(kind: Kind, data: bytes, place: Path) -> Path:
    """A copy of a file's folder, in which the file holds `data`."""
    shutil.rmtree(place, ignore_errors=True)
    if kind.folder.is_dir():
        shutil.copytree(kind.folder, place)
        path = place / kind.path.relative_to(kind.folder)
    else:
        place.mkdir(parents=True)
        path = place / kind.path.name
    path.write_bytes(data)
    return path


def ask(kind: Kind, read: Read, path: Path, whole: Any) -> tuple[str, str]:
    """Read a damaged file: "right", "refused" or "wrong", and why wrong."""
    try:
        found = read(path)
    except (IntegrityError, ConfigError) as error:
        said = str(error).replace(str(path.parent), "")
        fine = len(said) <= LONGEST and said.isprintable()
        return ("refused", "") if fine else ("wrong", f"a refusal of {len(said)} characters: {said[:400]!r}")
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {str(error)[:200]}"
    return ("right", "") if kind.right(whole, found) else ("wrong", "another answer")


def campaign(folder: Path, cuts: int, flips: int, seed: int) -> Counts:
    """Damage a file of every kind in every way, and read it in every way.

    Args:
        folder: To work in.
        cuts: Of each file, for each reader.
        flips: Likewise.
        seed: Of all that is drawn.
    """
    counts = Counts()
    place = folder / "damaged" / "r"
    for kind in kinds(folder):
        data = kind.path.read_bytes()
        for reader, read in kind.readers.items():
            rng = random.Random(f"{seed} {kind.name} {reader}")
            whole = read(put(kind, data, place))
            for damage, damaged in damages(data, cuts, flips, rng):
                status, why = ask(kind, read, put(kind, damaged, place), whole)
                key = f"{kind.name} / {reader} / {damage}"
                counts.by.setdefault(key, Counter())[status] += 1
                if status == "wrong":
                    counts.wrong.append(f"{key}: {why}")
    return counts


def as_json(counts: Counts) -> str:
    """For a file of results."""
    by = {key: dict(found) for key, found in counts.by.items()}
    return json.dumps({"total": dict(counts.total), "by": by, "wrong": counts.wrong}, indent=1)


def environment() -> dict[str, str]:
    """Of a child process that is counted: one thread."""
    return os.environ | {"OMP_NUM_THREADS": "1"}
