"""How good the latency predictor is: profile this machine from nothing, then measure networks that the fit never saw.

    python benchmarks/latency.py
    python benchmarks/latency.py growth

The first writes `benchmarks/results/latency-<device>.<runtime>.json`, or `latency-mixed-...` with `-c
configs/mixed.yaml`: the error on held-out networks beside the noise ceiling (two independent measurements of the same
networks) and beside simpler predictors from the same measurements, the time from nothing to a fitted predictor, and the
speed of predictions. The second registers toy operators, fifty mixers, fifteen gates, fifteen channel mixers and nine
policies, and writes `latency-growth-<device>.json`: the seconds of all that a space of them goes through. Both want a
quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _checkout import ROOT, use_checkout

use_checkout()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _growth import grow, rate  # noqa: E402
from _record import said, sayable  # noqa: E402

from mixnas.predictors.latency.fit import accuracy  # noqa: E402
from mixnas.predictors.latency.predictor import LatencyPredictor  # noqa: E402
from mixnas.predictors.latency.profile import ProfileConfig, Profiler, profile  # noqa: E402
from mixnas.predictors.latency.transfer import transfer_curve  # noqa: E402
from mixnas.predictors.measuring import runtimes  # noqa: E402
from mixnas.predictors.measuring.device import provenance  # noqa: E402
from mixnas.predictors.measuring.measure import (  # noqa: E402
    MeasureConfig,
    Measurement,
    fixed_threads,
    measure_networks,
)
from mixnas.predictors.measuring.sentinel import make_sentinel, sentinel_module  # noqa: E402
from mixnas.predictors.measuring.table import MeasurementTable  # noqa: E402
from mixnas.search_space.architecture import Architecture  # noqa: E402
from mixnas.search_space.cost import cost  # noqa: E402
from mixnas.search_space.files import load_yaml, write_json  # noqa: E402
from mixnas.search_space.network import Network  # noqa: E402
from mixnas.search_space.space import SearchSpace  # noqa: E402
from mixnas.search_space.units import IOSpec  # noqa: E402

DIGITS = IOSpec("image", (8, 8), 1, 10)  # the task of configs/digits.yaml; evaluators are not needed to measure


def measure(
    architectures: list[Architecture], runtime: str, config: MeasureConfig, reference_ms: float, seed: int
) -> list[Measurement]:
    """One independent measurement: networks built anew, other weights and inputs, passes of their own."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    calls = []
    for architecture in architectures:
        network = Network(architecture, DIGITS, generator=generator).eval().requires_grad_(False).deploy().to(device)
        inputs = DIGITS.example(config.batch_size, generator=generator).to(device)
        calls.append(runtimes.prepare(network, inputs, runtime, config.threads))
    sentinel = make_sentinel(device)
    if runtime == "graph":
        sentinel = runtimes.prepare(*sentinel_module(device), "graph", config.threads)
    return measure_networks(
        calls,
        rng=np.random.default_rng(seed),
        config=config,
        sentinel=sentinel,
        reference_ms=reference_ms,
        clock=runtimes.clock_of(runtime, device),
    )


def baselines(
    table: MeasurementTable, predictor: LatencyPredictor, space: SearchSpace, unseen: list[Architecture], seed: int
) -> dict[str, np.ndarray]:
    """Predictions of simpler predictors, each given every network that the table holds."""
    from sklearn.ensemble import RandomForestRegressor

    found = table.measurements("network")
    seen = [Architecture.from_canonical(table.subjects[i].config["architecture"]) for i in found]
    latency = np.array([value.latency.ms for value in found.values()])
    forest = RandomForestRegressor(n_estimators=300, random_state=seed, n_jobs=1)
    forest.fit(space.encode_many(seen), np.log(latency))

    def total(architecture: Architecture) -> float:
        rows = [predictor.profiled.units.find(unit) for _, unit in predictor.plan(architecture, DIGITS)]
        return float(predictor.profiled.alone_ms[rows].sum())

    macs_seen = np.array([cost(a, DIGITS).macs for a in seen], dtype=float)
    macs = np.array([cost(a, DIGITS).macs for a in unseen], dtype=float)
    # The line of least relative error; with an intercept, so that a count of zero need not take no time.
    design = np.stack([macs_seen, np.ones(len(macs_seen))], axis=1) / latency[:, None]
    slope, intercept = np.linalg.lstsq(design, np.ones(len(latency)), rcond=None)[0]
    return {
        "random forest on raw dimensions": np.exp(forest.predict(space.encode_many(unseen))),
        "plain sum of units": np.array([total(a) for a in unseen]),
        "multiply-accumulates, a line": np.maximum(slope * macs + intercept, 1e-6),
    }


