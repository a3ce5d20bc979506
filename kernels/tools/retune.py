"""`python -m mixnas.kernels.tools.retune` measures launch configurations on this GPU and writes its table rows.

The rows of the table for any GPU are timed first, on their own examples, and again on small launches (a family's
`SMALL`), which become rows of their own where that pays. Those that are furthest from their floor then come first. A
row is improved step by step: its launch with one value halved or doubled, or one halved and another doubled, from the
best so far, until nothing is faster. Candidates are compiled beforehand in processes of their own, as the launch would;
what spills is dropped. What gives another result than the present launch is dropped too. Only the one kernel is timed,
in a CUDA graph, on a cold L2. Each row is written when it is done. The table stays deterministic: it changes only here.
"""

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mixnas.kernels import FAMILIES, configs, dispatch
from mixnas.kernels.tools import aot
from mixnas.kernels.tools.rows import Job, format_table, jobs, provenance_of_rows, sources, table_with
from mixnas.kernels.tools.timing import Bench, Clock, Compilers, require_context

LIMITS = {"num_warps": (1, 32), "num_stages": (1, 4), "ROWS": (1, 2), "maxnreg": (64, 255)}
LARGEST_BLOCK = 65536
GAIN = 0.98  # a difference within the noise isn't worth a change
LAUNCH_US = 2.0  # no launch takes less, whatever its floor
ROUNDS = 3
_COMPILE_S = 60.0  # of one candidate: a compiler that hangs must not take the rest with it


