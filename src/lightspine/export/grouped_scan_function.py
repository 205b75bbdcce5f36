"""The scan as a function of ONNX operators: two levels of loops, of about the square root of the length each.

ONNX Runtime spends some microseconds on every step of a loop, so one loop over all positions costs several
times what its arithmetic does. The sequence is cut into J blocks of T positions, T the root of the length:
one loop over T finds what every block adds to the state, one over J the state before each block, a second
one over T the outputs. All shapes stay free.
"""

from typing import Any

FUNCTION_DOMAIN = "lightspine"

# Behind the last position the last pixel is read again: what that adds comes after every output.
_BEFORE = """
<opset_import: ["" : {opset}], domain: "lightspine">
{name} (x, delta, bias, A, B, C, order) => (y)
{{
  none = Constant<value_int=0>()
  single = Constant<value_int=1>()
  first = Constant<value_ints=[0]>()
  one = Constant<value_ints=[1]>()
  two = Constant<value_ints=[2]>()
  last = Constant<value_ints=[-1]>()
  last_but_one = Constant<value_ints=[-2]>()
  column = Constant<value_ints=[-1, 1]>()
  leading = Constant<value_ints=[-1, 1, 1]>()

  batch = Shape<start=0, end=1>(delta)
  pixels = Shape<start=1, end=2>(delta)
  groups = Shape<start=2, end=3>(delta)
  dim = Shape<start=3, end=4>(delta)
  state = Shape<start=2, end=3>(A)
  maps = Shape<start=2, end=3>(x)

  length_f = Cast<to=1>(pixels)
  root = Sqrt(length_f)
  side = Ceil(root)
  T = Cast<to=7>(side)
  end = Sub(pixels, one)
  rounded = Add(end, T)
  J = Div(rounded, T)
  padded = Mul(J, T)

  n_padded = Squeeze(padded)
  n_pixels = Squeeze(pixels)
  n_batch = Squeeze(batch)
  n_groups = Squeeze(groups)
  positions = Range(none, n_padded, single)
  inside = Min(positions, end)
  visits = Gather<axis=1>(order, inside)
  blocks_shape = Concat<axis=0>(groups, J, T)
  visits_kjt = Reshape(visits, blocks_shape)
  visits_tjk = Transpose<perm=[2, 1, 0]>(visits_kjt)
  visits_tbjk = Unsqueeze(visits_tjk, one)
  images = Range(none, n_batch, single)
  images_b = Reshape(images, leading)
  starts_b = Mul(images_b, pixels)
  rows = Add(visits_tbjk, starts_b)
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

# (T, B, J, K, N or 1, D or 1): a step's element is the states of all groups of all blocks.
# The first loop makes the steps as well: the elements of one step stay in the processor's cache meanwhile.
_SCAN = """
  At = Transpose<perm=[0, 2, 1]>(A)
  shift = Unsqueeze(bias, last_but_one)
  raw = Unsqueeze(deltas, last_but_one)
  entering = Unsqueeze(xs, last_but_one)
  writing = Unsqueeze(Bs, last)
  reading = Unsqueeze(Cs, {read_axis})
  raw_0 = Gather<axis=0>(raw, none)
  no_step = Sub(raw_0, raw_0)
  no_state = Mul(no_step, At)
  full = Constant<value_float=1.0>()
  {summed_start}
  block_added, {summed}, {kept} = Scan<num_scan_inputs=3, body = add_up
    (float[b,j,k,n,d] h, float[b,j,k,m,d] before, float[b,j,k,o,d] delta_t, float[b,j,k,o,d] x_t,
     float[b,j,k,n,o] B_t) => (float[b,j,k,n,d] h2, float[b,j,k,m,d] after, {outputs}) {{
    biased = Add(delta_t, shift)
    {steps}
    input = Mul(step, x_t) log = Mul(step, At) decay = Exp(log) added = Mul(input, B_t)
    kept_state = Mul(decay, h) h2 = Add(kept_state, added) {summing}
    }}>(no_state, start, raw, entering, writing)
  {block_decay}
  decays_j = Transpose<perm=[1, 0, 2, 3, 4]>(block_decay)
  added_j = Transpose<perm=[1, 0, 2, 3, 4]>(block_added)
  some = Gather<axis=0>(added_j, none)
  empty = Sub(some, some)
  final, starts_j = Scan<num_scan_inputs=2, body = chain
    (float[b,k,n,d] h, float[b,k,n,d] decay, float[b,k,n,d] added)
    => (float[b,k,n,d] h2, float[b,k,n,d] before) {{
    kept_state = Mul(decay, h) h2 = Add(kept_state, added) before = Identity(h) }}>(empty, decays_j, added_j)
  starts = Transpose<perm=[1, 0, 2, 3, 4]>(starts_j)
  ends, ys = Scan<num_scan_inputs={count}, body = read_out
    ({arguments}, float[b,j,k,p,q] c) => (float[b,j,k,n,d] h2, float[b,j,k,o,d] out) {{
    {again} h2 = Add(kept_state, added) out = {read}(c, h2) }}>(starts, {kept}{written}, reading)
