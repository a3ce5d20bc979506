"""Ahead-of-time compilation of every kernel and configuration for Hopper, without a GPU.

A family's `aot_examples` calls its launchers on "meta" tensors while `dispatch.recording` keeps what would have been
launched; each launch is compiled as Triton's own launcher specialises it at run time (types, arguments that are 1,
divisibility by 16, without which loads are 2 bytes wide), and its registers, stack, shared memory and instructions are
read from the machine code with the tools that Triton bundles. The compiler can't share a process with the interpreter,
so `compile_table` works in a child process. Results are kept between runs, keyed by the source and everything else that
the code depends on.
"""

import argparse
import bisect
import contextlib
import hashlib
import importlib
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixnas.kernels import FAMILIES, configs, dispatch

ARCH = 90  # Hopper: H100, H200
_ROOT = Path(__file__).resolve().parents[2]

# Of an H200. Measured: a device-to-device copy, counting bytes read and written, and an 8192-cubed bf16 product on
# random data. The vendor's: plain fp32, and 16 special operations a clock on each of 132 multiprocessors at 1.755 GHz.
COPY_BYTES_PER_S = 4.3e12
OPERATIONS_PER_S = {"matrix": 0.78e15, "fp32": 67e12, "special": 3.7e12}


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A call that launches one kernel at one row of its table, and the least work it stands for.

    Attributes:
        label: The shape in short, such as "bf16 8x56x56x64 k7".
        call: Launches the kernel, given tensors on the "meta" device.
        bytes: Least traffic to device memory: every operand once.
        operations: Arithmetic operations (a fused multiply-add is two).
        unit: What does the operations: "fp32" (plain multiply-adds) or "matrix" (tensor cores).
        special: Exponentials, logarithms, roots and reciprocals that no form of the operator does without.
        timed: `retune` times it too; otherwise it is a variant that is compiled to see that it needs no stack.
    """

    label: str
    call: Callable[[], Any]
    bytes: int
    operations: int
    unit: str = "fp32"
    special: int = 0
    timed: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What the machine code of one kernel, at one row of its table and one example, uses.

    `instructions` counts the machine instructions by what matters: total, ffma, mma, wgmma (those of the mma that take
    a warp group), special (exponentials, roots), load_16 (bytes a thread), load_8, load_4, load_narrow, store_16 ...,
    shared, local (spills).
    """

    family: str
    kernel: str
    gpu: str
    row: int
    label: str
    launch: dict[str, int]
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: dict[str, int]
    bytes: int
    operations: int
    unit: str
    special: int
    spills_because: str
    cached: bool


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, as it was recorded."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel's name in the tables."""
        return str(self.kernel.__name__).removesuffix("_kernel")


def floors_us(work: Example | Compiled) -> dict[str, float]:
    """Return the microseconds that no version takes less than on an H200, by what they are spent on."""
    return {
        "bytes": work.bytes / COPY_BYTES_PER_S * 1e6,
        "operations": work.operations / OPERATIONS_PER_S[work.unit] * 1e6,
        "special": work.special / OPERATIONS_PER_S["special"] * 1e6,
    }


def cache_dir() -> Path:
    """Return where compiled results are kept: `$MIXNAS_CACHE`, the checkout's `.cache`, or the user's cache."""
    if given := os.environ.get("MIXNAS_CACHE"):
        return Path(given) / "aot"
    if (_ROOT / "pyproject.toml").exists():
        return _ROOT / ".cache" / "aot"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mixnas" / "aot"