def speeds(predictor: LatencyPredictor, space: SearchSpace, tables: Path, config: str) -> dict[str, Any]:
    """Architectures a second of `predict_many`, microseconds of one `predict`, seconds of a cold query."""
    many = rate(predictor, space, 1_000_000)
    architectures = space.decode_many(space.sample_many(300, np.random.default_rng(5)))
    single = []
    for architecture in architectures:
        begun = time.perf_counter()
        predictor.predict(architecture, DIGITS)
        single.append(1e6 * (time.perf_counter() - begun))
    command = [
        sys.executable, str(ROOT / "nas.py"), "latency", "query", "--device", predictor.device, "--tables", str(tables),
        "-c", config, "--sample", "3", "--json",
    ]  # fmt: skip
    cold = []
    for _ in range(7):
        begun = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        cold.append(time.perf_counter() - begun)
        assert len(json.loads(done.stdout)) == 3
    return {
        "predict_many_per_second": many,
        "predict_us": {"median": statistics.median(single), "p95": float(np.percentile(single, 95))},
        "query_cold_s": {"median": statistics.median(cold), "min": min(cold), "max": max(cold)},
    }


def transferred(
    predictor: LatencyPredictor, space: SearchSpace, tables: Path, config: MeasureConfig, seed: int
) -> list[dict[str, float]] | str:
    """Error against the number of measured networks on another device: this CPU with two threads an operator."""
    if torch.cuda.is_available() or predictor.runtime != "eager" or (os.cpu_count() or 1) < 2:
        return "not measured: needs a CPU with two cores, eager"
    settings = ProfileConfig(max_networks=120, measure=replace(config, threads=2), seed=seed)
    with fixed_threads(2):
        profiler = Profiler(space, DIGITS, device="cpu", runtime="eager", directory=tables, config=settings)
        profiler.run(time.monotonic() + 60, 1.0)
    rng = np.random.default_rng(seed)
    measured = sum(what.kind == "network" for what in profiler.table.subjects.values())
    sizes = [size for size in (4, 8, 16, 32, 64) if size < 0.7 * measured]
    return transfer_curve(profiler.table, predictor, sizes, 20, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("accuracy", "growth"), default="accuracy")
    parser.add_argument("-c", "--config", default="configs/digits.yaml", help="whose space (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds of profiling (default: %(default)s)")
    parser.add_argument("--networks", type=int, default=200, help="held-out networks (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=3, help="passes per measurement (default: %(default)s)")
    parser.add_argument("--runtime", default="eager", help="eager, compiled, onnxruntime, graph (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--keep", type=Path, help="keep the table and the predictor in this directory")
    args = parser.parse_args()
    if args.what == "growth":
        growth(args)
    else:
        held_out(args)


def growth(args: argparse.Namespace) -> None:
    """A space of many operators and policies."""
    config = MeasureConfig(passes=args.passes)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as temporary, fixed_threads(config.threads):
        found = grow(DIGITS, args.keep or Path(temporary), args.budget, config)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    record = {
        "what": "a space of eighty operators on the axes of a block and nine policies",
        "command": "python benchmarks/latency.py " + said(sys.argv[1:]),
        "provenance": provenance(kind, config.threads) | {"load_average_before": round(load_before, 2)},
        **found,
    }
    record = sayable(record)
    write_json(args.output / f"latency-growth-{record['provenance']['device']}.json", record)
    print(json.dumps(record, indent=2))


def held_out(args: argparse.Namespace) -> None:
    """The predictor on networks that its fit never saw."""
    given = load_yaml(ROOT / args.config)
    plain = {"task": given["task"], "space": given["space"]}
    space = SearchSpace.from_dict(given["space"])
    config = MeasureConfig(passes=args.passes)
    with tempfile.TemporaryDirectory() as temporary, fixed_threads(config.threads):
        tables = args.keep or Path(temporary)
        begun = time.perf_counter()
        settings = ProfileConfig(budget_s=args.budget, measure=config, seed=args.seed)
        load_before = os.getloadavg()[0]
        predictor = profile(space, DIGITS, runtime=args.runtime, directory=tables, config=settings, plain=plain)
        profile_s = time.perf_counter() - begun
        print(f"profiled in {profile_s:.0f} s: {predictor.accuracy}", file=sys.stderr)

        table = MeasurementTable.load(tables, predictor.device, predictor.tag)
        known = {json.dumps(w.config["architecture"]) for w in table.subjects.values() if w.kind == "network"}
        candidates = space.decode_many(space.sample_many(2 * args.networks, np.random.default_rng([args.seed, 1])))
        unseen = [a for a in dict.fromkeys(candidates) if json.dumps(a.to_dict()) not in known][: args.networks]
        first, second = (
            measure(unseen, args.runtime, config, table.reference_ms, seed) for seed in (args.seed + 10, args.seed + 20)
        )
        once, again = (np.array([m.latency.ms for m in found]) for found in (first, second))
        predictions = [predictor.predict(a, DIGITS).latency for a in unseen]
        predicted = np.array([p.ms for p in predictions])
        low, high = (np.array([getattr(p, end) for p in predictions]) for end in ("low_ms", "high_ms"))
        results: dict[str, Any] = {
            "predictor": accuracy(predicted, once) | {"interval_coverage_percent": _covered(low, once, high)},
            "predictor against the second measurement": accuracy(predicted, again)
            | {"interval_coverage_percent": _covered(low, again, high)},
            "predictor against the mean of two measurements": accuracy(predicted, np.sqrt(once * again)),
            "noise ceiling: one measurement predicting the other": accuracy(again, once),
        }
        curve = transferred(predictor, space, Path(temporary), config, args.seed)
        simpler = baselines(table, predictor, space, unseen, args.seed)
        for name, values in simpler.items():
            results[name] = accuracy(values, once)
        record = {
            "what": "latency predictor on held-out whole networks",
            "command": "python benchmarks/latency.py " + said(sys.argv[1:]),
            "provenance": provenance("cuda" if torch.cuda.is_available() else "cpu", config.threads)
            | {"runtime": args.runtime, "load_average_before": round(load_before, 2)},
            "config": args.config,
            "profile": {
                "seconds_from_nothing_to_fitted": round(profile_s, 1),
                "units": predictor.meta["num_units"],
                "networks": predictor.meta["num_networks"],
                "calibration": predictor.accuracy,
                "half_width_log": predictor.half_width,
                "windows_dropped_percent": round(_dropped(table), 2),
                "boundary_us": {
                    policy: round(1e3 * float(ms), 2)
                    for policy, ms in zip(predictor.boundaries.policies, predictor.boundaries.ms, strict=True)
                },
            },
            "held_out": results,
            "transfer to two threads an operator": curve,
            "speed": speeds(predictor, space, tables, str(ROOT / args.config)),
            "networks": {
                "id": [a.id for a in unseen],
                "measured_ms": once.round(5).tolist(),
                "measured_again_ms": again.round(5).tolist(),
                "predicted_ms": predicted.round(5).tolist(),
                "low_ms": low.round(5).tolist(),
                "high_ms": high.round(5).tolist(),
                **{name: values.round(5).tolist() for name, values in simpler.items()},
            },
        }
    name = "" if Path(args.config).stem == "digits" else f"{Path(args.config).stem}-"
    path = args.output / f"latency-{name}{predictor.device}.{predictor.runtime}.json"
    record = sayable(record)
    write_json(path, record)
    print(json.dumps({key: value for key, value in record.items() if key != "networks"}, indent=2))


def _covered(low: np.ndarray, measured: np.ndarray, high: np.ndarray) -> float:
    return round(100 * float(((low <= measured) & (measured <= high)).mean()), 2)


def _dropped(table: MeasurementTable) -> float:
    windows = [window for found in table.windows.values() for window in found]
    return 100 * sum(not window.accepted for window in windows) / len(windows)


if __name__ == "__main__":
    main()
