"""How the Triton kernels cut up a scan: by its sizes alone, so that no result depends on the device."""

from typing import NamedTuple

# One warp's width: neighbouring threads read neighbouring channels.
_CHANNELS = 32
# So many programs of one warp keep a large GPU busy: 8 on each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 1056
# Chunks read their inputs twice; a shorter one does not pay for its share of the chain.
_SHORTEST_CHUNK = 32
# The longest tile, and the most states times steps of one: what a thread's registers hold.
_FORWARD_TILE, _BACKWARD_TILE = (16, 64), (8, 32)
# What the backward writes down and reads again: the states at the starts of the tiles of a program, and those
# of all programs of one launch.
_PROGRAM_SCRATCH_BYTES = 64 * 1024
_SCRATCH_BYTES = 128 * 1024 * 1024


class Blocks(NamedTuple):
    """The cut of a scan.

    Attributes:
        channels: channels of a program, BLOCK_D.
        states: states, padded to a power of two, BLOCK_N.
        tile: steps that a program takes in straight code, TILE.
        chunk: steps of a program, a multiple of `tile`.
        chunks: programs that share a sequence.
    """

    channels: int
    states: int
    tile: int
    chunk: int
    chunks: int


def choose_blocks(
    length: int, dim: int, state_dim: int, rows: int, itemsize: int, *, backward: bool
) -> Blocks:
    """Return the cut of a scan.

    Args:
        length: steps of the walk, L.
        dim: channels of a group, D.
        state_dim: states, N.
        rows: images times groups that are scanned in one launch.
        itemsize: bytes of a number of the state.
        backward: the chunks are also short enough for the scratch of a program.
    """
    states = 1 << (state_dim - 1).bit_length()
    longest_tile, fitting = _BACKWARD_TILE if backward else _FORWARD_TILE
    tile = max(1, min(longest_tile, fitting // states))
    chunks = 1
    if backward:
        longest = _PROGRAM_SCRATCH_BYTES // (state_dim * _CHANNELS * itemsize) * tile
        chunks = -(-length // max(_SHORTEST_CHUNK, longest))
    programs = max(1, rows * -(-dim // _CHANNELS))
    if programs < _ENOUGH_PROGRAMS:
        # More than enough: chunks are of equal work, but the last round of them rarely fills the device.
        wanted = -(-4 * _ENOUGH_PROGRAMS // programs)
        chunks = max(chunks, min(wanted, -(-length // _SHORTEST_CHUNK)))
    chunk = -(-length // chunks // tile) * tile
    return Blocks(_CHANNELS, states, tile, chunk, -(-length // chunk))


def scratch_size(blocks: Blocks, state_dim: int) -> int:
    """Return how many numbers of scratch a program of the backward needs for a cut and N states."""
    return blocks.chunk // blocks.tile * state_dim * blocks.channels


def programs_per_launch(blocks: Blocks, state_dim: int, itemsize: int) -> int:
    """Return how many programs of the backward share the scratch; `itemsize` is that of the state."""
    return max(1, _SCRATCH_BYTES // (scratch_size(blocks, state_dim) * itemsize))
