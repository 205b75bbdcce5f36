"""What happens to a training image, field by field, as the published recipes name it."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from timm.data import create_transform

from lightspine.errors import UsageError

AugmentationName = Literal["none", "light", "medium", "strong"]
AUGMENTATIONS: tuple[AugmentationName, ...] = get_args(AugmentationName)

TrainInterpolation = Literal["bicubic", "bilinear", "random"]
ErasingMode = Literal["pixel", "rand", "const"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The random transform of a training image; carried out by timm.

    In this order: crop, flip, one of RandAugment / AutoAugment / 3-augment, colour jitter, normalisation,
    random erasing. The defaults are the recipe of DeiT, which the published models follow with few changes.

    Attributes:
        crop: "resized" (a random part, scaled to the input's size) or "padded" (for images that have about
            the input's size, such as CIFAR's: resized to it, padded with black by an eighth of the side,
            cropped at a random place).
        scale: smallest and largest share of the image's area that a resized crop takes.
        ratio: smallest and largest width / height of a resized crop, before it is scaled.
        interpolation: filter of a resized crop; "random" draws bilinear or bicubic for every image; the
            preprocessing's own without it.
        hflip: probability of a horizontal flip.
        auto_augment: timm's name of a policy: "rand-m9-mstd0.5-inc1" is RandAugment of the published recipes,
            "3a" is DeiT III's 3-augment (solarise, grey or blur), None is off.
        color_jitter: strength of random brightness, contrast and saturation; 0 is off. As in timm it is left
            out where `auto_augment` is on, except with "3a".
        erasing: probability that rectangles are erased.
        erasing_mode: what fills them: "pixel" (noise per pixel), "rand" (one random colour) or "const" (the
            mean colour).
        erasing_count: largest number of rectangles per image.
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

    def check(self) -> None:
        """Refuse a value out of its range.

        Not done at construction: the parser of recipes would take the error for a wrong type and bury it.

        Raises:
            UsageError: a value is out of its range.
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
        """Return the arguments of `timm.data.create_transform` that say the same."""
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


def find_augmentation(augmentation: AugmentationName | Augmentation) -> Augmentation:
    """Return the settings of a preset other than "none", or the given settings.

    Raises:
        UsageError: an unknown name, or a value out of its range.
    """
    if isinstance(augmentation, Augmentation):
        augmentation.check()
        return augmentation
    if augmentation not in PRESETS:
        raise UsageError(f"expected an augmentation among {', '.join(AUGMENTATIONS)}, got {augmentation!r}")
    return PRESETS[augmentation]


def _check_policy(name: str | None) -> None:
    """Refuse a policy that timm refuses, and settings that it would silently pass over."""
    problem = ""
    try:
        create_transform(32, is_training=True, auto_augment=name)
    # timm asserts, or takes a part of the name for a number.
    except (AssertionError, ValueError) as error:
        problem = f": {error}"
    settings = (name or "").split("-")[1:]
    if problem or not all(re.fullmatch(r"[a-z]+\d[\d.]*", setting) for setting in settings):
        raise UsageError(
            "expected a policy of timm, such as rand-m9-mstd0.5-inc1 or 3a, as auto_augment, got "
            f"{name!r}{problem}"
        )
