"""Batches that give each image what it would give alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def largest_first(sizes: np.ndarray) -> list[int]:
    """Return the positions of images such that equal sizes follow each other, the largest first.

    An image that does not fit into the memory is met at the start.

    Args:
        sizes: (images, 2), height and width.
    """
    keys = (sizes[:, 1], sizes[:, 0], sizes.prod(axis=1))
    order: list[int] = np.lexsort(keys)[::-1].tolist()
    return order


def detect_alike(detector: Any, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Return what a detector finds, images of one size at a time.

    A detector fills the smaller images of a batch up with zeros, which changes what it finds in them.

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
