"""ONNX form of the scans: functions of standard operators, for dynamic shapes and every scan order.

`torch.export` keeps a scan as one operator. `scan_table` maps it to a function that is traced in its place
(`ExportedProgram.run_decompositions`): the call of an ONNX function with a loop, or operations without a
loop.

The text of a function is assembled from parts: gather the inputs in scan order, loop, scatter back.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError
from lightspine.ops.inputs import CrossScanInputs, SelectiveScanInputs
from lightspine.ops.scan_orders import scan_order
from lightspine.ops.torch_scan import run_cross_scan, run_selective_scan, unrolled_scan

# The loops of a scan. A loop of ONNX Runtime spends one to two microseconds per iteration and some tenths on
# each operator, so an iteration should process thousands of elements, but few enough for the cache. Both
# loops read `xs` and `deltas` (S, B, K, D), `bias` (K, D), `A` (K, D, N), `Bs` and `Cs` (S, B, K, N) for S
# positions and return `ys` in the order of `xs`.

# ONNX Runtime's own Softplus takes three times as long. log(1 + e) loses the last digits of a small e;
# `e - (u - 1)`, the rounding error of u = 1 + e, restores them.
_SOFTPLUS = """
  above = Relu(biased) size = Abs(biased) below = Neg(size) e = Exp(below) u = Add(e, full) grown = Log(u)
  u_1 = Sub(u, full) lost = Sub(e, u_1) rest = Add(grown, lost) dt = Add(above, rest)
"""

# One iteration per position, with N times the elements of a position. The decays are computed in the
# iteration: for all positions they would take N times the memory of the image.
_MANY_STATES = """
  biased = Add(deltas, bias)
  {softplus}
  inputs = Mul(dt, xs)
  dts_s = Unsqueeze(dt, last_but_one)
  inputs_s = Unsqueeze(inputs, last_but_one)
  Bs_n = Unsqueeze(Bs, last)
  Cs_n = Unsqueeze(Cs, last_but_one)
  At = Transpose<perm=[0, 2, 1]>(A)
  state_shape = Concat<axis=0>(batch, groups, state, dim)
  start = ConstantOfShape(state_shape)
  end_state, ys = Scan<num_scan_inputs=4, {directions} body = position
    (float[b,k,n,d] h, float[b,k,o,d] dt_t, float[b,k,o,d] input_t, float[b,k,n,o] B_t, float[b,k,o,n] C_t)
    => (float[b,k,n,d] h2, float[b,k,o,d] y_t) {{
    log = Mul(dt_t, At) decay = Exp(log) decayed = Mul(decay, h) added = Mul(input_t, B_t)
    h2 = Add(decayed, added) y_t = MatMul(C_t, h2) }}>(start, dts_s, inputs_s, Bs_n, Cs_n)
"""
_REVERSE = "scan_input_directions=[1, 1, 1, 1], scan_output_directions=[1],"

# A single state is too little for an iteration. The outer loop computes the decays of T positions at once,
# the inner one only `decay * h + added`. S is J * T here, with T such that T positions have `IN_CACHE`
# elements.
_ONE_STATE = """
  blocks = Concat<axis=0>(J, T, batch, groups, last)
  deltas_j = Reshape(deltas, blocks)
  xs_j = Reshape(xs, blocks)
  Bs_j = Reshape(Bs, blocks)
  Cs_j = Reshape(Cs, blocks)
  A_1 = Squeeze(A, last)
  state_shape = Concat<axis=0>(batch, groups, dim)
  start = ConstantOfShape(state_shape)
  end_state, ys = Scan<num_scan_inputs=4, body = block
    (float[b,k,d] h, float[t,b,k,d] delta_j, float[t,b,k,d] x_j, float[t,b,k,o] B_j, float[t,b,k,o] C_j)
    => (float[b,k,d] h2, float[t,b,k,d] y_j) {{
    biased = Add(delta_j, bias)
    {softplus}
    input = Mul(dt, x_j) log = Mul(dt, A_1) decays = Exp(log) added = Mul(input, B_j)
    h2, states = Scan<num_scan_inputs=2, body = position
      (float[b,k,d] before, float[b,k,d] decay, float[b,k,d] more)
      => (float[b,k,d] after, float[b,k,d] now) {{
      decayed = Mul(decay, before) after = Add(decayed, more) now = Identity(after) }}>(h, decays, added)
    y_j = Mul(states, C_j) }}>(start, deltas_j, xs_j, Bs_j, Cs_j)
