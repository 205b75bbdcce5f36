"""How much memory a forward pass keeps for its backward."""

from collections.abc import Iterable

import torch
import torch.nn as nn
from torch import Tensor


def count_saved_bytes(module: nn.Module, *inputs: Tensor) -> int:
    """Return how many bytes autograd keeps between the forward and the backward of a module.

    Each storage that a saved tensor lies in counts once and whole, as it stays in memory whole; the module's
    own parameters and buffers and the inputs do not count, as they stay anyway.

    Args:
        module: run once, as it is, with gradients recorded.
        *inputs: its arguments.
    """
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        # The graph must live until its storages are counted, lest an address be used twice.
        out = module(*inputs)
    owned = _addresses(module.parameters()) | _addresses(module.buffers()) | _addresses(inputs)
    saved = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in owned)
    del out
    return saved


def _addresses(tensors: Iterable[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}
