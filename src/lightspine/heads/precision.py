"""Boxes keep full precision whatever autocast says: bfloat16 knows only every fourth pixel beyond 512."""

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead


def at_least_float32(x: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own precision where that is higher."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class PreciseRPNHead(RPNHead):
    """torchvision's head of the proposal network, its outputs in full precision."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Map the levels to objectness logits and box offsets, one tensor per level each."""
        logits, offsets = super().forward(x)
        return [at_least_float32(y) for y in logits], [at_least_float32(y) for y in offsets]


class PreciseRetinaNetHead(RetinaNetHead):
    """torchvision's head of RetinaNet, its outputs in full precision."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Map the levels to class logits (B, N, classes) and box offsets (B, N, 4)."""
        return {name: at_least_float32(y) for name, y in super().forward(x).items()}
