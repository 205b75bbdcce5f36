"""Block sizes and chunking of the selective-scan kernels, chosen from the tensor sizes, not the device.

Therefore a result does not depend on the device, and an image gives the same values alone and in a batch if
the chunking is the same.
"""

from typing import NamedTuple

import torch

from lightspine.ops.dispatch import triton_is_interpreted

# Elements of a (states, channels) block, BLOCK_N x BLOCK_D: 64 per thread in the forward, 16 in the backward,
# which holds several blocks.
_SCAN_BLOCK, _GRAD_BLOCK = 2048, 512
_MOST_CHANNELS = 128
# Programs of one warp that fill a large GPU: 8 on each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 1056
# The backward saves the state before every SAVE_EVERY-th step and recomputes the others, TILE at a time.
SAVE_EVERY = 32
TILE = 2
# Temporary memory of the backward in bytes; above it, the images are processed in slices.
_SLICE_BYTES = 64 * 2**20
# Where states are passed from chunk to chunk: channels of a program, chunks whose states are loaded at once.
PASSING_CHANNELS, PASSING_CHUNKS = 32, 8


class ScanConfig(NamedTuple):
    """Launch configuration: block sizes and chunks of a scan.

    Attributes:
        block_n: states, padded to a power of two.
        block_d: channels of a program of a scan.
        grad_block_d: channels of a program of the gradient kernel.
        chunk: steps of a program.
        chunks: programs that share a sequence, J.
        saves: states saved per sequence in the backward, one for every `SAVE_EVERY` steps.
        images_per_slice: images that the backward processes at once; its chunks are those of a slice.
        fast_math: logarithms of the special-function unit; not for float64 and not in the interpreter.
    """

    block_n: int
    block_d: int
    grad_block_d: int
    chunk: int
    chunks: int
    saves: int
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

    Sequences are cut into chunks only where they are too few to fill a GPU: chunks cost a second scan.

    Args:
        batch: images, B.
        length: steps of a sequence, L.
        groups: groups of channels, K.
        dim: channels of a group, D.
        state_dim: states, N.
        dtype: dtype of the input.
        launched_groups: groups that one launch processes.
        backward: for the backward, whose chunks are stretches between saved states.
    """
    block_n = 1 << (state_dim - 1).bit_length()
    itemsize = torch.promote_types(dtype, torch.float32).itemsize
    block_d = _channels(_SCAN_BLOCK * 4 // itemsize, block_n)
    grad_block_d = _channels(_GRAD_BLOCK * 4 // itemsize, block_n)
    blocks = -(-dim // (grad_block_d if backward else block_d))
    saves = -(-length // SAVE_EVERY)

    def cut(images: int) -> tuple[int, int]:
        programs = max(1, images * launched_groups * blocks)
        chunks = min(-(-_ENOUGH_PROGRAMS // programs), saves)
        # Chunks are scanned twice: two passes over half the steps take as long as one pass over all.
        chunk = (-(-saves // chunks) if chunks > 2 else saves) * SAVE_EVERY
        return chunk, -(-length // chunk)

    images = max(1, batch)
    chunk, chunks = cut(images)
    slices = 1
    while backward and images > 1:
        # What an image needs: scratch, partial gradients of B and C, states and adjoints.
        scratch = launched_groups * blocks * chunks * SAVE_EVERY // TILE * block_n * grad_block_d
        partial = 2 * groups * blocks * length * state_dim
        states = groups * (saves + 2 * chunks) * state_dim * dim
        if images * itemsize * (scratch + partial + states) <= _SLICE_BYTES:
            break
        slices += 1
        images = -(-batch // slices)
        chunk, chunks = cut(images)
    fast_math = itemsize == 4 and not triton_is_interpreted()
    return ScanConfig(block_n, block_d, grad_block_d, chunk, chunks, saves, images, fast_math)


def _channels(block: int, block_n: int) -> int:
    return max(8, min(_MOST_CHANNELS, block // block_n))
