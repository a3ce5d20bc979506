"""The parts of `tasks.py` on what is large: 200,000 pictures on disk, and the two spaces of real size."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _checkout import ROOT
from _tasks_common import NAS, say, timed, told, write
from PIL import Image

from mixnas.search.run.directory import Run

CLASSES, SIDE = 10, 32
PICTURES = 200_000
HERE = Path(__file__).resolve().parent

# -- 200,000 pictures -----------------------------------------------------------------------------------------------


def draw_class(folder: Path, label: int, count: int, seed: int) -> None:
    """`count` pictures of one class: a colour and a stripe of its own, on noise."""
    rng = np.random.default_rng([seed, label])
    place = folder / f"class_{label}"
    place.mkdir(parents=True)
    y, x = np.mgrid[:SIDE, :SIDE]
    for i in range(count):
        wave = np.sin((x * np.cos(label) + y * np.sin(label)) * 0.5 + rng.uniform(0, 6))
        colour = 128 + 60 * np.cos(label * np.array([1.0, 2.0, 3.0]))
        pixels = colour + 40 * wave[..., None] + rng.normal(0, 30, (SIDE, SIDE, 3))
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        picture.save(place / f"{i:05}.jpg", quality=85)


def draw_many(folder: Path, pictures: int, seed: int = 0) -> None:
    """The data set, its classes drawn side by side."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        each = pictures // CLASSES
        list(pool.map(draw_class, [folder] * CLASSES, range(CLASSES), [each] * CLASSES, [seed] * CLASSES))


STEPS = """
import json, resource, sys, time
sys.path.insert(0, {here!r})
from _checkout import use_checkout
use_checkout()
import torch
torch.set_num_threads(1)
from mixnas.evaluators.batches import Batches
from mixnas.evaluators.tasks import by_name
from mixnas.evaluators.training import TrainConfig, optimizer_of
from mixnas.search_space.architecture import Architecture
from mixnas.search_space.network import Network
told = json.loads(sys.argv[1])
began = time.monotonic()
task = by_name(told["task"])
ready = time.monotonic() - began
network = Network(Architecture.from_dict(told["architecture"]), task.io, generator=torch.Generator().manual_seed(0))
config = TrainConfig(batch_size=told["batch_size"])
optimizer = optimizer_of(network, config)
batches = Batches(task.train, config.batch_size, task.augment, torch.device("cpu"))
data = batches.forever(torch.Generator().manual_seed(0))
def steps(n):
    for _ in range(n):
        x, y = next(data)
        optimizer.zero_grad()
        task.training_loss(network(x), y).backward()
        optimizer.step()
steps(100)
began = time.monotonic()
steps(told["steps"])
took = time.monotonic() - began
began = time.monotonic()
indices = torch.arange(1000)
if not task.record()["in_memory"]:
    task.train.gather(indices)
decoding = time.monotonic() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps({{
    "steps_per_second": told["steps"] / took, "ready_seconds": ready, "peak_mib": peak,
    "in_memory": task.record()["in_memory"],
    "waited_share": batches._reader.waited_s / max(batches._reader.seconds, 1e-9),
    "pictures_decoded_per_second_by_one_process": 1000 / decoding if decoding > 0.01 else None,
}}))
"""

TRAINED = {
    "stem": {"name": "conv", "kernel_size": 3, "stride": 2},
    "norm": "layer",
    "stages": [
        {
            "width": 32,
            "blocks": [
                {"mixer": {"name": "dwconv", "kernel_size": 5}, "channel_mixer": {"name": "mlp", "expansion": 2}}
            ]
            * 3,
        }
    ],
}


