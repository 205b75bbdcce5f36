"""Segmentation augmentation: joint transforms of an image and its label map, as in the published recipes."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lightspine.data.segmentation.label_maps import IGNORED
from lightspine.data.transforms import Preprocessing
from lightspine.errors import UsageError

_CROP_ATTEMPTS = 10


class RandomRatioResize(v2.Transform):
    """Resize to fit into a rectangle scaled by a random factor; keeps the aspect ratio.

    Args:
        scale: shorter and longer side of the rectangle in pixels.
        ratio: smallest and largest factor.

    Raises:
        UsageError: sides below 1, factors that are not above 0, or the larger factor first.
    """

    def __init__(self, scale: tuple[int, int] = (512, 2048), ratio: tuple[float, float] = (0.5, 2.0)) -> None:
        super().__init__()
        if min(scale) < 1 or not 0 < ratio[0] <= ratio[1]:
            raise UsageError(
                f"expected sides of at least 1 px and factors above 0, the smaller first, got {list(scale)} "
                f"and {list(ratio)}"
            )
        self.scale = scale
        self.ratio = ratio

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose the size."""
        height, width = v2.query_size(flat_inputs)
        drawn = self.ratio[0] + float(torch.rand(())) * (self.ratio[1] - self.ratio[0])
        return {"size": fit_size(height, width, (int(self.scale[0] * drawn), int(self.scale[1] * drawn)))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image (bilinear without antialiasing, as published) or labels (nearest neighbor)."""
        return self._call_kernel(F.resize, inpt, size=params["size"], antialias=False)


class RandomDiverseCrop(v2.Transform):
    """Random crop, redrawn up to ten times while one class fills too much of it (mmseg's cat_max_ratio).

    Sides shorter than the crop are not changed.

    Args:
        size: height and width in pixels.
        largest_share: largest share of the labeled pixels that one class may fill; 1 accepts every crop.

    Raises:
        UsageError: a value out of range.
    """

    def __init__(self, size: tuple[int, int], largest_share: float = 0.75) -> None:
        super().__init__()
        if min(size) < 1 or not 0 < largest_share <= 1:
            raise UsageError(
                f"expected a size of at least 1 px and a share above 0 to 1, got {list(size)} and "
                f"{largest_share}"
            )
        self.size = size
        self.largest_share = largest_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Choose a position."""
        height, width = v2.query_size(flat_inputs)
        labels = next(value for value in flat_inputs if isinstance(value, tv_tensors.Mask))
        box = {"height": min(height, self.size[0]), "width": min(width, self.size[1])}
        for _ in range(_CROP_ATTEMPTS):
            place = {
                "top": int(torch.randint(height - box["height"] + 1, ())),
                "left": int(torch.randint(width - box["width"] + 1, ())),
            }
            if self.largest_share == 1 or self._is_diverse(F.crop_mask(labels, **place, **box)):
                break
        return place | box

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop an image or labels."""
        return self._call_kernel(F.crop, inpt, **params)

    def _is_diverse(self, labels: Tensor) -> bool:
        counts = torch.bincount(labels.as_subclass(Tensor).flatten(), minlength=IGNORED + 1)
        counts[IGNORED] = 0
        return int((counts > 0).sum()) > 1 and bool(counts.max() < self.largest_share * counts.sum())


class PhotometricDistortion(v2.Transform):
    """SSD's photometric distortion (Liu et al., arXiv:1512.02325) as in the ADE20K recipes.

    Each with probability 0.5: add -32 to 32 (brightness); multiply by 0.5 to 1.5 (contrast), before or after
    the other color changes; multiply the HSV saturation by 0.5 to 1.5; rotate the hue by up to 36 degrees.
    torchvision's RandomPhotometricDistort multiplies the brightness, blends with gray and permutes channels
    instead.
    """

    _transformed_types = (tv_tensors.Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:  # noqa: ARG002  # torchvision's signature
        """Choose the parameters; 0 or 1 is the identity."""
        return {
            "brightness": _random_or_identity(-32, 32, 0),
            "contrast": _random_or_identity(0.5, 1.5, 1),
            "contrast_first": bool(torch.rand(()) < 0.5),
            "saturation": _random_or_identity(0.5, 1.5, 1),
            "hue": _random_or_identity(-0.1, 0.1, 0),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Distort an image, uint8 (3, H, W)."""
        image = inpt.as_subclass(Tensor).float()
        if params["brightness"]:
            image = _round_to_byte(image + params["brightness"])
        if params["contrast"] != 1 and params["contrast_first"]:
            image = _round_to_byte(image * params["contrast"])
        if params["saturation"] != 1:
            image = _round_to_byte(_scale_saturation(image, params["saturation"]))
        if params["hue"]:
            image = F.adjust_hue(image.to(torch.uint8), params["hue"]).float()
        if params["contrast"] != 1 and not params["contrast_first"]:
            image = _round_to_byte(image * params["contrast"])
        return tv_tensors.wrap(image.to(torch.uint8), like=inpt)


class NormalizeAndPad(torch.nn.Module):
    """Normalize the image to float32 (3, H, W) and convert the labels to int64 (H, W).

    Args:
        preprocessing: mean and standard deviation of the model's input.
        size: height and width to which smaller images are padded at the right and the bottom, with the mean
            color and ignored labels; `None` does not pad.
    """

    def __init__(self, preprocessing: Preprocessing, size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.mean, self.std = list(preprocessing.mean), list(preprocessing.std)
        self.size = size

    def forward(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Convert a uint8 image and its labels."""
        pixels = F.normalize(
            F.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True), self.mean, self.std
        )
        classes = labels.as_subclass(Tensor).long()
        if self.size is None:
            return pixels, classes
        border = (0, max(self.size[1] - pixels.shape[2], 0), 0, max(self.size[0] - pixels.shape[1], 0))
        pad = torch.nn.functional.pad
        return pad(pixels, border), pad(classes, border, value=IGNORED)


class ResizeImageOnly(torch.nn.Module):
    """Resize the image to fit into a rectangle, but not its labels, to which predictions are resized.

    Args:
        scale: shorter and longer side of the rectangle in pixels.
        divisor: sides are rounded up to multiples of it.
        twice: resize to the rectangle, then to the multiples, as in the published Semantic FPN; otherwise at
            once.
    """

    def __init__(self, scale: tuple[int, int], divisor: int = 1, twice: bool = True) -> None:
        super().__init__()
        self.scale = scale
        self.divisor = divisor
        self.twice = twice

    def forward(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Resize an image (3, H, W)."""
        size = fit_size(image.shape[-2], image.shape[-1], self.scale)
        aligned = [-(-side // self.divisor) * self.divisor for side in size]
        if self.twice:
            image = F.resize(image, size, antialias=False)
        return F.resize(image, aligned, antialias=False), labels


def create_segmentation_transform(
    preprocessing: Preprocessing,
    *,
    crop: tuple[int, int] = (512, 512),
    scale: tuple[int, int] = (512, 2048),
    ratio: tuple[float, float] = (0.5, 2.0),
    largest_share: float = 0.75,
    hflip: float = 0.5,
    photometric: bool = True,
) -> v2.Transform:
    """Create the published training transform: resize, crop, flip, photometric distortion, normalize, pad.

    Args:
        preprocessing: mean and standard deviation of the model's input.
        crop: height and width of the result in pixels.
        scale: shorter and longer side of the rectangle into which the image is resized.
        ratio: smallest and largest random factor of that rectangle.
        largest_share: largest share of a crop's labeled pixels that one class may fill.
        hflip: probability of a horizontal flip.
        photometric: apply `PhotometricDistortion`.

    Raises:
        UsageError: a value out of range.
    """
    if not 0 <= hflip <= 1:
        raise UsageError(f"expected a probability hflip from 0 to 1, got {hflip}")
    steps = [
        RandomRatioResize(scale, ratio),
        RandomDiverseCrop(crop, largest_share),
        v2.RandomHorizontalFlip(hflip),
    ]
    if photometric:
        steps.append(PhotometricDistortion())
    return v2.Compose([*steps, NormalizeAndPad(preprocessing, crop)])


def create_segmentation_eval_transform(
    preprocessing: Preprocessing,
    *,
    scale: tuple[int, int] | None = (512, 2048),
    divisor: int = 1,
    resize_twice: bool = True,
) -> v2.Transform:
    """Create the validation transform: the image is resized and normalized, the labels keep their size.

    Args:
        preprocessing: mean and standard deviation of the model's input.
        scale: shorter and longer side in pixels of the rectangle into which images are resized; `None` keeps
            their size.
        divisor: sides are rounded up to multiples of it; 32 in the published Semantic FPN configurations.
        resize_twice: see `ResizeImageOnly`.

    Raises:
        UsageError: a side or divisor below 1.
    """
    if divisor < 1 or (scale is not None and min(scale) < 1):
        raise UsageError(f"expected sides and a divisor of at least 1, got {scale} and {divisor}")
    convert = NormalizeAndPad(preprocessing)
    return v2.Compose(
        [convert] if scale is None else [ResizeImageOnly(scale, divisor, resize_twice), convert]
    )


def fit_size(height: int, width: int, scale: tuple[int, int]) -> list[int]:
    """Return the largest size with the same aspect ratio that fits into `scale`, two sides in any order."""
    longest, shortest = max(scale), min(scale)
    factor = min(longest / max(height, width), shortest / min(height, width))
    return [max(int(side * factor + 0.5), 1) for side in (height, width)]


def _scale_saturation(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV, (max - min) / max, up to at most 1; value and hue do not change."""
    largest, smallest = image.amax(dim=0), image.amin(dim=0)
    bound = largest / (largest - smallest).clamp(min=1)
    return largest - (largest - image) * bound.clamp(max=factor)


def _round_to_byte(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255)


def _random_or_identity(least: float, most: float, identity: float) -> float:
    chosen, share = torch.rand(2).tolist()
    return least + share * (most - least) if chosen < 0.5 else identity
