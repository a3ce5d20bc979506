"""People's own data, from the data to an answer; each part is one run and writes one file in `benchmarks/results/`.

    python benchmarks/tasks.py pictures           600 pictures in 5 classes to a front: one command, no other file
    python benchmarks/tasks.py mqar               attention, gated convolutions, and what a search makes of both
    python benchmarks/tasks.py bytes              bits per byte against latency, beside transformers
    python benchmarks/tasks.py super_resolution   PSNR against latency, beside bicubic interpolation and ESPCN
    python benchmarks/tasks.py segmentation       mean intersection over union on drawn shapes
    python benchmarks/tasks.py memory             200,000 pictures on disk: peak memory, and steps a second
    python benchmarks/tasks.py sizes              the two spaces of real size: seconds and memory

Each keeps to a budget of wall-clock time, which `--budget` changes: the phases of its search and what is trained beside
it take their shares of it. The data is drawn here, from a seed. Times are of the whole process, as somebody who waits
sees them; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import numpy as np  # noqa: E402
from _tasks_common import CORES, NAS, RESULTS, Clock, say, timed  # noqa: E402
from _tasks_dense import segmentation, super_resolution  # noqa: E402
from _tasks_sequences import bytes_, mqar  # noqa: E402
from _tasks_sizes import PICTURES, memory, sizes  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

from mixnas.search.config import load_config  # noqa: E402
from mixnas.search.run.directory import Run  # noqa: E402
from mixnas.search_space.settings import parse_duration  # noqa: E402

SHAPES = ("circle", "cross", "ring", "square", "triangle")


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


def scaled(by: float) -> list[str]:
    """Settings that make each phase of the embedded configuration so many times as long; none for 1: one command."""
    if by == 1:
        return []
    plain = load_config(ROOT / "configs" / "pictures.yaml")
    assert plain.search.time is not None and plain.supernet.seconds is not None and plain.final.train.steps is not None
    return [
        f"latency.profile={plain.latency.profile * by:.0f}s",
        f"supernet.seconds={plain.supernet.seconds * by:.0f}",
        f"search.time={plain.search.time * by:.0f}s",
        f"final.train.steps={max(1, round(plain.final.train.steps * by))}",
    ]


def pictures(args: argparse.Namespace, clock: Clock) -> None:
    """The search, the export, and its answers to the files of pictures that nobody has seen."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        draw_folder(home / "shapes", 120, seed=0)
        draw_folder(home / "unseen", 40, seed=1)
        changes = [*scaled(clock.seconds / BUDGETS["pictures"]), *args.set]
        settings = [word for change in changes for word in ("--set", change)]
        took, table = timed([*NAS, "search", "--data", "shapes", "--name", "shapes", *settings], home)
        say(f"{table}\nsearch: {took}")
        run = Run.open(home / "runs" / "shapes")
        front = run.front()
        exported, _ = timed([*NAS, "export", "shapes", "--format", "safetensors,torch-export"], home)
        (folder,) = (home / "runs" / "shapes" / "exports").iterdir()
        files = sorted((home / "unseen").glob("*/*"))
        asked, said = timed([sys.executable, "-I", folder / "load.py", *files], home)
        answers = [line.split() for line in said.splitlines()]
        right: dict[str, list[bool]] = {}
        for path, file, label, _ in answers:
            right.setdefault(file, []).append(Path(path).parent.name == label)
        card = json.loads((folder / "card.json").read_text())
        data = run.data()
        clock.write(
            "pictures",
            {
                "pictures": {key: data[key] for key in ("summary", "labels", "counts", "pictures")},
                "search": took,
                "settings": changes,
                "allowed_seconds": 480,
                "cores": CORES,
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


PARTS = {
    "pictures": pictures,
    "mqar": mqar,
    "bytes": bytes_,
    "super_resolution": super_resolution,
    "segmentation": segmentation,
    "memory": memory,
    "sizes": sizes,
}


BUDGETS = {
    "pictures": 480,
    "mqar": 600,
    "bytes": 900,
    "super_resolution": 480,
    "segmentation": 360,
    "memory": 480,
    "sizes": 360,
}
"""Seconds on two cores."""


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--budget", metavar="TIME", help="wall-clock time of the part, such as 8m; by default its own")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the search: to try a part")
    parser.add_argument("-o", "--results", type=Path, default=RESULTS, help="folder of the record: to try a part")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="of memory: so many are drawn")
    parser.add_argument("--scratch", help="of memory: a folder on the disk that is meant")
    args = parser.parse_args()
    budget = BUDGETS[args.part] if args.budget is None else parse_duration(args.budget, "--budget")
    say(f"{args.part}: some {budget:.0f} s")
    PARTS[args.part](args, Clock(budget, args.results))


if __name__ == "__main__":
    main()
