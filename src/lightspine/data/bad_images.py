"""How many images of an epoch could not be used, and when that is too many."""

from collections.abc import Iterable

from lightspine.data.batch import BadImage
from lightspine.errors import LightspineError, UsageError

MIN_BAD_IMAGES = 10
"""Fewer bad images than this never stop a run, however small the data set is."""

_NAMED = 3


class BadImageCounter:
    """Counts the images that were skipped and stops when they are too large a share of the epoch.

    Args:
        max_share: largest share of the epoch's images, from 0 to 1.

    Raises:
        UsageError: a share outside 0 to 1.
    """

    def __init__(self, max_share: float) -> None:
        if not 0 <= max_share <= 1:
            raise UsageError(f"expected a max_bad_share from 0 to 1, got {max_share}")
        self.max_share = max_share
        self.total = 0
        self.bad: dict[str, str] = {}

    def start(self, total: int) -> None:
        """Begin an epoch of `total` different images."""
        self.total = total
        self.bad = {}

    def add(self, bad: Iterable[BadImage]) -> None:
        """Count skipped images; one that is met again counts once.

        Raises:
            LightspineError: more than `max_share` of the epoch's images, and at least 10, are bad.
        """
        self.bad.update((image.path, image.reason) for image in bad)
        if len(self.bad) >= MIN_BAD_IMAGES and len(self.bad) > self.max_share * self.total:
            first = "; ".join(list(self.bad.values())[:_NAMED])
            raise LightspineError(
                f"{len(self.bad)} of {self.total} images ({len(self.bad) / self.total:.1%}) cannot be used, "
                f"more than max_bad_share={self.max_share:g} allows; the first are: {first}"
            )
