"""Detector input and output transform: target checks, normalization, resizing, padding, mask pasting."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from lightspine.errors import UsageError

Target = dict[str, Tensor]

ResizeRounding = Literal["nearest", "down"]


class DetectionTransform(GeneralizedRCNNTransform):
    """Check targets, normalize, resize and pad images, and map predictions back to the original images.

    Batches are padded to multiples of 32.

    Args:
        image_mean: mean of each channel, for pixels in 0..1.
        image_std: standard deviation of each channel.
        resize: shorter side and maximum longer side of images in evaluation mode; `None` keeps their size.
            Images are never resized in training mode, where augmentation sets their size.
        num_classes: object classes; labels are 1 to `num_classes`.
        masks: whether targets must have masks.
        rounding: "nearest" rounds the sides of resized images to the nearest integer and their pixels to
            whole 8-bit values, as OpenMMLab does in training and evaluation; "down", as torchvision does,
            rounds the sides down and keeps the pixels.

    Raises:
        UsageError: an unknown rounding.
    """

    def __init__(
        self,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        resize: tuple[int, int] | None,
        num_classes: int,
        masks: bool,
        rounding: ResizeRounding = "nearest",
    ):
        if rounding not in get_args(ResizeRounding):
            raise UsageError(f"resize_rounding must be 'nearest' or 'down', got {rounding!r}")
        super().__init__(0, 0, list(image_mean), list(image_std), size_divisible=32)
        self.set_resize(resize)
        self.num_classes = num_classes
        self.masks = masks
        self.rounding = rounding

    def set_resize(self, resize: tuple[int, int] | None) -> None:
        """Set the shorter side and maximum longer side of images in evaluation mode; `None`: their own."""
        shorter, self.max_size = resize or (0, 0)
        self.min_size = (shorter,)
        self.resizes = resize is not None

    def check(self, images: list[Tensor], targets: list[Target] | None) -> None:
        """Check images and targets.

        Raises:
            UsageError: an image that is not a (C, H, W) float tensor, training without targets, or a target
                with a missing entry, a wrong shape or dtype, labels out of range, or empty boxes.
        """
        for number, image in enumerate(images):
            if image.ndim != 3 or not image.is_floating_point():
                raise UsageError(
                    f"image {number} must be a (C, H, W) tensor of floats in 0..1, "
                    f"got shape {tuple(image.shape)} of {image.dtype}"
                )
        if targets is None:
            if self.training:
                raise UsageError("a detector in training needs a target for every image, got none")
            return
        if len(targets) != len(images):
            raise UsageError(
                f"every image needs a target, got {len(images)} images and {len(targets)} targets"
            )
        for number, (image, target) in enumerate(zip(images, targets, strict=True)):
            self._check_target(number, image, target)

    def forward(
        self, images: list[Tensor], targets: list[Target] | None = None
    ) -> tuple[ImageList, list[Target] | None]:
        """Return the batch of normalized, resized and padded images, and the targets."""
        if self.resizes and self.rounding == "nearest" and not self.training:
            # Before normalization, because pixels are rounded to 8 bits.
            images = [resize_rounded(image, self.min_size[0], self.max_size) for image in images]
        batch: tuple[ImageList, list[Target] | None] = super().forward(images, targets)
        return batch

    def resize(self, image: Tensor, target: Target | None = None) -> tuple[Tensor, Target | None]:
        """Resize one normalized image and its target in evaluation mode, if sides are rounded down."""
        if self.training or not self.resizes or self.rounding == "nearest":
            return image, target
        resized: tuple[Tensor, Target | None] = super().resize(image, target)
        return resized

    def postprocess(
        self,
        result: list[Target],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[Target]:
        """Map boxes and masks to the original image sizes."""
        if self.training:
            return result
        masks = [found.pop("masks", None) for found in result]
        resized: list[Target] = super().postprocess(result, image_shapes, original_image_sizes)
        for found, mask, size in zip(resized, masks, original_image_sizes, strict=True):
            if mask is not None:
                found["masks"] = paste_masks(mask, found["boxes"], size)
        return resized

    def _check_target(self, number: int, image: Tensor, target: Target) -> None:
        required = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
        for key in required:
            if key not in target:
                raise UsageError(f"target {number} has no {key!r}, expected {', '.join(required)}")
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise UsageError(
                f"the boxes of target {number} must be floats of shape (N, 4), "
                f"got {tuple(boxes.shape)} of {boxes.dtype}"
            )
        if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise UsageError(
                f"target {number} has {len(boxes)} boxes, so its labels must be int64 of shape "
                f"({len(boxes)},), got {tuple(labels.shape)} of {labels.dtype}"
            )
        mask_shape = (len(boxes), *image.shape[-2:])
        if self.masks and tuple(target["masks"].shape) != mask_shape:
            raise UsageError(
                f"the masks of target {number} must have shape {mask_shape}, "
                f"got {tuple(target['masks'].shape)}"
            )
        if not len(boxes):
            return
        if labels.min() < 1 or labels.max() > self.num_classes:
            raise UsageError(
                f"labels must be 1 to {self.num_classes}, target {number} has "
                f"{int(labels.min())} to {int(labels.max())}"
            )
        flat = (boxes[:, 2:] <= boxes[:, :2]).any(dim=1)
        if flat.any():
            box = [round(side, 2) for side in boxes[flat][0].tolist()]
            raise UsageError(f"boxes must have x1 < x2 and y1 < y2, target {number} has {box}")


def resized_size(
    size: tuple[int, int], shorter: int, longest: int, rounding: ResizeRounding
) -> tuple[int, int]:
    """Return the height and width to which an image is resized.

    Args:
        size: height and width of the image.
        shorter: length of the shorter side in pixels.
        longest: largest length of the longer side in pixels.
        rounding: see `DetectionTransform`.
    """
    factor = min(shorter / min(size), longest / max(size))
    shift = 0.5 if rounding == "nearest" else 0.0
    height, width = (max(int(side * factor + shift), 1) for side in size)
    return height, width


def resize_rounded(image: Tensor, shorter: int, longest: int) -> Tensor:
    """Resize an image as OpenMMLab does: sides rounded to the nearest integer, pixels to 8-bit values.

    Args:
        image: pixels in 0..1, (C, H, W).
        shorter: length of the shorter side in pixels.
        longest: largest length of the longer side in pixels.
    """
    sides = image.shape[1], image.shape[2]
    size = resized_size(sides, shorter, longest, "nearest")
    if size == sides:
        return image
    # Whole numbers, so that means of pixels with short binary fractions are exact and round as elsewhere.
    pixels = (image[None] * 255).round()
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)[0].round() / 255


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste mask head outputs into the image with subpixel accuracy; 0 outside the box.

    Masks are sampled bilinearly at pixel centers, as in the published detectors (torchvision rounds boxes to
    whole pixels): thresholded at 0.5, a mask of ones covers the pixels whose centers are in the box.

    Args:
        masks: probabilities (N, 1, M, M).
        boxes: x1, y1, x2, y2 (N, 4) in image pixels.
        size: height and width of the image.

    Returns:
        Probabilities (N, 1, height, width).
    """
    height, width = size
    pasted = masks.new_zeros((len(masks), 1, height, width))
    # One transfer for all boxes: every transfer synchronizes with the GPU.
    for i, (left, top, right, bottom) in enumerate(boxes.tolist()):
        # One pixel of margin, where the interpolation fades to 0.
        rows = slice(max(math.floor(top) - 1, 0), min(math.ceil(bottom) + 1, height))
        columns = slice(max(math.floor(left) - 1, 0), min(math.ceil(right) + 1, width))
        if rows.start >= rows.stop or columns.start >= columns.stop or right <= left or bottom <= top:
            continue
        y = torch.arange(rows.start, rows.stop, device=boxes.device) + 0.5
        x = torch.arange(columns.start, columns.stop, device=boxes.device) + 0.5
        down = _sampling_weights(y, top, bottom, masks.shape[2]).to(masks.dtype)
        across = _sampling_weights(x, left, right, masks.shape[3]).to(masks.dtype)
        pasted[i, 0, rows, columns] = down @ masks[i, 0] @ across.mT
    return pasted


def paste_whole_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks into an image without a loop over the boxes: `paste_masks` for `torch.export`.

    Returns:
        Probabilities (N, height, width).
    """
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    down = _sampling_weights(y[None], top, bottom, masks.shape[2])
    across = _sampling_weights(x[None], left, right, masks.shape[3])
    return down @ masks[:, 0] @ across.mT


def _sampling_weights(positions: Tensor, start: float | Tensor, end: float | Tensor, count: int) -> Tensor:
    """Return the weight of each pixel of a mask at positions of the image, by linear interpolation.

    The mask has `count` pixels from start to end and is 0 outside. A mask of two dimensions is sampled by one
    matrix product per dimension.

    Args:
        positions: (..., P).
        start: coordinate of the side of the box at which the mask starts, (..., 1) if a tensor.
        end: coordinate of the opposite side.
        count: number of pixels of the mask.

    Returns:
        (..., P, count); 0 for an empty box.
    """
    length = torch.as_tensor(end - start, device=positions.device, dtype=positions.dtype)
    places = (positions - start) / length * count - 0.5
    distances = (places[..., None] - torch.arange(count, device=positions.device)).abs()
    return torch.where((length > 0)[..., None], (1 - distances).clamp(min=0), 0.0)
