"""From a PIL image to the tensor that a model takes, with timm's transforms."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision.transforms import Compose, RandomCrop, Resize

from lightspine.data.augmentation import Augmentation, AugmentationName, find_augmentation
from lightspine.data.posterize import use_own_posterize
from lightspine.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes the input of a model; travels inside the checkpoint.

    Attributes:
        input_size: (channels, height, width) in pixels.
        mean: per channel, of values from 0 to 1.
        std: per channel, of values from 0 to 1.
        interpolation: Pillow's name of the resampling filter.
        crop_pct: side of the central crop as a share of the resized shorter side.
        crop_mode: timm's name of the way to crop: "center", "squash" (the ratio changes) or "border".
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, image_size: int | None = None) -> "Preprocessing":
        """Return the preprocessing that a timm pretrained cfg or a saved dictionary describes.

        Args:
            config: a mapping with any of the attributes' names; other keys are ignored.
            image_size: height and width in pixels instead of the configured ones.
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
        """Return the attributes as plain values that JSON can hold."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()
        }


def create_eval_transform(
    preprocessing: Preprocessing, *, normalize: bool = True
) -> Callable[[Image.Image], Tensor]:
    """Create the deterministic transform: resize, center crop, normalize to a float32 (3, H, W) tensor.

    Args:
        preprocessing: the size and statistics that the model takes.
        normalize: `False` returns the pixels as uint8 (3, H, W).
    """
    return create_transform(is_training=False, normalize=normalize, **_common_options(preprocessing))


def create_train_transform(
    preprocessing: Preprocessing, augmentation: AugmentationName | Augmentation = "medium"
) -> Callable[[Image.Image], Tensor]:
    """Return the random transform for training.

    Args:
        preprocessing: the size and statistics that the model takes.
        augmentation: "none" (resize and central crop), "light" (crops of at least 60 % of the image, flips),
            "medium" (at least 25 %, with colour jitter), "strong" (at least 8 %, RandAugment, erasing), or
            every setting by itself.

    Raises:
        UsageError: an unknown augmentation, or a value of it out of its range.
    """
    if augmentation == "none":
        return create_transform(is_training=True, no_aug=True, **_common_options(preprocessing))
    chosen = find_augmentation(augmentation)
    common = _common_options(preprocessing) | chosen.timm_options()
    transform = create_transform(is_training=True, **common)
    use_own_posterize(transform)
    if chosen.crop == "padded":
        # timm has no such crop: it takes the place of the first step, the random resized crop.
        height, width = preprocessing.input_size[1:]
        transform.transforms[0] = Compose(
            [
                Resize((height, width), str_to_interp_mode(preprocessing.interpolation)),
                RandomCrop((height, width), padding=(width // 8, height // 8)),
            ]
        )
    return transform


def _common_options(preprocessing: Preprocessing) -> dict[str, Any]:
    if preprocessing.input_size[0] != 3:
        raise UsageError(
            f"images are read as RGB, 3 channels, but the model takes {preprocessing.input_size[0]}"
        )
    return asdict(preprocessing)
