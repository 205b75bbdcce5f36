"""Launch of the fused cross scan: dt is projected inside the Triton kernels, one state per channel."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightspine.ops.scan_orders import scan_order
from lightspine.ops.triton import cross_scan_kernels as kernels
from lightspine.ops.triton.constants import use_constant
from lightspine.ops.triton.launch import launch
from lightspine.ops.triton.tile_language import INTERPRETED

# Steps of a tile; a state is saved before each half of it.
TILE = 16
# Programs of one warp that keep a large device busy: 8 on each of 132 multiprocessors.
_ENOUGH_PROGRAMS = 1056
# A chunk needs its steps twice, and a program reads the step weight for each direction: shorter ones do not
# pay.
SHORTEST_CHUNK = 64
# The sums over images of the gradient of the step weight are written apart: at most so many numbers.
_PARTIAL_NUMBERS = 16 * 1024 * 1024
# Bytes of the partial gradients of the low-rank rows; above it, the images are processed in slices.
_SLICE_BYTES = 96 * 2**20


class Walk(NamedTuple):
    """Directions of a scan order in the form that the kernels read.

    Attributes:
        order: pixels that each family visits, (families, L) int32.
        pairs: 2 where direction f + families walks backwards over what direction f walks, else 1.
    """

    order: Tensor
    pairs: int


class ProjectedInputs(NamedTuple):
    """The tensors of one scan with steps projected inside.

    Attributes:
        x: map, (B, L, D), channels adjacent.
        projected: for each direction R numbers from which its steps are made, then B, then C: (B, L, K, R +
        2). dt_weight: (K, R, D), of any strides.
        A: (K, D).
        D: skips, (K, D).
        dt_bias: (K, D).
    """

    x: Tensor
    projected: Tensor
    dt_weight: Tensor
    A: Tensor
    D: Tensor | None
    dt_bias: Tensor | None


class SavedStates(NamedTuple):
    """What the forward saves for the backward.

    Attributes:
        tiles: state before every 8 steps, (B, K, 2 ceil(L / 16), D).
        sums: sums of the steps of each chunk, (B, K, J, D); empty for one chunk.
    """

    tiles: Tensor
    sums: Tensor


def saved_shapes(
    batch: int, length: int, directions: int, dim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of `SavedStates`."""
    _, chunks = choose_chunks(length, dim, batch, 32 * _channels_per_thread(dim))
    sums = (batch, directions, chunks, dim) if chunks > 1 else (0,)
    return (batch, directions, 2 * ((length + TILE - 1) // TILE), dim), sums


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the kernels run on a device: NVIDIA from Ampere on, or any in Triton's interpreter."""
    if INTERPRETED:
        return True
    return device.type == "cuda" and dtype != torch.float64 and _has_tensor_cores(device)


@functools.cache
def _has_tensor_cores(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.lru_cache(maxsize=64)
def find_walk(order: str, height: int, width: int, device: torch.device) -> Walk:
    """Return the walk of a registered order on a device; kept for later calls.

    Raises:
        UsageError: as `scan_order`.
    """
    walk = walk_order(scan_order(order, height, width))
    with torch.inference_mode(False):
        return walk._replace(order=walk.order.to(device).contiguous())


def walk_order(order: Tensor) -> Walk:
    """Return how the kernels walk the directions of a scan order, (K, L)."""
    half = order.shape[0] // 2
    if order.shape[0] % 2 == 0 and torch.equal(order[half:], order[:half].flip(1)):
        return Walk(order[:half].to(torch.int32), 2)
    return Walk(order.to(torch.int32), 1)


def choose_chunks(length: int, dim: int, batch: int, block: int) -> tuple[int, int]:
    """Return the steps of a chunk, a multiple of the tile, and the number of chunks of a walk.

    They follow from the sizes alone, so that a result does not depend on the device.
    """
    programs = max(1, batch * -(-dim // block))
    chunks = min(-(-_ENOUGH_PROGRAMS // programs), max(1, length // SHORTEST_CHUNK))
    # Chunks are scanned twice: two passes over half the steps take as long as one pass over all.
    chunks = chunks if chunks > 2 else 1
    chunk = -(-length // chunks // TILE) * TILE
    return chunk, -(-length // chunk)


class _Scan:
    """One scan about to be run: its sizes, its cut, and the arguments that its kernels have in common."""

    def __init__(self, inputs: ProjectedInputs, walk: Walk) -> None:
        x, projected, dt_weight, A, D, dt_bias = inputs
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.batch, self.length, self.dim = x.shape
        self.directions, self.rank, _ = dt_weight.shape
        self.x = x if x.stride(2) == 1 else x.contiguous()
        self.low = _rows_adjacent(projected)
        self.dt_weight = dt_weight
        self.A = A.to(self.dtype).contiguous()
        none = self.A.new_zeros(self.directions, self.dim) if D is None or dt_bias is None else self.A
        self.D, self.dt_bias = (none if t is None else t.to(self.dtype).contiguous() for t in (D, dt_bias))
        self.walk = walk
        self.vector = _channels_per_thread(self.dim)
        self.blocks = -(-self.dim // (32 * self.vector))
        self.chunk, self.chunks = choose_chunks(self.length, self.dim, self.batch, 32 * self.vector)
        # Chunks of a walk and of the walk back are the same pixels; the directions of all families are not.
        per_launch = self.directions if self.chunks == 1 else walk.pairs
        self.launches = range(0, self.directions, per_launch)
        self.per_launch = per_launch

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.x.device)

    def arguments(self) -> dict[str, Any]:
        """What all kernels take that walk the map."""
        return {
            "p_low": self.low,
            "p_W": self.dt_weight,
            "p_A": self.A,
            "p_bias": self.dt_bias,
            "p_order": use_constant(self.walk.order),
            "length": self.length,
            "dim": self.dim,
            "rank": self.rank,
            "families": self.directions // self.walk.pairs,
            "pairs": self.walk.pairs,
            "chunk": self.chunk,
            "chunks": self.chunks,
            "weight_strides": self.dt_weight.stride(),
            "low_pixel": self.low.stride(1),
            "low_image": self.low.stride(0),
            "RANK_SLABS": self.rank // 16 + 1,
        }


def cross_scan_forward(
    inputs: ProjectedInputs, walk: Walk, save_states: bool
) -> tuple[Tensor, SavedStates | None]:
    """Return the sum over the directions, (B, L, D), and, with `save_states`, states for the backward."""
    scan = _Scan(inputs, walk)
    out = scan.empty(*scan.x.shape)
    starts = sums = None
    if scan.chunks > 1:
        starts, sums = _enter_chunks(scan, scan.x, None)
    saved = None
    if save_states:
        tiles = scan.empty(scan.batch, scan.directions, 2 * (-(-scan.length // TILE)), scan.dim)
        saved = SavedStates(tiles, scan.empty(0) if sums is None else sums)
    for first in scan.launches:
        launch(
            kernels.fused_cross_scan_fwd_kernel,
            scan.batch * scan.chunks * scan.blocks,
            p_x=scan.x,
            p_D=scan.D,
            p_start=scan.A if starts is None else starts,
            p_kept=scan.A if saved is None else saved.tiles,
            p_out=out,
            first=first,
            count=scan.per_launch,
            x_pixel=scan.x.stride(1),
            x_image=scan.x.stride(0),
            has_start=int(starts is not None),
            keeps=int(save_states),
            VEC=scan.vector,
            T=TILE,
            **scan.arguments(),
        )
    return out, saved


def cross_scan_backward(
    grad_out: Tensor, inputs: ProjectedInputs, walk: Walk, states: SavedStates | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, projected, dt_weight (K, D, R), A, D and dt_bias in the dtype of the state.

    Args:
        grad_out: gradient of the output, (B, L, D).
        inputs: as in the forward.
        walk: as in the forward.
        states: what the forward has saved; None if nothing, and it runs once more.
    """
    if states is None:
        _, states = cross_scan_forward(inputs, walk, True)
        assert states is not None
    scan = _Scan(inputs, walk)
    grad = grad_out if grad_out.stride(2) == 1 else grad_out.contiguous()
    flows = None
    if scan.chunks > 1:
        flows, _ = _enter_chunks(scan, grad, states.sums)
    wide = all(
        size % 8 == 0
        for t in (scan.x, grad)
        for size in (t.stride(0), t.stride(1), t.storage_offset(), scan.dim)
    )
    # One channel per thread: the backward needs three times the registers.
    backward_vector = 1
    blocks = -(-scan.dim // (32 * backward_vector))
    weights = scan.directions * scan.rank * scan.dim
    # At least one, also for an empty batch.
    images = max(1, min(scan.batch, scan.batch * scan.chunks * weights // _PARTIAL_NUMBERS))
    rows = (scan.length, scan.directions, scan.rank + 2)
    per_image = blocks * math.prod(rows) * scan.dtype.itemsize
    slice_size = max(1, -(-scan.batch // max(1, -(-scan.batch * per_image // _SLICE_BYTES))))
    slices = range(0, scan.batch, slice_size)
    parts_of_slice = -(-slice_size // images) * scan.chunks
    grad_x = scan.empty(*scan.x.shape)
    by_projected = scan.empty(scan.batch, *rows)
    # A channel block adds a part to the gradient of the low-rank rows; a single one writes the gradient.
    grad_low = by_projected[None] if blocks == 1 else scan.empty(blocks, slice_size, *rows)
    grad_W = scan.empty(len(slices) * parts_of_slice, scan.directions, scan.dim, scan.rank)
    parameters = scan.empty(len(grad_W), scan.directions, 3, scan.dim)
    used_parts = 0
    for start in slices:
        size = min(slice_size, scan.batch - start)
        parts = -(-size // images) * scan.chunks
        arguments = scan.arguments() | {"p_low": scan.low[start:]}
        for first in scan.launches:
            launch(
                kernels.fused_cross_scan_bwd_kernel,
                parts * blocks,
                p_x=scan.x[start:],
                p_D=scan.D,
                p_kept=states.tiles[start:],
                p_flow=scan.A if flows is None else flows[start:],
                p_grad_out=grad[start:],
                p_grad_x=grad_x[start:],
                p_grad_low=grad_low[:, start:] if blocks == 1 else grad_low,
                p_grad_W=grad_W[used_parts:],
                p_grad_parameters=parameters[used_parts:],
                first=first,
                count=scan.per_launch,
                batch=size,
                images=images,
                x_pixel=scan.x.stride(1),
                x_image=scan.x.stride(0),
                grad_pixel=grad.stride(1),
                grad_image=grad.stride(0),
                has_start=int(flows is not None),
                SLABS=-(-scan.rank // 16),
                SLAB=8 if scan.rank <= 8 else 16,
                VEC=backward_vector,
                WIDE=wide,
                **arguments,
            )
        if blocks > 1:
            sums = by_projected[start : start + size]
            partial = grad_low.flatten()[: blocks * sums.numel()].view(blocks, *sums.shape)
            torch.sum(partial, 0, out=sums)
        used_parts += parts
    grad_W, parameters = grad_W[:used_parts], parameters[:used_parts]
    # Three sums, because the results of an operator must not share memory.
    by_A, by_D, by_bias = (parameters[:, :, n].sum(0) for n in range(3))
    return grad_x, by_projected, grad_W.sum(0), by_A, by_D, by_bias


def _enter_chunks(scan: _Scan, x: Tensor, sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state that enters each chunk, (B, K, J, D) in the order of the walk, and the sums of steps.

    With `sums` it is the adjoint, for `x` the gradient of the output, in the order of the backward.
    """
    adjoint = sums is not None
    if sums is None:
        sums = scan.empty(scan.batch, scan.directions, scan.chunks, scan.dim)
    states = torch.empty_like(sums)
    launch(
        kernels.fused_chunk_state_kernel,
        scan.batch * scan.chunks * scan.blocks,
        p_x=x,
        p_end=states,
        p_sum=sums,
        first=0,
        count=scan.directions,
        x_pixel=x.stride(1),
        x_image=x.stride(0),
        ADJOINT=adjoint,
        VEC=scan.vector,
        T=TILE,
        **scan.arguments(),
    )
    launch(
        kernels.fused_state_passing_kernel,
        scan.batch * scan.directions * -(-scan.dim // 32),
        p_states=states,
        p_sum=sums,
        p_A=scan.A,
        directions=scan.directions,
        dim=scan.dim,
        chunks=scan.chunks,
        adjoint=int(adjoint),
        T=TILE,
    )
    return states, sums


def _channels_per_thread(dim: int) -> int:
    """Return how many neighboring channels a thread of the forward has: as many as its registers hold."""
    return 1 if dim % 2 else 2


def _rows_adjacent(projected: Tensor) -> Tensor:
    width = projected.shape[3]
    return projected if projected.stride(3) == 1 and projected.stride(2) == width else projected.contiguous()
