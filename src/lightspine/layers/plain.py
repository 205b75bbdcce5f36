"""Check that a layer is as the model built it, so that its weights may be read instead of calling it.

Users replace and wrap layers (LoRA, quantization, parametrizations) and register hooks on them. Models
therefore call every layer as a module; a fast path that does not must make this check at every call.
"""

import torch.nn as nn
import torch.nn.modules.module as module_globals
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a layer is of exactly one class, without hooks and with an ordinary weight.

    Args:
        module: layer.
        kind: class that the model built. Parametrized, quantized and adapted layers have another class.
    """
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    )
    if hooks:
        return False
    weight = module._parameters.get("weight")
    # Some quantizers replace only the weight, by a tensor subclass that not every operation knows.
    return type(weight) is nn.Parameter or not is_traceable_wrapper_subclass(weight)
