"""Block sizes and chunking of the selective-scan kernels, chosen from the tensor sizes, not the device.

Therefore a result does not depend on the device, and an image gives the same values alone and in a batch if
the chunking is the same.
"""

from typing import NamedTuple

import torch

from lightspine.ops.dispatch import triton_is_interpreted

# Elements of a (states, channels) block of a warp, BLOCK_N x BLOCK_D: 64 per thread in the forward, 16 in the
# gradient kernel, which holds several blocks.
_SCAN_BLOCK, _GRAD_BLOCK = 2048, 512
_MOST_CHANNELS = 128
# Warps of a program of the gradient kernel, each with channels of its own: so many fewer partial gradients of
# B and C.
GRAD_WARPS, _MOST_GRAD_CHANNELS = 4, 32
# Programs that fill a large GPU of 132 multiprocessors: 8 of one warp on each. The gradient kernel, whose
# chunks cost memory, makes do with less.
_ENOUGH_PROGRAMS, _ENOUGH_GRAD_PROGRAMS = 1056, 176
# Chunks of the forward are multiples of this.
CHUNK_UNIT = 32
# The gradient kernel keeps the states before every stretch of a chunk in shared memory: at most 92 KiB in
# all, which every GPU since Ampere has. More than 64 states leave room for fewer.
STRETCH, _MOST_STRETCHES, _MANY_STATES, _FEW_STRETCHES = 16, 7, 64, 3
# Temporary memory of the backward in bytes; above it, the images are processed in slices.
_SLICE_BYTES = 12 * 2**20
# Where states are passed from chunk to chunk: channels of a program, chunks whose states are loaded at once.
PASSING_CHANNELS, PASSING_CHUNKS = 32, 8


class ScanConfig(NamedTuple):
    """Launch configuration: block sizes and chunks of a scan.

    Attributes:
        block_n: states, padded to a power of two.
        block_d: channels of a program of a scan.
        grad_block_d: channels of a program of the gradient kernel.
        stretches: the longest chunk of the gradient kernel in stretches of `STRETCH` steps.
        chunk: steps of a program.
        chunks: programs that share a sequence, J.
        images_per_slice: images that the backward processes at once; its chunks are those of a slice.
        fast_math: logarithms of the special-function unit; not for float64 and not in the interpreter.
    """

    block_n: int
    block_d: int
    grad_block_d: int
    stretches: int
    chunk: int
    chunks: int
    images_per_slice: int
    fast_math: bool


def choose_config(
    batch: int,
    length: int,
    groups: int,
    dim: int,
    state_dim: int,
    dtype: torch.dtype,
    *,
    launched_groups: int,
    backward: bool,
) -> ScanConfig:
    """Return the configuration of a scan.

    Sequences are cut into chunks where they are too few to fill a GPU, because chunks cost a second scan, and
    in the backward, whose chunks have a limited length.

    Args:
        batch: images, B.
        length: steps of a sequence, L.
        groups: groups of channels, K.
        dim: channels of a group, D.
        state_dim: states, N.
        dtype: dtype of the input.
        launched_groups: groups that one launch processes.
        backward: for the backward.
    """
    block_n = 1 << (state_dim - 1).bit_length()
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    block_d = _channels(_SCAN_BLOCK * 4 // itemsize, block_n, _MOST_CHANNELS)
    grad_channels = _channels(_GRAD_BLOCK * 4 // itemsize, block_n, _MOST_GRAD_CHANNELS, least=2)
    grad_block_d = GRAD_WARPS * grad_channels
    stretches = _MOST_STRETCHES if block_n <= _MANY_STATES else _FEW_STRETCHES
    fast_math = itemsize == 4 and not triton_is_interpreted()

    def cut(images: int) -> tuple[int, int]:
        if backward:
            programs = images * launched_groups * -(-dim // grad_block_d)
            return _cut(length, STRETCH, _ENOUGH_GRAD_PROGRAMS, programs, stretches)
        return _cut(length, CHUNK_UNIT, _ENOUGH_PROGRAMS, images * launched_groups * -(-dim // block_d))

    images = max(1, batch)
    chunk, chunks = cut(images)
    slices = 1
    while backward and images > 1:
        # What an image needs: partial gradients of B and C; states, adjoints and three sums of channels.
        partial = 2 * groups * -(-dim // grad_block_d) * length * state_dim
        states = groups * chunks * (2 * state_dim + 3) * dim
        if images * itemsize * (partial + states) <= _SLICE_BYTES:
            break
        slices += 1
        images = -(-batch // slices)
        chunk, chunks = cut(images)
    return ScanConfig(block_n, block_d, grad_block_d, stretches, chunk, chunks, images, fast_math)


def _cut(
    length: int, unit: int, enough: int, programs: int, most_units: int | None = None
) -> tuple[int, int]:
    """Return the steps of a chunk, a multiple of `unit`, and the number of chunks.

    Args:
        length: steps of a sequence.
        unit: steps.
        enough: programs that fill a device.
        programs: programs of scans that are not cut.
        most_units: the longest chunk in units; without it, a sequence may be one chunk.
    """
    units = -(-length // unit)
    chunks = min(-(-enough // max(1, programs)), units)
    # Chunks are scanned twice: two passes over half the steps take as long as one pass over all.
    chunks = chunks if chunks > 2 else 1
    if most_units is not None:
        chunks = max(chunks, -(-units // most_units))
    chunk = -(-units // chunks) * unit
    return chunk, -(-length // chunk)


def _channels(block: int, block_n: int, most: int, least: int = 8) -> int:
    return max(least, min(most, block // block_n))
