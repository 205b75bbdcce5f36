"""Inference with detectors, without the effect of padding."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def detect_by_size(detector: Any, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Run a detector on groups of images of one size, so that batching adds no padding.

    Padding smaller images to the largest of a batch would change their detections.

    Args:
        detector: in evaluation mode.
        images: each (3, H, W), 0..1.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(position)
    found: dict[int, dict[str, Tensor]] = {}
    for positions in groups.values():
        results = detector([images[position] for position in positions])
        found |= dict(zip(positions, results, strict=True))
    return [found[position] for position in range(len(images))]
