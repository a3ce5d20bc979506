"""Today's default search against that of an earlier commit, on one machine and in one box. Part of `supernet.py`.

Two records of `supernet-hypervolume.json` do not compare: their boxes are of different networks, their latencies of
different machines. Here the earlier commit is unpacked beside this checkout, and both search their own embedded
default, seed by seed, each in a process of its own with no profile of this machine at hand. All networks of both are
then measured together, and the box is that of all of them, by the rule of `supernet_hypervolume.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from supernet_hypervolume import Point, curve, ever_on_front, measure

from mixnas.search.study.objectives import parse_objectives
from mixnas.search.study.pareto import Reference
from mixnas.search_space.architecture import Architecture

# What a process of either checkout does: that checkout's own benchmark searches, and what it found comes out as JSON.
_SEARCH = """
import json, sys
from pathlib import Path
import torch
import supernet_hypervolume
from mixnas.search.config import load_config
root, folder, out, threads, settings = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:]
torch.set_num_threads(threads)
search = getattr(supernet_hypervolume, "searched", None) or supernet_hypervolume._run
source = Path(root, "configs", "digits.yaml")
points, seconds, phases = search(load_config(source, settings=settings), source, Path(folder), "run")
points = [{"seconds": p.seconds, "architecture": p.architecture.to_dict(), "metrics": p.metrics} for p in points]
Path(out).write_text(json.dumps({"seconds": seconds, "phases": phases, "points": points}))
"""


def unpacked(commit: str, root: Path, folder: Path) -> Path:
    """That commit's files, from the history of the checkout at `root`."""
    tree = folder / "then"
    tree.mkdir()
    with subprocess.Popen(["git", "archive", commit], cwd=root, stdout=subprocess.PIPE) as archive:
        written = subprocess.run(["tar", "-x", "-C", str(tree)], stdin=archive.stdout, check=False)
    if archive.returncode or written.returncode:
        raise SystemExit(f"--against {commit}: git knows no such commit here. A shallow clone has no history.")
    return tree


def searched_by(root: Path, folder: Path, threads: int, settings: Sequence[str]) -> dict[str, Any]:
    """One search by the code at `root`: its seconds, its phases, and its networks."""
    folder.mkdir()
    package = folder / "src" / "mixnas"
    package.parent.mkdir()
    package.symlink_to(root, target_is_directory=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package.parent), str(root / "benchmarks")]),
        "MIXNAS_TABLES": str(folder / "tables"),  # each makes its own profile, as the first search of a machine does
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": str(threads),
    }
    out = folder / "found.json"
    command = [sys.executable, "-c", _SEARCH, str(root), str(folder), str(out), str(threads), *settings]
    subprocess.run(command, env=environment, cwd=folder, check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def run(args: argparse.Namespace, root: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Search, measure, compare; returns the record."""
    objectives = parse_objectives({"accuracy": "max", "latency_ms": "min", "params": "min"})
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        trees = {"then": unpacked(args.against, root, Path(folder)), "now": root}
        for seed in range(args.seeds):
            for kind in sorted(trees, reverse=seed % 2 == 0):  # in turns: a machine that slows down favours neither
                settings = [f"search.seed={seed}", *args.set]
                found = searched_by(trees[kind], Path(folder) / f"{kind}-{seed}", args.threads, settings)
                points = [
                    Point(one["seconds"], Architecture.from_dict(one["architecture"]), one["metrics"])
                    for one in found["points"]
                ]
                runs.append({**found, "kind": kind, "seed": seed, "networks": len(points), "points": points})
                say(f"seed {seed}, {kind}: {found['seconds']:.0f} s, {len(points)} networks, {found['phases']}")
    for r in runs:
        r["points"] = ever_on_front(r["points"], objectives)
    everything = [point for r in runs for point in r["points"]]
    measure(everything, args.threads)
    values = np.array([[point.metrics[o.name] for o in objectives] for point in everything])
    reference = Reference.of(values, objectives)
    ends = {kind: float(np.mean([r["seconds"] for r in runs if r["kind"] == kind])) for kind in trees}
    last = max(r["seconds"] for r in runs)
    times = np.linspace(0, last, 150)
    summary: dict[str, Any] = {}
    for kind in trees:
        mine = [r for r in runs if r["kind"] == kind]
        curves = np.array([curve(r["points"], times, reference, objectives) for r in mine])
        instants = {"end_of_then": ends["then"], "end_of_now": ends["now"], "final": last}
        at = {
            name: [curve(r["points"], np.array([t]), reference, objectives)[0] for r in mine]
            for name, t in instants.items()
        }
        summary[kind] = {
            "seconds": [r["seconds"] for r in mine],
            "hypervolume": {name: {"seeds": found, "mean": float(np.mean(found))} for name, found in at.items()},
            "curve": dict(zip(("mean", "low", "high"), (f(curves, axis=0).tolist() for f in (np.mean, np.min, np.max)),
                              strict=True)),
        }  # fmt: skip
        say(f"{kind}: {ends[kind]:.0f} s; hypervolume " + "; ".join(
            f"{name} ({instants[name]:.0f} s) {', '.join(f'{v:.4f}' for v in found)}, mean {np.mean(found):.4f}"
            for name, found in at.items()))  # fmt: skip
    for r in runs:
        r["points"] = [{"seconds": p.seconds, "id": p.architecture.id, "architecture": p.architecture.to_dict(),
                        "metrics": p.metrics} for p in r["points"]]  # fmt: skip
    plain: dict[str, Any] = json.loads(
        json.dumps({"against": args.against, "settings": args.set, "mean_end_s": ends, "summary": summary,
                    "reference": reference.point, "span": reference.span, "times": times.tolist(),
                    "objectives": {o.name: o.direction for o in objectives}, "runs": runs})
    )  # fmt: skip
    return plain
