"""Exponentials, logarithms and reciprocals as the GPU's special unit has them, for use inside kernels.

`tl.exp2` and its kin guard against denormals, at three instructions an exponential, and `tl.exp` multiplies first: a
kernel whose exponentials count scales by log2(e) once, outside its loop, and calls `exp2`. Each has an error of about
two units in the last place and takes denormals for zero. The interpreter, which has no assembly, calls NumPy's.
"""

from mixnas.kernels.dispatch import HAS_TRITON, INTERPRETING, tl, triton

# Kernels read globals only as constants.
INTERPRETED = tl.constexpr(INTERPRETING) if HAS_TRITON else INTERPRETING
LOG2_E = tl.constexpr(1.4426950408889634) if HAS_TRITON else 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453) if HAS_TRITON else 0.6931471805599453


@triton.jit
def exp2(x):
    """2 to the power of x, float32."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log2(x):
    """Logarithm to the base 2, float32; between 0.5 and 2 the error is absolute, 2^-22."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x, float32; 0 for an infinite x."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def widen(x):
    """x in float32. Of bfloat16 a pair of neighbours takes two instructions; the compiler's own form takes three."""
    if INTERPRETED or x.dtype != tl.bfloat16:
        return x.to(tl.float32)
    else:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), float32."""
    return reciprocal(1.0 + exp2(x * -LOG2_E))


@triton.jit
def normal_tail(x):
    """Return the probability that a standard normal is above |x|, and its density there times sqrt(2 pi), float32.

    Half of erfc(|x| / sqrt(2)) by formula 7.1.26 of Abramowitz and Stegun's Handbook, absolute error 8e-8.
    """
    density = exp2(x * x * (-0.5 * LOG2_E))
    t = reciprocal(1.0 + 0.231641888 * tl.abs(x))
    poly = 0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
    return t * poly * density, density
