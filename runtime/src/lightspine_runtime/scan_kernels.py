"""Selective scans of VMamba and Vim compiled by numba, in place of the loops of an exported file.

A kernel scans a slice of the channels of one image. Channels are innermost in memory, so that the compiler
computes several of them at once; exponentials and logarithms are polynomials without branches, because calls
of the C library are not vectorized. float32; relative error of `_exp2` 2e-7, of `_softplus` 3e-7.
"""

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

SCAN_FUNCTIONS = tuple(
    f"{kind}{suffix}"
    for kind in ("GroupedScan", "GroupedScanOneState", "SequenceScan", "SequenceScanReverse")
    for suffix in ("", "WithoutSoftplus")
)
"""Functions of an exported file (domain "lightspine") that `run_scans` computes."""

# Channels of a task: enough for loops of many vector instructions, and few enough that 16 states and their
# decay rates (24 KiB) stay in the first-level cache. Slices are multiples of the channels that the compiler
# processes in one iteration.
_MAX_CHANNELS, _CHANNEL_STEP = 192, 16

# Multiplications and additions may be fused; NaN and infinity stay as they are.
_FASTMATH = {"contract"}

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
_LOG2_E = np.float32(1.4426950408889634)
# The last bits of the sum of `_SHIFT` and a number from -126 to 128 are the number, rounded to an integer,
# plus the bias of float32's exponent.
_SHIFT = np.float32(3 * 2**22 + 127)
_SMALLEST, _LARGEST = np.float32(-126), np.float32(128)
# Minimax polynomial of 2^f for |f| <= 1 / 2, from the second power on; relative error 2e-9.
_P2, _P3, _P4, _P5, _P6 = (
    np.float32(value) for value in (0.24022646, 0.055503287, 0.0096184877, 0.0013399932, 0.00015345812)
)
_P1 = np.float32(0.6931471805599453)
# 2 artanh(s) = s (2 + 2/3 s^2 + 2/5 s^4 + ...), for s <= 1/3.
_S1, _S2, _S3, _S4, _S5 = (np.float32(2 / k) for k in (3, 5, 7, 9, 11))


@intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:  # noqa: ARG001
    """Return the float32 with the bits of an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _bits_of_float(typing_context: Any, value: Any) -> Any:  # noqa: ARG001
    """Return the bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@njit(forceinline=True, fastmath=_FASTMATH)
def _exp2(x: Any) -> Any:
    """Return 2 to the power of x; 2^-126 below -126, infinity from 127.5 on, NaN for NaN."""
    limited = min(max(x, _SMALLEST), _LARGEST)
    shifted = limited + _SHIFT
    f = limited - (shifted - _SHIFT)
    power = ((((_P6 * f + _P5) * f + _P4) * f + _P3) * f + _P2) * f + _P1
    return (power * f + _ONE) * _float_of_bits(np.int32(_bits_of_float(shifted) << np.int32(23)))


@njit(forceinline=True, fastmath=_FASTMATH)
def _softplus(x: Any) -> Any:
    """Return log(1 + e^x)."""
    e = _exp2(-abs(x) * _LOG2_E)
    # log(1 + e) = 2 artanh(e / (2 + e)) keeps the last digits of a small e.
    s = e / (_TWO + e)
    q = s * s
    series = ((((_S5 * q + _S4) * q + _S3) * q + _S2) * q + _S1) * q + _TWO
    return max(x, _ZERO) + s * series


@njit(forceinline=True, fastmath=_FASTMATH)
def _fill_dt(delta: Any, shift: Any, softplus: bool, dt: Any) -> None:
    if softplus:
        for c in range(len(dt)):
            dt[c] = _softplus(delta[c] + shift[c])
    else:
        for c in range(len(dt)):
            dt[c] = delta[c] + shift[c]


