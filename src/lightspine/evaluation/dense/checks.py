"""What an evaluation of a detector or segmenter refuses before, and while, it runs."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightspine.errors import LightspineError, UsageError


def check_loading(batch_size: int, num_workers: int) -> None:
    """Refuse what no loader can do.

    Raises:
        UsageError: a batch size below 1, or fewer than 0 workers.
    """
    if batch_size < 1 or num_workers < 0:
        raise UsageError(
            f"expected a batch size of at least 1 and 0 or more workers, got {batch_size} and {num_workers}"
        )


def check_detection_options(options: dict[str, Any]) -> None:
    """Refuse options with which a detector finds nothing or fails.

    Args:
        options: those that take the place of the checkpoint's.

    Raises:
        UsageError: a score outside 0 to 1, fewer than 1 detection, sides below 1 or the longer first.
    """
    score, most = options.get("score_threshold", 0.0), options.get("detections_per_image", 1)
    shorter, longest = options.get("resize", (1, 1))
    if not 0 <= score <= 1:
        raise UsageError(f"expected a score_threshold from 0 to 1, got {score}")
    if most < 1:
        raise UsageError(f"expected detections_per_image of at least 1, got {most}")
    if not 1 <= shorter <= longest:
        raise UsageError(
            f"expected a resize of at least 1 px, the shorter side first, got {shorter} and {longest}"
        )


def check_finite(network: nn.Module, checkpoint: str | Path) -> None:
    """Refuse the weights of a diverged training, which would score a little instead of failing.

    Raises:
        LightspineError: a weight that is not finite.
    """
    for name, value in network.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise LightspineError(f"{checkpoint} holds weights that are not finite, the first in {name}")


class FiniteLogits:
    """A segmenter whose logits are finite: the largest of numbers that are none is some class all the same.

    Args:
        network: the segmenter.
        checkpoint: what an error calls it.
    """

    def __init__(self, network: Any, checkpoint: str | Path) -> None:
        self.network = network
        self.checkpoint = checkpoint

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes, H, W) of images (B, 3, H, W).

        Raises:
            LightspineError: one is not finite.
        """
        logits: Tensor = self.network(images)
        # One pass without a copy: a sum is finite where all of these are.
        if not logits.sum(dtype=torch.float32).isfinite():
            raise LightspineError(f"the segmenter in {self.checkpoint} gives logits that are not finite")
        return logits
