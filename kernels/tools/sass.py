"""Loops in compiled kernels: how many instructions a warp runs, from machine code and the trips of its loops.

Machine code says where the loops are (a branch back), not how often they run. That stands in Triton's intermediate
form, whose `scf.for` have constant bounds here; a bound that depends on the program's place has its mean given. Where
the assembler has unrolled a loop, its code holds a multiple of what PTX has of the instructions that nothing merges.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
MMA = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA")
_ANCHORS = {  # in PTX and in machine code: what the assembler neither merges nor splits
    "exponentials": (re.compile(r"\bex2\.approx"), lambda name: name.startswith("MUFU.EX2")),
    "products": (re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)"), lambda name: name.split(".")[0] in MMA),
    "barriers": (re.compile(r"\bbar(?:rier)?\.(?:cta\.)?sync"), lambda name: name.startswith("BAR.SYNC")),
    "copies": (re.compile(r"\bcp\.async\.c[ag]"), lambda name: name.startswith("LDGSTS")),
    "loads": (re.compile(r"\bld\.global"), lambda name: name.startswith("LDG.")),
    "stores": (re.compile(r"\bst\.global"), lambda name: name.startswith("STG.")),
}


@dataclass
class Loop:
    """A loop, or at the root the whole kernel.

    Attributes:
        first, last: Where it begins and ends.
        inner: Loops directly inside it, in order.
        trips: How often its body runs.
    """

    first: int
    last: int
    inner: list["Loop"] = field(default_factory=list)
    trips: float = 1.0

    def innermost(self, place: int) -> list["Loop"]:
        """The loops around a place, outermost first, this one included."""
        for loop in self.inner:
            if loop.first <= place <= loop.last:
                return [self, *loop.innermost(place)]
        return [self]

    def has(self, place: int) -> bool:
        """Whether a place is in the loop, and in none inside it."""
        inside = self.first <= place <= self.last
        return inside and not any(loop.first <= place <= loop.last for loop in self.inner)


def _nested(spans: Iterable[tuple[int, int]], end: int) -> Loop:
    """Loops by their first and last place, those with one head taken as one."""
    widest: dict[int, int] = {}
    for first, last in spans:
        widest[first] = max(last, widest.get(first, last))
    root = Loop(0, end)
    for first, last in sorted(widest.items(), key=lambda span: (span[0], -span[1])):
        around = root.innermost(first)[-1]
        around.inner.append(Loop(first, last))
    return root


_SHAPE = re.compile(r"\.(?:(\d+)x(\d+)x(\d+)|(16)(8)(\d+))(?:\.|$)")
_PASSES = {"TF32": 2.0, "S8": 0.5, "U8": 0.5, "E4M3": 0.5, "E5M2": 0.5, "QGMMA": 0.5}  # beside bfloat16, in time


def tensor_operations(name: str) -> tuple[float, float]:
    """What an instruction of the tensor cores does, for one warp.

    Args:
        name: With its flags, such as "HMMA.16816.F32.BF16" or, of a group of four warps, "HGMMA.64x64x16.F32.BF16".

    Returns:
        Operations (a multiply-add is two), those of other types as many as bfloat16 would do in their time; and bytes
        that it reads of shared memory: none of one warp's, at most both operands of a group's.
    """
    shape = _SHAPE.search(name)
    if shape is None:
        return 0.0, 0.0
    m, n, k = (int(size) for size in shape.groups() if size)
    parts = name.split(".")
    passes = next((_PASSES[part] for part in parts if part in _PASSES), 1.0)
    together = 4 if parts[0].endswith("GMMA") else 1
    read = (m + n) * k * 2 * passes / together if together > 1 else 0.0
    return 2.0 * m * n * k * passes / together, read


_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def moved_bytes(name: str) -> float:
    """Bytes that a warp's instruction moves between registers or L1 and the lanes, of loads, stores and copies."""
    kind, *flags = name.split(".")
    if kind in ("LDSM", "STSM"):
        return 128.0 * next((int(flag) for flag in flags if flag in ("2", "4")), 1)
    if kind not in ("LDG", "STG", "LDS", "STS", "LDGSTS"):
        return 0.0
    return 32.0 * next((_BYTES[flag] for flag in flags if flag in _BYTES), 4)


@dataclass(frozen=True)
class Instruction:
    """One machine instruction: where it stands, and its name with all flags."""

    place: int
    name: str


def instructions(sass: str) -> tuple[list[Instruction], Loop]:
    """Read the text of `cuobjdump -sass`; returns the instructions (no NOPs) and the kernel with its loops."""
    found, back = [], []
    for match in _INSTRUCTION.finditer(sass):
        place, name, operands = int(match[1], 16), match[3], match[4]
        if name == "NOP":
            continue
        found.append(Instruction(place, name))
        target = re.search(r"0x([0-9a-f]+)", operands)
        if name == "BRA" and target and int(target[1], 16) < place:
            back.append((int(target[1], 16), place))
    return found, _nested(back, found[-1].place if found else 0)


def _ptx(text: str) -> tuple[list[tuple[int, str]], Loop]:
    lines = list(enumerate(text.splitlines()))
    labels = {match[1]: at for at, line in lines if (match := re.match(r"\s*(\$L\w+):", line))}
    back = []
    for at, line in lines:
        match = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if match and labels.get(match[1], at + 1) <= at:
            back.append((labels[match[1]], at))
    return lines, _nested(back, len(lines))


