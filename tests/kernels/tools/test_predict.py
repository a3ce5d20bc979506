"""What a launch is predicted to take: loops read off code, residency, and the report; nothing here compiles."""

import json
from pathlib import Path

import pytest

from mixnas.kernels import dispatch, report
from mixnas.kernels.tools import predict, reasons, sass

_TTIR = """
  tt.func public @a() {
    %c0_i32 = arith.constant 0 : i32
    %c1_i32 = arith.constant 1 : i32
    %c12_i32 = arith.constant 12 : i32
    %c30_i32 = arith.constant 30 : i32
    %0 = scf.for %i = %c0_i32 to %c30_i32 step %c1_i32 iter_args(%x = %y) -> (f32)  : i32 {
      scf.for %j = %c0_i32 to %c12_i32 step %c1_i32  : i32 {
        %2 = arith.addf %x, %x : f32
      }
    }
    %1 = scf.for %k = %low to %high step %c1_i32 iter_args(%x = %y) -> (f32)  : i32 {
    }
"""
_PTX = """
$L__BB0_1:
	st.global.b32 [%rd1], %r1;
$L__BB0_2:
	ex2.approx.ftz.f32 %f1, %f2;
	@%p1 bra $L__BB0_2;
	@%p2 bra $L__BB0_1;
$L__BB0_3:
	ld.global.b32 %r1, [%rd1];
	bra.uni $L__BB0_3;
"""
# The inner loop is unrolled four times.
_SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   STG.E desc[UR4][R2.64], R0 ;
        /*0020*/                   MUFU.EX2 R1, R2 ;
        /*0030*/                   MUFU.EX2 R1, R2 ;
        /*0040*/                   MUFU.EX2 R1, R2 ;
        /*0050*/                   MUFU.EX2 R1, R2 ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/              @!P1 BRA 0x10 ;
        /*0080*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0090*/                   FFMA R1, R2, R3, R4 ;
        /*00a0*/                   BRA 0x80 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0 ;
        /*00d0*/                   NOP;