def neighbours(launch: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield the launches next to one: a value halved or doubled, or one halved and another doubled."""
    names = list(launch)
    single = [((name, launch[name] // 2),) for name in names] + [((name, launch[name] * 2),) for name in names]
    trades = [((a, launch[a] // 2), (b, launch[b] * 2)) for a, b in itertools.permutations(names, 2)]
    for changes in itertools.chain(single, trades):
        changed = dict(launch) | dict(changes)
        lowest_highest = ((value, *LIMITS.get(name, (1, LARGEST_BLOCK))) for name, value in changed.items())
        if all(low <= value <= high for value, low, high in lowest_highest):
            yield changed


@dataclass
class Record:
    """What was found for one row.

    Attributes:
        key: `Job.key`.
        floor_us: Of its first example, on an H200; a launch takes `LAUNCH_US` at least.
        present: The launch it has, and the time of each example by label.
        best: The same of the fastest; empty until it is tuned.
        tried: Each candidate with its time on the first example, or why it has none.
        state: "timed", "tuning" or "tuned", or why it has failed.
    """

    key: str
    family: str
    kernel: str
    bounds: dict[str, int]
    sources: str
    floor_us: float = 0.0
    present: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    state: str = ""

    @property
    def ratio(self) -> float:
        """How far the present launch is from its floor."""
        times = list(self.present.get("us", {}).values())
        return times[0] / max(self.floor_us, LAUNCH_US) if times else 0.0


class Tuner:
    """Tunes rows for as long as there is time.

    Args:
        deadline: On the clock of `time.monotonic`.
        keep: Called with a record whenever one is new or has changed.
        device: "cuda"; or "cpu", in Triton's interpreter, to try the tool out.
        workers: Processes that compile.
        repeats: Of each timing.
        most: Candidates of a row, at most.
    """

    def __init__(
        self,
        deadline: float,
        keep: Callable[[Record], None],
        *,
        device: str = "cuda",
        workers: int = 1,
        repeats: int = 20,
        most: int = 60,
    ) -> None:
        self._deadline, self._keep, self._device, self._most = deadline, keep, device, most
        self._clock = Clock(device, repeats)
        self._compilers = Compilers(workers)

    def run(self, todo: Sequence[Job], known: Mapping[str, Record]) -> list[Record]:
        """Time all rows, then tune them, furthest from the floor first; those that `known` has tuned are left alone.

        Raises:
            ContextLostError: The GPU answers this process no more. What was found until then was kept: go on in a new
                process.
        """
        for record in known.values():
            if record.state == "tuning":
                record.state = "failed: the process died while it was tuned"
                self._keep(record)
        records = {}
        try:
            ahead = {job.key: self._compilers.submit(job, job.launch) for job in todo if job.key not in known}
            for job in todo:
                records[job.key] = known.get(job.key) or self._timed(job, ahead.get(job.key))
                if not records[job.key].state:
                    del records[job.key]  # out of time
            by_key = {job.key: job for job in todo}
            for record in sorted(records.values(), key=lambda record: -record.ratio):
                if record.state == "timed" and self._left() > 0:
                    record.state = "tuning"
                    self._keep(record)  # where a candidate ends this process, the next one knows
                    self._tune(by_key[record.key], record)
                    self._keep(record)
                    require_context(self._device)
        finally:
            self._compilers.close()
        return list(records.values())

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def _timed(self, job: Job, compiling: Future[dict[str, Any]] | None) -> Record:
        """Time the present launch."""
        record = Record(job.key, job.family, job.kernel, dict(job.bounds), sources(job.family))
        if self._left() <= 0:
            return record
        example = job.examples()[0]
        record.floor_us = round(max(aot.floors_us(example).values()), 3)
        self._compiled(compiling)
        try:
            wrong, launch = Bench(job.kernel, example, self._device).run(job.launch)
            record.present = {"launch": dict(job.launch), "us": {example.label: round(self._clock(launch), 2)}}
            record.state = f"failed: {wrong}" if wrong else "timed"
        except Exception as error:  # one row that does not run must not cost the others
            record.state = f"failed: {_first_line(error)}"
        self._keep(record)
        require_context(self._device)
        return record

    def _compiled(self, compiling: Future[dict[str, Any]] | None) -> dict[str, Any]:
        """What a process compiled; empty where it could not tell (the launch will compile, or fail, by itself)."""
        if compiling is None:
            return {}
        with suppress(Exception):
            return compiling.result(timeout=max(0.1, min(_COMPILE_S, self._left())))
        return {}

    def _tune(self, job: Job, record: Record) -> None:
        examples = job.examples()
        try:
            benches = [Bench(job.kernel, examples[0], self._device)]
            best, best_us = dict(job.launch), self._clock(benches[0].run(job.launch)[1])
            first_us = best_us
            tried = {_key(best)}
            record.tried = [{"launch": best, "us": round(best_us, 2)}]
            for _ in range(ROUNDS):
                new = [launch for launch in neighbours(best) if _key(launch) not in tried][: self._most - len(tried)]
                tried |= {_key(launch) for launch in new}
                compiling = [(launch, self._compilers.submit(job, launch)) for launch in new]
                before = best_us
                for launch, future in compiling:
                    if self._left() <= 0:
                        break
                    us = self._candidate(job, benches[0], launch, future, record)
                    if us < best_us * GAIN:
                        best, best_us = launch, us
                if best_us >= before or self._left() <= 0:
                    break
            record.best = {"launch": best, "us": {benches[0].label: round(best_us, 2)}}
            if best != dict(job.launch):
                self._confirm(job, record, first_us / best_us, examples[1:])
            record.state = "tuned"
        except Exception as error:
            record.state = f"failed: {_first_line(error)}"

    def _candidate(
        self, job: Job, bench: Bench, launch: dict[str, int], compiling: Future[dict[str, Any]] | None, record: Record
    ) -> float:
        """Time a candidate; infinite where it is dropped."""
        entry: dict[str, Any] = {"launch": launch}
        record.tried.append(entry)
        uses = self._compiled(compiling)
        if uses.get("stack_bytes") and not job.spills_because:
            entry["why"] = f"spills: a stack of {uses['stack_bytes']} bytes"
            return math.inf
        try:
            wrong, run = bench.run(launch)
            if wrong:
                entry["why"] = wrong
                return math.inf
            took = self._clock(run)
        except Exception as error:  # what a candidate can't do (registers, shared memory) is known only by trying
            entry["why"] = _first_line(error)
            require_context(self._device)
            return math.inf
        entry["us"] = round(took, 2)
        return took

    def _confirm(self, job: Job, record: Record, gain: float, others: Sequence[aot.Example]) -> None:
        """Look at the row's other examples (other types, other shapes): on the whole it must gain, nowhere lose 5%."""
        gains = [gain]
        for example in others:
            bench = Bench(job.kernel, example, self._device)
            before = self._clock(bench.run(job.launch)[1])
            record.present["us"][example.label] = round(before, 2)
            try:
                wrong, run = bench.run(record.best["launch"])
                after = math.inf if wrong else self._clock(run)
            except Exception as error:
                wrong, after = _first_line(error), math.inf
            record.best["us"][example.label] = wrong or round(after, 2)
            gains.append(before / after)
        if min(gains) < 0.95 or math.prod(gains) ** (1 / len(gains)) < 1 / GAIN:
            record.best["dropped"] = "other examples of the row lose"


def _key(launch: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(launch.items()))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


def launches(records: Mapping[str, Record]) -> dict[str, dict[str, int]]:
    """Return what the tables should have, by `Job.key`: of tuned rows the best launch, unless it was dropped."""
    found = {}
    for key, record in records.items():
        if record.state == "tuned":
            found[key] = record.present["launch"] if "dropped" in record.best else record.best["launch"]
    return found


def main(argv: list[str] | None = None) -> None:
    """Retune the launch tables for this machine's GPU."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m mixnas.kernels.tools.retune", description=main.__doc__
    )
    parser.add_argument("families", nargs="*", default=FAMILIES, help="which families (default: all)")
    parser.add_argument("--minutes", type=float, default=30.0, help="start nothing new after this long (default: 30)")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compiling processes")
    parser.add_argument("--output", type=Path, default=configs.TABLES, help="folder to write the tables to")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available() or not dispatch.HAS_TRITON:
        parser.error("retuning times kernels on a GPU: it needs a CUDA device and Triton, and finds none here")
    gpu = configs.gpu_of(torch.empty(0, device="cuda"))
    records: dict[str, Record] = {}

    def keep(record: Record) -> None:
        records[record.key] = record
        if record.state == "tuned":
            table = table_with(record.family, gpu, launches(records), provenance_of_rows())
            (arguments.output / f"{record.family}.json").write_text(format_table(table), encoding="utf-8")
            before, after = (next(iter(side["us"].values())) for side in (record.present, record.best))
            print(f"{record.key}: {before:.1f} -> {after:.1f} us with {record.best['launch']}")
        elif record.state != "timed":
            print(f"{record.key}: {record.state}", file=sys.stderr)

    tuner = Tuner(time.monotonic() + 60 * arguments.minutes, keep, workers=arguments.workers)
    tuner.run(jobs(arguments.families), {})


if __name__ == "__main__":
    main()