# Inputs of ONNX Runtime are read-only arrays.
_ROWS = types.Array(types.float32, 3, "C", readonly=True)
_MATRIX = types.Array(types.float32, 2, "C", readonly=True)
_ORDER = types.Array(types.int64, 2, "C", readonly=True)
_OUTPUT = types.Array(types.float32, 2, "C")
_SIGNATURE = types.void(
    _ROWS, _ROWS, _MATRIX, _ROWS, _ROWS, _ROWS, _ORDER, _OUTPUT, types.boolean, types.intp, types.intp
)


def _kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function that releases the GIL, with its machine code cached on disk."""
    options: dict[str, Any] = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
    try:
        return njit(_SIGNATURE, cache=True, **options)(function)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        warnings.warn(
            "the compiled scans cannot be cached on disk, so each process compiles them for some seconds: "
            "set NUMBA_CACHE_DIR to a writable folder",
            RuntimeWarning,
            stacklevel=1,  # one place for all kernels, so that the warning appears once
        )
        return njit(_SIGNATURE, **options)(function)


# Both kernels scan the channels from `first` to before `last` of one image, group after group, and write the
# sum over the groups. x (P, M, D), one map for all groups or one each; delta (P, K, D); bias (K, D), added to
# delta; A (K, D, N); B and C (P, K, N); order (K, P), the position of each step; y (P, D).


@_kernel
def _scan_many_states(
    x: Any,
    delta: Any,
    bias: Any,
    A: Any,
    B: Any,
    C: Any,
    order: Any,
    y: Any,
    softplus: bool,
    first: int,
    last: int,
) -> None:
    groups, states, width = A.shape[0], A.shape[2], last - first
    rates, state = np.empty((states, width), np.float32), np.empty((states, width), np.float32)
    shift, dt = np.empty(width, np.float32), np.empty(width, np.float32)
    added = np.empty(width, np.float32)
    for k in range(groups):
        m = k if x.shape[1] > 1 else 0
        for c in range(width):
            shift[c] = bias[k, first + c]
            for n in range(states):
                rates[n, c] = A[k, first + c, n] * _LOG2_E
                state[n, c] = _ZERO
        for t in range(order.shape[1]):
            p = order[k, t]
            x_p, delta_p, y_p = x[p, m, first:last], delta[p, k, first:last], y[p, first:last]
            # Loops without conditions, which the compiler turns into vector instructions.
            if k == 0:
                for c in range(width):
                    y_p[c] = _ZERO
            _fill_dt(delta_p, shift, softplus, dt)
            for c in range(width):
                added[c] = dt[c] * x_p[c]
            for n in range(states):
                b, w, rate, h = B[p, k, n], C[p, k, n], rates[n], state[n]
                for c in range(width):
                    now = _exp2(dt[c] * rate[c]) * h[c] + added[c] * b
                    h[c] = now
                    y_p[c] += now * w


@_kernel
def _scan_one_state(
    x: Any,
    delta: Any,
    bias: Any,
    A: Any,
    B: Any,
    C: Any,
    order: Any,
    y: Any,
    softplus: bool,
    first: int,
    last: int,
) -> None:
    groups, width = A.shape[0], last - first
    rate, h, shift = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for k in range(groups):
        m = k if x.shape[1] > 1 else 0
        for c in range(width):
            shift[c] = bias[k, first + c]
            rate[c] = A[k, first + c, 0] * _LOG2_E
            h[c] = _ZERO
        for t in range(order.shape[1]):
            p = order[k, t]
            x_p, delta_p, y_p = x[p, m, first:last], delta[p, k, first:last], y[p, first:last]
            b, w = B[p, k, 0], C[p, k, 0]
            if k == 0:
                for c in range(width):
                    y_p[c] = _ZERO
            if softplus:
                for c in range(width):
                    dt = _softplus(delta_p[c] + shift[c])
                    now = _exp2(dt * rate[c]) * h[c] + dt * x_p[c] * b
                    h[c] = now
                    y_p[c] += now * w
            else:
                for c in range(width):
                    dt = delta_p[c] + shift[c]
                    now = _exp2(dt * rate[c]) * h[c] + dt * x_p[c] * b
                    h[c] = now
                    y_p[c] += now * w


def run_scans(
    calls: Sequence[tuple[str, Sequence[NDArray[Any]]]], pool: ThreadPoolExecutor, threads: int
) -> list[NDArray[np.float32]]:
    """Compute calls of scan functions that do not depend on each other.

    Args:
        calls: name of each function, see `SCAN_FUNCTIONS`, and its inputs as in the exported file: x, delta,
            bias, A, B, C and, for a grouped scan, the order.
        pool: threads that help the calling one.
        threads: number of threads, the calling one included.

    Returns:
        The output of each call, (B, P, D).

    Raises:
        ValueError: inputs of shapes or dtypes that do not fit together, or an order that is not a permutation
            of the positions.
    """
    outputs: list[NDArray[np.float32]] = []
    tasks: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    for name, inputs in calls:
        x, delta, bias, A, B, C, order = _grouped(name, inputs)
        _check(x, delta, bias, A, B, C, order)
        batch, positions, _, dim = delta.shape
        y = np.empty((batch, positions, dim), np.float32)
        outputs.append(y)
        kernel = _scan_one_state if A.shape[2] == 1 else _scan_many_states
        softplus = not name.endswith("WithoutSoftplus")
        slices = _slices(dim, -(-threads // max(batch * len(calls), 1)))
        tasks += [
            (kernel, (x[b], delta[b], bias, A, B[b], C[b], order, y[b], softplus, first, last))
            for b in range(batch)
            for first, last in slices
        ]

    def work(start: int) -> None:
        for kernel, arguments in tasks[start::threads]:
            kernel(*arguments)

    helpers = [pool.submit(work, start) for start in range(1, min(threads, len(tasks)))]
    work(0)
    for helper in helpers:
        helper.result()
    return outputs


def _grouped(name: str, inputs: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return the inputs of a scan as those of a grouped scan: a sequence is a single group."""
    arrays = [np.ascontiguousarray(value) for value in inputs]
    if name.startswith("GroupedScan"):
        return arrays
    x, delta, bias, A, B, C = arrays
    steps = np.arange(x.shape[1], dtype=np.int64)
    order = steps[::-1].copy() if name.startswith("SequenceScanReverse") else steps
    return [x[:, :, None], delta[:, :, None], bias, A, B[:, :, None], C[:, :, None], order[None]]