def compile_table(families: Iterable[str] = FAMILIES, *, first_only: bool = False) -> list[Compiled]:
    """Compile the table's rows in a child process and return what each uses.

    Args:
        families: Which families' kernels.
        first_only: Only the first example of each row.

    Raises:
        RuntimeError: The child failed; the message holds the end of what it said.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mixnas.kernels.tools.aot", *families, *(["--first-only"] if first_only else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stderr[-6000:]}")
    return [Compiled(**item) for item in json.loads(done.stdout)]


class _PretendedGPU:
    """What Triton asks its driver before it compiles for a launch: answers as a GPU of `ARCH` would."""

    device = 1 << 20  # no real one's index: Triton keeps what it compiled by device

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCH, 32)


def _specialise(kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> tuple[Any, dict[str, int]]:
    """Return the `ASTSource` Triton compiles for this launch, and the compiler's options.

    Triton's own launcher makes it, up to the compilation, so a launch on a GPU finds in Triton's cache what was
    compiled here.
    """
    from triton import knobs
    from triton.compiler import ASTSource
    from triton.runtime import driver

    caught: list[dict[str, Any]] = []

    def catch(**about: Any) -> bool:
        caught.append(about["compile"])
        return True  # "I compile it"

    before = driver._active, knobs.runtime.jit_cache_hook
    driver.set_active(_PretendedGPU())
    knobs.runtime.jit_cache_hook = catch
    try:
        kernel.warmup(*arguments, grid=(1,), **options)
    finally:
        driver._active, knobs.runtime.jit_cache_hook = before
    (launch,) = caught
    names = {parameter.name for parameter in kernel.params}
    source = ASTSource(
        fn=kernel, signature=launch["signature"], constexprs=launch["constants"], attrs=launch["configs"][0]
    )
    return source, {name: value for name, value in options.items() if name not in names}


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _machine_code(cubin: bytes) -> bytes:
    """Return the executable sections of a cubin, an ELF file of 64 bits."""
    (sections,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    code = b""
    for at in range(sections, sections + size * count, size):
        _, _, flags, _, offset, length = struct.unpack_from("<IIQQQQ", cubin, at)
        if flags & 4:
            code += cubin[offset : offset + length]
    return code


def _opcodes(cubins: Sequence[bytes], folder: Path) -> list[list[str]]:
    """Return the instructions of each cubin by name and flags, such as "LDG.E.128".

    All are disassembled as one: what `nvdisasm` takes to start is more than it takes for a kernel.
    """
    codes = [_machine_code(cubin) for cubin in cubins]
    path = folder / "kernels.bin"
    path.write_bytes(b"".join(codes))
    command = [_tool("nvdisasm"), "--binary", f"SM{ARCH}a", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ends = list(itertools.accumulate(map(len, codes)))
    found: list[list[str]] = [[] for _ in cubins]
    for place, opcode in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)", text):
        found[bisect.bisect_right(ends, int(place, 16))].append(opcode)
    assert all(found), "a kernel without instructions"
    return found


def _counts(opcodes: Iterable[str]) -> dict[str, int]:
    counts = dict.fromkeys(
        (
            *("total", "ffma", "mma", "wgmma", "special", "shared", "local"),
            *(f"{kind}_{width}" for kind in ("load", "store") for width in ("16", "8", "4", "narrow")),
        ),
        0,
    )
    for opcode in opcodes:
        name, *flags = opcode.split(".")
        counts["total"] += name != "NOP"
        counts["ffma"] += name in ("FFMA", "FFMA2")
        counts["mma"] += name in ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA")
        counts["wgmma"] += name.endswith("GMMA")
        counts["special"] += name == "MUFU"
        counts["shared"] += name in ("LDS", "STS", "LDSM", "STSM")
        counts["local"] += name in ("LDL", "STL")
        if name in ("LDG", "STG", "LDGSTS"):
            narrow = any(flag in ("U8", "S8", "U16", "S16") for flag in flags)
            width = "16" if "128" in flags else "8" if "64" in flags else "narrow" if narrow else "4"
            counts[f"{'store' if name == 'STG' else 'load'}_{width}"] += 1
    return counts


def _inspect(cubins: Sequence[bytes], folder: Path) -> list[dict[str, Any]]:
    """Read resources and instruction counts off the machine code of each cubin."""
    found = []
    path = folder / "kernel.cubin"
    for cubin, opcodes in zip(cubins, _opcodes(cubins, folder) if cubins else (), strict=True):
        path.write_bytes(cubin)
        command = [_tool("cuobjdump"), "-res-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+)", usage), re.search(r"STACK:(\d+)", usage)
        assert registers and stack, usage
        counts = _counts(opcodes)
        found.append({"registers": int(registers[1]), "stack_bytes": int(stack[1]), "instructions": counts})
    return found


def _compile(launches: Sequence[Launch]) -> list[tuple[dict[str, Any], bool]]:
    """Compile launches, or find them in the cache; return the resources of each and whether they were found."""
    import triton

    places = [_place([__file__], launch) for launch in launches]
    missing = {place: launch for place, launch in zip(places, launches, strict=True) if not place.exists()}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        binaries = []
        for launch in missing.values():
            source, options = _specialise(launch.kernel, launch.arguments, launch.options)
            binaries.append(triton.compile(source, target=_PretendedGPU().get_current_target(), options=options))
        inspected = _inspect([binary.asm["cubin"] for binary in binaries], Path(folder))
    for place, binary, found in zip(missing, binaries, inspected, strict=True):
        _keep(place, found | {"shared_bytes": binary.metadata.shared})
    return [(json.loads(place.read_text(encoding="utf-8")), place not in missing) for place in places]


def _place(files: Iterable[str], launch: Launch, also: str = "") -> Path:
    """Return where what is found of a launch is kept; see `kept`."""
    source, options = _specialise(launch.kernel, launch.arguments, launch.options)
    key_parts = [source.hash(), json.dumps(options, sort_keys=True), dispatch.triton.__version__, str(ARCH), also]
    key_parts += [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    return cache_dir() / f"{hashlib.sha256('|'.join(key_parts).encode()).hexdigest()[:32]}.json"


def _keep(path: Path, found: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)


def kept(
    files: Iterable[str], launch: Launch, make: Callable[[], dict[str, Any]], also: str = ""
) -> tuple[dict[str, Any], bool]:
    """Return what `make` finds of a launch, from the cache where it was found before, and whether it was.

    Args:
        files: The sources that find it: another source is another result.
        launch: What is compiled; its source, types, constants, options and Triton's version are the rest of the key.
        make: Called where nothing is in the cache; plain data.
        also: What the result depends on besides.
    """
    path = _place(files, launch, also)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8")), True
    found = make()
    _keep(path, found)
    return found, False


def compile_for_launch(kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> dict[str, Any]:
    """Compile one launch into Triton's own cache, where the launch on a GPU finds it; needs no GPU.

    Returns:
        registers, stack_bytes, shared_bytes and instructions; the first two 0 where the tools that tell are missing.
    """
    import triton

    source, compiler_options = _specialise(kernel, arguments, options)
    binary = triton.compile(source, target=_PretendedGPU().get_current_target(), options=compiler_options)
    found: dict[str, Any] = {"registers": 0, "stack_bytes": 0, "instructions": {}}
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError, subprocess.SubprocessError):
        (found,) = _inspect([binary.asm["cubin"]], Path(folder))
    return found | {"shared_bytes": binary.metadata.shared}


def _launches(families: Iterable[str]) -> Iterator[tuple[str, str, str, int, configs.Row, Example]]:
    for family in families:
        module = importlib.import_module(f"mixnas.kernels.{family}")
        for kernel, by_gpu in configs.load()[family]["kernels"].items():
            for gpu in by_gpu:
                if gpu == configs.INTERPRETER:
                    continue
                for index, row in enumerate(configs.rows(kernel, gpu)):
                    for example in module.aot_examples(kernel, dict(row.up_to)):
                        yield family, kernel, gpu, index, row, example


def launches_of(call: Callable[[], Any], gpu: str) -> list[Launch]:
    """Run `call` on "meta" tensors and return what it would launch on `gpu`."""
    seen: list[Launch] = []
    with dispatch.backend("triton"), dispatch.recording(lambda *launch: seen.append(Launch(*launch)), gpu):
        call()
    return seen


def _launch(kernel: str, gpu: str, example: Example) -> Launch:
    """Run the example and return its launch of `kernel`."""
    seen = launches_of(example.call, gpu)
    wanted = [launch for launch in seen if launch.name == kernel]
    if not wanted:
        raise AssertionError(f"{example.label}: launched {[launch.name for launch in seen]}, not {kernel}")
    return wanted[0]


def _record(kernel: str, gpu: str, example: Example) -> tuple[Any, tuple[Any, ...], dict[str, int]]:
    """Run the example and return what its launch of `kernel` passes."""
    launch = _launch(kernel, gpu, example)
    return launch.kernel, launch.arguments, launch.options


def main(argv: list[str] | None = None) -> None:
    """Compile in this process and write the results to stdout as JSON."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, prog="python -m mixnas.kernels.tools.aot", description=main.__doc__
    )
    parser.add_argument("families", nargs="*", default=FAMILIES)
    parser.add_argument("--first-only", action="store_true", help="only the first example of each row")
    arguments = parser.parse_args(argv)
    if dispatch.INTERPRETING or not dispatch.HAS_TRITON:
        raise SystemExit("compiling needs Triton, in a process without TRITON_INTERPRET")
    results: list[dict[str, Any]] = []
    for family in arguments.families:
        started = time.perf_counter()
        done: set[tuple[str, str, int]] = set()
        asked = []
        for _, kernel, gpu, index, row, example in _launches([family]):
            if arguments.first_only and (kernel, gpu, index) in done:
                continue
            done.add((kernel, gpu, index))
            launch = _launch(kernel, gpu, example)
            missed = {name: value for name, value in row.launch.items() if launch.options.get(name, value) != value}
            if missed:
                taken = launch.options
                raise SystemExit(
                    f"{kernel}, row {index} for {gpu}: {example.label} launched with {taken}, not {missed}"
                )
            asked.append((kernel, gpu, index, row, example, launch))
        inspected = _compile([launch for *_, launch in asked])
        for (kernel, gpu, index, row, example, _), (found, cached) in zip(asked, inspected, strict=True):
            compiled = Compiled(
                family=family,
                kernel=kernel,
                gpu=gpu,
                row=index,
                label=example.label,
                launch=row.launch,
                bytes=example.bytes,
                operations=example.operations,
                unit=example.unit,
                special=example.special,
                spills_because=row.spills_because,
                cached=cached,
                **found,
            )
            results.append(asdict(compiled))
            print(f"{kernel} {gpu}[{index}] {example.label}: {compiled.registers} registers", file=sys.stderr)
        print(f"{family}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
