"""Memory of the activations that autograd saves for the backward pass."""

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor


def count_saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Run a module once with gradients and return the bytes that autograd saves for its backward pass.

    Each storage counts once and in full. Parameters, buffers and inputs do not count, since they stay in
    memory anyway.

    Args:
        module: the module, in its current mode.
        *inputs: arguments of the module.
    """
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # The output keeps the graph alive, so no address is reused before the storages are counted.
        out = module(*inputs)
    owned = _storage_addresses([*module.parameters(), *module.buffers(), *inputs])
    total = sum(t.untyped_storage().nbytes() for address, t in saved.items() if address not in owned)
    del out
    return total


def _storage_addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}
