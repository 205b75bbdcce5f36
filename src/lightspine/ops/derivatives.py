"""Derivatives that kernels do not have: forward mode, the transforms of `torch.func`, second derivatives.

Kernels have a first derivative in reverse mode. Everything else runs standard PyTorch operations, which can
be differentiated in every mode and any number of times, and vectorized.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightspine.errors import UsageError


# Compilers evaluate it once per graph: they compile anew for another stack of transforms.
@torch.compiler.assume_constant_result
def in_transform() -> bool:
    """Return whether `torch.func` transforms (vmap, grad, jvp) or forward-mode differentiation are active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_forward_mode(operator: str) -> None:
    """Check that an operator is not differentiated in forward mode, which would lose its tangent silently.

    A call of the operator's Python function never gets here; a traced or scripted graph does.

    Raises:
        UsageError: forward-mode differentiation is active.
    """
    if forward_ad._current_level >= 0:
        raise UsageError(
            f"the operator lightspine::{operator} has no forward-mode derivative: differentiate the model "
            "itself instead of a traced, scripted or exported copy"
        )


def differentiable_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """Return the gradients of `function(*tensors)` with a graph of their own, for second derivatives.

    Args:
        function: standard PyTorch operations.
        tensors: its arguments; gradients are computed for those that require one.
        grad_outputs: gradients of its outputs.

    Returns:
        One gradient per argument, `None` for an argument that requires none.
    """
    # Aliases, so that an argument which depends on another one counts as independent of it here.
    aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in tensors]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    outputs = function(*aliases)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    grads = iter(torch.autograd.grad(outputs, wanted, grad_outputs, create_graph=True, allow_unused=True))
    return [next(grads) if t is not None and t.requires_grad else None for t in aliases]
