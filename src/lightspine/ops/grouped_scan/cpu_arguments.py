"""How tensors reach the compiled kernels: as addresses and strides in one table of integers.

Handing over one array each costs microseconds per tensor, which is as much as a small scan itself takes. The
table costs a few for all of them. It says nothing about dtypes: a kernel is compiled for the types of the
empty arrays that are handed over beside it.
"""

# numba gives an intrinsic its typing context and reads the names of its arguments.
# ruff: noqa: ARG001

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array
from torch import Tensor

# The kernels tell the two 16-bit formats apart by the sign of the integers that carry them.
_CARRIERS = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.bfloat16: np.int16,
    torch.float16: np.uint16,
}


class Rows(NamedTuple):
    """A tensor (B, L, K, X) inside a kernel: its memory and its strides in elements.

    Attributes:
        memory: flat array without bounds.
        batch: stride of B.
        position: stride of L.
        group: stride of K; 0 where all groups share.
        last: stride of X: of the states of B and C; 1 for channels.
    """

    memory: Any
    batch: int
    position: int
    group: int
    last: int


class Operands(NamedTuple):
    """What both kernels read.

    Attributes:
        batch: images or sequences B.
        length: positions L.
        groups: groups K.
        dim: channels D of a group.
        states: states N.
        slices: slices per image.
        chunk: steps of a chunk.
        softplus: whether the steps pass through softplus.
        rank: R, or 0 where the steps are given for every channel.
        gated: whether there is a gate.
        x: input, (B, L, K, D).
        delta: steps before bias and softplus, (B, L, K, D), or what `step_weight` maps to them, (B, L, K, R).
        B: input projections, (B, L, K, N).
        C: output projections, (B, L, K, N).
        z: gate, (B, L, K, D).
        A: state matrices, contiguous (K, N, D).
        D: skips, contiguous (K, D).
        delta_bias: added to delta, contiguous (K, D).
        step_weight: maps R numbers to the steps of all channels, contiguous (K, R, D).
    """

    batch: int
    length: int
    groups: int
    dim: int
    states: int
    slices: int
    chunk: int
    softplus: bool
    rank: int
    gated: bool
    x: Rows
    delta: Rows
    B: Rows
    C: Rows
    z: Rows
    A: Any
    D: Any
    delta_bias: Any
    step_weight: Any


# Entries of the table that are `Operands`: nine numbers, five `Rows`, four addresses.
OPERANDS = 9 + 5 * 5 + 4


@functools.lru_cache(maxsize=64)
def type_examples(*dtypes: torch.dtype) -> tuple[np.ndarray, ...]:
    """Return an empty array for each dtype, by whose type a kernel is compiled."""
    return tuple(np.empty(0, _CARRIERS[dtype]) for dtype in dtypes)


class Strided(NamedTuple):
    """A tensor seen as (B, L, K, X), whatever its own axes: no view of it has to be made.

    Attributes:
        tensor: the memory; index 0 on every axis is where it begins.
        batch: stride of B in elements.
        position: stride of L.
        group: stride of K; 0 where all groups share.
        last: stride of X.
    """

    tensor: Tensor
    batch: int
    position: int
    group: int
    last: int = 1


def readable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `t` itself where a kernel whose states have `dtype` can read its last axis, else a copy.

    The last axis has to be adjacent in memory. Every dtype is read as it is, but 64 bits only beside 64 bits.
    """
    if (t.dtype == torch.float64) != (dtype == torch.float64):
        t = t.to(dtype)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def table_of(numbers: Sequence[int], entries: Sequence[Strided | Tensor | None]) -> np.ndarray:
    """Return the table: the numbers, then address and strides of each entry.

    A `Strided` takes five places, as does `None` in its stead; a tensor takes its address only and has to be
    contiguous. The caller keeps the tensors alive.
    """
    table = list(numbers)
    for entry in entries:
        if entry is None:
            table += (0, 0, 0, 0, 0)
        elif isinstance(entry, Strided):
            tensor, *strides = entry
            table.append(tensor.data_ptr())
            table += strides
        else:
            table.append(entry.data_ptr())
    return np.array(table, np.int64)


@intrinsic
def memory_at(typingctx: Any, example: types.Array, address: types.Integer) -> Any:
    """Return the memory from an address on as a flat array of the example's type, whose length is unknown."""

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        array = context.make_array(sig.return_type)(context, builder)
        size = context.get_constant(
            types.intp, context.get_abi_sizeof(context.get_data_type(sig.return_type.dtype))
        )
        populate_array(
            array,
            data=builder.inttoptr(args[1], array.data.type),
            shape=[context.get_constant(types.intp, 0)],
            strides=[size],
            itemsize=size,
            meminfo=ir.Constant(array.meminfo.type, None),
        )
        return array._getvalue()

    return example(example, types.intp), codegen


@njit(forceinline=True)
def read_rows(table: Any, at: int, example: Any) -> Rows:
    """Return the `Rows` whose five entries begin at `at`."""
    return Rows(memory_at(example, table[at]), table[at + 1], table[at + 2], table[at + 3], table[at + 4])


@njit(forceinline=True)
def read_operands(table: Any, x: Any, delta: Any, state: Any, z: Any) -> Operands:
    """Return what stands at the beginning of a table, given examples of the dtypes."""
    return Operands(
        table[0],
        table[1],
        table[2],
        table[3],
        table[4],
        table[5],
        table[6],
        table[7] != 0,
        table[8],
        table[29] != 0,
        read_rows(table, 9, x),
        read_rows(table, 14, delta),
        read_rows(table, 19, state),
        read_rows(table, 24, state),
        read_rows(table, 29, z),
        memory_at(state, table[34]),
        memory_at(state, table[35]),
        memory_at(state, table[36]),
        memory_at(state, table[37]),
    )
