"""Block and chunk sizes of the Triton kernels, by the sizes of a scan only: results match on all devices."""

from typing import NamedTuple

# The width of a warp: neighboring threads read neighboring channels.
_CHANNELS = 32
# Programs of one warp that keep a large GPU busy: 8 on each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 1056
# Chunks read their inputs twice; shorter ones do not pay for the state passing.
_SHORTEST_CHUNK = 32
# The longest tile and its largest number of states times positions, which the registers of a thread hold.
_FORWARD_TILE, _BACKWARD_TILE = (16, 64), (8, 32)
# Scratch memory of the backward for the states at the starts of tiles: of a program, and of all programs of
# one launch.
_PROGRAM_SCRATCH_BYTES = 64 * 1024
_SCRATCH_BYTES = 128 * 1024 * 1024
# Chunk boundaries that the state passing loads at once.
BOUNDARY_TILE = 16


class Blocks(NamedTuple):
    """Block and chunk sizes of a scan.

    Attributes:
        channels: channels of a program, BLOCK_D.
        states: states, padded to a power of two, BLOCK_N.
        tile: positions that a program processes in unrolled code, TILE.
        chunk: positions of a program, a multiple of `tile`.
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
    """Return block and chunk sizes for a scan.

    Args:
        length: positions, L.
        dim: channels of a group, D.
        state_dim: states, N.
        rows: images times groups of one launch.
        itemsize: bytes of an element of the state.
        backward: also limit the chunks to the scratch memory of a program.
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
        # More than enough, since the last wave of chunks rarely fills the device.
        wanted = -(-4 * _ENOUGH_PROGRAMS // programs)
        chunks = max(chunks, min(wanted, -(-length // _SHORTEST_CHUNK)))
    chunk = -(-length // chunks // tile) * tile
    return Blocks(_CHANNELS, states, tile, chunk, -(-length // chunk))


def scratch_size(blocks: Blocks, state_dim: int) -> int:
    """Return the elements of scratch memory that a program of the backward needs."""
    return blocks.chunk // blocks.tile * state_dim * blocks.channels


def programs_per_launch(blocks: Blocks, state_dim: int, itemsize: int) -> int:
    """Return how many programs of the backward fit into the scratch memory, for the itemsize of the state."""
    return max(1, _SCRATCH_BYTES // (scratch_size(blocks, state_dim) * itemsize))
