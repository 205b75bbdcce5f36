"""Anchors of fixed strides."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class StridedAnchors(AnchorGenerator):
    """Anchors of given strides and exact sizes.

    torchvision infers the strides from the sizes of the maps, which is wrong where a map's size was rounded
    (800 px at stride 64 are 13 pixels: 61), and rounds the anchors' corners, which the published detectors
    do not.

    Args:
        strides: stride of each level, in pixels of the image.
        scales: sides of the square anchors, in strides.
        aspect_ratios: height over width; the area stays.
    """

    def __init__(
        self,
        strides: Sequence[int],
        scales: Sequence[float],
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ):
        self.strides = tuple(strides)
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(aspect_ratios),) * len(sizes))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (torchvision's signature)
    ) -> Tensor:
        """Return one level's anchors (x1, y1, x2, y2) around the origin, the scales of a ratio together."""
        sides = torch.tensor(scales, dtype=dtype, device=device)
        roots = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths = (sides[None, :] / roots[:, None]).flatten()
        heights = (sides[None, :] * roots[:, None]).flatten()
        return torch.stack((-widths, -heights, widths, heights), dim=1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors of all levels, (N, 4) for each image."""
        device = feature_maps[0].device
        # In float32 though the maps be in half precision, which cannot hold pixel coordinates.
        self.set_cell_anchors(torch.float32, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        levels = self.grid_anchors([list(x.shape[-2:]) for x in feature_maps], strides)
        anchors = torch.cat(levels)
        return [anchors for _ in image_list.image_sizes]
