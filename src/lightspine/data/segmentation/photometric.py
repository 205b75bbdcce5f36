"""Random brightness, contrast, saturation and hue as the published segmenters are trained."""

from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class PhotometricDistortion(v2.Transform):
    """SSD's photometric distortion (Liu et al., arXiv:1512.02325) as the ADE20K recipes have it.

    Each with probability 0.5: a number from -32 to 32 is added; values are multiplied by 0.5 to 1.5, before
    or after the colours change; the saturation of HSV is multiplied by 0.5 to 1.5; the hue is turned by up
    to 36 degrees. torchvision's RandomPhotometricDistort multiplies the brightness, mixes with grey and
    exchanges channels instead.
    """

    _transformed_types = (tv_tensors.Image,)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:  # noqa: ARG002  # torchvision's signature
        """Draw what happens; 0 or 1 where nothing does."""
        return {
            "brightness": _draw(-32, 32, 0),
            "contrast": _draw(0.5, 1.5, 1),
            "contrast_first": bool(torch.rand(()) < 0.5),
            "saturation": _draw(0.5, 1.5, 1),
            "hue": _draw(-0.1, 0.1, 0),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change an image, uint8 (3, H, W)."""
        image = inpt.as_subclass(Tensor).float()
        if params["brightness"]:
            image = _rounded(image + params["brightness"])
        if params["contrast"] != 1 and params["contrast_first"]:
            image = _rounded(image * params["contrast"])
        if params["saturation"] != 1:
            image = _rounded(_saturate(image, params["saturation"]))
        if params["hue"]:
            image = F.adjust_hue(image.to(torch.uint8), params["hue"]).float()
        if params["contrast"] != 1 and not params["contrast_first"]:
            image = _rounded(image * params["contrast"])
        return tv_tensors.wrap(image.to(torch.uint8), like=inpt)


def _saturate(image: Tensor, factor: float) -> Tensor:
    """Multiply the saturation (max - min) / max of HSV, at most to 1; value and hue stay."""
    largest, smallest = image.amax(dim=0), image.amin(dim=0)
    bound = largest / (largest - smallest).clamp(min=1)
    return largest - (largest - image) * bound.clamp(max=factor)


def _rounded(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255)


def _draw(least: float, most: float, otherwise: float) -> float:
    chosen, share = torch.rand(2).tolist()
    return least + share * (most - least) if chosen < 0.5 else otherwise
