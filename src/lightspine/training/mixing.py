"""Mixup and CutMix of whole batches, independent of the installed timm version.

Sources: Zhang et al., "mixup: Beyond empirical risk minimization", ICLR 2018, arXiv:1710.09412; Yun et al.,
"CutMix", ICCV 2019, arXiv:1905.04899. The details are those of timm 0.4.12 to 0.6.13, with which the
published models were trained. Later versions of timm draw larger CutMix boxes.
"""

import numpy as np
import torch
from torch import Tensor

Box = tuple[slice, slice]


class Mixup:
    """Mixup or CutMix: mixes image i of a batch of N with image N - 1 - i.

    The random numbers come from NumPy's global generator.

    Args:
        mixup: alpha of mixup; 0 disables it.
        cutmix: alpha of CutMix; 0 disables it.
        prob: probability of mixing a batch.
        cutmix_prob: probability of CutMix for a mixed batch if both are enabled.
        label_smoothing: label smoothing of the targets.
        num_classes: number of classes.
    """

    def __init__(
        self,
        mixup: float,
        cutmix: float,
        *,
        prob: float = 1.0,
        cutmix_prob: float = 0.5,
        label_smoothing: float = 0.0,
        num_classes: int,
    ) -> None:
        self.mixup = mixup
        self.cutmix = cutmix
        self.prob = prob
        self.cutmix_prob = cutmix_prob
        self.label_smoothing = label_smoothing
        self.num_classes = num_classes

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed images and their class probabilities.

        Args:
            images: (N, C, H, W), floating point or uint8. Mixed uint8 images are rounded to integers.
            labels: class indices (N,).

        Returns:
            Images (N, C, H, W) in the type of the input, and targets (N, num_classes).
        """
        share, box = self._draw(images.shape[-2:])
        if box is not None:
            images = images.clone()
            images[..., *box] = images.flip(0)[..., *box]
        elif share != 1.0:
            images = _blend(images, share)
        return images, self._targets(labels, share)

    def _draw(self, size: torch.Size) -> tuple[float, Box | None]:
        """Return the share of the first image, and the CutMix box of the other or None for mixup."""
        if np.random.rand() >= self.prob:
            return 1.0, None
        both = self.mixup > 0 and self.cutmix > 0
        cuts = bool(np.random.rand() < self.cutmix_prob) if both else self.cutmix > 0
        alpha = self.cutmix if cuts else self.mixup
        share = float(np.random.beta(alpha, alpha))
        if not cuts or share == 1.0:
            return share, None
        height, width = size
        box = cutmix_box(height, width, share)
        area = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
        # The border of the image may cut the box off.
        return 1.0 - area / float(height * width), box

    def _targets(self, labels: Tensor, share: float) -> Tensor:
        low = self.label_smoothing / self.num_classes
        targets = torch.full((len(labels), self.num_classes), low, device=labels.device)
        targets.scatter_(1, labels[:, None], 1.0 - self.label_smoothing + low)
        return targets * share + targets.flip(0) * (1.0 - share)


def cutmix_box(height: int, width: int, share: float) -> Box:
    """Draw a CutMix box at a random center, clipped to the image.

    A side of odd length s is cut to s - 1 pixels, because both halves are rounded down.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        share: share of the image that stays, before clipping, from 0 to 1.

    Returns:
        The rows and the columns of the box.
    """
    ratio = np.sqrt(1 - share)
    halves = [int(side * ratio) // 2 for side in (height, width)]
    centers = [int(np.random.randint(0, side)) for side in (height, width)]
    rows, columns = (
        slice(max(center - half, 0), min(center + half, side))
        for center, half, side in zip(centers, halves, (height, width), strict=True)
    )
    return rows, columns


def _blend(images: Tensor, share: float) -> Tensor:
    wide = images if images.is_floating_point() else images.float()
    mixed = wide * share + wide.flip(0) * (1.0 - share)
    return mixed if images.is_floating_point() else mixed.round_().to(images.dtype)
