"""Functions that the scan kernels share: softplus and its derivative in base 2."""

# Kernels are written in Triton's language: untyped, and not executed by Python.
# mypy: ignore-errors

import triton.language as tl

from lightspine.ops.triton.tile_language import device_function, exp2, gl, log2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@device_function
def softplus2(v, ACCURATE: tl.constexpr):
    """Return log2(1 + 2^v), which is softplus(v ln 2) / ln 2.

    The exponent is never positive, so that nothing overflows. The special-function unit's logarithm of a
    number near 1 has an absolute error of 2^-22: relative to a step of 0.001, 1.6e-4, a twentieth of what the
    rounding of bfloat16 operands brings. With ACCURATE it is a polynomial of relative error 1e-7. For float64
    it is exact, but as PyTorch's `softplus` v itself above 20 / ln 2.
    """
    small = exp2(-gl.abs(v))
    if v.dtype == gl.float64:
        # log2(1 + small) times what 1 + small lost of small.
        kept = (1.0 + small) - 1.0
        log = log2(1.0 + small) * (small / gl.where(kept > 0.0, kept, 1.0))
        log = gl.where(kept > 0.0, log, small * LOG2E)
        return gl.where(v > 20.0 * LOG2E, v, gl.maximum(v, 0.0) + log)
    elif ACCURATE:
        return gl.maximum(v, 0.0) + log2_1p(small)
    else:
        return gl.maximum(v, 0.0) + log2(1.0 + small)


@device_function
def log2_1p(x):
    """Return log2(1 + x) for x from 0 to 1, relative error 1e-7, by a polynomial of degree 8 times x."""
    y = 0.007395402137226637 * x - 0.04194500892674723
    y = y * x + 0.11183207392730457
    y = y * x - 0.19623895189809704
    y = y * x + 0.2752212123310505
    y = y * x - 0.35829906959248986
    y = y * x + 0.48067888959198063
    y = y * x - 0.7213395131456684
    y = y * x + 1.4426949917298655
    return y * x
