"""The table of one screen that `gpu.py` prints last: what was found, with its unit and its floor."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from _gpu_results import read_json, read_step

_WIDTH = 118
_LINES = 46
_WORST = 4  # lines for what is wrong
_OURS = "mixnas (Triton)"


def table(out: Path) -> list[str]:
    """The lines, at most a screen of them."""
    found = [_section("gpu.json", _head, read_json(out / "gpu.json"))]
    for step, lines in (("right", _right), ("tuned", _tuned), ("fast", _fast), ("measured", _measured)):
        found.append(_step(out / f"{step}.json", lines))
    found.append(_step(out / "trained.json", _trained))
    fast = found[3]
    room = max(4, _LINES - sum(map(len, found)) + len(fast))
    if len(fast) > room:
        found[3] = [*fast[: room - 1], f"  ... {len(fast) - room + 1} more in fast.json"]
    return [line[:_WIDTH] for lines in found for line in lines]


def _step(path: Path, lines: Callable[[Mapping[str, Any]], Iterator[str]]) -> list[str]:
    data, fault = read_step(path)
    return [f"== {fault.removeprefix(f'{path.parent}/')}"] if fault else _section(path.name, lines, data)


def _section(name: str, lines: Callable[[Mapping[str, Any]], Iterator[str]], data: Mapping[str, Any]) -> list[str]:
    """A part of the table; what was not written by gpu.py costs that part."""
    try:
        return list(lines(data))
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        return [f"== {name}: is not as gpu.py leaves it ({type(error).__name__}: {error})"]


def _head(gpu: Mapping[str, Any]) -> Iterator[str]:
    machine = gpu.get("machine", {})
    rates, versions = machine.get("rates", {}), machine.get("versions", {})
    dry = " (a dry run: no device's figures)" if gpu.get("dry") else ""
    known = (f"{name} {versions[name] or 'none'}" for name in ("torch", "triton", "numpy") if name in versions)
    yield ", ".join([f"== {machine.get('device', 'the step machine found no device')}{dry}", *known])
    if len(rates) > 1:
        yield (
            f"  reaches: copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, bf16 product "
            f"{rates['matrix_operations_per_s'] / 1e12:.0f} TFLOP/s, fp32 "
            f"{rates['fp32_operations_per_s'] / 1e12:.0f} TFLOP/s: the floors below are of these"
        )
    for call in gpu.get("calls", [])[-1:]:
        steps = [f"{name} {step['state']} ({step['seconds']:.0f} s)" for name, step in call["steps"].items()]
        yield from textwrap.wrap(", ".join(steps), _WIDTH, initial_indent="  steps: ", subsequent_indent="    ")


def _right(right: Mapping[str, Any]) -> Iterator[str]:
    if not right:
        return
    items = right["items"]
    wrong = {key: item for key, item in items.items() if item.get("right") is False}
    good = sum(item.get("right") is True for item in items.values())
    rest = len(items) - good - len(wrong) + len(right["left_out"])
    yield f"== right: {good} checks right, {len(wrong)} wrong, {rest} left out"
    for key, item in list(wrong.items())[:_WORST]:
        why = item.get("why") or f"error {item.get('error', 0):.1e}, allowed {item.get('allowed', 0):.0e}"
        fallback = ", right with its fallback" if item.get("with_fallback", {}).get("right") else ""
        yield f"  WRONG {key}: {why}{fallback}"
    if len(wrong) > _WORST:
        yield f"  ... {len(wrong) - _WORST} more in right.json"


def _tuned(tuned: Mapping[str, Any]) -> Iterator[str]:
    if not tuned:
        return
    gains = []
    for item in tuned["items"].values():
        if item["state"] == "tuned" and "dropped" not in item["best"]:
            before, after = (next(iter(item[side]["us"].values())) for side in ("present", "best"))
            if isinstance(after, int | float):
                gains.append((before / max(after, 1e-9), before, after, item))
    gains.sort(key=lambda gain: -gain[0])
    timed = sum(bool(item.get("present")) for item in tuned["items"].values())
    yield f"== tuned: {timed} rows timed, {len(gains)} tuned; µs before -> after, floor (of an H200)"
    for gain, before, after, item in gains[:5]:
        yield f"  {item['key'][:64]:64s} {before:9.1f} -> {after:8.1f}, {item['floor_us']:7.1f}  ({gain:.2f}x)"


def _time(entry: Mapping[str, Any]) -> float | None:
    times = entry.get("times", {})
    for name in ("forward, graph, cold", "forward, eager, cold", "forward, eager, hot"):
        if isinstance(times.get(name), dict):
            return float(times[name]["p50_us"])
    return None


def _fast(fast: Mapping[str, Any]) -> Iterator[str]:
    if not fast:
        return
    yield "== fast: forward, cold, µs: ours, best of those that compute the same, floor (what binds), ours over floor"
    for key, item in fast["items"].items():
        if "floor" not in item:
            yield f"  {key[:60]:60s} {item.get('failed', 'nothing')}"
            continue
        floor = item["floor"]
        least = max(floor[f"{what}_us"] for what in ("bytes", "operations", "special"))
        ours, peers = None, []
        for name, entry in item["implementations"].items():
            took = _time(entry)
            if name == _OURS:
                ours = took
                if entry.get("right") is False or "failed" in entry:
                    ours = None
            elif took is not None and entry.get("same_function"):
                peers.append((took, name))
        best = min(peers, default=None)
        mine = f"{ours:9.1f}" if ours is not None else "    WRONG" if _OURS in item["implementations"] else "        -"
        peer = f"{best[0]:9.1f} {best[1][:19]:19s}" if best else f"{'-':>9s} {'':19s}"
        far = f"{ours / least:8.1f}x" if ours is not None and least else ""
        yield f"  {key[:52]:52s}{mine} {peer}{least:8.1f} ({floor['bound_by'][:7]}){far}"


def _measured(measured: Mapping[str, Any]) -> Iterator[str]:
    if not measured:
        return
    yield "== measured: unseen networks, mean error % of the predictor, its floor (one measurement against another)"
    for name, item in measured["items"].items():
        if "held_out" not in item:
            yield f"  {name:28s} {item.get('failed', 'no unseen networks')}"
            continue
        held, ceiling, sheet = item["held_out"], item["noise_ceiling"], item.get("estimate", {})
        data_sheet = f"{sheet['mape_percent']:.0f}%" if "mape_percent" in sheet else "none" if sheet else "at --take"
        yield (
            f"  {name:28s} {held['networks']:3d} networks: {held['mape_percent']:5.1f}%, floor "
            f"{ceiling['mape_percent']:.1f}%; interval of 90% holds {held['coverage_percent']:.0f}%; "
            f"data sheet {data_sheet}"
        )
        yield f"    {'':26s} profile {item['profile_s']:.0f} s: {item['units']} units, {item['networks']} networks"


def _trained(trained: Mapping[str, Any]) -> Iterator[str]:
    if not trained:
        return
    yield "== trained"
    best = 0.0
    for name, item in trained["items"].items():
        if not item.get("right"):
            yield f"  {name}: {item.get('failed')}"
        elif "steps_per_s" in item:
            best = max(best, item["steps_per_s"])
            loses = f", the input loses {100 * (1 - item['steps_per_s'] / best):.0f}%" if item.get("streamed") else ""
            yield (
                f"  {name:56s} {item['steps_per_s']:8.2f} steps/s, at most {item['floor_steps_per_s']:.1f} by its "
                f"products{loses}, {item.get('peak_gib', 0):.1f} GiB"
            )
        elif "best_test" in item:
            yield (
                f"  {name}: {item['supernet_steps_per_s']} steps/s, {item['judged_per_s']} judged/s, best test "
                f"accuracy {100 * item['best_test']:.1f}% (chance 10%)"
            )
