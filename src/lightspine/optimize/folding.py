"""`optimize`: a copy of a model for inference, its constants folded into its weights."""

import copy
from typing import TypeVar

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightspine.errors import UsageError
from lightspine.optimize import find_rule

Module = TypeVar("Module", bound=nn.Module)


def optimize(model: Module) -> Module:
    """Return a copy of a model for inference, equal to it within the rounding of its dtype.

    - Every BatchNorm is folded into the convolution or linear map beside it; a residual depthwise branch
      `x + BN(conv(x))` becomes one convolution.
    - What does not depend on the image is computed once: `-exp(A_log)`, gates, layer scales, the scale of
      attention, mirrored kernels, the affine part of a norm before a pointwise map.
    - Linear maps in a row with nothing between them become one: two classifiers whose mean is the output,
      the classifiers of EfficientViM's stages.

    The copy keeps timm's `forward`, `forward_features`, `forward_head`, `forward_intermediates` and the
    attributes of the model, such as its pretrained cfg. It is for inference alone: no parameter asks for a
    gradient, its layout of weights is no checkpoint's, and its classifier is not to be reset.

    Args:
        model: any model of lightspine, also with `features_only=True`, a detector or a segmenter of it, in
            evaluation mode; it stays as it is.

    Raises:
        UsageError: the model is in training mode, or has a BatchNorm that cannot be folded.

    Examples:
        >>> import lightspine, torch
        >>> model = lightspine.create_model("shvit_s1").eval()
        >>> fast = lightspine.optimize(model)
        >>> fast(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
    """
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise UsageError(f"expected a model in evaluation mode (model.eval()), but {training[0]} is training")
    optimized = fold(model)
    if unfolded := [name for name, m in optimized.named_modules() if isinstance(m, _BatchNorm)]:
        more = f" and {len(unfolded) - 1} more" if len(unfolded) > 1 else ""
        raise UsageError(
            f"expected every BatchNorm of a {type(model).__name__} behind a convolution or linear map in a "
            f"Sequential, or a rule for its block, but {unfolded[0]}{more} cannot be folded"
        )
    return optimized


@torch.no_grad()
def fold(model: Module) -> Module:
    """Return what `optimize` does, also where a BatchNorm stays in it, as in many models of timm."""
    return _fold(copy.deepcopy(model)).requires_grad_(False)


def _fold(module: Module) -> Module:
    """Replace children first: a block's rule finds its convolutions without their norms."""
    for name, child in list(module.named_children()):
        folded = _fold(child)
        if folded is not child:
            setattr(module, name, folded)
    rule = find_rule(module)
    return module if rule is None else rule(module)
