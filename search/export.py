"""Taking networks away from a run: trained weights, architecture, and how to load them, verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from mixnas.evaluators.tasks.loading import by_name
from mixnas.evaluators.training import evaluate
from mixnas.search.run.directory import Run
from mixnas.search.run.front import Front, Member
from mixnas.search.study.objectives import parse_filter
from mixnas.search_space.errors import ConfigError, IntegrityError, NasError, nearest
from mixnas.search_space.files import atomic_write, write_json
from mixnas.search_space.formats.safetensors import load_network, save_network

_LOADER = '''"""Loads the exported network. Needs the package mixnas and nothing else of the project that made it."""

from pathlib import Path

import torch
from mixnas.search_space.formats.safetensors import load_network

network = load_network(Path(__file__).with_name("model.safetensors"))  # weights, architecture and interface in one file

if __name__ == "__main__":
    example = network.io.example(1)
    with torch.inference_mode():
        print("input", tuple(example.shape), "output", tuple(network(example).shape))
'''


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


def export_run(run: Run, *, pick: str | None = None, where: str | None = None, output: str | None = None) -> list[Path]:
    """Write members of a run's front as folders with `model.safetensors`, `architecture.yaml`, `load.py`, `card.json`.

    Each is loaded again and judged on the test split: what is exported does what the front says.

    Args:
        run: A finished run.
        pick: Id, or the start of one.
        where: Filter over metrics; the knee when neither is given.
        output: Directory; the run's `exports/` if not given.

    Returns:
        The folders.

    Raises:
        IntegrityError: The exported network does not score what the front says.
    """
    written = []
    for member in pick_members(run.front(), pick, where):
        folder = (Path(output) if output else run.exports) / member.id
        network = load_network(run.networks / f"{member.id}.safetensors")
        plain = member.to_plain()
        card: dict[str, Any] = {
            "run": run.name,
            "task": run.manifest["fixed"]["task"],
            "versions": run.manifest["versions"],
            **{key: plain[key] for key in ("id", "metrics", "latency", "predicted") if key in plain},
        }
        save_network(folder / "model.safetensors", network, card)
        atomic_write(folder / "architecture.yaml", network.architecture.to_yaml())
        atomic_write(folder / "load.py", _LOADER)
        write_json(folder / "card.json", card)
        _verify(folder, card)
        written.append(folder)
    return written


def _verify(folder: Path, card: dict[str, Any]) -> None:
    task = by_name(card["task"])
    threads = torch.get_num_threads()
    score = evaluate(load_network(folder / "model.safetensors"), task, "test").score
    expected = card["metrics"][f"test_{task.metric}"]
    if abs(score - expected) > 1e-3 * max(1.0, abs(expected)):
        raise IntegrityError(
            f"{folder}: the exported network's test {task.metric} is {score:.4f}, and the front says {expected:.4f} "
            f"({threads} threads). Do not use it; resume the run and export again."
        )
    card["verified"] = {f"test_{task.metric}": score}
    atomic_write(folder / "card.json", json.dumps(card, indent=2) + "\n")
