"""Held-out split of a COCO file without a validation split."""

import numpy as np

from lightspine.data.detection.annotations import CocoAnnotations, select_images
from lightspine.data.image_folder import draw_val_indices


def hold_out(
    annotations: CocoAnnotations, fraction: float, seed: int
) -> tuple[CocoAnnotations, CocoAnnotations]:
    """Split the images of a COCO file into training and validation.

    Args:
        annotations: annotations of all images.
        fraction: share of the images, between 0 and 1, for validation; at least one image.
        seed: seed of the split.

    Raises:
        UsageError: a fraction outside 0 to 1, or fewer than two images.
    """
    count = len(annotations)
    chosen = draw_val_indices(count, fraction, np.random.default_rng(seed), str(annotations.folder))
    is_val = np.isin(np.arange(count), sorted(chosen))
    return (
        select_images(annotations, np.flatnonzero(~is_val)),
        select_images(annotations, np.flatnonzero(is_val)),
    )