def memory(args: Any) -> None:
    """A search on pictures that are decoded at each step: its peak memory; steps a second beside those in memory."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        home = Path(name)
        began = time.monotonic()
        draw_many(home / "many", args.pictures)
        drawn = time.monotonic() - began
        say(f"drew {args.pictures:,} pictures in {drawn:.0f} s")
        steps = {}
        # In turns, so that a busier minute falls on both: in memory, decoded at each step, and again.
        for label, gib in (("memory", 1.0), ("decoded", 0.05), ("memory again", 1.0), ("decoded again", 0.05)):
            told_ = {
                "task": {"name": "folder", "path": str(home / "many"), "size": SIDE, "channels": 3, "memory_gib": gib},
                "architecture": TRAINED,
                "batch_size": 64,
                "steps": args.steps,
            }
            program = STEPS.format(here=str(HERE))
            took, said = timed([sys.executable, "-c", program, json.dumps(told_)], home)
            steps[label] = json.loads(said.splitlines()[-1]) | {"process": took}
            say(f"{label}: {steps[label]}")
        changes = ["task.memory_gib=0.05", "search.time=60s", "supernet.seconds=120", "final.candidates=4"]
        settings = [word for change in [*changes, *args.set] for word in ("--set", change)]
        took, table = timed([*NAS, "search", "--data", "many", "--name", "many", *settings], home)
        say(f"{table}\nsearch: {took}")
        fast, slow = (
            max(steps[n]["steps_per_second"] for n in steps if n.startswith(k)) for k in ("memory", "decoded")
        )
        write(
            "memory",
            {
                **told(Run.open(home / "runs" / "many"), took),
                "pictures": args.pictures,
                "bytes_on_disk": sum(f.stat().st_size for f in (home / "many").rglob("*.jpg")),
                "drawing_seconds": drawn,
                "search_settings": changes,
                "peak_gib": took["peak_together_mib"] / 1024,
                "allowed_gib": 3,
                "steps": steps,
                "streamed_over_in_memory": slow / fast,
            },
        )


# -- spaces of real size --------------------------------------------------------------------------------------------

IMAGES = '''"""Sixteen pictures of noise: the task that configs/imagenet.yaml leaves to its reader."""

import torch

from mixnas import IOSpec, Split, Task


class Images(Task):
    name = "my_images"

    def __init__(self):
        self.io = IOSpec("image", (224, 224), in_features=3, num_outputs=1000)
        x = torch.randn(24, 224, 224, 3, generator=torch.Generator().manual_seed(0))
        self.train, self.validation, self.test = (Split(part, torch.arange(8)) for part in x.split(8))
'''

STEP = """
import json, resource, sys, time
sys.path.insert(0, {here!r})
from _checkout import use_checkout
use_checkout()
import numpy as np, torch
from mixnas.evaluators.supernet.training import SupernetConfig, train_supernet
from mixnas.evaluators.tasks import by_name
from mixnas.search.config import load_config
from mixnas.search_space.cost import cost
from mixnas.search_space.space import SearchSpace
from mixnas.search_space.supernet import Supernet
told = json.loads(sys.argv[1])
config = load_config(told["config"])
task = by_name(told["task"] or config.task.to_plain())
space = SearchSpace.from_dict(config.space)
began = time.monotonic()
supernet = Supernet(space, task.io, torch.Generator().manual_seed(0))
built = time.monotonic() - began
settings = SupernetConfig(
    steps=1, batch_size=told["batch_size"], samples=1, corners="none", distillation=0, ema=0, augment=False, lr=1e-3
)
began = time.monotonic()
result = train_supernet(supernet, task, settings, seed=told["seed"])
print(json.dumps({{
    "store_params": sum(p.numel() for p in supernet.parameters()),
    "building_seconds": built, "step_seconds": time.monotonic() - began, "loss": result.loss,
    "batch_size": told["batch_size"], "tokens_or_size": list(task.io.size),
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
}}))
"""

SIZES: dict[str, Any] = {
    "imagenet": {"batch_size": 2, "task": None, "needs_gib": 6},
    "lm": {
        "batch_size": 1,
        "needs_gib": 20,  # a store of two thousand million parameters, gradients and moments of those that a step moves
        "task": {
            "name": "mqar", "vocab_size": 8192, "length": 1024, "pairs": 64,
            "train_size": 8, "validation_size": 2, "test_size": 2,
        },
    },
}  # fmt: skip


def available_gib() -> float:
    """Memory that can be had without swapping."""
    (line,) = (one for one in Path("/proc/meminfo").read_text().splitlines() if one.startswith("MemAvailable:"))
    return int(line.split()[1]) / 2**20


def sizes(args: Any) -> None:
    """`space show`, `latency profile`, `query` for 1,000 architectures, and one step of a super-network, for both."""
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        (home / "my_images.py").write_text(IMAGES)
        for config, settings in SIZES.items():
            file = home / f"{config}.yaml"
            shutil.copy(ROOT / "configs" / file.name, file)
            found = record[config] = {}
            found["space_show"], said = timed([*NAS, "space", "show", file, "--json"], home)
            found["architectures"], found["choices"] = json.loads(said)["size"], len(json.loads(said)["variables"])
            say(f"{config}: space show {found['space_show']}")
            few = ["--set", f"task={json.dumps(settings['task'])}"] if settings["task"] else []
            asked = ["latency", "query", "-c", file, "--sample", "1000", "--json", *few]
            found["query_h100"], said = timed([*NAS, *asked, "--device", "nvidia-h100", "--estimate"], home)
            found["query_h100"]["median_ms"] = float(np.median([row["latency_ms"] for row in json.loads(said)]))
            say(f"{config}: query of an H100 {found['query_h100']}")
            if args.profile:
                tables = ["--tables", home / f"tables-{config}"]
                profile = ["latency", "profile", "-c", file, "--budget", args.profile, *tables, "--json", *few]
                found["profile_cpu"], said = timed([*NAS, *profile], home)
                found["profile_cpu"] |= {"budget": args.profile, "accuracy": json.loads(said)["accuracy"]}
                found["query_cpu"], said = timed([*NAS, *asked, *tables], home)
                found["query_cpu"]["median_ms"] = float(np.median([row["latency_ms"] for row in json.loads(said)]))
                say(f"{config}: profile {found['profile_cpu']}, query {found['query_cpu']}")
            if (there := available_gib()) < settings["needs_gib"]:
                found["supernet_step"] = f"left out: it needs {settings['needs_gib']} GiB, and {there:.0f} were free"
                say(f"{config}: a super-network's step was {found['supernet_step']}")
                continue
            told_ = {"config": str(file), "seed": 0, **settings}
            took, said = timed([sys.executable, "-c", STEP.format(here=str(HERE)), json.dumps(told_)], home)
            found["supernet_step"] = json.loads(said.splitlines()[-1]) | {"process": took}
            say(f"{config}: a super-network's step {found['supernet_step']}")
    write("sizes", record)
