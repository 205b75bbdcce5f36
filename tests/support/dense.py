"""Small backbones of every family and timm, and a batch of detection targets."""

from typing import Any

import torch
from torch import Tensor, nn

import lightspine
from lightspine.heads import FeatureBackbone

# name -> the model, its sizes
MEMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vmamba": ("vmamba_tiny", {"embed_dims": (16, 32, 64, 128), "depths": (1, 1, 1, 1)}),
    "vim": ("vim_tiny", {"dim": 32, "depth": 4}),
    "efficientvim": ("efficientvim_m1", {"dims": (16, 24, 32), "depths": (1, 1, 1), "state_dims": (9, 9, 9)}),
    "shvit": ("shvit_s1", {"embed_dims": (16, 64, 96), "depths": (1, 1, 1)}),
    "efficientmod": ("efficientmod_xxs", {"embed_dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}),
    "timm": ("test_efficientnet", {"out_indices": (1, 2, 3, 4)}),
}

NUM_CLASSES = 3


def create_features(member: str, **options: Any) -> nn.Module:
    """Create a small `features_only` model."""
    name, sizes = MEMBERS[member]
    return lightspine.create_model(name, features_only=True, **sizes | options)


def small_backbone(member: str, **options: Any) -> FeatureBackbone:
    """Return a small model as a FeatureBackbone with its options."""
    return FeatureBackbone(create_features(member), **options)


def full_backbone(name: str, **options: Any) -> FeatureBackbone:
    """Return a published model as a FeatureBackbone with its options."""
    return FeatureBackbone(lightspine.create_model(name, features_only=True), **options)


def few_proposals(detector: nn.Module, count: int = 12) -> nn.Module:
    """Reduce a two-stage detector's number of proposals for fast tests."""
    rpn: Any = getattr(detector, "rpn", None)
    if rpn is not None:
        rpn._post_nms_top_n = {"training": count, "testing": count}
    return detector


def scene(*, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Return two images of odd and different sizes, the first with two objects, the second with none."""
    sizes = [(97, 65), (50, 121)]
    images = [torch.rand(3, height, width, dtype=dtype) for height, width in sizes]
    boxes = torch.tensor([[10.0, 10.0, 50.0, 60.0], [5.0, 50.0, 27.0, 90.0]], dtype=dtype)
    masks = torch.zeros(2, *sizes[0], dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    objects = {"boxes": boxes, "labels": torch.tensor([1, NUM_CLASSES]), "masks": masks}
    return images, [objects, without_objects(*sizes[1], dtype=dtype)]


def without_objects(height: int, width: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the target of an image without objects."""
    return {
        "boxes": torch.zeros(0, 4, dtype=dtype),
        "labels": torch.zeros(0, dtype=torch.int64),
        "masks": torch.zeros(0, height, width, dtype=torch.uint8),
    }


def without_gradient(module: nn.Module) -> list[str]:
    """Return the names of trainable parameters without a finite gradient."""
    return [
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
