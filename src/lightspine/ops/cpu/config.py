"""Chunk sizes of the CPU kernels, known without numba because compilers need the shapes of saved states."""

# Scratch memory of one task in vectors of 64 bytes: half a MiB stays in the second-level cache of current
# machines and holds all of Vim's 197 tokens.
SCRATCH_VECTORS = 8192
# Vectors per position beside the decay and the state of each n: dt, slope of the softplus, x, and gradient of
# the output.
VECTORS_PER_POSITION = 4
# Positions whose dt a forward with a projection computes in advance: they stay in the first-level cache.
PROJECTED_POSITIONS = 64

# Positions of sequences (B, D, L), positions innermost in memory, that are transposed into scratch memory at
# once: a multiple of the channels in a register; the tensors of a scan then stay in the first-level cache.
TRANSPOSED_POSITIONS = 128


def chunk_length(length: int, states: int) -> int:
    """Return how many positions of a chunk fit into the scratch memory, with chunks of even length."""
    fitting = max(SCRATCH_VECTORS // (2 * states + VECTORS_PER_POSITION), 8)
    chunks = (length + fitting - 1) // fitting
    return (length + chunks - 1) // chunks


def saved_states_shape(batch: int, length: int, groups: int, dim: int, states: int) -> tuple[int, ...]:
    """Return the shape of the saved states: those at the start of every chunk but the first."""
    return batch, groups, (length - 1) // chunk_length(length, states), states, dim
