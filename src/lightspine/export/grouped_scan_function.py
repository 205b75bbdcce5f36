"""The scans as functions of ONNX operators, in which all shapes stay free; their loops are `scan_loops`'."""

from typing import Any

from lightspine.export.scan_loops import IN_CACHE, loop_text

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

# Rows of D or N numbers are gathered in the order in which the groups visit them, positions outermost. Behind
# the last position the last pixel is read again: what that adds comes after every output.
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
  visits = Gather<axis=1>(order, inside)
  visits_sk = Transpose<perm=[1, 0]>(visits)
  visits_sbk = Unsqueeze(visits_sk, one)
  images = Range(none, n_batch, single)
  images_b = Reshape(images, column)
  starts_b = Mul(images_b, pixels)
  rows = Add(visits_sbk, starts_b)
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

# Back to the pixels: the inverse of the order tells at which position each of them was visited.
_PLACE = """
  y_rows = Reshape(ys, rows_shape)
  walk = Range(none, n_pixels, single)
  order_shape = Shape(order)
  walks = Expand(walk, order_shape)
  places = ScatterElements<axis=1>(order, order, walks)
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

# A sequence is one group whose order is that of its positions.
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


def _grouped(one_state: bool, softplus: bool) -> str:
    beginning = _BEGINNING + _GATHER.replace("{blocks}", _BLOCKS if one_state else _SINGLE_POSITIONS)
    loop = loop_text(one_state=one_state, delta_softplus=softplus)
    return beginning.replace("{arguments}", "x, delta, bias, A, B, C, order") + _escape(loop) + _PLACE


def _sequence(backwards: bool, softplus: bool) -> str:
    loop = loop_text(one_state=False, delta_softplus=softplus, backwards=backwards)
    beginning = (_BEGINNING + _SEQUENCE).replace("{arguments}", "x, delta, bias, A, B, C")
    return beginning + _escape(loop) + _SEQUENCE_END


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


_FORMS = {
    f"{kind}{'' if softplus else 'OfSteps'}": text(choice, softplus)
    for softplus in (True, False)
    for kind, text, choice in (
        ("GroupedScan", _grouped, False),
        ("GroupedScanOneState", _grouped, True),
        ("SequenceScan", _sequence, False),
        ("SequenceScanBackwards", _sequence, True),
    )
}

SCAN_FUNCTIONS = tuple(_FORMS)
"""The names of all functions; see `grouped_name` and `sequence_name`."""

SCAN_FLOATS = 6
"""So many arguments of each function are floats; the order of a grouped scan comes behind them."""


def grouped_name(state_dim: int, delta_softplus: bool) -> str:
    """Return the name of the function for so many states, with or without a softplus of the steps."""
    return f"GroupedScan{'OneState' if state_dim == 1 else ''}{'' if delta_softplus else 'OfSteps'}"


def sequence_name(reverse: bool, delta_softplus: bool) -> str:
    """Return the name of the function for a sequence, ahead or backwards."""
    return f"SequenceScan{'Backwards' if reverse else ''}{'' if delta_softplus else 'OfSteps'}"


def scan_function(name: str, opset: int) -> Any:
    """Return the `onnx.FunctionProto` of a scan.

    A grouped scan takes x (B, P, M, D), one map for all groups (M = 1) or one each (M = K); delta
    (B, P, K, D); bias (K, D), added to delta; A (K, D, N); B and C (B, P, K, N); order (K, P), the pixel that
    each group visits at each position. It gives the sum over the groups, back at the pixels, (B, P, D).

    A scan of a sequence takes x and delta (B, L, D), bias (1, D), A (1, D, N), B and C (B, L, N) and gives
    (B, L, D). All floats are float32.

    Args:
        name: one of `SCAN_FUNCTIONS`.
        opset: version of the ONNX operators.
    """
    import onnx.parser

    return onnx.parser.parse_function(_FORMS[name].format(opset=opset, name=name))
