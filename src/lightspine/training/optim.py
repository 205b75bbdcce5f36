"""The optimiser of a task: which parameters are decayed, and at which rate each layer learns."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightspine.training.finetuning import layer_decay_groups

OptimizerName = Literal["adamw", "sgd", "lamb"]


def create_optimizer(
    model: nn.Module,
    name: OptimizerName,
    *,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """Make an optimiser by timm.

    One-dimensional parameters, those whose name ends in `.bias` and those that the model's
    `no_weight_decay()` names are not decayed: the rule of all five official repositories.

    Args:
        model: the network; frozen parameters are left out.
        name: timm's name. All have PyTorch's defaults, AdamW betas of 0.9 and 0.999 and an eps of 1e-8.
        lr: highest rate, that of the classifier.
        weight_decay: of the decayed parameters.
        layer_decay: factor of the rate from one layer to the one before it; see `layer_scales`.
        fused: make AdamW in one pass over the weights instead of ten: on a CPU a plain step costs half a
            forward pass.

    Raises:
        UsageError: a `layer_decay` out of its range.
    """
    options: dict[str, Any] = {"fused": True} if name == "adamw" and fused else {}
    if layer_decay is None:
        # The model itself and not its parameters, so that timm asks for its no_weight_decay().
        return create_optimizer_v2(model, opt=name, lr=lr, weight_decay=weight_decay, **options)
    groups = layer_decay_groups(model, lr=lr, weight_decay=weight_decay, layer_decay=layer_decay)
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=0.0, **options)


def schedule_by_step(
    optimizer: torch.optim.Optimizer, factor: Callable[[int], float]
) -> dict[str, LambdaLR | str]:
    """Return what Lightning wants to know to set the rates before every step.

    Args:
        optimizer: its groups keep their proportions.
        factor: step of the optimiser, from 0 -> factor of every group's rate.
    """
    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
