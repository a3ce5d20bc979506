"""Profile this machine's NVIDIA GPU on a space, through the Triton kernels, and write its table and predictor.

    python benchmarks/profile_gpu.py --size 224 --batch 1 --runtime graph --budget 500

Needs torch, triton, numpy, scikit-learn and pyyaml, and this folder: nothing has to be installed. Ends within the
budget, and goes on from the table where an earlier call ended: call it several times for a larger one. Image spaces get
a stem of stride 4 here (at 224 x 224 the first stage then has 56 x 56 positions); sequence spaces take `--size` as
their length. A batch size has a table of its own; the sizes of one device and runtime share theirs.
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

from mixnas.predictors.device import device_name, gpu_models  # noqa: E402
from mixnas.predictors.latency import SHIPPED  # noqa: E402
from mixnas.predictors.measure import MeasureConfig  # noqa: E402
from mixnas.predictors.profile import ProfileConfig, profile  # noqa: E402
from mixnas.search_space.files import load_yaml  # noqa: E402
from mixnas.search_space.network import IOSpec  # noqa: E402
from mixnas.search_space.space import SearchSpace  # noqa: E402


def image_space(plain: dict[str, Any]) -> dict[str, Any]:
    """The space with a stem that cuts the image into patches of 4 x 4."""
    changed = copy.deepcopy(plain)
    changed["stem"] = {"name": "patch", "patch_size": 4}
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", default="configs/digits.yaml", help="whose space (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="height and width, or length (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="inputs per forward (default: %(default)s)")
    parser.add_argument("--runtime", default="graph", help="graph or eager (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=500.0, help="seconds, everything (default: %(default)s)")
    parser.add_argument("--kind", choices=("image", "sequence", "causal"), default="image")
    parser.add_argument("-o", "--output", type=Path, help="directory (default: predictors/tables)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script out (default: %(default)s)")
    args = parser.parse_args()

    plain = load_yaml(ROOT / args.config)["space"]
    if args.kind == "image":
        plain = image_space(plain)
        io = IOSpec("image", (args.size, args.size), 3, 1000)
    else:
        io = IOSpec(args.kind, (args.size,), 8192, 8192, head="token", tokens=True)
    output = args.output or SHIPPED
    measure = MeasureConfig(batch_size=args.batch, window_ms=10.0)
    config = ProfileConfig(budget_s=args.budget, measure=measure)
    predictor = profile(
        SearchSpace.from_dict(plain),
        io,
        device=args.device,
        runtime=args.runtime,
        directory=output,
        config=config,
        plain=plain,
    )
    report = {
        "device": device_name(args.device),
        "gpus": gpu_models(),
        "runtime": args.runtime,
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
