"""Class probabilities of whole images: at once, through a sliding window, at several sizes and mirrored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightspine.errors import UsageError

Network = Callable[[Tensor], Tensor]
"""(B, 3, H, W), normalised, to logits (B, classes, H, W)."""


@dataclass(frozen=True, kw_only=True)
class SlidingWindowInference:
    """How a segmenter looks at an image outside training.

    Attributes:
        window: height and width in pixels of a window that slides over larger images; `None` takes the whole
            image at once.
        stride: of the window in pixels, down and across.
        ratios: factors of the image's size whose probabilities are averaged; 0.5 to 1.75 in steps of 0.25 are
            the published multi-scale test.
        flip: average over the mirrored image too.
    """

    window: tuple[int, int] | None = None
    stride: tuple[int, int] = (341, 341)
    ratios: tuple[float, ...] = (1.0,)
    flip: bool = False

    def check(self) -> None:
        """Refuse a value out of its range.

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
        """Return the probabilities of the classes for one image.

        Args:
            network: the segmenter, in evaluation mode.
            image: (3, H, W), normalised.
            size: height and width of the result, in pixels.

        Returns:
            (classes, *size), float32.

        Raises:
            UsageError: see `check`.
        """
        self.check()
        views = self._views(network, image, size)
        # Added up as they come: twelve views of 150 classes would take gigabytes.
        total = next(views).softmax(0)
        for logits in views:
            total += logits.softmax(0)
        return total / (len(self.ratios) * (2 if self.flip else 1))

    def classify(self, network: Network, image: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the likeliest class of every pixel, (*size), int64; see `predict`."""
        self.check()
        if len(self.ratios) == 1 and not self.flip:
            # The largest logit is the largest probability: no pass over all classes for the softmax.
            return next(self._views(network, image, size)).argmax(0)
        return self.predict(network, image, size).argmax(0)

    def _views(self, network: Network, image: Tensor, size: tuple[int, int]) -> Iterator[Tensor]:
        """Give the logits (classes, *size) of the image at each size and mirrored."""
        for ratio in self.ratios:
            resized = image[None]
            if ratio != 1:
                sides = [max(int(side * ratio + 0.5), 1) for side in image.shape[1:]]
                resized = F.interpolate(resized, sides, mode="bilinear", align_corners=False)
            for mirrored in (False, True) if self.flip else (False,):
                logits = self._logits(network, resized.flip(3) if mirrored else resized)
                yield F.interpolate(
                    logits.flip(3) if mirrored else logits, size, mode="bilinear", align_corners=False
                )[0]

    def _logits(self, network: Network, images: Tensor) -> Tensor:
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

    The last of a row or column is moved back to end at the border; a window is cut where it is larger than
    the image.

    Args:
        size: height and width of the image.
        window: height and width of a window.
        stride: steps down and across, at most the window's sides.
    """
    spans = []
    for side, length, step in zip(size, window, stride, strict=True):
        count = -(-max(side - length, 0) // step) + 1
        ends = [min(number * step + length, side) for number in range(count)]
        spans.append([(max(end - length, 0), end) for end in ends])
    return [(top, bottom, left, right) for top, bottom in spans[0] for left, right in spans[1]]
