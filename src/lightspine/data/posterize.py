"""Posterising to no bits at all, which the published RandAugment does now and then."""

from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp, AutoAugment


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest bits of every channel; with none the image is black.

    `rand-m9-mstd0.5-inc1` draws no bits where the magnitude reaches 10, for about one posterised image in 44.
    The Pillow of the published trainings made such an image black; a newer one raises, in the middle of an
    epoch.
    """
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def use_own_posterize(transform: Any) -> None:
    """Let the policies of a timm transform posterise by `posterize`; in place."""
    for step in transform.transforms:
        for operation in _operations(step):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize


def _operations(step: Any) -> Iterator[AugmentOp]:
    if isinstance(step, AutoAugment):
        yield from (operation for policy in step.policy for operation in policy)
    # RandAugment and AugMix.
    yield from getattr(step, "ops", ())