"""

_AFTER = """
  y_rows = Reshape(ys, rows_shape)
  walk = Range(none, n_pixels, single)
  order_shape = Shape(order)
  walks = Expand(walk, order_shape)
  places = ScatterElements<axis=1>(order, order, walks)
  place_t = Mod(places, T)
  place_j = Div(places, T)
  place_tb = Mul(place_t, batch)
  place_1tb = Unsqueeze(place_tb, first)
  place_b = Add(place_1tb, images_b)
  place_bj = Mul(place_b, J)
  place_j_in = Add(place_bj, place_j)
  place_k = Mul(place_j_in, groups)
  group_column = Reshape(group, column)
  place_bkp = Add(place_k, group_column)
  place_bpk = Transpose<perm=[0, 2, 1]>(place_bkp)
  found = Gather<axis=0>(y_rows, place_bpk)
  y = ReduceSum<keepdims=0>(found, two)
}}
"""

# ONNX Runtime's own Softplus takes three times as long. log(1 + e) loses the last digits of a small e, which
# `e - (u - 1)`, the rounding error of u = 1 + e, gives back.
_SOFTPLUS = """
    positive = Relu(biased) size = Abs(biased) below = Neg(size) e = Exp(below) u = Add(e, full)
    grown = Log(u) u_1 = Sub(u, full) lost = Sub(e, u_1) rest = Add(grown, lost) step = Add(positive, rest)
"""

# With one state the decays are kept for the second loop; with many it makes them again from the steps, which
# are far fewer.
_ONE_STATE = {
    "read_axis": "last",
    "summed_start": "start = Exp(no_state)",
    "summed": "block_decay",
    "summing": "after = Mul(before, decay)",
    "block_decay": "",
    "kept": "decays, writes",
    "outputs": "float[b,j,k,n,d] decay, float[b,j,k,n,d] added",
    "count": "3",
    "arguments": "float[b,j,k,n,d] h, float[b,j,k,n,d] decay, float[b,j,k,n,d] added",
    "again": "kept_state = Mul(decay, h)",
    "written": "",
    "read": "Mul",
}
_MANY_STATES = {
    "read_axis": "last_but_one",
    "summed_start": "start = Identity(no_step)",
    "summed": "total",
    "summing": "after = Add(before, step)",
    "block_decay": "total_log = Mul(total, At) block_decay = Exp(total_log)",
    "kept": "all_steps, inputs",
    "outputs": "float[b,j,k,o,d] step, float[b,j,k,o,d] input",
    "count": "4",
    "arguments": "float[b,j,k,n,d] h, float[b,j,k,m,d] step, float[b,j,k,m,d] input, float[b,j,k,n,m] B_t",
    "again": "log = Mul(step, At) decay = Exp(log) kept_state = Mul(decay, h) added = Mul(input, B_t)",
    "written": ", writing",
    "read": "MatMul",
}

_FORMS = {
    "GroupedScan": _MANY_STATES | {"steps": _SOFTPLUS},
    "GroupedScanOneState": _ONE_STATE | {"steps": _SOFTPLUS},
    "GroupedScanOfSteps": _MANY_STATES | {"steps": "step = Identity(biased)"},
    "GroupedScanOneStateOfSteps": _ONE_STATE | {"steps": "step = Identity(biased)"},
}

SCAN_FUNCTIONS = tuple(_FORMS)
"""The names of all functions; see `scan_name`."""


def scan_name(state_dim: int, delta_softplus: bool) -> str:
    """Return the name of the function for so many states, with or without a softplus of the steps."""
    return f"GroupedScan{'OneState' if state_dim == 1 else ''}{'' if delta_softplus else 'OfSteps'}"


def scan_function(name: str, opset: int) -> Any:
    """Return the `onnx.FunctionProto` of a scan over K groups.

    Its arguments are x (B, P, M, D), one map for all groups (M = 1) or one each (M = K); delta (B, P, K, D);
    bias (K, D), added to delta; A (K, D, N); B and C (B, P, K, N); order (K, P), the pixel that each group
    visits at each position. It gives the sum over the groups, back at the pixels, (B, P, D). All floats are
    float32.

    Args:
        name: one of `SCAN_FUNCTIONS`.
        opset: version of the ONNX operators.
    """
    import onnx.parser

    text = _BEFORE + _SCAN.format(**_FORMS[name]).replace("{", "{{").replace("}", "}}") + _AFTER
    return onnx.parser.parse_function(text.format(opset=opset, name=name))