def _ttir(text: str, mean: Callable[[int], float]) -> Loop:
    """Loops of the intermediate form with their trips; `mean(n)` tells those of the n-th whose bounds vary."""
    constants = {m[1]: int(m[2]) for m in re.finditer(r"(%[\w#-]+) = arith\.constant (-?\d+) : i(?:32|64)\b", text)}
    root = Loop(0, 1 << 30)
    around: list[tuple[int, Loop]] = [(-1, root)]
    varying = 0
    for at, line in enumerate(text.splitlines()):
        indent = len(line) - len(line.lstrip())
        while line.strip() and indent <= around[-1][0] and not line.lstrip().startswith("}"):
            around.pop()
        match = re.search(r"scf\.for %[\w#-]+ = (%[\w#-]+) to (%[\w#-]+) step (%[\w#-]+)", line)
        if match:
            bounds = [constants.get(name) for name in match.groups()]
            loop = Loop(at, at)
            low, high, step = bounds
            if low is None or high is None or step is None:
                loop.trips = mean(varying)
                varying += 1
            else:
                loop.trips = max(0, -(-(high - low) // step))
            around[-1][1].inner.append(loop)
            around.append((indent, loop))
    return root


def _count(ptx: Sequence[tuple[int, str]], found: Sequence[Instruction], of: Loop, also: Loop) -> float:
    """How many copies of a loop's body in PTX its machine code holds, by what stands in no loop within it."""
    ratios = []
    for in_ptx, in_sass in _ANCHORS.values():
        written = sum(bool(in_ptx.search(line)) for at, line in ptx if of.has(at))
        compiled = sum(in_sass(item.name) for item in found if also.has(item.place))
        if written:
            ratios.append(compiled / written)
    ratios.sort()
    middle = ratios[len(ratios) // 2] if ratios else 1.0
    return float(max(1, round(middle)))


def _unrolled(of: Loop, ptx: Loop, sass: Loop, lines: Sequence[tuple[int, str]], found: Sequence[Instruction]) -> bool:
    """Whether the assembler wrote out every trip of all loops: what they do stands in the code as often as they run.

    But for the last trips of what is read ahead, which then turn out to read nothing.
    """
    for in_ptx, in_sass in _ANCHORS.values():
        wanted = sum(
            loop.trips * sum(bool(in_ptx.search(line)) for at, line in lines if twin.has(at))
            for loop, twin in zip(of.inner, ptx.inner, strict=False)
        )
        if 0.75 * wanted > sum(in_sass(item.name) for item in found if sass.has(item.place)):
            return False
    return len(of.inner) == len(ptx.inner)


def _match(
    of: Loop, ptx: Loop, sass: Loop, lines: Sequence[tuple[int, str]], found: Sequence[Instruction], name: str
) -> None:
    if not ptx.inner and not sass.inner:  # short ones are written out before there is PTX
        return
    if not sass.inner and _unrolled(of, ptx, sass, lines, found):
        return
    if not len(of.inner) == len(ptx.inner) == len(sass.inner):
        counts = f"{len(of.inner)} in Triton's form, {len(ptx.inner)} in PTX, {len(sass.inner)} in machine code"
        raise ValueError(f"{name}: the loops do not match: {counts}")
    for one, two, three in zip(of.inner, ptx.inner, sass.inner, strict=True):
        three.trips = one.trips / _count(lines, found, two, three)
        _match(one, two, three, lines, found, name)


@dataclass(frozen=True)
class Counts:
    """Instructions of a warp from its start to its end.

    Attributes:
        total: All.
        special: Exponentials, roots, reciprocals.
        fma: Plain multiply-adds in fp32.
        mma: On the tensor cores.
        tensor: Operations that these do (see `tensor_operations`).
        moved: Bytes through L1 and shared memory.
        loop: In the body of the loop that runs longest (static, the loops within it included); 0 without a loop.
        trips: Of that loop.
    """

    total: float
    special: float
    fma: float
    mma: float
    tensor: float
    moved: float
    loop: int
    trips: float


def counts(sass: str, ptx: str, ttir: str, mean: Callable[[int], float], name: str = "") -> Counts:
    """Count what a warp runs.

    Args:
        sass: From `cuobjdump -sass`.
        ptx: The same kernel.
        ttir: Triton's intermediate form of it.
        mean: Trips of the n-th loop whose bounds are not constants.
        name: For the error.

    Raises:
        ValueError: The loops of the three do not match.
    """
    found, root = instructions(sass)
    lines, ptx_root = _ptx(ptx)
    _match(_ttir(ttir, mean), ptx_root, root, lines, found, name)
    total = special = fma = mma = tensor = moved = 0.0
    weights: dict[int, float] = {}
    for item in found:
        around = root.innermost(item.place)
        weight = 1.0
        for loop in around:
            weight *= loop.trips
        kind = item.name.split(".")[0]
        total += weight
        special += weight * (kind == "MUFU")
        fma += weight * (kind in ("FFMA", "FFMA2"))
        mma += weight * (kind in MMA)
        operations, read = tensor_operations(item.name) if kind in MMA else (0.0, 0.0)
        tensor += weight * operations
        moved += weight * (read + moved_bytes(item.name))
        for loop in around[1:]:
            weights[id(loop)] = weights.get(id(loop), 0.0) + weight
    longest = max(root.inner, key=lambda loop: weights.get(id(loop), 0.0), default=None)
    body = 0 if longest is None else sum(longest.first <= item.place <= longest.last for item in found)
    return Counts(total, special, fma, mma, tensor, moved, body, longest.trips if longest else 0.0)