"""

IN_CACHE = 32768
"""Elements of each array in an outer iteration of the loop with one state: 128 KiB."""


def _loop(*, one_state: bool, delta_softplus: bool, reverse: bool = False) -> str:
    """Return the operators of a loop.

    Args:
        one_state: N is 1, and the positions come in J blocks of T; excludes `reverse`.
        delta_softplus: apply softplus to dt.
        reverse: from the last position to the first; the outputs are in the order of the inputs.
    """
    loop = _ONE_STATE if one_state else _MANY_STATES
    return loop.format(
        softplus=_SOFTPLUS if delta_softplus else "dt = Identity(biased)",
        directions=_REVERSE if reverse else "",
    )


FUNCTION_DOMAIN = "lightspine"

_BEGINNING = """
<opset_import: ["" : {opset}], domain: "lightspine">
{name} ({arguments}) => (y)
{{
  none = Constant<value_int=0>()
  single = Constant<value_int=1>()
  one = Constant<value_ints=[1]>()
  two = Constant<value_ints=[2]>()
  last = Constant<value_ints=[-1]>()
  last_but_one = Constant<value_ints=[-2]>()
  full = Constant<value_float=1.0>()
  batch = Shape<start=0, end=1>(delta)
  pixels = Shape<start=1, end=2>(delta)
"""

# Gathers rows of D or N elements in the scan order of each group, positions outermost. Padding positions
# repeat the last pixel: they follow all outputs and do not affect them.
_GATHER = """
  column = Constant<value_ints=[-1, 1]>()
  first = Constant<value_ints=[0]>()
  groups = Shape<start=2, end=3>(delta)
  dim = Shape<start=3, end=4>(delta)
  state = Shape<start=2, end=3>(A)
  maps = Shape<start=2, end=3>(x)
  end = Sub(pixels, one)
  {blocks}

  n_padded = Squeeze(padded)
  n_pixels = Squeeze(pixels)
  n_batch = Squeeze(batch)
  n_groups = Squeeze(groups)
  positions = Range(none, n_padded, single)
  inside = Min(positions, end)
  pixels_at = Gather<axis=1>(order, inside)
  pixels_at_sk = Transpose<perm=[1, 0]>(pixels_at)
  pixels_at_sbk = Unsqueeze(pixels_at_sk, one)
  images = Range(none, n_batch, single)
  images_b = Reshape(images, column)
  starts_b = Mul(images_b, pixels)
  rows = Add(pixels_at_sbk, starts_b)
  group = Range(none, n_groups, single)
  rows_k = Mul(rows, groups)
  group_rows = Add(rows_k, group)
  last_map = Sub(maps, one)
  map = Min(group, last_map)
  rows_m = Mul(rows, maps)
  map_rows = Add(rows_m, map)

  rows_shape = Concat<axis=0>(last, dim)
  states_shape = Concat<axis=0>(last, state)
  x_rows = Reshape(x, rows_shape)
  delta_rows = Reshape(delta, rows_shape)
  B_rows = Reshape(B, states_shape)
  C_rows = Reshape(C, states_shape)
  xs = Gather<axis=0>(x_rows, map_rows)
  deltas = Gather<axis=0>(delta_rows, group_rows)
  Bs = Gather<axis=0>(B_rows, group_rows)
  Cs = Gather<axis=0>(C_rows, group_rows)
"""

_SINGLE_POSITIONS = "padded = Identity(pixels)"
_BLOCKS = f"""
  wanted = Constant<value_ints=[{IN_CACHE}]>()
  rows_per_position = Mul(batch, groups)
  numbers_per_position = Mul(rows_per_position, dim)
  fitting = Div(wanted, numbers_per_position)
  at_least_one = Max(fitting, one)
  T = Min(at_least_one, pixels)
  rounded = Add(end, T)
  J = Div(rounded, T)
  padded = Mul(J, T)
"""

# Scatters the outputs back to the pixels by the inverse of the order.
_PLACE = """
  y_rows = Reshape(ys, rows_shape)
  sequence = Range(none, n_pixels, single)
  order_shape = Shape(order)
  sequences = Expand(sequence, order_shape)
  places = ScatterElements<axis=1>(order, order, sequences)
  places_pk = Transpose<perm=[1, 0]>(places)
  places_b = Mul(places_pk, batch)
  places_1b = Unsqueeze(places_b, first)
  images_11 = Unsqueeze(images_b, last)
  places_bpk = Add(places_1b, images_11)
  place_rows = Mul(places_bpk, groups)
  places_of_groups = Add(place_rows, group)
  found = Gather<axis=0>(y_rows, places_of_groups)
  y = ReduceSum<keepdims=0>(found, two)
}}
"""

# A sequence is a single group in memory order.
_SEQUENCE = """
  groups = Identity(one)
  dim = Shape<start=2, end=3>(delta)
  state = Shape<start=2, end=3>(A)
  deltas_s = Transpose<perm=[1, 0, 2]>(delta)
  xs_s = Transpose<perm=[1, 0, 2]>(x)
  Bs_s = Transpose<perm=[1, 0, 2]>(B)
  Cs_s = Transpose<perm=[1, 0, 2]>(C)
  deltas = Unsqueeze(deltas_s, two)
  xs = Unsqueeze(xs_s, two)
  Bs = Unsqueeze(Bs_s, two)
  Cs = Unsqueeze(Cs_s, two)
