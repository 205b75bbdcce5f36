"""Single rows, or of few tokens all, of the matrix of softmax attention."""

import math

import torch
from torch import Tensor

from lightspine.analysis.recording import OperatorCall
from lightspine.errors import UsageError


def attention_rows(call: OperatorCall, places: Tensor | None = None) -> Tensor:
    """Return the attention of one image's heads, (heads, places, N of the keys), float32; rows sum to 1.

    Args:
        call: a recorded softmax attention.
        places: which queries, (P,); all by default.

    Raises:
        UsageError: the call was a scan, is causal, or split the image into windows.
    """
    if call.kind != "softmax":
        raise UsageError(f"expected softmax attention, got the scan of {call.module}")
    query, key = call.args[0], call.args[1]
    mask = call.kwargs.get("attn_mask", call.args[3] if len(call.args) > 3 else None)
    if call.kwargs.get("is_causal", False) or query.shape[0] != 1:
        raise UsageError(
            f"expected attention over a whole image, got {query.shape[0]} windows or a causal mask "
            f"in {call.module}"
        )
    # SHViT's single head has no axis of its own.
    query, key = (tensor.unsqueeze(1) if tensor.dim() == 3 else tensor for tensor in (query, key))
    if query.shape[1] != key.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if places is not None:
        query = query[:, :, places.to(query.device)]
    scale = call.kwargs.get("scale") or 1 / math.sqrt(query.shape[-1])
    scores = scale * query.float() @ key.float().transpose(2, 3)
    if mask is not None:
        mask = mask.expand(1, query.shape[1], call.args[0].shape[-2], key.shape[2])
        mask = mask if places is None else mask[:, :, places.to(mask.device)]
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)[0].cpu()
