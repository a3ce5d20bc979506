"""Profile this machine's NVIDIA GPU on a space, through the Triton kernels, and write its table and predictor.

    python benchmarks/profile_gpu.py --size 224 --batch 1
    python benchmarks/profile_gpu.py --size 224 --batch 32
    python benchmarks/profile_gpu.py --kind causal --size 1024
    python benchmarks/profile_gpu.py --kind causal --size 8192

Needs torch, triton, numpy, scikit-learn and pyyaml, and this folder: nothing has to be installed. Ends within the
budget, and goes on from the table where an earlier call ended: call it several times for a larger one. A call that is
killed loses the last seconds. Image spaces get a stem of stride 4 here (at 224 x 224 the first stage then has 56 x 56
positions); sequence spaces take `--size` as their length. A batch size has a table of its own; the sizes of one device
and runtime share theirs.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

from mixnas.predictors.latency.predictor import SHIPPED  # noqa: E402
from mixnas.predictors.latency.profile import ProfileConfig, profile  # noqa: E402
from mixnas.predictors.measuring.device import device_name, gpu_models  # noqa: E402
from mixnas.predictors.measuring.measure import MeasureConfig  # noqa: E402
from mixnas.search_space.errors import ConfigError  # noqa: E402
from mixnas.search_space.files import load_yaml  # noqa: E402
from mixnas.search_space.space import SearchSpace  # noqa: E402
from mixnas.search_space.units import IOSpec  # noqa: E402


def image_space(plain: dict[str, Any]) -> dict[str, Any]:
    """The space with a stem that cuts the image into patches of 4 x 4."""
    changed = copy.deepcopy(plain)
    changed["stem"] = {"name": "patch", "patch_size": 4}
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", help="whose space (default: configs/digits.yaml; of sequences mqar.yaml)")
    parser.add_argument("--size", type=int, default=224, help="height and width, or length (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="inputs per forward (default: %(default)s)")
    parser.add_argument("--runtime", help="graph or eager (default: graph; eager on a CPU)")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds, everything (default: %(default)s)")
    parser.add_argument("--kind", choices=("image", "sequence", "causal"), default="image")
    parser.add_argument("-o", "--output", type=Path, help="directory (default: predictors/tables)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out (default: %(default)s)")
    args = parser.parse_args()

    given = load_yaml(ROOT / (args.config or f"configs/{'digits' if args.kind == 'image' else 'mqar'}.yaml"))
    plain, runtime = given["space"], args.runtime or ("eager" if args.device == "cpu" else "graph")
    if args.kind == "image":
        plain = image_space(plain)
        io = IOSpec("image", (args.size, args.size), 3, 1000)
    else:
        task = given["task"]
        vocabulary = task.get("vocab_size", 8192) if isinstance(task, dict) else 8192
        io = IOSpec(args.kind, (args.size,), vocabulary, vocabulary, head="token", tokens=True)
    output = args.output or SHIPPED
    measure = MeasureConfig(batch_size=args.batch, window_ms=10.0)
    config = ProfileConfig(budget_s=args.budget, measure=measure)
    try:
        predictor = profile(
            SearchSpace.from_dict(plain),
            io,
            device=args.device,
            runtime=runtime,
            directory=output,
            config=config,
            plain=plain,
        )
    except ConfigError as error:  # among others: too few measurements yet
        kept = f"\nWhat was measured is kept in {output}; the next call goes on from there."
        sys.exit(f"{error}{kept if any(output.glob('*.csv')) else ''}")
    report = {
        "device": device_name(args.device),
        "gpus": gpu_models(),
        "runtime": runtime,
        "batch": args.batch,
        "size": args.size,
        "units": predictor.meta["num_units"],
        "networks": predictor.meta["num_networks"],
        "accuracy": predictor.accuracy,
        "half_width_log": predictor.half_width,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
