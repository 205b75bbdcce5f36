"""Semantic segmentation dataset: images with label maps."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.data.bad_images import BadImage, BadImageTolerantDataset
from lightspine.data.segmentation.folders import LabeledImage
from lightspine.data.segmentation.label_maps import LabelMapSource
from lightspine.errors import LightspineError, UsageError
from lightspine.utils.image_files import open_image
from lightspine.utils.packed_strings import PackedStrings

SegmentationTransform = Callable[[Any, Any], tuple[Tensor, Tensor]]


class SegmentationItem(NamedTuple):
    """One image with its label map; both are `None` if the image could not be read.

    Attributes:
        image: (3, H, W), float32, normalized.
        labels: (H, W), int64.
        name: path of the image.
        bad: images that were skipped.
    """

    image: Tensor | None
    labels: Tensor | None
    name: str
    bad: tuple[BadImage, ...] = ()


class SegmentationBatch(NamedTuple):
    """Batch of images and label maps, stacked for training and in lists for evaluation.

    Attributes:
        images: (N, 3, H, W), or N images (3, H, W), float32, normalized.
        labels: (N, H, W), or N label maps (H, W), int64. Outside training they keep the size of the file,
            even if the image was resized.
        names: path of each image.
        bad: images that were skipped.
    """

    images: Tensor | list[Tensor]
    labels: Tensor | list[Tensor]
    names: list[str]
    bad: list[BadImage]


def collate_segmentation(items: Sequence[SegmentationItem]) -> SegmentationBatch:
    """Collate items of one size into stacked tensors; items without an image are left out."""
    batch = collate_segmentation_lists(items)
    if not batch.names:
        return batch
    return batch._replace(images=torch.stack(list(batch.images)), labels=torch.stack(list(batch.labels)))


def collate_segmentation_lists(items: Sequence[SegmentationItem]) -> SegmentationBatch:
    """Collate items of any sizes into lists; items without an image are left out."""
    return SegmentationBatch(
        [item.image for item in items if item.image is not None],
        [item.labels for item in items if item.labels is not None],
        [item.name for item in items if item.image is not None],
        [bad for item in items for bad in item.bad],
    )


class SegmentationDataset(BadImageTolerantDataset[SegmentationItem]):
    """Map-style dataset of images with label maps.

    Args:
        pairs: paths of the images and label maps.
        reader: reads the label maps.
        transform: transforms a uint8 image (3, H, W) and its uint8 labels (H, W) into float32 and int64: one
            of `create_segmentation_transform`.
        replace_bad: see `BadImageTolerantDataset`.

    Raises:
        UsageError: there is no pair.
    """

    def __init__(
        self,
        pairs: Sequence[LabeledImage],
        reader: LabelMapSource,
        transform: SegmentationTransform,
        *,
        replace_bad: bool = False,
    ) -> None:
        if not pairs:
            raise UsageError("expected at least one image with labels, got none")
        super().__init__(replace_bad=replace_bad)
        self.images = PackedStrings.pack(str(pair.image) for pair in pairs)
        self.labels = PackedStrings.pack(str(pair.labels) for pair in pairs)
        self.reader = reader
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def image_name(self, position: int) -> str:
        """Return the path of an image."""
        return self.images[position]

    def read(self, position: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Read an image, uint8 (3, H, W), and its label map, uint8 (H, W).

        Raises:
            LightspineError: one of them cannot be read, or their sizes differ.
        """
        path = self.images[position]
        image = open_image(path)
        labels = self.reader.read(self.labels[position])
        if labels.shape != (image.height, image.width):
            raise LightspineError(
                f"image {path} is {image.width}x{image.height} px, but its labels "
                f"{self.labels[position]} are {labels.shape[1]}x{labels.shape[0]}"
            )
        return tv_tensors.Image(F.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(labels))

    def make_item(
        self,
        position: int,
        content: tuple[tv_tensors.Image, tv_tensors.Mask] | None,
        bad: tuple[BadImage, ...],
    ) -> SegmentationItem:
        """Transform an image and its label map."""
        image, labels = (None, None) if content is None else self.transform(*content)
        return SegmentationItem(image, labels, self.images[position], bad)
