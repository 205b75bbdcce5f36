"""Sliding-window and multi-scale inference for semantic segmentation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError

Network = Callable[[Tensor], Tensor]
"""Maps normalized images (B, 3, H, W) to logits (B, classes, H, W)."""


@dataclass(frozen=True, kw_only=True)
class SlidingWindowInference:
    """Whole-image or sliding-window inference, with multi-scale and flip test-time augmentation.

    Attributes:
        window: height and width of the sliding window in pixels; `None` processes the whole image at once.
        stride: vertical and horizontal stride of the window in pixels.
        ratios: scales of the image whose probabilities are averaged; 0.5 to 1.75 in steps of 0.25 is the
            published multi-scale test.
        flip: also average over the horizontally flipped image.
    """

    window: tuple[int, int] | None = None
    stride: tuple[int, int] = (341, 341)
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False

    def check(self) -> None:
        """Check that all values are in range.

        Raises:
            UsageError: a window, stride or ratio that is not above 0, a stride larger than the window.
        """
        if not self.ratios or min(self.ratios) <= 0:
            raise UsageError(f"expected ratios above 0, got {list(self.ratios)}")
        if self.window is not None:
            for side, step in zip(self.window, self.stride, strict=True):
                if not 1 <= step <= side:
                    raise UsageError(
                        f"expected a stride from 1 px to the window's side, got {list(self.stride)} for "
                        f"{list(self.window)}"
                    )

    def predict(self, network: Network, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the class probabilities of one image.

        Args:
            network: segmentation network in evaluation mode.
            image: (3, H, W), normalized.
            size: height and width of the result in pixels.

        Returns:
            (classes, *size), float32.

        Raises:
            UsageError: see `check`.
        """
        self.check()
        views = self._augmented_logits(network, image, size)
        # Accumulated one by one, because 12 views of 150 classes would take gigabytes.
        total = next(views).softmax(0)
        for logits in views:
            total += logits.softmax(0)
        return total / (len(self.ratios) * (2 if self.flip else 1))

    def classify(self, network: Network, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the predicted class of every pixel, (*size), int64; see `predict`."""
        self.check()
        if len(self.ratios) == 1 and not self.flip:
            # The argmax of the logits is that of the probabilities.
            return next(self._augmented_logits(network, image, size)).argmax(0)
        return self.predict(network, image, size).argmax(0)

    def _augmented_logits(self, network: Network, image: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """Yield the logits (classes, *size) of the image at each scale, also flipped."""
        for ratio in self.ratios:
            resized = image[None]
            if ratio != 1:
                sides = [max(int(side * ratio + 0.5), 1) for side in image.shape[1:]]
                resized = F.interpolate(resized, sides, mode="bilinear", align_corners=False)
            for flipped in (False, True) if self.flip else (False,):
                logits = self._window_logits(network, resized.flip(3) if flipped else resized)
                yield F.interpolate(
                    logits.flip(3) if flipped else logits, size, mode="bilinear", align_corners=False
                )[0]

    def _window_logits(self, network: Network, images: Tensor) -> Tensor:
        if self.window is None:
            return network(images).float()
        height, width = images.shape[2:]
        total = torch.zeros(())
        seen = images.new_zeros(1, 1, height, width, dtype=torch.float32)
        for top, bottom, left, right in sliding_windows((height, width), self.window, self.stride):
            logits = network(images[:, :, top:bottom, left:right]).float()
            if not total.ndim:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[:, :, top:bottom, left:right] += logits
            seen[:, :, top:bottom, left:right] += 1
        return total / seen


def sliding_windows(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """Return the windows that cover an image, row by row: top, bottom, left, right in pixels.

    The last window of a row or column ends at the border of the image; windows larger than the image are
    cropped.

    Args:
        size: height and width of the image.
        window: height and width of a window.
        stride: vertical and horizontal stride, at most the sides of the window.
    """
    spans = []
    for side, length, step in zip(size, window, stride, strict=True):
        count = -(-max(side - length, 0) // step) + 1
        ends = [min(number * step + length, side) for number in range(count)]
        spans.append([(max(end - length, 0), end) for end in ends])
    return [(top, bottom, left, right) for top, bottom in spans[0] for left, right in spans[1]]
