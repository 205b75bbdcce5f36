"""In which pieces the CPU kernels walk a sequence backwards, and which states the forward notes for that.

Known without the kernels, since compilers ask for the shapes of an operator's results before it runs.
"""

# Scratch of one task in vectors of 64 bytes: half a MiB stays in the second-level cache of current machines,
# and holds all of Vim's 197 tokens.
SCRATCH_VECTORS = 8192
# Vectors per step beside decay and state of each n: step, slope of the softplus, input, gradient of the
# output.
STEP_ROWS = 4
# Steps that a forward which projects them itself computes in advance: they stay in the first-level cache.
PROJECTED_STEPS = 64


def chunk_length(length: int, states: int) -> int:
    """Return how many steps of the walk fit into the scratch, shared out evenly over the chunks."""
    fitting = max(SCRATCH_VECTORS // (2 * states + STEP_ROWS), 8)
    chunks = (length + fitting - 1) // fitting
    return (length + chunks - 1) // chunks


def saved_states_shape(batch: int, length: int, groups: int, dim: int, states: int) -> tuple[int, ...]:
    """Return the shape of the noted states: those at the start of every chunk but the first."""
    return batch, groups, (length - 1) // chunk_length(length, states), states, dim
