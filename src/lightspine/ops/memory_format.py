"""Channels-last memory format, which makes a transpose between maps and tokens free."""

import torch
from torch import Tensor

from lightspine.ops.derivatives import in_transform


def channels_last(x: Tensor) -> Tensor:
    """Return a map (B, C, H, W) in `torch.channels_last` format; unchanged under `torch.func` transforms.

    `torch.func.vmap` knows only the contiguous format. Scripts and traces.
    """
    # TorchScript skips a branch only if its condition stands alone.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        pass
    elif in_transform():
        return x
    return x.contiguous(memory_format=torch.channels_last)
