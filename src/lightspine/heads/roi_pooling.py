"""RoIAlign over the levels of a pyramid, with the strides told instead of guessed."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align


class RoIPooler(MultiScaleRoIAlign):
    """Crop boxes from the level that suits their size (equation 1 of the FPN paper).

    Unlike torchvision's it is given the strides (which torchvision guesses from the first batch it sees, and
    keeps), and samples as the published detectors do: pixel centres at half integers, as many samples per
    bin as it has pixels.

    Args:
        strides: strides of the levels to crop from; the maps are found by them.
        output_size: side of the crops.

    Shape:
        Maps `{str(stride): (B, C, H, W)}` and boxes `(N_i, 4)` in pixels of the image, for each image; output
        `(sum of N_i, C, output_size, output_size)`.
    """

    def __init__(self, strides: Sequence[int], output_size: int):
        super().__init__([str(stride) for stride in strides], output_size, sampling_ratio=0)
        self.strides = tuple(strides)

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Crop; `image_shapes` is not needed, it is torchvision's."""
        del image_shapes
        maps = [x[name] for name in self.featmap_names]
        which = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
        rois = torch.cat([which, torch.cat(boxes)], dim=1)
        levels = self._levels(rois)
        crops = maps[0].new_zeros((len(rois), maps[0].shape[1], *self.output_size))
        for level, (feature, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(levels == level)[0]
            cropped = roi_align(
                feature, rois[chosen], self.output_size, 1 / stride, sampling_ratio=0, aligned=True
            )
            # Under autocast the crops may come in another precision than the maps.
            crops[chosen] = cropped.to(crops.dtype)
        return crops

    def _levels(self, rois: Tensor) -> Tensor:
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        # A box of 56 to 112 px belongs to stride 4, of 112 to 224 to stride 8...
        level = torch.floor(torch.log2(side / (14 * self.strides[0]) + 1e-6))
        return level.clamp(0, len(self.strides) - 1).long()
