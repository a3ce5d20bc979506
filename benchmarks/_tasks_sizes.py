"""The parts of `tasks.py` on what is large: 200,000 pictures on disk, and the two spaces of real size."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _checkout import ROOT
from _tasks_common import NAS, Clock, say, timed, told
from PIL import Image

from mixnas.search.run.directory import Run

CLASSES, SIDE = 10, 32
PROFILE = 0.15  # of the part's time, for each space
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


ROUNDS = """
import json, sys, time
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
ends = time.monotonic() + told["seconds"]
config = TrainConfig(batch_size=told["batch_size"])
class Arm:
    def __init__(self, gib):
        began = time.monotonic()
        self.task = by_name({{**told["task"], "memory_gib": gib}})
        self.ready = time.monotonic() - began
        generator = torch.Generator().manual_seed(0)
        self.network = Network(Architecture.from_dict(told["architecture"]), self.task.io, generator=generator)
        self.optimizer = optimizer_of(self.network, config)
        self.batches = Batches(self.task.train, config.batch_size, self.task.augment, torch.device("cpu"))
        self.data = self.batches.forever(torch.Generator().manual_seed(0))
        self.per_second = []
    def steps(self, n):
        began = time.monotonic()
        for _ in range(n):
            x, y = next(self.data)
            self.optimizer.zero_grad()
            self.task.training_loss(self.network(x), y).backward()
            self.optimizer.step()
        self.per_second.append(n / (time.monotonic() - began))
arms = {{"memory": Arm(1.0), "decoded": Arm(0.05)}}
print("both are ready", {{name: round(arm.ready) for name, arm in arms.items()}}, file=sys.stderr, flush=True)
for arm in arms.values():
    arm.steps(50)
    arm.per_second.clear()
# In turns, so that a busier minute falls on both; the readers of one are asked for nothing while the other steps.
while time.monotonic() < ends or len(arms["decoded"].per_second) < 3:
    for arm in arms.values():
        arm.steps(told["steps"])
task = arms["decoded"].task
began = time.monotonic()
task.train.gather(torch.arange(1000))
decoding = 1000 / (time.monotonic() - began)
print(json.dumps({{
    name: {{
        "in_memory": arm.task.record()["in_memory"], "ready_seconds": arm.ready, "steps_per_second": arm.per_second,
        "waited_share": arm.batches._reader.waited_s / max(arm.batches._reader.seconds, 1e-9),
    }}
    for name, arm in arms.items()
}} | {{"pictures_decoded_per_second_by_one_process": decoding}}))
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


def memory(args: Any, clock: Clock) -> None:
    """A search on pictures that are decoded at each step: its peak memory; steps a second beside those in memory."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        home = Path(name)
        draw_many(home / "many", args.pictures)
        drawn = clock.gone
        say(f"drew {args.pictures:,} pictures in {drawn:.0f} s")
        asked = {
            "task": {"name": "folder", "path": str(home / "many"), "size": SIDE, "channels": 3},
            "architecture": TRAINED,
            "batch_size": 64,
            "steps": 100,
            "seconds": 0.45 * clock.seconds,
        }
        took, said = timed([sys.executable, "-c", ROUNDS.format(here=str(HERE)), json.dumps(asked)], home)
        steps = json.loads(said.splitlines()[-1])
        pairs = zip(steps["decoded"]["steps_per_second"], steps["memory"]["steps_per_second"], strict=True)
        ratios = sorted(slow / fast for slow, fast in pairs)
        say(f"decoded at each step over in memory, of {len(ratios)} rounds: {ratios[len(ratios) // 2]:.3f}; {took}")
        left = clock.left
        changes = [
            "task.memory_gib=0.05",
            f"latency.profile={max(10, 0.1 * left):.0f}s",
            f"supernet.seconds={max(10, 0.25 * left):.0f}",
            f"search.time={max(10, 0.15 * left):.0f}s",
            "final.candidates=4",
            "final.train.steps=200",
            *args.set,
        ]
        settings = [word for change in changes for word in ("--set", change)]
        took, table = timed([*NAS, "search", "--data", "many", "--name", "many", *settings], home)
        say(f"{table}\nsearch: {took}")
        clock.write(
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
                "streamed_over_in_memory": ratios[len(ratios) // 2],
                "of_rounds": ratios,
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
open('/proc/self/oom_score_adj', 'w').write('1000')  # where memory ends, this ends, and nobody else
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


def sizes(args: Any, clock: Clock) -> None:
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
            tables, budget = ["--tables", home / f"tables-{config}"], f"{PROFILE * clock.seconds:.0f}s"
            profile = ["latency", "profile", "-c", file, "--budget", budget, *tables, "--json", *few]
            found["profile_cpu"], said = timed([*NAS, *profile], home)
            found["profile_cpu"] |= {"budget": budget, "accuracy": json.loads(said)["accuracy"]}
            found["query_cpu"], said = timed([*NAS, *asked, *tables], home)
            found["query_cpu"]["median_ms"] = float(np.median([row["latency_ms"] for row in json.loads(said)]))
            say(f"{config}: profile {found['profile_cpu']}, query {found['query_cpu']}")
            if (there := available_gib()) < settings["needs_gib"]:
                found["supernet_step"] = f"left out: it needs {settings['needs_gib']} GiB, and {there:.0f} were free"
                say(f"{config}: a super-network's step was {found['supernet_step']}")
                continue
            told_ = {"config": str(file), "seed": 0, **settings}
            try:
                took, said = timed([sys.executable, "-c", STEP.format(here=str(HERE)), json.dumps(told_)], home)
            except subprocess.CalledProcessError as error:
                if error.returncode != -signal.SIGKILL:
                    raise
                found["supernet_step"] = f"was ended by the system: {there:.0f} GiB were free, and it needed more"
                say(f"{config}: a super-network's step {found['supernet_step']}")
                continue
            found["supernet_step"] = json.loads(said.splitlines()[-1]) | {"process": took}
            say(f"{config}: a super-network's step {found['supernet_step']}")
    clock.write("sizes", record)
