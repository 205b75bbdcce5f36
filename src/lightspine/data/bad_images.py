"""Unreadable images: skip or replace them, log the reasons, and stop if there are too many."""

import logging
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

from torch.utils.data import Dataset

from lightspine.errors import LightspineError, UsageError

MIN_BAD_IMAGES = 10
"""Fewer unreadable images than this never stop a run, however small the dataset is."""

_NAMED_IN_ERROR = 3
_NAMED_IN_LOG = 5

ItemT = TypeVar("ItemT")


class BadImage(NamedTuple):
    """Path of a skipped image and the reason."""

    path: str
    reason: str


class BadImageLog:
    """Log of unreadable images, with a limit on their share of an epoch.

    Args:
        max_share: largest fraction of an epoch's images that may be bad, from 0 to 1; `None`: no limit.

    Attributes:
        reasons: path -> reason of every bad image so far.
        epoch_reasons: the same since the last `start_epoch`.

    Raises:
        UsageError: a share outside 0 to 1.
    """

    def __init__(self, max_share: float | None = None) -> None:
        if max_share is not None and not 0 <= max_share <= 1:
            raise UsageError(f"expected a max_bad_share from 0 to 1, got {max_share}")
        self.max_share = max_share
        self.reasons: dict[str, str] = {}
        self.epoch_reasons: dict[str, str] = {}
        self._epoch_images = 0
        self._reported = 0

    def start_epoch(self, images: int) -> None:
        """Start an epoch of `images` distinct images."""
        self._epoch_images = images
        self.epoch_reasons = {}

    def add(self, bad: Iterable[BadImage]) -> None:
        """Add skipped images; each path is counted once.

        Raises:
            LightspineError: more than `max_share` of the images of the epoch, and at least 10, are bad.
        """
        for image in bad:
            self.reasons[image.path] = self.epoch_reasons[image.path] = image.reason
        count = len(self.epoch_reasons)
        if self.max_share is None or count < MIN_BAD_IMAGES or count <= self.max_share * self._epoch_images:
            return
        first = "; ".join(list(self.epoch_reasons.values())[:_NAMED_IN_ERROR])
        raise LightspineError(
            f"{count} of {self._epoch_images} images ({count / self._epoch_images:.1%}) cannot be used, "
            f"more than max_bad_share={self.max_share:g} allows; the first are: {first}"
        )

    def report(self, logger: logging.Logger) -> None:
        """Log a warning that lists the bad images if there are new ones since the last call."""
        if len(self.reasons) == self._reported:
            return
        self._reported = len(self.reasons)
        reasons = list(self.reasons.values())
        more = f"; and {len(reasons) - _NAMED_IN_LOG} more" if len(reasons) > _NAMED_IN_LOG else ""
        images = "1 image" if len(reasons) == 1 else f"{len(reasons)} images"
        logger.warning("skipped %s: %s%s", images, "; ".join(reasons[:_NAMED_IN_LOG]), more)


class BadImageTolerantDataset(Dataset[ItemT], Generic[ItemT]):
    """Base class of map-style datasets whose items report unreadable images instead of raising.

    Args:
        replace_bad: replace a bad image by the next readable one, so that training batches keep their size.
            Otherwise the item has no image, so that an evaluation counts no image twice.
    """

    def __init__(self, *, replace_bad: bool = False) -> None:
        self.replace_bad = replace_bad
        # Bad images found by this process, so that none is read twice.
        self._known_bad: dict[int, BadImage] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image_name(self, position: int) -> str:
        """Return the name of an image for messages, such as its path."""

    @abstractmethod
    def read(self, position: int) -> Any:
        """Read an image with its labels.

        Raises:
            LightspineError: it cannot be used.
        """

    @abstractmethod
    def make_item(self, position: int, content: Any, bad: tuple[BadImage, ...]) -> ItemT:
        """Create an item from the result of `read`; `content` is `None` if no image could be read."""

    def __getitem__(self, index: int) -> ItemT:
        # A `for` loop over the dataset stops at an IndexError.
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        bad: list[BadImage] = []
        for offset in range(len(self) if self.replace_bad else 1):
            position = (index + offset) % len(self)
            if position not in self._known_bad:
                try:
                    content = self.read(position)
                except LightspineError as error:
                    self._known_bad[position] = BadImage(self.image_name(position), str(error))
                else:
                    return self.make_item(position, content, tuple(bad))
            bad.append(self._known_bad[position])
        return self.make_item(index, None, tuple(bad))