"""
_SEQUENCE_END = """
  inner = Constant<value_ints=[2, 3]>()
  ys_s = Squeeze(ys, inner)
  y = Transpose<perm=[1, 0, 2]>(ys_s)
}}
"""


def _grouped_scan(one_state: bool, delta_softplus: bool) -> str:
    beginning = _BEGINNING + _GATHER.replace("{blocks}", _BLOCKS if one_state else _SINGLE_POSITIONS)
    loop = _loop(one_state=one_state, delta_softplus=delta_softplus)
    return beginning.replace("{arguments}", "x, delta, bias, A, B, C, order") + _escape(loop) + _PLACE


def _sequence_scan(reverse: bool, delta_softplus: bool) -> str:
    loop = _loop(one_state=False, delta_softplus=delta_softplus, reverse=reverse)
    beginning = (_BEGINNING + _SEQUENCE).replace("{arguments}", "x, delta, bias, A, B, C")
    return beginning + _escape(loop) + _SEQUENCE_END


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


_FUNCTION_TEXTS = {
    f"{kind}{'' if softplus else 'WithoutSoftplus'}": text(choice, softplus)
    for softplus in (True, False)
    for kind, text, choice in (
        ("GroupedScan", _grouped_scan, False),
        ("GroupedScanOneState", _grouped_scan, True),
        ("SequenceScan", _sequence_scan, False),
        ("SequenceScanReverse", _sequence_scan, True),
    )
}

SCAN_FUNCTIONS = tuple(_FUNCTION_TEXTS)
"""Names of all functions."""

SCAN_FLOATS = 6
"""Number of leading float arguments of each function; the order of a grouped scan follows them."""


def scan_function(name: str, opset: int) -> Any:
    """Return the `onnx.FunctionProto` of a scan.

    A grouped scan takes x (B, P, M, D), one map for all groups (M = 1) or one each (M = K); delta
    (B, P, K, D); bias (K, D), added to delta; A (K, D, N); B and C (B, P, K, N); order (K, P), the pixels in
    the scan order of each group. It returns the sum over the groups in pixel order, (B, P, D).

    A scan of a sequence takes x and delta (B, L, D), bias (1, D), A (1, D, N), B and C (B, L, N) and returns
    (B, L, D). All floats are float32.

    Args:
        name: one of `SCAN_FUNCTIONS`.
        opset: version of the ONNX operators.
    """
    import onnx.parser

    return onnx.parser.parse_function(_FUNCTION_TEXTS[name].format(opset=opset, name=name))


ScanForm = Literal["loop", "inlined", "unrolled"]
Decompositions = dict[Any, Callable[..., Any]]


def scan_table(form: ScanForm) -> Decompositions:
    """Return the functions that replace the scan operators of an exported program.

    Args:
        form: "loop" and "inlined" call a function of `SCAN_FUNCTIONS`, for any image size; "unrolled" has no
            loop and needs a fixed size.
    """
    if form != "unrolled":
        return {
            torch.ops.lightspine.cross_scan.default: _cross_scan_loop,
            torch.ops.lightspine.selective_scan.default: _selective_scan_loop,
        }
    return {
        torch.ops.lightspine.cross_scan.default: _cross_scan_unrolled,
        torch.ops.lightspine.selective_scan.default: _selective_scan_unrolled,
    }


# The operators also return saved states for the backward, which an export does not need.


def _cross_scan_loop(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    save_states: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    height, width = x.shape[1], x.shape[2]
    y = _call_function(
        f"GroupedScan{'OneState' if A.shape[2] == 1 else ''}{'' if delta_softplus else 'WithoutSoftplus'}",
        x.flatten(1, 2).unsqueeze(2),
        delta.flatten(1, 2),
        _or_zeros(delta_bias, A),
        A,
        B.flatten(1, 2),
        C.flatten(1, 2),
        scan_order(order, height, width).to(x.device),
    ).unflatten(1, (height, width))
    if D is not None:
        y = y + x * D.sum(0)
    return y, y.new_empty(0)


def _selective_scan_loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    groups = B.shape[1]
    if groups != 1:
        raise UsageError(f"an exported selective scan in a loop has one group of channels, received {groups}")
    x = u.transpose(1, 2)
    y = _call_function(
        f"SequenceScan{'Reverse' if reverse else ''}{'' if delta_softplus else 'WithoutSoftplus'}",
        x,
        delta.transpose(1, 2),
        _or_zeros(None if delta_bias is None else delta_bias[None], A[None]),
        A[None],
        B[:, 0].transpose(1, 2),
        C[:, 0].transpose(1, 2),
    )
    if D is not None:
        y = y + x * D
    if z is not None:
        y = y * F.silu(z.transpose(1, 2))
    return y.transpose(1, 2), y.new_empty(u.shape[0], *A.shape), y.new_empty(0)


def _call_function(name: str, x: Tensor, *others: Tensor) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{FUNCTION_DOMAIN}::{name}",
        (x, *others),
        dtype=torch.float32,
        shape=(x.shape[0], x.shape[1], x.shape[-1]),
        version=1,
    )
    return result


def _or_zeros(bias: Tensor | None, A: Tensor) -> Tensor:
    return torch.zeros(A.shape[:2], device=A.device) if bias is None else bias


def _cross_scan_unrolled(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    order: str,
    save_states: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    inputs = CrossScanInputs(x, delta, A, B, C, D, delta_bias)
    y = run_cross_scan(unrolled_scan, inputs, delta_softplus, order)
    return y, y.new_empty(0)


def _selective_scan_unrolled(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    save_states: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = SelectiveScanInputs(u, delta, A, B, C, D, z, delta_bias)
    y, state = run_selective_scan(unrolled_scan, inputs, delta_softplus, reverse)
    return y, state, y.new_empty(0)
