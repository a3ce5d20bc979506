"""Everything that a GPU can tell, in one call of some minutes, on a machine that has only torch and this folder.

    python benchmarks/gpu.py --minutes 9 --out DIR
    python benchmarks/gpu.py --minutes 4 --out DIR --only measured
    python benchmarks/gpu.py --take DIR

Needs torch, triton, numpy, scikit-learn, pyyaml and a CUDA device; nothing has to be installed. The steps, each in a
process of its own with a share of the minutes; one that fails, hangs or dies stops no other:

    right     every kernel and every operator against float64: eagerly, compiled, in a CUDA graph
    tuned     launch configurations of the kernels that are furthest from their floors
    fast      the kernels against their floors and against what a user would take instead
    measured  networks of configs/imagenet.yaml and configs/lm.yaml; the latency predictor and what it is worth
    trained   steps of the super-network at real size, and a small search on this device

DIR gets at most eight files, none over 16 MiB. A second call goes on from what is in DIR, or in the checkout after
`--take`, which puts results where they belong: launch tables, predictors/tables, benchmarks/results, docs/kernels.md.
The last lines are a table of one screen. `--dry` tries all of it out on a CPU in small: that is no device's, and
`--take` refuses it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import math
import os
import shutil
import signal
import stat
import sys
import threading
import time
import traceback
from pathlib import Path

STARTED = time.monotonic()
sys.path.insert(0, str(Path(__file__).resolve().parent))
from _gpu_context import first_line  # noqa: E402
from _gpu_results import STEPS, WHY, unfit  # noqa: E402
from _gpu_steps import NO_GPU, OWNER, Run, checkout, devices_here, gpus_may_be_here, new_work, run_all  # noqa: E402

_CLOSING_S = 8.0  # for the table


def _end_with_parent() -> None:
    """Let this process, and all that it starts, end with the process that started it, however that ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def watch() -> None:  # gpu.py holds the other end, and writes nothing
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _as_step(arguments: argparse.Namespace) -> None:
    """What a step's own process does."""
    _end_with_parent()
    from _checkout import use_checkout

    use_checkout()
    from _gpu_context import Context

    if os.environ.get("TRITON_INTERPRET") == "1":  # of a dry run
        from mixnas.kernels.tools.interpreting import prepare_once

        prepare_once()
    context = Context(out=arguments.out, work=arguments.work, deadline=STARTED + arguments.seconds, dry=arguments.dry)
    step, _, part = arguments.step.partition(":")
    module = importlib.import_module(f"_gpu_{step}")
    if part:
        module.work(context, part, arguments.answers)
    else:
        module.run(context)


def _run(arguments: argparse.Namespace) -> int:
    out: Path = arguments.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"--out {out}: no folder can be made there ({error.strerror}). Give another.")
    if not os.access(out, os.W_OK | os.X_OK):
        sys.exit(f"--out {out}: nothing can be written there. Give another.")
    why = unfit(out, arguments.dry)
    if not why and not arguments.dry:
        why = unfit(out, False, *devices_here()[:1]) if gpus_may_be_here() else NO_GPU
    if why:
        sys.exit(why)
    from _gpu_take import bring

    work = new_work()
    run = Run(
        out=out,
        work=work,
        deadline=STARTED + 60 * arguments.minutes - _CLOSING_S,
        dry=arguments.dry,
        grace_s=arguments.grace,
        least_s=3.0 if arguments.dry else 15.0,
    )
    try:
        checkout(work)
        if not arguments.dry:
            bring(out)
        steps = [step for step in STEPS if arguments.only is None or step in arguments.only]
        call = run_all(run, steps, lambda text: print(f"[{time.monotonic() - STARTED:4.0f} s] {text}", flush=True))
    finally:
        if arguments.keep_work:
            (work / OWNER).unlink(missing_ok=True)  # no later call removes it
        else:
            shutil.rmtree(work, ignore_errors=True)
    if call["steps"]["machine"]["state"] == "refused":
        return 1
    from _gpu_table import table

    print("\n".join(table(out)), flush=True)
    ended = {step["state"] for step in call["steps"].values()}
    return 0 if ended <= {"done", "known", "incomplete", "left out"} else 1


def number(text: str) -> float:
    """A finite number that is not negative, for argparse."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no length of time")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the steps, take their results, or be one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=number, default=9.0, help="everything, this long (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results, gone on from if it has some")
    parser.add_argument("--only", action="append", choices=STEPS, help="only this step; may be given again")
    parser.add_argument("--dry", action="store_true", help="on a CPU, in small, to try it out")
    parser.add_argument("--take", type=Path, metavar="DIR", help="put the results in DIR where they belong")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the table of the results in DIR")
    parser.add_argument("--grace", type=number, default=12.0, help="seconds that a step may take over its share")
    parser.add_argument("--keep-work", action="store_true", help="keep the working folder")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.take is not None:
        from _gpu_take import take

        for line in take(arguments.take):
            print(line)
        return 0
    if arguments.table is not None:
        from _gpu_table import table

        if not any((arguments.table / f"{name}.json").is_file() for name in ("gpu", *STEPS)):
            sys.exit(f"--table {arguments.table}: no results of gpu.py are here.")
        print("\n".join(table(arguments.table)))
        return 0
    if arguments.out is None:
        parser.error("--out DIR is needed: where the results go")
    if arguments.minutes == 0:
        parser.error("argument --minutes: above 0 is wanted: everything takes 9 of them")
    if arguments.step is not None:
        if arguments.seconds is None or arguments.work is None:
            parser.error("--step is how gpu.py starts itself; use --only to run one step")
        _as_step(arguments)
        return 0
    return _run(arguments)


if __name__ == "__main__":
    code = 1
    try:
        code = main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException as error:
        traceback.print_exc()
        print(f"{WHY}{first_line(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no library's thread or exit handler holds the machine