def _check(*inputs: NDArray[Any]) -> None:
    """Check what the kernels, which read memory without bounds, rely on."""
    x, delta, _, A, _, _, order = inputs
    if delta.ndim != 4 or A.ndim != 3 or x.ndim != 4:
        raise ValueError(f"expected a scan of 4-d x and delta and 3-d A, got {[v.shape for v in inputs]}")
    batch, positions, groups, dim = delta.shape
    states, maps = A.shape[2], groups if x.shape[2] == groups else 1
    rows = (batch, positions, groups, states)
    expected = [
        (batch, positions, maps, dim),
        delta.shape,
        (groups, dim),
        (groups, dim, states),
        rows,
        rows,
        (groups, positions),
    ]
    if [value.shape for value in inputs] != expected or 0 in (positions, groups, dim, states):
        raise ValueError(f"expected inputs of a scan of shapes {expected}, got {[v.shape for v in inputs]}")
    if any(value.dtype != np.float32 for value in inputs[:-1]) or order.dtype != np.int64:
        raise ValueError(f"expected float32 and an int64 order, got {[str(v.dtype) for v in inputs]}")
    for row in order:
        inside = row.min() >= 0 and row.max() < positions
        if not inside or (np.bincount(row, minlength=positions) != 1).any():
            raise ValueError("expected an order that visits each position of a scan once")


def _slices(dim: int, at_least: int) -> list[tuple[int, int]]:
    """Cut channels into slices of similar size, `at_least` so many if there are enough channels."""
    steps = -(-dim // _CHANNEL_STEP)
    count = min(max(-(-dim // _MAX_CHANNELS), at_least), steps)
    bounds = [steps * i // count * _CHANNEL_STEP for i in range(count)] + [dim]
    return list(pairwise(bounds))
