"""Taking networks away from a run: as files that other programs load, each loaded and compared before it counts."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.tasks.task import Task
from mixnas.evaluators.training import evaluate
from mixnas.search.run.directory import Run
from mixnas.search.run.front import Front, Member
from mixnas.search.run.trust import require_trust
from mixnas.search.study.objectives import parse_filter
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError, nearest
from mixnas.search_space.files import atomic_write, write_json
from mixnas.search_space.formats import format as formats
from mixnas.search_space.formats.format import Answer, Format
from mixnas.search_space.formats.safetensors import load_network
from mixnas.search_space.network import IOSpec, Network

_COMPARED = 64  # inputs of the test split

_ARCHITECTURE, _LOADER, _CARD = "architecture.yaml", "load.py", "card.json"

_LOADER_HEAD = '''"""Loads the exported network. What a function here gives answers a batch: arrays in, arrays out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

'''

_LOADER_TAIL = """

FILES = {{{files}}}

if __name__ == "__main__":
    example = np.zeros({shape}, dtype=np.{dtype})
    for name, load in FILES.items():
        print(name, "input", example.shape, "output", load(Path(__file__).with_name(name))(example).shape)
"""


def pick_members(front: Front, pick: str | None, where: str | None) -> list[Member]:
    """Members of a final front: one by its id (or the start of it), those that satisfy a filter, or the knee.

    Raises:
        ConfigError: No such id, or nothing satisfies the filter.
        NasError: The run has no final front yet.
    """
    if not front.final:
        raise NasError(f"{front.run}: the search has not come to its final networks. nas resume {front.run}")
    if pick is not None:
        found = [m for m in (*front.members, *front.others) if m.id.startswith(pick)]
        if len(found) != 1:
            ids = [m.id for m in front.members]
            problem = "stands for several networks" if found else "is none of the final networks"
            raise ConfigError(f"{pick!r} {problem}.{nearest(pick, ids)} The front: {', '.join(ids)}.")
        return found
    if where is not None:
        wanted = parse_filter(where, known=sorted({name for m in front.members for name in m.values}))
        found = [m for m in front.members if wanted.holds(m.values)]
        if not found:
            raise ConfigError(f"--where: no network of the front satisfies {where!r}. See them: nas front {front.run}")
        return found
    return [m for m in front.members if m.id == front.knee]


def export_run(
    run: Run,
    *,
    format_names: Sequence[str] = ("safetensors",),
    pick: str | None = None,
    where: str | None = None,
    output: str | None = None,
    trust: bool = False,
) -> list[Path]:
    """Write members of a run's front as folders: files of the network as deployed, architecture, `load.py`, card.

    Every file is loaded in its own way, its outputs are compared with those of the deployed network, and it is judged
    on the test split: what is exported does what the front says. Until all of it does, nothing has its final name.

    Args:
        run: A finished run.
        format_names: Formats, see `formats.names()`.
        pick: Id, or the start of one.
        where: Filter over metrics; the knee when neither is given.
        output: Directory; the run's `exports/` if not given.
        trust: Whether a task that is not of the package may be run though the run was not started here with it.

    Returns:
        The folders.

    Raises:
        ConfigError: No such format or network, or a format can't hold one of the networks, or lacks a package.
        IntegrityError: A file's outputs are not the network's, or its score is not what the front says.

    Examples:
        After the example of `mixnas.search`:

        >>> import mixnas
        >>> (folder,) = mixnas.export(mixnas.Run.open("small"), output="exported")
        >>> sorted(path.name for path in folder.iterdir())
        ['architecture.yaml', 'card.json', 'load.py', 'model.safetensors']
    """
    require_trust(run.manifest, run.path, "export", trust)
    wanted = [formats.get(name) for name in dict.fromkeys(format_names)]
    for file_format in wanted:
        formats.require(file_format)
    chosen = []
    for member in pick_members(run.front(), pick, where):
        network = load_network(run.networks / f"{member.id}.safetensors").deploy()
        if network.architecture.id != member.id:
            raise IntegrityError(
                f"{run.networks / member.id}.safetensors: damaged: it holds {network.architecture.id}, another network."
            )
        for file_format in wanted:
            if problem := file_format.why_not(network):
                raise ConfigError(f"{member.id} cannot be exported as {file_format.name}: {problem}.")
        chosen.append((member, network))
    task = by_name(run.manifest["fixed"]["task"])
    root = Path(output) if output else run.exports
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    held = contextlib.ExitStack()
    if output is None:  # the run is written
        held.enter_context(run)
    root.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(dir=root, prefix=".exporting-"))
    try:
        for member, network in chosen:
            _write(making / member.id, wanted, network, task, _card(run, member))
        return [_publish(making / member.id, root / member.id) for member, _ in chosen]
    finally:
        shutil.rmtree(making)
        held.close()
        with contextlib.suppress(OSError):  # they go only if nothing is in them
            for folder in made or [root]:
                folder.rmdir()


def _card(run: Run, member: Member) -> dict[str, Any]:
    plain = member.to_plain()
    origin = {"run": run.name, "task": run.manifest["fixed"]["task"], "versions": run.manifest["versions"]}
    return {**origin, **{key: plain[key] for key in ("id", "metrics", "latency", "predicted") if key in plain}}


def _write(folder: Path, wanted: Iterable[Format], network: Network, task: Task, card: dict[str, Any]) -> None:
    """Fill a folder, and verify each file in it."""
    folder.mkdir()
    inputs, _ = task.test.gather(torch.arange(min(_COMPARED, len(task.test))))
    metric = f"test_{task.metric}"
    expected = card["metrics"][metric]
    share = max(1e-3, formats.tolerance(network))
    verified = {metric: _score(network, task, expected, share, folder.name)}
    files = {}
    for file_format in wanted:
        path = folder / file_format.file_name
        file_format.write(network, path, card)
        agreement = formats.verify(file_format, path, network, inputs)
        answer = formats.load(file_format, path)
        files[path.name] = {
            "format": file_format.name,
            "bytes": path.stat().st_size,
            "weight_bytes": file_format.weight_bytes(path),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "verified": {
                "inputs": agreement.inputs,
                "difference": agreement.difference,
                "allowed": agreement.allowed,
                metric: _score(_Answering(answer), task, expected, share, path.name),
            },
        }
    atomic_write(folder / _ARCHITECTURE, network.architecture.to_yaml())
    atomic_write(folder / _LOADER, _loader(wanted, network.io))
    write_json(folder / _CARD, {**card, "io": network.io.to_plain(), "files": files, "verified": verified})


class _Answering(nn.Module):
    """A loaded file, to be judged as a network is."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self._answer(x.numpy()))


def _score(network: nn.Module, task: Task, expected: float, share: float, what: str) -> float:
    """The test metric, if it is what the front says, but for this share of it."""
    score = evaluate(network, task, "test").score
    if not abs(score - expected) <= share * max(1.0, abs(expected)):
        raise IntegrityError(
            f"{what}: the exported network's test {task.metric} is {score:.4f}, and the front says {expected:.4f} "
            f"({torch.get_num_threads()} threads). Resume the run and export again."
        )
    return score


def _loader(wanted: Iterable[Format], io: IOSpec) -> str:
    """The text of `load.py`: the functions by which the files were verified."""
    functions = "".join(f"\n{inspect.getsource(file_format.load)}\n" for file_format in wanted)
    files = ", ".join(f'"{f.file_name}": {f.load.__name__}' for f in wanted)
    example = io.example(1).numpy()
    return _LOADER_HEAD + functions + _LOADER_TAIL.format(files=files, shape=example.shape, dtype=example.dtype)


def _publish(made: Path, folder: Path) -> Path:
    """Put a finished folder under its name. What somebody else laid into an earlier one of that name moves along."""
    if folder.exists():
        ours = {_ARCHITECTURE, _LOADER, _CARD, *(formats.get(name).file_name for name in formats.names())}
        for entry in folder.iterdir():
            if entry.name not in ours:
                os.replace(entry, made / entry.name)
        os.replace(folder, made.with_name(f"{made.name}.before"))
    os.replace(made, folder)
    return folder
