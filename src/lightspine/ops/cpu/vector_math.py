"""exp, exp2, softplus and sigmoid of SIMD vectors, without branches.

float32, measured against float64 (tests/ops/test_cpu_kernels.py holds the bounds):

    exp       relative error below 1.5e-7; exactly 1 at 0; 0 below -87.3, infinity from 88.4 on
    exp2      relative error below 1.5e-7; exactly 1 at 0; 0 below -126, infinity from 127.5 on
    softplus  relative error below 2.5e-7
    sigmoid   relative error below 3.0e-7

The bounds hold where the result is a normal number. float64 calls the C library lane by lane: it serves tests
and analysis.
"""

from typing import Any

from numba import njit, types
from numba.extending import overload

from lightspine.ops.cpu.simd import (
    SHIFT,
    VectorType,
    absolute,
    llvm_exp,
    llvm_log,
    maximum,
    minimum,
    power_of_two,
    where_negative,
    zero_below,
)

LOG2_E = 1.4426950408889634
_LN2 = 0.6931471805599453
# ln 2 in two parts; the first has so few bits that its product with an integer is exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Below the first, 2^n is not a normal number; at the second it is infinity.
_SMALLEST, _LARGEST = -87.3, 89.0
_LINEAR_ABOVE = 20.0
# 1 + r + r^2 (...) = e^r for |r| <= ln(2) / 2: minimax polynomial, relative error 1.9e-9.
_E2, _E3, _E4, _E5, _E6 = 0.4999999, 0.1666642, 0.04166822, 0.008374816, 0.0013836846
# The same for 2^r, |r| <= 1 / 2.
_P2, _P3, _P4, _P5, _P6 = _E2 * _LN2**2, _E3 * _LN2**3, _E4 * _LN2**4, _E5 * _LN2**5, _E6 * _LN2**6
# log(1 + x) / x for 0 <= x <= 1: minimax polynomial, relative error 3.0e-8.
_L0, _L1, _L2, _L3, _L4 = 0.99999994, -0.49999493, 0.33319098, -0.24842982, 0.19106005
_L5, _L6, _L7, _L8 = -0.13663244, 0.078225926, -0.029505225, 0.0052326908


def exp(x: Any) -> Any:
    """Return e to the power of every lane; NaN stays NaN."""
    raise NotImplementedError("only for compiled kernels")


def exp2(x: Any) -> Any:
    """Return 2 to the power of every lane; NaN stays NaN."""
    raise NotImplementedError("only for compiled kernels")


def log_one_plus(x: Any) -> Any:
    """Return log(1 + x) of every lane, for lanes from 0 to 1."""
    raise NotImplementedError("only for compiled kernels")


@overload(exp, jit_options={"forceinline": True})
def _exp(x: Any) -> Any:
    if not isinstance(x, VectorType):
        return None
    if x.dtype == types.float64:

        def by_lane(x: Any) -> Any:
            return llvm_exp(x)

        return by_lane

    def polynomial(x: Any) -> Any:
        bounded = maximum(minimum(x, _LARGEST), _SMALLEST)
        shifted = bounded * LOG2_E + SHIFT
        n = shifted - SHIFT
        r = bounded - n * _LN2_HIGH - n * _LN2_LOW
        tail = (((r * _E6 + _E5) * r + _E4) * r + _E3) * r + _E2
        return zero_below(x, _SMALLEST, ((tail * r + 1.0) * r + 1.0) * power_of_two(shifted))

    return polynomial


@overload(exp2, jit_options={"forceinline": True})
def _exp2(x: Any) -> Any:
    if not isinstance(x, VectorType):
        return None
    if x.dtype == types.float64:

        def by_lane(x: Any) -> Any:
            return llvm_exp(x * _LN2)

        return by_lane

    def polynomial(x: Any) -> Any:
        # Saves the multiplications of `exp` that find n and r, which are on the critical path of a scan.
        bounded = maximum(minimum(x, 128.0), -126.0)
        shifted = bounded + SHIFT
        r = bounded - (shifted - SHIFT)
        tail = (((r * _P6 + _P5) * r + _P4) * r + _P3) * r + _P2
        return zero_below(x, -126.0, ((tail * r + _LN2) * r + 1.0) * power_of_two(shifted))

    return polynomial


@overload(log_one_plus, jit_options={"forceinline": True})
def _log_one_plus(x: Any) -> Any:
    if not isinstance(x, VectorType):
        return None
    if x.dtype == types.float64:

        def by_lane(x: Any) -> Any:
            # A first-order term corrects for what 1 + x loses of a small x.
            return llvm_log(1.0 + x) + (x - ((1.0 + x) - 1.0)) / (1.0 + x)

        return by_lane

    def polynomial(x: Any) -> Any:
        upper = ((((x * _L8 + _L7) * x + _L6) * x + _L5) * x + _L4) * x + _L3
        return (((upper * x + _L2) * x + _L1) * x + _L0) * x

    return polynomial


@njit(forceinline=True)
def softplus(x: Any) -> Any:
    """Return log(1 + e^x) of every lane; x itself above 20, as PyTorch does."""
    curved = maximum(x, 0.0) + log_one_plus(exp(0.0 - absolute(x)))
    return where_negative(_LINEAR_ABOVE - x, x, curved)


@njit(forceinline=True)
def softplus_and_slope(x: Any) -> tuple[Any, Any]:
    """Return `softplus` of every lane and its derivative with a single exponential."""
    small = exp(0.0 - absolute(x))
    curved = maximum(x, 0.0) + log_one_plus(small)
    slope = where_negative(x, small, 1.0) / (1.0 + small)
    below = _LINEAR_ABOVE - x
    return where_negative(below, x, curved), where_negative(below, 1.0, slope)


@njit(forceinline=True)
def sigmoid(x: Any) -> Any:
    """Return 1 / (1 + e^-x) of every lane."""
    small = exp(0.0 - absolute(x))
    return where_negative(x, small, 1.0) / (1.0 + small)
