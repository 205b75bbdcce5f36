"""Detection augmentation: joint transforms of an image with its boxes and masks, as in the published recipes.

They take (image, target) with torchvision's `tv_tensors` and can be combined with
`torchvision.transforms.v2`. Random numbers come from torch's global generator.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lightspine.errors import UsageError

DetectionAugmentation = Literal["none", "flip", "multi_scale", "large_scale_jitter"]

MULTI_SCALE = tuple(range(480, 801, 32))
"""Shorter sides in pixels for multi-scale training as in DETR (Carion et al., arXiv:2005.12872)."""

_GRAY = 128


class ResizeShorterSide(v2.Transform):
    """Resize the shorter side to a random choice of `sizes`, limiting the longer side; keeps the ratio.

    torchvision's RandomShortestSize truncates the sides instead of rounding them, which gives 799 px in place
    of 800 at some image sizes.

    Args:
        sizes: lengths of the shorter side in pixels to choose from.
        longest: largest length of the longer side in pixels.

    Raises:
        UsageError: no size, or one below 1.
    """

    def __init__(self, sizes: tuple[int, ...], longest: int) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1 or longest < 1:
            raise UsageError(f"expected sides of at least 1 px, got {list(sizes)} and {longest}")
        self.sizes = tuple(sizes)
        self.longest = longest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose the size."""
        height, width = v2.query_size(flat_inputs)
        shorter = self.sizes[_random_int(0, len(self.sizes) - 1)]
        factor = min(shorter / min(height, width), self.longest / max(height, width))
        return {"size": [_round_side(height, factor), _round_side(width, factor)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image, boxes or masks; bilinear without antialiasing, as published."""
        return self._call_kernel(F.resize, inpt, size=params["size"], antialias=False)


class RandomSizedCrop(v2.Transform):
    """Crop to a random size at a random position; objects outside the crop remain as empty boxes.

    Args:
        smallest: smallest side in pixels; that of the image if it is smaller.
        largest: largest side in pixels; that of the image if it is smaller.

    Raises:
        UsageError: sides below 1, or the larger side first.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__()
        if not 1 <= smallest <= largest:
            raise UsageError(f"expected sides of at least 1 px, the smaller first, got {smallest}, {largest}")
        self.smallest = smallest
        self.largest = largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose size and position."""
        sides = v2.query_size(flat_inputs)
        height, width = (_random_int(min(self.smallest, side), min(self.largest, side)) for side in sides)
        top, left = _random_int(0, sides[0] - height), _random_int(0, sides[1] - width)
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image, boxes or masks."""
        return self._call_kernel(F.crop, inpt, **params)


class LargeScaleJitter(v2.Transform):
    """Large-scale jitter (Ghiasi et al., arXiv:2012.07177) as in ViTDet's recipe.

    The image is resized to fit into a square of `size` times a random factor, then cropped at a random
    position or padded with gray at the right and the bottom to `size`. If there are masks, boxes are
    recomputed from them.

    Args:
        size: height and width of the result in pixels.
        scale: smallest and largest factor.

    Raises:
        UsageError: a value out of its range.
    """

    def __init__(self, size: int = 1024, scale: tuple[float, float] = (0.1, 2.0)) -> None:
        super().__init__()
        if size < 1 or not 0 < scale[0] <= scale[1]:
            raise UsageError(
                f"expected a size of at least 1 px and scales above 0, the smaller first, got {size} and "
                f"{list(scale)}"
            )
        self.size = size
        self.scale = scale

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose factor and position."""
        height, width = v2.query_size(flat_inputs)
        factor = self.scale[0] + float(torch.rand(())) * (self.scale[1] - self.scale[0])
        factor *= min(self.size / height, self.size / width)
        resized = [_round_side(height, factor), _round_side(width, factor)]
        top, left = (_random_int(0, max(side - self.size, 0)) for side in resized)
        return {"source": (height, width), "resized": resized, "top": top, "left": left}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize, crop and pad an image, boxes or masks."""
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.wrap(self._resample_masks(inpt, params), like=inpt)
        resized = self._call_kernel(F.resize, inpt, size=params["resized"], antialias=True)
        height, width = (min(side, self.size) for side in params["resized"])
        cropped = self._call_kernel(
            F.crop, resized, top=params["top"], left=params["left"], height=height, width=width
        )
        border = [0, 0, self.size - width, self.size - height]
        return self._call_kernel(F.pad, cropped, padding=border, fill=_GRAY)

    def forward(self, *inputs: Any) -> Any:
        """Transform (image, target) and recompute the boxes from the masks."""
        image, target = super().forward(*inputs)
        if "masks" in target and len(target["masks"]):
            boxes = _masks_to_boxes(target["masks"].as_subclass(Tensor))
            target = target | {"boxes": tv_tensors.wrap(boxes, like=target["boxes"])}
        return image, target

    def _resample_masks(self, masks: Tensor, params: dict[str, Any]) -> Tensor:
        """Resample only the pixels of the result; enlarging all masks first would take gigabytes."""
        indices = []
        for source, resized, start in zip(
            params["source"], params["resized"], (params["top"], params["left"]), strict=True
        ):
            places = torch.arange(start, start + min(resized, self.size))
            # Aligned by pixel centers, like the image; aligned corners would shift the mask.
            indices.append(((2 * places + 1) * source).div(2 * resized, rounding_mode="floor"))
        plain = masks.as_subclass(Tensor)
        result = plain.new_zeros(*plain.shape[:-2], self.size, self.size)
        picked = plain[..., indices[0], :][..., indices[1]]
        result[..., : len(indices[0]), : len(indices[1])] = picked
        return result


def create_detection_transform(
    augmentation: DetectionAugmentation = "flip",
    *,
    shorter: int = 800,
    longest: int = 1333,
    size: int = 1024,
) -> v2.Transform:
    """Create the training transform of a published detection schedule.

    - "none": resize to a shorter side of `shorter`, with the longer side at most `longest`.
    - "flip" (1x schedules): the same and a horizontal flip with probability 0.5.
    - "multi_scale": DETR's augmentation in the 3x schedules: flip; with probability 0.5 resize to a shorter
      side of 400, 500 or 600 px and crop to 384 to 600 px; resize to a shorter side of 480 to 800 px. These
      lengths are for `shorter=800` and scale with it.
    - "large_scale_jitter" (ViTDet): flip and large-scale jitter to `size`.

    Args:
        augmentation: name of the augmentation.
        shorter: length of the shorter side in pixels.
        longest: largest length of the longer side in pixels.
        size: side in pixels of the square that large-scale jitter produces.

    Raises:
        UsageError: an unknown name or sides below 1.
    """
    if augmentation not in get_args(DetectionAugmentation):
        expected = ", ".join(get_args(DetectionAugmentation))
        raise UsageError(f"expected an augmentation among {expected}, got {augmentation!r}")
    resize: v2.Transform = ResizeShorterSide((shorter,), longest)
    flip = v2.RandomHorizontalFlip(0.5)
    if augmentation == "none":
        return resize
    if augmentation == "flip":
        return v2.Compose([resize, flip])
    if augmentation == "large_scale_jitter":
        return v2.Compose([LargeScaleJitter(size), flip])

    def scale_sides(*sides: int) -> tuple[int, ...]:
        return tuple(_round_side(side, shorter / 800) for side in sides)

    many = ResizeShorterSide(scale_sides(*MULTI_SCALE), longest)
    crop = [
        ResizeShorterSide(scale_sides(400, 500, 600), *scale_sides(4200)),
        RandomSizedCrop(*scale_sides(384, 600)),
        many,
    ]
    return v2.Compose([flip, v2.RandomChoice([many, v2.Compose(crop)])])


def _random_int(least: int, most: int) -> int:
    return int(torch.randint(least, most + 1, ()))


def _round_side(side: int, factor: float) -> int:
    return max(int(side * factor + 0.5), 1)


def _masks_to_boxes(masks: Tensor) -> Tensor:
    """Return the bounding boxes of masks (N, H, W), (N, 4) float32; an empty mask has a box without area."""
    # `any` of a uint8 tensor returns uint8.
    rows, columns = masks.any(dim=2).bool(), masks.any(dim=1).bool()
    sides = []
    for filled in (columns, rows):
        first = filled.int().argmax(dim=1)
        last = filled.shape[1] - filled.flip(1).int().argmax(dim=1)
        sides.append((first, torch.where(filled.any(dim=1), last, first)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1).float()
