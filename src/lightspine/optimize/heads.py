"""Classifiers for inference."""

from typing import Any, TypeVar

import torch.nn as nn

from lightspine.optimize.norms import set_weights
from lightspine.optimize.packed import PackedLinear

Model = TypeVar("Model", bound=nn.Module)


def average_heads(model: Model) -> Model:
    """Give a distilled model the mean of its two linear classifiers, which is its output, as its only one."""
    distilled: Any = model
    if distilled.distilled and distilled.num_classes:
        head, other = distilled.head, distilled.head_dist
        weight = (head.weight.double() + other.weight.double()) / 2
        set_weights(head, weight, (head.bias.double() + other.bias.double()) / 2)
        distilled.head_dist = nn.Identity()
        distilled.distilled = False
    return model


def pack_head(model: Model) -> Model:
    """Pack the classifier, if there is one: a whole matrix is read for each image."""
    owner: Any = model
    if isinstance(owner.head, nn.Linear):
        owner.head = PackedLinear(owner.head)
    return model
