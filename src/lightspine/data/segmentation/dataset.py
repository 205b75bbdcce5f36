"""Images with their label maps."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from lightspine.data.batch import BadImage
from lightspine.data.images import open_image
from lightspine.data.packed import PackedTexts
from lightspine.data.segmentation.batch import SegmentationItem
from lightspine.data.segmentation.folders import LabelledImage
from lightspine.data.segmentation.label_maps import ReadsLabels
from lightspine.errors import LightspineError, UsageError

SegmentationTransform = Callable[[Any, Any], tuple[Tensor, Tensor]]


class SegmentationDataset(Dataset[SegmentationItem]):
    """Reads images and label maps; a bad one is reported with the item and never raises.

    Args:
        pairs: the files.
        reader: reads the label maps.
        transform: turns an image, uint8 (3, H, W), and its labels, uint8 (H, W), into float32 and int64: one
            of `create_segmentation_transform`.
        replace_bad: give the next readable image in place of a bad one, so that training batches keep their
            size; without it the item has no image, so that an evaluation counts no image twice.

    Raises:
        UsageError: there is no pair.
    """

    def __init__(
        self,
        pairs: Sequence[LabelledImage],
        reader: ReadsLabels,
        transform: SegmentationTransform,
        *,
        replace_bad: bool = False,
    ) -> None:
        if not pairs:
            raise UsageError("expected at least one image with labels, got none")
        self.images = PackedTexts.pack(str(pair.image) for pair in pairs)
        self.labels = PackedTexts.pack(str(pair.labels) for pair in pairs)
        self.reader = reader
        self.transform = transform
        self.replace_bad = replace_bad
        # Known to this process only: saves reading a bad image again while a replacement is sought.
        self._known_bad: dict[int, BadImage] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> SegmentationItem:
        # Without it a loop over the dataset would never end.
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        bad: list[BadImage] = []
        for offset in range(len(self) if self.replace_bad else 1):
            position = (index + offset) % len(self)
            name = self.images[position]
            if position not in self._known_bad:
                try:
                    pair = self._read(position)
                except LightspineError as error:
                    self._known_bad[position] = BadImage(name, str(error))
                else:
                    return SegmentationItem(*self.transform(*pair), name, tuple(bad))
            bad.append(self._known_bad[position])
        return SegmentationItem(None, None, self.images[index], tuple(bad))

    def _read(self, position: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        path = Path(self.images[position])
        image = open_image(path)
        labels = self.reader.read(self.labels[position])
        if labels.shape != (image.height, image.width):
            raise LightspineError(
                f"image {path} is {image.width}x{image.height} px, but its labels "
                f"{self.labels[position]} are {labels.shape[1]}x{labels.shape[0]}"
            )
        return tv_tensors.Image(F.pil_to_tensor(image)), tv_tensors.Mask(torch.from_numpy(labels))
