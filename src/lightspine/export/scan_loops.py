"""The loops of a scan, as text for the parser of ONNX, and how long each of their turns is.

A loop of ONNX Runtime spends one to two microseconds on a turn and some tenths on each operator in it, so a
turn should have thousands of numbers to work on, and few enough to stay in the processor's cache. Both loops
read `xs` and `deltas` (S, B, K, D), `bias` (K, D), `A` (K, D, N), `Bs` and `Cs` (S, B, K, N) for S positions
and give `ys`, whose numbers are in the order of those of `xs`.
"""

# ONNX Runtime's own Softplus takes three times as long. log(1 + e) loses the last digits of a small e, which
# `e - (u - 1)`, the rounding error of u = 1 + e, gives back.
_SOFTPLUS = """
  above = Relu(biased) size = Abs(biased) below = Neg(size) e = Exp(below) u = Add(e, full) grown = Log(u)
  u_1 = Sub(u, full) lost = Sub(e, u_1) rest = Add(grown, lost) step = Add(above, rest)
"""

# One turn is one position: with N states it has N times the numbers of a position. Their decays are made and
# used within the turn; they would take N times the memory of the image.
_MANY_STATES = """
  biased = Add(deltas, bias)
  {softplus}
  inputs = Mul(step, xs)
  stepping = Unsqueeze(step, last_but_one)
  entering = Unsqueeze(inputs, last_but_one)
  writing = Unsqueeze(Bs, last)
  reading = Unsqueeze(Cs, last_but_one)
  At = Transpose<perm=[0, 2, 1]>(A)
  state_shape = Concat<axis=0>(batch, groups, state, dim)
  start = ConstantOfShape(state_shape)
  end_state, ys = Scan<num_scan_inputs=4, {directions} body = turn
    (float[b,k,n,d] h, float[b,k,o,d] step_t, float[b,k,o,d] input_t, float[b,k,n,o] B_t, float[b,k,o,n] C_t)
    => (float[b,k,n,d] h2, float[b,k,o,d] y_t) {{
    log = Mul(step_t, At) decay = Exp(log) kept = Mul(decay, h) added = Mul(input_t, B_t)
    h2 = Add(kept, added) y_t = MatMul(C_t, h2) }}>(start, stepping, entering, writing, reading)
"""
_BACKWARDS = "scan_input_directions=[1, 1, 1, 1], scan_output_directions=[1],"

# One state is too little for a turn. An outer turn makes the decays of T positions at once, an inner one does
# nothing but `decay * h + added`. S is J * T here, T such that T positions have `IN_CACHE` numbers.
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
    input = Mul(step, x_j) log = Mul(step, A_1) decays = Exp(log) added = Mul(input, B_j)
    h2, states = Scan<num_scan_inputs=2, body = turn
      (float[b,k,d] before, float[b,k,d] decay, float[b,k,d] more)
      => (float[b,k,d] after, float[b,k,d] now) {{
      kept = Mul(decay, before) after = Add(kept, more) now = Identity(after) }}>(h, decays, added)
    y_j = Mul(states, C_j) }}>(start, deltas_j, xs_j, Bs_j, Cs_j)
"""

IN_CACHE = 32768
"""Numbers of each array in an outer turn of a loop with one state: 128 KiB."""


def loop_text(*, one_state: bool, delta_softplus: bool, backwards: bool = False) -> str:
    """Return the operators of a loop.

    Args:
        one_state: N is 1, and the positions come in J blocks of T; they cannot be read backwards then.
        delta_softplus: pass the steps through softplus.
        backwards: from the last position to the first; the outputs are in the order of the inputs.
    """
    form = _ONE_STATE if one_state else _MANY_STATES
    return form.format(
        softplus=_SOFTPLUS if delta_softplus else "step = Identity(biased)",
        directions=_BACKWARDS if backwards else "",
    )
