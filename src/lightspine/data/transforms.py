"""Preprocessing and augmentation for image classification, with timm's transforms."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from timm.data.auto_augment import AugmentOp, AutoAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop, Resize

from lightspine.errors import UsageError

AugmentationName = Literal["none", "light", "medium", "strong"]
AUGMENTATIONS: tuple[AugmentationName, ...] = get_args(AugmentationName)

TrainInterpolation = Literal["bicubic", "bilinear", "random"]
ErasingMode = Literal["pixel", "rand", "const"]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop and normalization of a model's input; saved inside the checkpoint.

    Attributes:
        input_size: (channels, height, width) in pixels.
        mean: mean per channel, for pixel values from 0 to 1.
        std: standard deviation per channel, for pixel values from 0 to 1.
        interpolation: name of Pillow's resampling filter.
        crop_pct: side of the center crop as a share of the resized shorter side.
        crop_mode: timm's name: "center", "squash" (changes the aspect ratio) or "border".
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, image_size: int | None = None) -> "Preprocessing":
        """Create the preprocessing from a timm pretrained cfg or a saved dictionary.

        Args:
            config: mapping with any of the attributes' names; other keys are ignored.
            image_size: height and width in pixels, in place of the configured ones.
        """
        found = resolve_data_config(pretrained_cfg=asdict(cls()) | dict(config))
        result = cls(
            input_size=tuple(found["input_size"]),
            mean=tuple(found["mean"]),
            std=tuple(found["std"]),
            interpolation=found["interpolation"],
            crop_pct=found["crop_pct"],
            crop_mode=found["crop_mode"],
        )
        if image_size is not None:
            result = replace(result, input_size=(result.input_size[0], image_size, image_size))
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON-serializable values."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Training augmentation settings, applied by timm's transforms.

    The order is: crop, flip, one of RandAugment / AutoAugment / 3-augment, color jitter, normalization,
    random erasing, mixup or CutMix. The defaults are DeiT's recipe, which the published models follow with
    few changes.

    Attributes:
        crop: "resized" (random resized crop) or "padded" (for images of about the input's size, such as
            CIFAR's: resize to the input's size, pad with black by an eighth of the side, random crop).
        scale: smallest and largest area of a resized crop as a share of the image.
        ratio: smallest and largest width / height of a resized crop.
        interpolation: filter of a resized crop; "random" chooses bilinear or bicubic for every image.
            Default: the filter of the preprocessing.
        hflip: probability of a horizontal flip.
        auto_augment: timm's name of a policy: "rand-m9-mstd0.5-inc1" is RandAugment as in the published
            recipes, "3a" is DeiT III's 3-augment (solarize, grayscale or blur), `None` disables it.
        color_jitter: strength of random brightness, contrast and saturation; 0 disables it. As in timm it is
            not applied together with `auto_augment`, except with "3a".
        erasing: probability of random erasing.
        erasing_mode: fill of the erased rectangles: "pixel" (noise per pixel), "rand" (one random color) or
            "const" (the mean color).
        erasing_count: largest number of rectangles per image.
        erasing_after_mixing: apply mixup and CutMix to the uint8 images, rounding the result, and normalize
            and erase afterwards, as timm's data loader does (EfficientMod). By default images are normalized
            and erased before mixing, as in DeiT, so that mixup blends the noise of an erased rectangle with
            another image.
    """

    crop: Literal["resized", "padded"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: TrainInterpolation | None = None
    hflip: float = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    erasing: float = 0.25
    erasing_mode: ErasingMode = "pixel"
    erasing_count: int = 1
    erasing_after_mixing: bool = False

    def check(self) -> None:
        """Check that all values are in range.

        Not called by the constructor, because the recipe parser would report a wrong type instead.

        Raises:
            UsageError: a value out of range.
        """
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"expected a crop scale from 0 to 1, the smaller first, got {list(self.scale)}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UsageError(f"expected a crop ratio above 0, the smaller first, got {list(self.ratio)}")
        for name in ("hflip", "erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"expected a probability {name} from 0 to 1, got {getattr(self, name)}")
        if self.color_jitter < 0:
            raise UsageError(f"expected a color_jitter of at least 0, got {self.color_jitter}")
        if self.erasing_count < 1:
            raise UsageError(f"expected an erasing_count of at least 1, got {self.erasing_count}")
        _check_policy(self.auto_augment)

    def timm_options(self) -> dict[str, Any]:
        """Return the equivalent arguments of `timm.data.create_transform`."""
        options: dict[str, Any] = {
            "scale": self.scale,
            "ratio": self.ratio,
            "hflip": self.hflip,
            "auto_augment": self.auto_augment,
            "color_jitter": self.color_jitter or None,
            "re_prob": self.erasing,
            "re_mode": self.erasing_mode,
            "re_count": self.erasing_count,
        }
        return options if self.interpolation is None else options | {"interpolation": self.interpolation}


PRESETS = {
    "light": Augmentation(scale=(0.6, 1.0), auto_augment=None, color_jitter=0.0, erasing=0.0),
    "medium": Augmentation(scale=(0.25, 1.0), auto_augment=None, color_jitter=0.3, erasing=0.0),
    "strong": Augmentation(),
}


def create_eval_transform(
    preprocessing: Preprocessing, *, normalize: bool = True
) -> Callable[[Image.Image], Tensor]:
    """Create the deterministic transform: resize, center crop, normalize to a float32 (3, H, W) tensor.

    Args:
        preprocessing: input size and statistics of the model.
        normalize: `False` returns the pixels as uint8 (3, H, W).
    """
    transform = create_transform(is_training=False, normalize=normalize, **_common_options(preprocessing))
    transform.transforms.insert(0, ResizeLimit(preprocessing))
    return transform


class ResizeLimit:
    """Check of an image before its shorter side is resized: a long one would take gigabytes.

    Raises:
        UsageError: the resized image would have more than `PIL.Image.MAX_IMAGE_PIXELS` pixels.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.mode = preprocessing.crop_mode
        self.side = max(preprocessing.input_size[1:]) / preprocessing.crop_pct

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image."""
        most = Image.MAX_IMAGE_PIXELS
        shorter, longer = sorted(image.size)
        needed = self.side**2 * longer / shorter
        if self.mode == "center" and most is not None and needed > most:
            raise UsageError(
                f"expected an image of usual proportions, got {image.width}x{image.height} px, which resized "
                f"to {self.side:.0f} px on the shorter side have more than {most:,} px"
            )
        return image


def create_train_transform(
    preprocessing: Preprocessing, augmentation: AugmentationName | Augmentation = "medium"
) -> Callable[[Image.Image], Tensor]:
    """Create the random training transform.

    Args:
        preprocessing: input size and statistics of the model.
        augmentation: "none" (resize and center crop), "light" (crops of at least 60 % of the image, flips),
            "medium" (at least 25 %, with color jitter), "strong" (at least 8 %, RandAugment, erasing), or an
            `Augmentation`.

    Returns:
        A function that maps a PIL image to a normalized float32 tensor (3, H, W), or to a uint8 tensor with
        `erasing_after_mixing`; `create_batch_transform` normalizes these.

    Raises:
        UsageError: an unknown augmentation, or a setting out of range.
    """
    if augmentation == "none":
        transform = create_transform(is_training=True, no_aug=True, **_common_options(preprocessing))
        transform.transforms.insert(0, ResizeLimit(preprocessing))
        return transform
    settings = resolve_augmentation(augmentation)
    options = _common_options(preprocessing) | settings.timm_options()
    if settings.erasing_after_mixing:
        options |= {"re_prob": 0.0, "normalize": False}
    transform = create_transform(is_training=True, **options)
    _replace_posterize(transform)
    if settings.crop == "padded":
        # timm has no padded crop; this replaces its first step, the random resized crop.
        height, width = preprocessing.input_size[1:]
        transform.transforms[0] = Compose(
            [
                Resize((height, width), str_to_interp_mode(preprocessing.interpolation)),
                RandomCrop((height, width), padding=(width // 8, height // 8)),
            ]
        )
    return transform


def create_batch_transform(
    preprocessing: Preprocessing, augmentation: AugmentationName | Augmentation
) -> Callable[[Tensor], Tensor] | None:
    """Create the normalization and random erasing of a batch after Mixup and CutMix.

    The transform, or `None` without that setting, maps uint8 images (N, 3, H, W) to float32.

    Args:
        preprocessing: statistics of the model.
        augmentation: see `create_train_transform`.
    """
    if not isinstance(augmentation, Augmentation) or not augmentation.erasing_after_mixing:
        return None

    normalize = create_batch_normalization(preprocessing)

    def finish(images: Tensor) -> Tensor:
        erase = RandomErasing(
            augmentation.erasing,
            mode=augmentation.erasing_mode,
            max_count=augmentation.erasing_count,
            device=images.device,
        )
        return erase(normalize(images))

    return finish


def create_batch_normalization(preprocessing: Preprocessing) -> Callable[[Tensor], Tensor]:
    """Create the normalization of a batch: values from 0 to 255 (N, 3, H, W) to float32, on any device."""
    # Like timm's loader: statistics in units of the 8-bit values. A copy per device, because a copy for every
    # batch would wait for the device.
    host = 255 * torch.tensor([preprocessing.mean, preprocessing.std], dtype=torch.float64)
    statistics: dict[torch.device, Tensor] = {}

    def normalize(images: Tensor) -> Tensor:
        if images.device not in statistics:
            statistics[images.device] = host.to(images.device, torch.float32)[..., None, None]
        mean, std = statistics[images.device]
        return (images.to(torch.float32) - mean).div_(std)

    return normalize


def resolve_augmentation(augmentation: AugmentationName | Augmentation) -> Augmentation:
    """Return the settings of a preset other than "none", or the given settings after checking them.

    Raises:
        UsageError: an unknown name, or a setting out of range.
    """
    if isinstance(augmentation, Augmentation):
        augmentation.check()
        return augmentation
    if augmentation not in PRESETS:
        raise UsageError(f"expected an augmentation among {', '.join(AUGMENTATIONS)}, got {augmentation!r}")
    return PRESETS[augmentation]


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Posterize: keep the highest bits of every channel; 0 bits give a black image.

    `rand-m9-mstd0.5-inc1` draws 0 bits where the magnitude reaches 10, for about one posterized image in 44.
    The Pillow versions of the published runs returned a black image; newer ones raise an error.
    """
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def _replace_posterize(transform: Any) -> None:
    """Replace the posterize function in the policies of a timm transform by `posterize`, in place."""
    for step in transform.transforms:
        for operation in _policy_operations(step):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = posterize


def _policy_operations(step: Any) -> Iterator[AugmentOp]:
    if isinstance(step, AutoAugment):
        yield from (operation for policy in step.policy for operation in policy)
    # RandAugment and AugMix.
    yield from getattr(step, "ops", ())


def _check_policy(name: str | None) -> None:
    """Raise for a policy that timm rejects, and for settings that timm would ignore."""
    problem = ""
    try:
        create_transform(32, is_training=True, auto_augment=name)
    # timm fails an assertion, or parses a part of the name as a number.
    except (AssertionError, ValueError) as error:
        problem = f": {error}"
    settings = (name or "").split("-")[1:]
    if problem or not all(re.fullmatch(r"[a-z]+\d[\d.]*", setting) for setting in settings):
        raise UsageError(
            "expected a policy of timm, such as rand-m9-mstd0.5-inc1 or 3a, as auto_augment, got "
            f"{name!r}{problem}"
        )


def _common_options(preprocessing: Preprocessing) -> dict[str, Any]:
    if preprocessing.input_size[0] != 3:
        raise UsageError(
            f"expected a model with 3 input channels, as images are RGB, got {preprocessing.input_size[0]}"
        )
    return asdict(preprocessing)