"""


def test_what_a_warp_runs_is_instructions_times_trips():
    counted = sass.counts(_SASS, _PTX, _TTIR, lambda loop: 7.5 + loop)
    assert counted.special == 30 * 12, "unrolled or not, each exponential runs once a trip"
    assert counted.fma == 7.5
    assert counted.total == 1 + 30 * (1 + 3 * 5 + 1) + 7.5 * 3 + 2
    assert (counted.loop, counted.trips) == (7, 30)


def test_loops_that_do_not_match_are_no_count():
    with pytest.raises(ValueError, match="1 in Triton's form, 2 in PTX"):
        sass.counts(_SASS, _PTX, _TTIR[: _TTIR.index("%1 =")], lambda _: 1.0)


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "expected"),
    [(4, 128, 0, 4), (4, 168, 0, 3), (4, 227, 0, 2), (8, 188, 0, 1), (1, 64, 0, 32), (4, 32, 49664, 4)],
)
def test_blocks_that_a_multiprocessor_holds(warps, registers, shared, expected):
    assert predict.resident_blocks(warps, registers, shared) == expected


def test_more_warps_than_one_a_scheduler_wait_less():
    counted = sass.Counts(1e6, 0, 0, 0, 0, 0, 0, 0)
    one, bound = predict._time(132, 4, 1, counted)
    four, _ = predict._time(132 * 4, 4, 4, counted)
    assert bound == "issue" and one == pytest.approx(1e6 / 0.45 / predict.CLOCK_HZ * 1e6)
    assert one < four < 4 * one
    few = predict._time(1, 1, 1, sass.Counts(10, 0, 0, 0, 0, 0, 0, 0))
    assert few == (predict.LAUNCH_US, "launch")


@pytest.mark.skipif(not dispatch.HAS_TRITON, reason="Triton isn't installed")
def test_every_point_launches_and_has_a_floor():
    from mixnas.kernels.tools import aot

    points = predict.points()
    assert len({(point.family, point.label) for point in points}) == len(points)
    for point in points:
        assert aot.launches_of(point.call, "any"), point.label
        assert max(point.floors_us().values()) >= predict.LAUNCH_US
    scan = next(point for point in points if "1x8192x2048" in point.label)
    assert scan.floors_us()["special"] == pytest.approx(8192 * 2048 * 16 / 3.7e12 * 1e6)


def test_the_rows_of_depthwise_are_the_mean_over_its_strips():
    """7 rows, 7 taps down, two output rows a strip: 5, 7, 6 and 4 rows of input."""
    arguments = (*(None,) * 7, 7, 7, 64)
    launch = predict.aot.Launch(depthwise_kernel(), (4,), arguments, {"ROWS": 2, "DOWN": 7, "TOP": 3})
    assert predict._mean_trips(launch)(0) == (5 + 7 + 6 + 4) / 4


def depthwise_kernel():
    def depthwise_forward_kernel():
        pass

    return depthwise_forward_kernel


def test_the_report_has_before_beside_after():
    launch = {"kernel": "norm_forward", "options": {"num_warps": 4}, "blocks": 10, "registers": 40, "stack_bytes": 0}
    launch |= {"shared_bytes": 0, "loop": 12, "trips": 3.0, "instructions": 99.0, "resident": 12, "waves": 0.01}
    row = {"family": "norm", "label": "8x8", "launches": [launch | {"us": 4.0, "bound_by": "issue"}], "us": 4.0}
    row |= {"bound_by": "issue", "floor_us": 2.0, "floor_by": "launch"}
    lines = list(report.lines({"rows": [row]}, {"rows": [row | {"us": 40.0}]}))
    assert lines[0] == "### norm"
    assert lines[4].endswith("| 12 x 3 | 99 | 12 | 0.01 | 4.0 us | issue | 2.0 us | launch | 2.0 | 40.0 us | 20.0 |")


def test_what_is_far_from_its_floor_has_a_reason():
    """In the committed table, which the report wrote: a reason for each such row, beside it, and for no other."""
    results = Path(report.__file__).parents[1] / "benchmarks" / "results" / "kernels-predicted.json"
    table = json.loads(results.read_text())
    far = {f"{row['family']} {row['label']}" for row in table["rows"] if row["us"] > predict.FAR * row["floor_us"]}
    assert far == set(reasons.BECAUSE)
    for row in table["rows"]:
        assert row["because"] == reasons.BECAUSE.get(f"{row['family']} {row['label']}", "")
        assert not any(launch["stack_bytes"] for launch in row["launches"]), row["label"]
    printed = "\n".join(report.lines(table))
    assert all(why in printed for why in reasons.BECAUSE.values())


def test_operations_of_the_tensor_cores_by_the_name_of_the_instruction():
    """Of one warp: a group of four shares a wgmma, which reads both operands from shared memory."""
    assert sass.tensor_operations("HMMA.16816.F32.BF16") == (2 * 16 * 8 * 16, 0.0)
    assert sass.tensor_operations("HMMA.1688.F32.TF32") == (2 * 2 * 16 * 8 * 8, 0.0)
    assert sass.tensor_operations("HGMMA.64x32x16.F32.BF16") == (2 * 64 * 32 * 16 / 4, (64 + 32) * 16 * 2 / 4)
    assert sass.tensor_operations("FFMA") == (0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "expected"), [("LDG.E.128", 512), ("STS", 128), ("LDS.U16", 64), ("LDSM.16.M88.4", 512), ("FADD", 0)]
)
def test_bytes_that_an_instruction_moves(name, expected):
    assert sass.moved_bytes(name) == expected


def test_what_binds_a_launch_of_products():
    """A 128-column product of a whole GPU: as long as its operations over the rate that was measured."""
    operations = 2.0 * 64 * 128 * 16 / 4 * 1e4
    us, bound = predict._time(132, 4, 1, sass.Counts(1e4, 0, 0, 1e4, operations, 0, 0, 0))
    assert bound == "matrix" and us == pytest.approx(132 * 4 * operations / 0.78e15 * 1e6)
