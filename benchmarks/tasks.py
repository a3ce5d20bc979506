"""People's own data, from the data to an answer; each part is one run and writes one file in `benchmarks/results/`.

    python benchmarks/tasks.py pictures       600 pictures in 5 classes to a front: one command, no file written by hand

The data is drawn here, from a seed. Times are of the whole process, as somebody who waits sees them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import numpy as np  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from mixnas.predictors.measuring.device import provenance  # noqa: E402
from mixnas.search.run.directory import Run  # noqa: E402
from mixnas.search_space.files import write_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHAPES = ("circle", "cross", "ring", "square", "triangle")


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


def write(part: str, record: dict[str, Any]) -> None:
    """One result file."""
    path = RESULTS / f"tasks-{part}.json"
    write_json(path, {**record, "command": f"python benchmarks/tasks.py {part}", "provenance": provenance("cpu", 1)})
    say(f"wrote {path.relative_to(ROOT)}")


def timed(command: Sequence[str | Path], cwd: Path) -> tuple[dict[str, float], str]:
    """What a command that has to succeed took, and its stdout.

    Wall and processor seconds, the peak memory of its largest process so far (MiB), and what the machine's load was:
    above the number of cores, the wall clock is that of a machine that others use too.
    """
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    took = {
        "seconds": time.monotonic() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "load_average": os.getloadavg()[1],
    }
    return took, done.stdout


# -- pictures -----------------------------------------------------------------------------------------------------


def drawn(shape: str, rng: np.random.Generator) -> Image.Image:
    """One bright shape, somewhere, of any size and turn, on dull blotches, with noise; 64 to 112 pixels."""
    width, height = (int(n) for n in rng.integers(64, 113, 2))
    blotches = Image.fromarray(rng.integers(60, 120, (6, 6, 3), dtype=np.uint8))
    picture = blotches.resize((width, height), Image.Resampling.BICUBIC)
    extent = int(min(width, height) * rng.uniform(0.45, 0.85))
    mask = Image.new("L", (extent * 4, extent * 4))
    pen, e = ImageDraw.Draw(mask), extent * 4 - 1
    if shape in ("circle", "ring"):
        pen.ellipse((0, 0, e, e), fill=255)
        if shape == "ring":
            pen.ellipse((e * 0.28, e * 0.28, e * 0.72, e * 0.72), fill=0)
    elif shape == "square":
        pen.rectangle((e * 0.12, e * 0.12, e * 0.88, e * 0.88), fill=255)
    elif shape == "triangle":
        pen.polygon((e / 2, 0, e, e * 0.9, 0, e * 0.9), fill=255)
    else:
        pen.rectangle((e * 0.36, 0, e * 0.64, e), fill=255)
        pen.rectangle((0, e * 0.36, e, e * 0.64), fill=255)
    mask = mask.rotate(float(rng.uniform(0, 360)), Image.Resampling.BICUBIC).resize((extent, extent))
    place = int(rng.integers(0, width - extent + 1)), int(rng.integers(0, height - extent + 1))
    bright = rng.integers(0, 256, 3)
    bright[rng.integers(3)] = 255
    picture.paste(tuple(int(n) for n in bright), place, mask)
    pixels = np.asarray(picture) + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_folder(folder: Path, each: int, seed: int) -> None:
    """`each` pictures of every shape, half of them PNG, half JPEG."""
    rng = np.random.default_rng(seed)
    for shape in SHAPES:
        (folder / shape).mkdir(parents=True)
        for i in range(each):
            drawn(shape, rng).save(folder / shape / f"{i:04}.{'png' if i % 2 else 'jpg'}")


def pictures(args: argparse.Namespace) -> None:
    """The search, the export, and its answers to the files of pictures that nobody has seen."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        draw_folder(home / "shapes", 120, seed=0)
        draw_folder(home / "unseen", 40, seed=1)
        nas = [sys.executable, ROOT / "nas.py"]
        took, table = timed([*nas, "search", "--data", "shapes", "--name", "shapes"], home)
        say(f"{table}\nsearch: {took}")
        run = Run.open(home / "runs" / "shapes")
        front = run.front()
        exported, _ = timed([*nas, "export", "shapes", "--format", "safetensors,torch-export"], home)
        (folder,) = (home / "runs" / "shapes" / "exports").iterdir()
        files = sorted((home / "unseen").glob("*/*"))
        asked, said = timed([sys.executable, "-I", folder / "load.py", *files], home)
        answers = [line.split() for line in said.splitlines()]
        right: dict[str, list[bool]] = {}
        for path, file, label, _ in answers:
            right.setdefault(file, []).append(Path(path).parent.name == label)
        card = json.loads((folder / "card.json").read_text())
        data = run.data()
        write(
            "pictures",
            {
                "pictures": {key: data[key] for key in ("summary", "labels", "counts", "pictures")},
                "search": took,
                "allowed_seconds": 480,
                "cores": len(os.sched_getaffinity(0)),
                "phases": run.manifest["phases"],
                "trials": dict(front.trials),
                "front": [
                    {"id": m.id, **{k: m.values[k] for k in m.values}, "architecture": m.architecture}
                    for m in front.members
                ],
                "exported": {
                    "id": card["id"],
                    "took": exported,
                    "test_accuracy": card["metrics"]["test_accuracy"],
                    "unseen_pictures": len(files),
                    "unseen_accuracy": {file: float(np.mean(of)) for file, of in right.items()},
                    "took_for_all_unseen": asked,
                },
            },
        )


PARTS = {"pictures": pictures}


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
