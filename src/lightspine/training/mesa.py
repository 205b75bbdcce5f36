"""MESA, the self-distillation of EfficientViM's default recipe: the averaged model teaches the trained one.

Du et al., "Sharpness-aware training for free", NeurIPS 2022, arXiv:2205.14083, as the official EfficientViM
applies it.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError


class Mesa:
    """Adds `weight` times the soft cross-entropy with the averaged (EMA) model on the same images.

    The published recipe has it on from a quarter of the epochs, and never together with a teacher.

    Args:
        start: share of the epochs before it begins, from 0 to 1.
        weight: factor of its loss.

    Raises:
        UsageError: a value out of its range.
    """

    def __init__(self, start: float = 0.25, weight: float = 1.0) -> None:
        if not 0 <= start <= 1:
            raise UsageError(f"expected MESA to start at a share of the epochs from 0 to 1, got {start}")
        if weight <= 0:
            raise UsageError(f"expected a weight of MESA above 0, got {weight}")
        self.start = start
        self.weight = weight

    def is_active(self, epoch: int, epochs: int) -> bool:
        """Return whether the loss counts in an epoch.

        Args:
            epoch: number of the epoch, from 0.
            epochs: length of the schedule, without the epochs of a cool-down, which the official code
                does not count either.
        """
        return epoch >= int(self.start * epochs)

    def loss(self, student_logits: Tensor, ema_model: nn.Module, images: Tensor) -> Tensor:
        """Return the weighted loss of a batch; the gradient reaches the student only.

        Args:
            student_logits: (N, K), with gradient.
            ema_model: the averaged model; is put into evaluation mode, in which it belongs.
            images: what the student saw, (N, C, H, W), mixed or not.

        Raises:
            UsageError: the student returned more than one tensor of logits.
        """
        if not isinstance(student_logits, Tensor):
            raise UsageError("MESA needs a student with one head, got the output of one with two heads")
        with torch.no_grad():
            averaged = ema_model.eval()(images)
        # Probabilities as targets; half precision would lose the small ones.
        wide = torch.promote_types(student_logits.dtype, torch.float32)
        return self.weight * F.cross_entropy(student_logits.to(wide), averaged.to(wide).softmax(1))
